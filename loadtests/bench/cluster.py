"""What HAProxy and Ray cost, and whether the fleet simulator predicts two replicas: `python -m loadtests.bench.cluster`.

1. Requests a second of a model that returns at once, one replica alone and `make cluster N=2`, in turns; the time
   that HAProxy adds to a request on one connection and on 32; the memory of all processes. With `--modes thread ray-2`
   Serve behind its HAProxy, with `ray-2-python` behind its own proxy, one of them at a time, as on_ray.py says.
2. Two replicas of a model that takes 20 ms, asked by strangers at four loads, beside what `fleet.simulate` says of it.
"""

import argparse
import contextlib
import os
import statistics
from collections.abc import Iterator
from typing import Any

from loadtests import arguments
from loadtests.bench.apps import SLEEP_S
from loadtests.bench.overhead import SERVER_CPU, measure
from loadtests.load import generator
from loadtests.modes import MODES, Server, start
from loadtests.plan import fleet
from loadtests.plan.planner import OVERHEAD_S, CostLaw, markdown
from loadtests.ray import cluster

LIMIT_S = 1.0
INSTANT = {"MODEL": "loadtests.bench.apps:Instant"}
SLEEPS = {"MODEL": "loadtests.bench.apps:Sleeps", "DEADLINE_S": f"{LIMIT_S:g}"}
LOADS = (0.5, 0.8, 0.95, 2.0)
RAY = {"ray-2": cluster.ray_env, "ray-2-python": lambda: {"RAY_worker_niceness": "0"}}


@contextlib.contextmanager
def started(name: str) -> Iterator[Server]:
    """A server of a no-op model in this mode."""
    if name not in RAY:
        with start(MODES[name], INSTANT) as server:
            yield server
    else:
        with cluster.nodes(env=RAY[name]()) as ray:
            ray.deploy(**INSTANT, REPLICAS="2")
            yield ray


def pin(server: Server, cpus: set[int]) -> None:
    """Let all its processes and threads share these cores."""
    for process in server.processes():
        for thread in process.threads():
            with contextlib.suppress(ProcessLookupError):
                os.sched_setaffinity(thread.id, cpus)


def price(servers: dict[str, Server], rounds: int, seconds: float) -> str:
    """A row a mode: the medians of rounds that take turns."""
    rates: dict[tuple[str, int], list[float]] = {}
    for _ in range(rounds):
        for name, server in servers.items():
            for users in (1, 32):
                rates.setdefault((name, users), []).append(measure(server, users, seconds))
    rows = []
    first = next(iter(servers))
    for name, server in servers.items():
        row: dict[str, Any] = {"mode": name}
        for users in (1, 32):
            mine, alone = rates[name, users], rates[first, users]
            row[f"/s, {users} connections"] = statistics.median(mine)
            added_ms = [1e3 * users * (1 / one - 1 / other) for one, other in zip(mine, alone, strict=True)]
            row[f"added ms, {users}"] = f"{statistics.median(added_ms):.2f}"
        rows.append(row | {"MB": server.memory_mb()})
    return markdown(rows)


def simulated(seconds: float) -> str:
    """A row a load: measured, and predicted from the model's own times and when the requests came."""
    rows = []
    with start(MODES["haproxy-2"], SLEEPS) as server, generator.generator() as locust:
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
            measured = generator.summary(df, LIMIT_S)
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
                row[told] = f"{measured[name]:.0f}, predicted {found[told]:.0f}{off}"
            rows.append(row)
    return markdown(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--modes", nargs="+", choices=[*MODES, *RAY], default=["thread", "haproxy-2"], metavar="MODE"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0, help="of each measurement of the price")
    parser.add_argument("--no-simulation", action="store_true", help="the price only")
    options = parser.parse_args()
    everywhere = os.sched_getaffinity(0)
    with contextlib.ExitStack() as stack:
        servers = {name: stack.enter_context(started(name)) for name in options.modes}
        for where, cpus in (
            ("on one core", {SERVER_CPU}),
            ("on all cores, the client's among them", everywhere),
        ):
            for server in servers.values():
                pin(server, cpus)
                server.wait_until_idle()
            print(f"{where}:\n\n{price(servers, options.rounds, options.seconds)}\n", flush=True)
    if not options.no_simulation:
        print(simulated(10 * options.seconds))


if __name__ == "__main__":
    arguments.run(main)
