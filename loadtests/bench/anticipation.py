"""Requests per second with batches that are held where that pays, as a ratio of greedy batching, on real servers side by side.

    $ python -m loadtests.bench.anticipation          # about 12 minutes on two idle cores
    $ python -m loadtests.bench.anticipation --quick

Models that sleep a + b n ms, as an accelerator's call does, asked by users of closed loops who ask again 1 to 3 ms after their
answer; then the bundled model, asked again at once: short texts, and mixed ones, of which a tenth has about 200 tokens.
"""

import argparse
import asyncio
import json
import random
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from itertools import islice
from typing import Any

from tqdm import tqdm

from loadtests import arguments
from loadtests.bench.overhead import CLIENT_CPU, SERVER_CPU, Client, ask, side_by_side, texts
from loadtests.load.raw_client import http, on_core
from loadtests.load.texts import Text, stream
from loadtests.modes import Mode, Server, start
from loadtests.plan.planner import markdown

LAWS = ((100.0, 0.0), (10.0, 1.0), (20.0, 0.2))
USERS = (2, 8, 32, 64)
CONNECTIONS = (1, 2, 4, 8, 16, 32, 64)
THINK_S = (0.001, 0.003)
BATCH_SIZE = 32
HELD, GREEDY = "held", "greedy"
SIDES: dict[str, dict[str, str]] = {HELD: {}, GREEDY: {"FIXED_DELAY_MS": "0"}}


class Law:
    """A model whose call with n inputs takes `a_ms` + `b_ms` n."""

    example = "Paris"

    def __init__(self, a_ms: float, b_ms: float) -> None:
        self.a_ms, self.b_ms = a_ms, b_ms

    def __call__(self, inputs: list[Any]) -> list[Any]:
        time.sleep((self.a_ms + self.b_ms * len(inputs)) / 1000)
        return inputs


class User(Client):
    """Asks again after a moment."""

    def again(self, status: int) -> None:
        self.errors += status != 200
        self.done_at.append(time.perf_counter())
        pause_s = random.uniform(*THINK_S)
        asyncio.get_running_loop().call_later(pause_s, self.next)

    def next(self) -> None:
        if not self.ended:
            self.ask(self.request, self.again)


class Mixed(Client):
    """Asks something else each time."""

    requests: tuple[bytes, ...] = ()

    def again(self, status: int) -> None:
        self.request = random.choice(self.requests)
        super().again(status)


def possible_per_s(a_ms: float, b_ms: float, users: int) -> float:
    """Return what the law and the think time allow, where all users share their calls."""
    calls = -(-users // BATCH_SIZE)
    call_ms = a_ms + b_ms * min(users, BATCH_SIZE)
    return 1000 * users / (calls * call_ms if calls > 1 else call_ms + 1000 * THINK_S[1])


def measure(server: Server, users: int, client: type[Client], duration_s: float) -> float:
    """Return the requests per second of so many users."""
    random.seed(0)  # both sides are asked the same
    if client is Mixed:
        some = islice(stream("mixed", random.Random(0)), 200)
        Mixed.requests = tuple(http(server.url, one.text) for one in some if isinstance(one, Text))
    requests = [http(server.url, text) for text in texts(users)]
    rate = float(on_core(CLIENT_CPU, ask(server.url, requests, duration_s, client)))
    server.wait_until_idle()
    return rate


def compare(
    env: dict[str, str], users: tuple[int, ...], client: type[Client], rounds: int, duration_s: float
) -> list[dict[str, Any]]:
    """Measure both sides in turn for each number of users, on one core."""
    rows = []
    with ExitStack() as stack:
        command = "uvicorn server:app --no-access-log"
        base = {"BATCH_SIZE": str(BATCH_SIZE), "TORCH_THREADS": "1", **env}
        servers = {
            side: stack.enter_context(start(Mode(side, command, {**base, **more}), cpus={SERVER_CPU}))
            for side, more in SIDES.items()
        }
        for n in users:
            measures: dict[str, Callable[[float], float]] = {
                side: partial(measure, server, n, client) for side, server in servers.items()
            }
            rates = side_by_side(measures, rounds, duration_s)
            ratio = statistics.median(a / b for a, b in zip(rates[HELD], rates[GREEDY], strict=True))
            medians = {side: f"{statistics.median(found):.0f}" for side, found in rates.items()}
            rows.append({"users": str(n), **medians, "ratio": f"{ratio:.2f}"})
    return rows


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one short round: shows that it runs")
    quick = parser.parse_args().quick
    rounds, duration_s = (1, 0.5) if quick else (3, 2.0)
    print(f"About {2 if quick else 12} minutes on two idle cores.", file=sys.stderr, flush=True)
    rows: list[dict[str, Any]] = []
    try:
        for a, b in tqdm(LAWS, "laws", disable=None):
            env = {
                "MODEL": "loadtests.bench.anticipation:Law",
                "MODEL_ARGS": json.dumps({"a_ms": a, "b_ms": b}),
            }
            for row in compare(env, USERS, User, rounds, duration_s):
                possible = possible_per_s(a, b, int(row["users"]))
                share = float(row[HELD]) / possible
                rows.append({"model": f"{a:g} + {b:g} n ms", **row, "of what is possible": f"{share:.2f}"})
        for name, client, longer in (("short", Client, 1), ("mixed", Mixed, 2)):
            for row in compare({}, CONNECTIONS, client, rounds, longer * duration_s):
                rows.append({"model": f"bundled, {name} texts", **row, "of what is possible": ""})
    finally:  # what was measured before Ctrl-C is kept
        if rows:
            print(markdown(rows))


if __name__ == "__main__":
    arguments.run(main)
