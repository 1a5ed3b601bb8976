"""What a second core gives, and to what: threads of one instance, instances, replicas: `python -m loadtests.bench.scaling`.

    $ python -m loadtests.bench.scaling          # about 6 minutes on two idle cores
    $ python -m loadtests.bench.scaling --quick

Requests per second of the bundled model with BATCH_SIZE=32, short texts, in closed loops of 1, 8 and 64 users. They share the
last core with the server, which loses about a sixth of it.
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial

from loadtests import arguments
from loadtests.bench.overhead import SERVER_CPU, measure, side_by_side
from loadtests.modes import MODES, Mode, start
from loadtests.plan.planner import markdown

USERS = (1, 8, 64)
UVICORN = "uvicorn server:app --no-access-log"
FIRST, ALL = {SERVER_CPU}, None  # cores: the first, or those of this process
TWO = {"INSTANCES": "2"}
EACH = {**TWO, "TORCH_THREADS": "1"}
WAYS: dict[str, tuple[Mode, set[int] | None]] = {
    "one core": (Mode("one core", UVICORN), FIRST),
    "one core, two instances": (Mode("two on one core", UVICORN, TWO), FIRST),
    "two cores, one instance with two threads": (Mode("threads", UVICORN), ALL),
    "two cores, two instances in threads": (Mode("instances", UVICORN, TWO), ALL),
    "two cores, two instances with one thread each": (Mode("one thread each", UVICORN, EACH), ALL),
    "two cores, two instances in processes": (Mode("processes", UVICORN, {**TWO, "OFFLOAD": "process"}), ALL),
    "two cores, two replicas": (MODES["haproxy-2"], ALL),
}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one short round: shows that it runs")
    quick = parser.parse_args().quick
    rounds, duration_s = (1, 0.5) if quick else (4, 2.0)
    print(f"About {1 if quick else 6} minutes on two idle cores.", file=sys.stderr, flush=True)
    rows: dict[str, dict[str, str]] = {way: {"": way} for way in WAYS}
    with ExitStack() as stack:
        servers = {
            way: stack.enter_context(start(mode, {"BATCH_SIZE": "32"}, cpus=cpus))
            for way, (mode, cpus) in WAYS.items()
        }
        for users in USERS:
            measures: dict[str, Callable[[float], float]] = {
                way: partial(measure, server, users) for way, server in servers.items()
            }
            rates = side_by_side(measures, rounds, duration_s)
            one = statistics.median(rates["one core"])
            for way, found in rates.items():
                rate = statistics.median(found)
                rows[way][f"{users} users"] = f"{rate:.0f} ({rate / one:.2f})"
        for way, server in servers.items():
            rows[way]["MB"] = f"{server.memory_mb():.0f}"
    print(markdown(list(rows.values())))


if __name__ == "__main__":
    arguments.run(main)
