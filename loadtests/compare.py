"""Every deployment mode through the same scenarios: `make compare`, or a part of it:

    $ python -m loadtests.compare --modes thread batch sync-2 --repeats 1 --out /tmp/results

Modes take turns, `--repeats` rounds of them, so that a slow moment of the machine does not hit one mode alone. The
server (all its processes) is pinned to the first core, the load generator to the last; `--server-cores` gives it more.
Clients wait `LIMIT_S`, and the server is told so (DEADLINE_S). Loads are multiples of the capacity that the same start
of the server has just shown ("own"), or of what the planner predicts for one text at a time ("common").
"""

import argparse
import json
import math
import os
import random
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from tqdm import tqdm

from loadtests import drive, machine, planner, report
from loadtests.modes import MODES, Mode, Server, start
from workers.settings import Settings

LIMIT_S = 1.0
TIMEOUT_S = 1.5  # then the client hangs up: what a run leaves behind is gone 1.5 s later
MOST_PER_S = 1500.0  # more than this the generator's core can't send on time
HEALTH_PER_S = 20.0
SPIKE_X = 6.0  # of half the capacity
QUANTILES = (0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 1.0)


@dataclass(frozen=True)
class Scenario:
    """A run of load: `seconds` long, at `load` times the own or the common capacity."""

    name: str
    seconds: float
    load: float
    of: str = "own"
    kind: str = "open"
    health: bool = False


SCENARIOS = (
    Scenario("own 50 %", 2.5, 0.5),
    Scenario("own 80 %", 6.0, 0.8, health=True),
    Scenario("common 50 %", 2.0, 0.5, "common"),
    Scenario("common 80 %", 2.5, 0.8, "common"),
    Scenario("own 2 x", 2.5, 2.0, health=True),
    Scenario("own 10 x", 2.0, 10.0),
    Scenario("spike", 4.3, 0.5, kind="spike"),
)
WARM_UP_S, CAPACITY_S, SPIKE_S = 0.8, 3.0, 1.0
BESIDE_S = 10.0  # start, stop and drains of one visit


@dataclass
class Comparison:
    """What is the same for every visit of a server, and the rows found so far."""

    scenarios: list[Scenario]
    server_cpus: set[int]
    locust: drive.Generator
    common_per_s: float
    device: str
    scale: float  # of the durations
    rows: list[dict[str, Any]] = field(default_factory=list)

    def visit(self, mode: Mode, repeat: int) -> None:
        """Start the server in this mode, run every scenario, stop it."""

        def note(scenario: str, **values: float) -> None:
            for metric, value in values.items():
                self.rows.append(
                    {
                        "mode": mode.name,
                        "repeat": repeat,
                        "scenario": scenario,
                        "metric": metric,
                        "value": value,
                    }
                )

        env = {"DEADLINE_S": f"{LIMIT_S:g}", "DEVICE": self.device}
        began = time.monotonic()
        with start(mode, env, cpus=self.server_cpus, wait=False) as server:
            server.wait_until_ready(60)
            ask_until_answered(server.url)
            note("start", first_answer_s=time.monotonic() - began)
            settle(server)
            self.load(server, "closed", users=16, duration_s=WARM_UP_S * self.scale)
            capacity = self.capacity(server, note, repeat)
            for scenario in self.scenarios:
                per_s = capacity if scenario.of == "own" else self.common_per_s
                self.open_loop(
                    server, scenario, max(1.0, min(scenario.load * per_s, MOST_PER_S)), note, repeat
                )
            note("start", copies=count_copies(server))
        note("start", visit_s=time.monotonic() - began)

    def load(self, server: Server, kind: str, **options: Any) -> pd.DataFrame:
        """Put load on the server."""
        return self.locust.run(server.url, kind, **{"limit_s": LIMIT_S, "timeout_s": TIMEOUT_S} | options)

    def capacity(self, server: Server, note: Callable[..., None], repeat: int) -> float:
        """Saturate it: requests a second, processor time, memory."""
        seconds, skip_s = CAPACITY_S * self.scale, 0.4
        cpu_s = server.cpu_s()
        df = self.load(
            server,
            "closed",
            users=drive.CAPACITY_USERS,
            duration_s=seconds + skip_s,
            seed=repeat,
            limit_s=10.0,
            timeout_s=10.0,
        )
        cpu_s = server.cpu_s() - cpu_s
        capacity = drive.throughput_per_s(df, skip_s)
        if not capacity:
            raise RuntimeError(f"{server.mode.name} answered nothing:\n{server.log()[-2000:]}")
        answers = int((df["outcome"] == "200").sum())
        note(
            "capacity",
            per_s=capacity,
            cpu_s_per_1000=1000 * cpu_s / answers,
            memory_mb=server.memory_mb(),
            batch_size=float(df["batch_size"].mean()),
            **counts(df),
        )
        return capacity

    def open_loop(
        self, server: Server, scenario: Scenario, rate_per_s: float, note: Callable[..., None], repeat: int
    ) -> None:
        """Run one scenario and note what became of its requests."""
        options: dict[str, Any] = {"health_per_s": HEALTH_PER_S} if scenario.health else {}
        if scenario.kind == "spike":
            options |= {"spike_x": SPIKE_X, "spike_s": SPIKE_S}
        seconds = max(scenario.seconds * self.scale, 3 * SPIKE_S if scenario.kind == "spike" else 0.0)
        df = self.load(
            server, scenario.kind, rate_per_s=rate_per_s, duration_s=seconds, seed=1000 + repeat, **options
        )
        if scenario.kind == "spike":
            recovery = drive.recovery_s(df, LIMIT_S, SPIKE_S)
            note("spike", recovery_s=recovery, **counts(df))
            return
        found = drive.summary(df, LIMIT_S)
        model = df[df["kind"] == "model"]
        # For a client a refusal or a late answer is no better than the limit itself.
        felt_ms = model["latency_ms"].where(drive.good(model, LIMIT_S), LIMIT_S * 1000)
        note(
            scenario.name,
            **{k: float(v) for k, v in found.items() if k not in drive.OUTCOMES},
            **counts(df),
            **{f"q{q * 100:g}_ms": float(v) for q, v in felt_ms.quantile(list(QUANTILES)).items()},
        )
        if scenario.health:
            health = df[df["kind"] == "health"]
            note(scenario.name, health_p99_ms=float(health["latency_ms"].quantile(0.99)))


def counts(df: pd.DataFrame) -> dict[str, float]:
    """How many requests to the model had each outcome."""
    found = df[df["kind"] == "model"]["outcome"].value_counts()
    return {f"n_{outcome}": float(found.get(outcome, 0)) for outcome in drive.OUTCOMES if outcome != "left"}


def ask_until_answered(url: str, timeout_s: float = 30.0) -> None:
    """One request for the model; again while it is refused: /ready may be another worker's."""
    until = time.monotonic() + timeout_s
    while True:
        try:
            with urllib.request.urlopen(
                url, data=b"Paris is the [MASK] of France.", timeout=timeout_s
            ) as reply:
                reply.read()
                return
        except OSError:
            if time.monotonic() > until:
                raise
            time.sleep(0.02)


def settle(server: Server, timeout_s: float = 20.0, window_s: float = 0.25) -> None:
    """Wait until the server's processes are idle: one worker may answer while another is still loading."""
    until = time.monotonic() + timeout_s
    while time.monotonic() < until:
        before_s = server.cpu_s()
        time.sleep(window_s)
        if server.cpu_s() - before_s < 0.1 * window_s:
            return


def count_copies(server: Server) -> float:
    """How many times the model is in memory: each copy has logged that it serves, each sharer of one that it does."""
    served = [line for line in server.log().splitlines() if "Serving " in line]
    own = sum(not line.endswith(", shared") for line in served)
    return float(own or bool(served)) or math.nan


# --- the planner's prediction -----------------------------------------------------------------------------------------

# The modes that are one ModelLoop; on one core it does not matter where it computes.
PREDICTED = {
    "inline": {"batch_size": 1},
    "thread": {"batch_size": 1},
    "process": {"batch_size": 1},
    "batch": {"batch_size": 32},
    "inline-stock": {"batch_size": 1, "stock": True},
    "batch-stock": {"batch_size": 32, "stock": True},
    "gthread-1x8": {"batch_size": 4},  # the batch that runs and the one that gathers share 8 threads
    "asgi": {"batch_size": 1},
}


def predict(
    modes: list[str], cpus: set[int], device: str, budget_s: float
) -> tuple[list[dict[str, Any]], float]:
    """Rows like the measured ones (repeat -1), from the cost of the bare model; and the common capacity."""
    settings = Settings(DEVICE=device, TORCH_THREADS=0 if len(cpus) > 1 else 1)
    overhead_s = planner.measure_overhead(cpus, duration_s=min(2.0, budget_s))
    stock = {bool(PREDICTED[mode].get("stock")) for mode in modes if mode in PREDICTED} | {False}
    laws = {}
    for is_stock in sorted(stock):
        settings_of = Settings(**vars(settings) | {"FAST": not is_stock})
        laws[is_stock] = planner.fit(
            planner.measure_on(cpus, settings_of, kinds=["short"], budget_s=budget_s)
        )
    rows: list[dict[str, Any]] = [
        {
            "mode": f"cost law{' stock' * is_stock}",
            "repeat": -1,
            "scenario": "law",
            "metric": name,
            "value": value,
        }
        for is_stock, law in laws.items()
        for name, value in {**vars(law), "overhead_s": overhead_s}.items()
    ]
    for mode in modes:
        if mode not in PREDICTED:
            continue
        setting = planner.Setting(
            laws[bool(PREDICTED[mode].get("stock"))], overhead_s, int(PREDICTED[mode]["batch_size"])
        )
        found: dict[tuple[str, str], float] = {("capacity", "per_s"): setting.capacity_per_s}
        for scenario, load in (("own 50 %", 0.5), ("own 80 %", 0.8), ("own 2 x", 2.0)):
            summary = setting.summary(load * setting.capacity_per_s, LIMIT_S, 20.0)
            for metric in ("offered_per_s", "goodput_per_s", "p50_ms", "p99_ms"):
                found[scenario, metric] = float(summary[metric])
        rows += [
            {"mode": mode, "repeat": -1, "scenario": scenario, "metric": metric, "value": value}
            for (scenario, metric), value in found.items()
        ]
    return rows, planner.predict_capacity(laws[False], overhead_s=overhead_s)


# --- the run ----------------------------------------------------------------------------------------------------------


def order(modes: list[str], repeats: int) -> Iterator[tuple[str, int]]:
    """Each round visits every mode once, in an order of its own."""
    for repeat in range(repeats):
        yield from ((mode, repeat) for mode in random.Random(repeat).sample(modes, len(modes)))


def cores(server_cores: int) -> tuple[set[int], set[int]]:
    """The server's cores and the generator's: the first ones and the last one."""
    have = sorted(os.sched_getaffinity(0))
    return set(have[: max(1, min(server_cores, len(have) - 1))]), {have[-1]}


def predicted_minutes(visits: int, scenarios: list[Scenario], scale: float) -> float:
    """How long it will take."""
    loads_s = WARM_UP_S + CAPACITY_S + sum(scenario.seconds for scenario in scenarios)
    return (visits * (scale * loads_s + BESIDE_S) + 30) / 60


def main(argv: list[str] | None = None) -> int:
    """Run the comparison; return how many visits failed."""
    names = [scenario.name for scenario in SCENARIOS]
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--quick", action="store_true", help="short runs, once: shows that it works, measures little"
    )
    parser.add_argument(
        "--modes", nargs="+", choices=MODES, default=list(MODES), metavar="MODE", help=", ".join(MODES)
    )
    parser.add_argument(
        "--scenarios", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names)
    )
    parser.add_argument("--repeats", type=int, help="rounds; default 3, with --quick 1")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results", help="folder for the results"
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--server-cores", type=int, default=1, help="how many cores the server gets")
    parser.add_argument("--redraw", action="store_true", help="only make the table and pictures anew")
    options = parser.parse_args(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    if options.redraw:
        report.write(options.out)
        return 0

    scale = 0.2 if options.quick else 1.0
    scenarios = [scenario for scenario in SCENARIOS if scenario.name in options.scenarios]
    visits = list(order(options.modes, options.repeats or (1 if options.quick else 3)))
    server_cpus, client_cpus = cores(options.server_cores)
    pinning = f"server on core {sorted(server_cpus)}, load generator on core {sorted(client_cpus)}"
    if server_cpus & client_cpus:
        pinning += ", the same: latencies include the generator's own work"
    print(
        f"{len(visits)} visits, about {predicted_minutes(len(visits), scenarios, scale):.0f} minutes; {pinning}"
    )
    rows, common_per_s = predict(options.modes, server_cpus, options.device, 1.0 if options.quick else 6.0)
    about = machine.describe() | {
        "device": options.device,
        "pinning": pinning,
        "limit_s": LIMIT_S,
        "scale": scale,
    }
    about |= {"most_per_s": MOST_PER_S}
    about |= {"common_per_s": round(common_per_s, 1), "failed": []}
    with drive.generator(client_cpus) as locust:
        comparison = Comparison(scenarios, server_cpus, locust, common_per_s, options.device, scale, rows)
        for name, repeat in (progress := tqdm(visits, unit="visit", file=sys.stderr)):
            progress.set_description(f"round {repeat + 1}: {name}")
            try:
                comparison.visit(MODES[name], repeat)
            except (RuntimeError, OSError, KeyError) as exc:
                about["failed"].append(f"{name}, round {repeat + 1}")
                progress.write(f"{name} failed: {exc}")
            save(options.out, comparison.rows, about)
    report.write(options.out)
    print((options.out / "table.md").read_text())
    return len(about["failed"])


def save(out: Path, rows: list[dict[str, Any]], about: dict[str, Any]) -> None:
    """Write what there is after every visit: an interrupted run is not lost."""
    df = pd.DataFrame(rows)
    df["value"] = df["value"].map(lambda value: float(f"{value:.5g}") if np.isfinite(value) else value)
    df.to_csv(out / "measurements.csv", index=False)
    (out / "machine.json").write_text(json.dumps(about, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
