"""What HAProxy costs, and whether the fleet's twin foretells two replicas: `python -m loadtests.bench_cluster`.

1. Requests a second of a model that returns at once, one replica alone and `make cluster N=2`, in turns; the time
   that HAProxy adds to a request on one connection; the memory of all processes.
2. Two replicas of a model that takes 20 ms, asked by strangers at four loads, beside what `fleet.simulate` says of it.
"""

import argparse
import contextlib
import statistics
from typing import Any

from loadtests import drive, fleet
from loadtests.bench import SERVER_CPU, measure
from loadtests.bench_apps import SLEEP_S
from loadtests.modes import MODES, start
from loadtests.planner import OVERHEAD_S, CostLaw, markdown

LIMIT_S = 1.0
INSTANT = {"MODEL": "loadtests.bench_apps:Instant"}
SLEEPS = {"MODEL": "loadtests.bench_apps:Sleeps", "DEADLINE_S": f"{LIMIT_S:g}"}
LOADS = (0.5, 0.8, 0.95, 2.0)


def price(modes: list[str], rounds: int, seconds: float, cpus: set[int] | None) -> str:
    """A row a mode, whose processes share `cpus`: the medians of rounds that take turns."""
    with contextlib.ExitStack() as stack:
        servers = {name: stack.enter_context(start(MODES[name], INSTANT, cpus=cpus)) for name in modes}
        for server in servers.values():
            server.wait_until_idle()
        rates: dict[tuple[str, int], list[float]] = {}
        for _ in range(rounds):
            for name, server in servers.items():
                for users in (1, 32):
                    rates.setdefault((name, users), []).append(measure(server, users, seconds))
        rows = []
        for name, server in servers.items():
            one, many = (statistics.median(rates[name, users]) for users in (1, 32))
            added_ms = statistics.median(
                1e3 / mine - 1e3 / alone
                for mine, alone in zip(rates[name, 1], rates[modes[0], 1], strict=True)
            )
            rows.append(
                {
                    "mode": name,
                    "/s, 1 connection": one,
                    "/s, 32": many,
                    "added ms": f"{added_ms:.2f}",
                    "MB": server.memory_mb(),
                }
            )
    return markdown(rows)


def twin(seconds: float) -> str:
    """A row a load: measured, and foretold from the model's own times and when the requests came."""
    rows = []
    with start(MODES["haproxy-2"], SLEEPS) as server, drive.generator() as locust:
        server.wait_until_idle()
        for load in LOADS:
            df = locust.run(
                server.url,
                "open",
                rate_per_s=2 * load / SLEEP_S,
                duration_s=seconds,
                limit_s=LIMIT_S,
                timeout_s=5.0,
            )
            measured = drive.summary(df, LIMIT_S)
            calls_s = df["model_ms"].dropna() / 1e3
            cost = CostLaw(0.0, calls_s.mean(), {1: (calls_s / calls_s.mean()).tolist()})
            found = fleet.simulate(
                fleet.Fleet(cost, 2, overhead_s=OVERHEAD_S, deadline_s=LIMIT_S),
                arrivals_s=df["due_s"].tolist(),
                duration_s=seconds,
            ).summary()
            row: dict[str, Any] = {"load": f"{load:g}"}
            for name, told in (
                ("goodput_per_s", "goodput_per_s"),
                ("p50_ms", "p50_ms"),
                ("p99_ms", "p99_ms"),
                ("503", "refused"),
            ):
                off = f" ({found[told] / measured[name] - 1:+.0%})" if measured[name] else ""
                row[told] = f"{measured[name]:.0f}, foretold {found[told]:.0f}{off}"
            rows.append(row)
    return markdown(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--modes", nargs="+", choices=MODES, default=["thread", "haproxy-2"], metavar="MODE")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0, help="of each measurement of the price")
    parser.add_argument("--no-twin", action="store_true", help="the price only")
    options = parser.parse_args()
    for where, cpus in (("on one core", {SERVER_CPU}), ("on all cores, the client's among them", None)):
        print(f"{where}:\n\n{price(options.modes, options.rounds, options.seconds, cpus)}\n", flush=True)
    if not options.no_twin:
        print(twin(10 * options.seconds))


if __name__ == "__main__":
    main()
