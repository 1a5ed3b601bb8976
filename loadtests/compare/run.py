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
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from tqdm import tqdm

from loadtests import arguments, host
from loadtests.compare import report
from loadtests.load import generator, texts
from loadtests.modes import MODES, Mode, Server, start
from loadtests.plan import planner
from workers.settings import Settings

PARTS = Path(tempfile.gettempdir()) / "comparison"
LIMIT_S = 1.0
TIMEOUT_S = 1.5  # then the client hangs up
HEALTH_PER_S = 40.0
SPIKE_X = 6.0  # of half the capacity
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95, 0.99)


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
    Scenario("own 80 %", 10.0, 0.8, health=True),
    Scenario("common 50 %", 2.0, 0.5, "common"),
    Scenario("common 80 %", 2.5, 0.8, "common"),
    Scenario("own 2 x", 4.0, 2.0, health=True),
    Scenario("own 10 x", 4.0, 10.0),
    Scenario("spike", 6.0, 0.5, kind="spike"),
)
WARM_UP_S, CAPACITY_S, SPIKE_S, ALONE_S = 0.8, 5.0, 1.0, 2.0
BESIDE_S = 18.0  # start, stop and drains of one visit


@dataclass
class Comparison:
    """What is the same for every visit of a server, and the rows found so far."""

    server_cpus: set[int]
    locust: generator.Generator
    foresight: "Foresight"
    common_per_s: float
    device: str
    scale: float  # of the durations

    def visit(self, mode: Mode, repeat: int) -> list[tuple[Any, ...]]:
        """Start the server in this mode, run every scenario, each from idle, stop it; return the rows, see COLUMNS."""
        rows: list[tuple[Any, ...]] = []

        def note(scenario: str, **values: float) -> None:
            rows.extend((mode.name, repeat, scenario, metric, value) for metric, value in values.items())

        env = {"DEADLINE_S": f"{LIMIT_S:g}", "DEVICE": self.device}
        began = time.monotonic()
        with start(mode, env, cpus=self.server_cpus, wait=False) as server:
            server.wait_until_ready(60)
            ask_until_answered(
                server.url,
                next(texts.stream("short", random.Random(0), texts.example_of(self.foresight.settings))),
            )
            note("start", first_answer_s=time.monotonic() - began)
            server.wait_until_idle()
            self.load(server, "closed", users=16, duration_s=WARM_UP_S * self.scale)
            capacity = self.capacity(server, note, repeat)
            setting = self.foresight.setting(mode) if mode.name in PREDICTED else None
            if setting:
                alone = self.load(server, "closed", users=1, duration_s=ALONE_S * self.scale)
                setting = setting.slower(alone["model_ms"].mean() / 1000)
                cost = setting.cost
                note("cost law", a_s=cost.a_s, b_s=cost.b_s, spread=cost.spread, **setting.overhead._asdict())
                note("capacity", predicted_per_s=setting.capacity_per_s)
            for scenario in SCENARIOS:
                per_s = capacity if scenario.of == "own" else self.common_per_s
                rate_per_s = max(1.0, min(scenario.load * per_s, generator.MOST_PER_S))
                server.wait_until_idle()
                df = self.open_loop(server, scenario, rate_per_s, note, repeat)
                if setting and scenario.name in report.PREDICTED_SCENARIOS:
                    note(scenario.name, **predict(setting, df))
            note("start", instances=count_instances(server))
        note("start", visit_s=time.monotonic() - began)
        return rows

    def load(self, server: Server, kind: str, **options: Any) -> pd.DataFrame:
        """Put load on the server."""
        return self.locust.run(server.url, kind, **{"limit_s": LIMIT_S, "timeout_s": TIMEOUT_S} | options)

    def capacity(self, server: Server, note: Callable[..., None], repeat: int) -> float:
        """Saturate it: requests per second, processor time, memory."""
        seconds, skip_s = CAPACITY_S * self.scale, 0.4
        cpu_s = server.cpu_s()
        df = self.load(
            server,
            "closed",
            users=generator.CAPACITY_USERS,
            duration_s=seconds + skip_s,
            seed=repeat,
            limit_s=10.0,
            timeout_s=10.0,
        )
        cpu_s = server.cpu_s() - cpu_s
        capacity = generator.throughput_per_s(df, skip_s)
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
    ) -> pd.DataFrame:
        """Run one scenario and note what became of its requests; return those to the model."""
        options: dict[str, Any] = {"health_per_s": HEALTH_PER_S} if scenario.health else {}
        spike_s = SPIKE_S * self.scale
        if scenario.kind == "spike":
            options |= {"spike_x": SPIKE_X, "spike_s": spike_s}
        seconds = scenario.seconds * self.scale
        df = self.load(
            server, scenario.kind, rate_per_s=rate_per_s, duration_s=seconds, seed=1000 + repeat, **options
        )
        if scenario.kind == "spike":
            recovery = generator.recovery_s(df, LIMIT_S, spike_s)
            note("spike", recovery_s=recovery, **counts(df))
            return df
        found = generator.summary(df, LIMIT_S)
        model = df[df["kind"] == "model"]
        # For a client a rejection or a late answer is no better than the limit itself.
        felt_ms = model["latency_ms"].where(generator.good(model, LIMIT_S), LIMIT_S * 1000)
        note(
            scenario.name,
            **{k: float(v) for k, v in found.items() if k not in generator.OUTCOMES},
            **counts(df),
            **{f"q{q * 100:g}_ms": float(v) for q, v in felt_ms.quantile(list(QUANTILES)).items()},
        )
        if scenario.health:
            health = df[df["kind"] == "health"]
            note(scenario.name, health_p99_ms=float(health["latency_ms"].quantile(0.99)))
        return model


def counts(df: pd.DataFrame) -> dict[str, float]:
    """How many requests to the model had each outcome."""
    found = df[df["kind"] == "model"]["outcome"].value_counts()
    return {
        f"n_{outcome}": float(found.get(outcome, 0)) for outcome in generator.OUTCOMES if outcome != "left"
    }


def ask_until_answered(url: str, question: Any, timeout_s: float = 30.0) -> None:
    """One request for the model; again while it is refused: /ready may be another worker's."""
    until = time.monotonic() + timeout_s
    while True:
        try:
            headers = {"Content-Type": question.media_type}
            request = urllib.request.Request(url, question.body, headers)
            with urllib.request.urlopen(request, timeout=timeout_s) as reply:
                reply.read()
                return
        except OSError as exc:
            if time.monotonic() > until:
                raise
            if isinstance(exc, urllib.error.HTTPError):
                exc.close()
            time.sleep(0.02)


def count_instances(server: Server) -> float:
    """How many times the model is in memory: each instance has logged that it serves, each sharer of one that it does."""
    served = [line for line in server.log().splitlines() if "Serving " in line]
    own = sum(not line.endswith(", shared") for line in served)
    return float(own or bool(served)) or math.nan


# --- the planner's prediction -----------------------------------------------------------------------------------------

# The modes that are one ModelLoop, with its batch size; on one core it does not matter where it computes.
PREDICTED = {
    "inline": 1,
    "inline-stock": 1,
    "thread": 1,
    "process": 1,
    "asgi": 1,
    "batch": 32,
    "batch-stock": 32,
    "gthread-1x8": 4,  # the batch that runs and the one that gathers share 8 threads
}


@dataclass
class Foresight:
    """What the planner needs to know to predict a visit.

    It times the bare model on the server's core beside each visit: the machine's speed drifts by more than the planner
    errs. A single user tells how much slower a call is between requests, with other work in the caches.
    """

    measure: Callable[..., pd.DataFrame]  # see planner.measuring_on
    settings: Settings
    overheads: dict[str, planner.Overhead]
    budget_s: float

    def setting(self, mode: Mode) -> planner.Setting:
        """What the model costs now, and what a request of this mode costs besides."""
        settings = replace(self.settings, FAST=mode.env.get("FAST") != "0")
        batch_size = PREDICTED[mode.name]
        sizes = [size for size in planner.SIZES if size <= batch_size]
        df = self.measure(settings, kinds=["short"], sizes=sizes, budget_s=self.budget_s)
        return planner.Setting(planner.fit(df), self.overheads[mode.name], batch_size)


def predict(setting: planner.Setting, df: pd.DataFrame) -> dict[str, float]:
    """What becomes of the requests of a run: the planner is told when they came, and nothing else."""
    simulated = planner.simulate(
        setting.cost,
        batch_size=setting.batch_size,
        deadline_s=LIMIT_S,
        duration_s=df.attrs["duration_s"],
        arrivals_s=df["due_s"],
        **setting.overhead._asdict(),
    )
    found = generator.summary(simulated, LIMIT_S)
    return {f"predicted_{name}": float(found[name]) for name in ("goodput_per_s", "p50_ms", "p99_ms")}


# --- the run ----------------------------------------------------------------------------------------------------------


def order(modes: list[str], repeats: int) -> Iterator[tuple[str, int]]:
    """Each round visits every mode once, in an order of its own."""
    for repeat in range(repeats):
        yield from ((mode, repeat) for mode in random.Random(repeat).sample(modes, len(modes)))


def cores(server_cores: int) -> tuple[set[int], set[int]]:
    """The server's cores and the generator's: the first ones and the last one."""
    have = sorted(os.sched_getaffinity(0))
    return set(have[: max(1, min(server_cores, len(have) - 1))]), {have[-1]}


def predicted_minutes(visits: int, scale: float) -> float:
    """How long it will take."""
    loads_s = WARM_UP_S + ALONE_S + CAPACITY_S + sum(scenario.seconds for scenario in SCENARIOS)
    return (visits * (scale * loads_s + BESIDE_S) + 60) / 60


def main(argv: list[str] | None = None) -> int:
    """Run the comparison; return how many visits failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--quick", action="store_true", help="short runs, once: shows that it works, measures little"
    )
    parser.add_argument(
        "--modes", nargs="+", choices=MODES, default=list(MODES), metavar="MODE", help=", ".join(MODES)
    )
    parser.add_argument("--repeats", type=int, help="rounds; default 3, with --quick 1")
    parser.add_argument(
        "--out", type=Path, help=f"folder for the results; default: loadtests/results, of a part {PARTS}"
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--server-cores", type=int, default=1, help="how many cores the server gets")
    parser.add_argument("--redraw", action="store_true", help="only make the table and pictures again")
    options = parser.parse_args(argv)
    partial = options.quick or options.repeats or options.modes != list(MODES)
    # A part must not overwrite the whole.
    out = options.out or (PARTS if partial else Path(__file__).parents[1] / "results")
    if options.redraw:
        report.write(out)
        return 0
    out.mkdir(parents=True, exist_ok=True)

    scale = 0.2 if options.quick else 1.0
    visits = list(order(options.modes, options.repeats or (1 if options.quick else 3)))
    server_cpus, client_cpus = cores(options.server_cores)
    pinning = f"server on core {sorted(server_cpus)}, load generator on core {sorted(client_cpus)}"
    if server_cpus & client_cpus:
        pinning += ", the same: latencies include the generator's own work"
    print(f"{len(visits)} visits, about {predicted_minutes(len(visits), scale):.0f} minutes; {pinning}")
    settings = replace(Settings.read(), DEVICE=options.device, TORCH_THREADS=0 if len(server_cpus) > 1 else 1)
    about = host.describe() | {
        "model": settings.model_name,
        "device": options.device,
        "pinning": pinning,
        "limit_s": LIMIT_S,
        "timeout_s": TIMEOUT_S,
        "scale": scale,
        "most_per_s": generator.MOST_PER_S,
        "failed": [],
    }
    budget_s = 1.0 if options.quick else 4.0
    overheads = {
        name: planner.Overhead()
        if options.quick
        else planner.measure_overhead(server_cpus, budget_s, MODES[name])
        for name in PREDICTED
        if name in options.modes or name == "thread"
    }
    with planner.measuring_on(server_cpus) as measure, generator.generator(client_cpus) as locust:
        foresight = Foresight(measure, settings, overheads, budget_s)
        common_per_s = foresight.setting(MODES["thread"]).capacity_per_s
        about |= {"common_per_s": round(common_per_s, 1)}
        comparison = Comparison(server_cpus, locust, foresight, common_per_s, options.device, scale)
        rows: list[tuple[Any, ...]] = []
        try:
            for name, repeat in (progress := tqdm(visits, unit="visit", file=sys.stderr)):
                progress.set_description(f"round {repeat + 1}: {name}")
                try:
                    rows += comparison.visit(MODES[name], repeat)
                except (RuntimeError, OSError, KeyError) as exc:
                    about["failed"].append(f"{name}, round {repeat + 1}")
                    progress.write(f"{name} failed: {exc}")
                save(out, rows, about)
        except KeyboardInterrupt:  # the visits so far are kept
            if not rows:
                raise
            about["failed"].append("interrupted")
            save(out, rows, about)
    report.write(out)
    print((out / "table.md").read_text())
    print(f"This table and its pictures are in {out}.")
    return len(about["failed"])


COLUMNS = ("mode", "repeat", "scenario", "metric", "value")


def save(out: Path, rows: list[tuple[Any, ...]], about: dict[str, Any]) -> None:
    """Write what there is after every visit: an interrupted run is not lost."""
    df = pd.DataFrame(rows, columns=COLUMNS)
    df["value"] = df["value"].map(lambda value: float(f"{value:.5g}") if np.isfinite(value) else value)
    df.to_csv(out / "measurements.csv", index=False)
    (out / "machine.json").write_text(json.dumps(about, indent=2) + "\n")


if __name__ == "__main__":
    arguments.run(main)
