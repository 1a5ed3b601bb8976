"""Does holding a batch pay? The real loop on a virtual clock, with greedy batching and fixed delays beside it.

    $ python -m loadtests.plan.anticipation

Writes loadtests/results/anticipation.md: five cost laws, closed and open loops and both at once, 1, 2 and 4 instances, and
loads that change. Deterministic: the same code gives the same page.
"""

import argparse
import asyncio
import contextlib
import math
import random
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from loadtests import arguments
from loadtests.arguments import above
from loadtests.plan.fixed_delay import FixedDelay
from loadtests.plan.planner import VirtualClock, markdown
from workers.loop import ModelLoop

RESULTS = Path(__file__).resolve().parent.parent / "results" / "anticipation.md"
BATCH_SIZE = 32
LAWS = ((100, 0), (10, 1), (20, 0.2), (5, 3), (2, 5))  # ms a call + ms an input
USERS = (2, 8, 32, 64)
Think = Callable[[random.Random], float]
THINKS: dict[str, Think] = {  # seconds from an answer to the next request
    "1-3 ms": lambda rng: rng.uniform(0.001, 0.003),
    "about 10 ms": lambda rng: rng.expovariate(100),
    "about 100 ms": lambda rng: rng.expovariate(10),
}
LOADS = (0.05, 0.3, 0.7, 0.95)
DELAYS_MS = (0, 2, 5, 10)  # 0: greedy
POLICIES: dict[str, Callable[..., ModelLoop]] = {
    **{f"{ms} ms" if ms else "greedy": partial(FixedDelay, delay_s=ms / 1000) for ms in DELAYS_MS},
    "learnt": ModelLoop,
}


class Load(NamedTuple):
    """Closed loops of `users` who think for so long, and open arrivals at `rate` per second, from one time to another."""

    users: int = 0
    think: str = "1-3 ms"
    rate: float = 0.0
    from_s: float = 0.0
    to_s: float = math.inf


@dataclass(frozen=True)
class Cell:
    """One row of the table."""

    name: str
    a_ms: float
    b_ms: float
    instances: int
    loads: tuple[Load, ...]


class Outcome(NamedTuple):
    per_s: float
    mean_ms: float
    p99_ms: float

    def __str__(self) -> str:
        return f"{self.per_s:.0f} / {self.mean_ms:.0f} / {self.p99_ms:.0f}"


def cells(instances: int) -> Iterator[Cell]:
    """The 85 cells for so many instances: each law with closed loops, open loops, and both at once."""
    for a, b in LAWS:
        capacity = instances * BATCH_SIZE / (a + b * BATCH_SIZE) * 1000
        law = f"{a} + {b} n"
        for think in THINKS:
            for users in USERS:
                yield Cell(f"{law}, {users} users, {think}", a, b, instances, (Load(users, think),))
        for load in LOADS:
            yield Cell(f"{law}, open, {load:.0%}", a, b, instances, (Load(rate=load * capacity),))
        both = (Load(8), Load(rate=0.3 * capacity))
        yield Cell(f"{law}, 8 users and open, 30%", a, b, instances, both)


def changes() -> Iterator[Cell]:
    """Loads that change in the middle of 20 seconds."""
    for a, b in LAWS[:3]:
        open_load = Load(rate=0.3 * BATCH_SIZE / (a + b * BATCH_SIZE) * 1000)
        law = f"{a} + {b} n"
        cases = {
            "32 users appear beside strangers": (open_load, Load(32, from_s=10)),
            "32 users leave, strangers stay": (open_load, Load(32, to_s=10)),
            "32 users become strangers": (Load(32, to_s=10), Load(32, "about 100 ms", from_s=10)),
            "2 users become 32": (Load(2, to_s=10), Load(32, from_s=10)),
        }
        for name, loads in cases.items():
            yield Cell(f"{law}, {name}", a, b, 1, loads)


def run(cell: Cell, policy: str, duration_s: float) -> Outcome:
    """Return what the clients of `cell` see on a virtual clock."""
    rng = random.Random(0)

    async def model(inputs: list[Any]) -> list[Any]:
        await asyncio.sleep((cell.a_ms + cell.b_ms * len(inputs)) / 1000)
        return inputs

    async def ask(loop: ModelLoop, latencies_s: list[float]) -> None:
        began = loop.now()
        await loop.submit(None)
        if loop.now() <= duration_s:
            latencies_s.append(loop.now() - began)

    async def user(loop: ModelLoop, load: Load, latencies_s: list[float]) -> None:
        await asyncio.sleep(load.from_s + rng.uniform(0, 0.005))
        while loop.now() < min(load.to_s, duration_s):
            await ask(loop, latencies_s)
            await asyncio.sleep(THINKS[load.think](rng))

    async def strangers(loop: ModelLoop, load: Load, latencies_s: list[float]) -> None:
        async with asyncio.TaskGroup() as requests:
            while loop.now() < min(load.to_s, duration_s):
                await asyncio.sleep(rng.expovariate(load.rate))
                requests.create_task(ask(loop, latencies_s))

    async def traffic() -> list[float]:
        options = {"batch_size": BATCH_SIZE, "max_queue": 10**6, "budget_s": 1e6, "target_s": 0.0}
        loop = POLICIES[policy](**options)
        consumers = [asyncio.create_task(loop.consume(model)) for _ in range(cell.instances)]
        for n in (1, 8, BATCH_SIZE):  # a server has warmed up
            loop.cost_model.observe(n, (cell.a_ms + cell.b_ms * n) / 1000)
        latencies_s: list[float] = []
        async with asyncio.TaskGroup() as clients:
            for load in cell.loads:
                for _ in range(load.users):
                    clients.create_task(user(loop, load, latencies_s))
                if load.rate:
                    clients.create_task(strangers(loop, load, latencies_s))
        for consumer in consumers:
            consumer.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.gather(*consumers)
        return latencies_s

    with asyncio.Runner(loop_factory=VirtualClock) as runner:
        latencies_ms = np.array(runner.run(traffic())) * 1000
    return Outcome(
        len(latencies_ms) / duration_s, float(latencies_ms.mean()), float(np.quantile(latencies_ms, 0.99))
    )


class Row(NamedTuple):
    """What a cell's clients see with each policy, and the learnt one's ratios; None where a ratio does not apply."""

    load: str
    outcomes: dict[str, Outcome]
    throughput: float
    mean: float | None
    p99: float | None

    def shown(self) -> dict[str, str]:
        """Return the table's row."""
        by_delay = {name: outcome for name, outcome in self.outcomes.items() if name != "learnt"}
        best = max(by_delay, key=lambda name: by_delay[name].per_s)
        return {
            "load": self.load,
            "greedy": str(by_delay["greedy"]),
            "best fixed delay": "greedy" if best == "greedy" else f"{best}: {by_delay[best]}",
            "learnt": str(self.outcomes["learnt"]),
            "requests/s": f"{self.throughput:.3f}",
            "mean, p99": ", ".join(
                "-" if ratio is None else f"{ratio:.2f}" for ratio in (self.mean, self.p99)
            ),
        }


def row(cell: Cell, duration_s: float = 20.0) -> Row:
    """Return what each policy gives in `cell`, and the learnt one's share of the best fixed delay."""
    outcomes = {policy: run(cell, policy, duration_s) for policy in POLICIES}
    learnt, greedy = outcomes["learnt"], outcomes["greedy"]
    fixed = [outcome for name, outcome in outcomes.items() if name != "learnt"]
    best = max(outcome.per_s for outcome in fixed)
    as_fast = [o for o in fixed if o.per_s >= 0.99 * max(best, learnt.per_s)]
    mean = round(learnt.mean_ms / min(o.mean_ms for o in as_fast), 2) if as_fast else None
    p99 = round(learnt.p99_ms / greedy.p99_ms, 2) if greedy in as_fast else None
    return Row(cell.name, outcomes, round(learnt.per_s / best, 3), mean, p99)


def summary(rows: list[Row]) -> str:
    """Return one sentence about the ratios of `rows`."""
    shares = [row.throughput for row in rows]
    means = [row.mean for row in rows if row.mean is not None]
    p99s = [row.p99 for row in rows if row.p99 is not None]
    return (
        f"Requests/s as a share of the best fixed delay of each cell: worst {min(shares):.3f}, mean "
        f"{sum(shares) / len(shares):.3f}; below 0.97 in {sum(s < 0.97 for s in shares)} of {len(rows)} cells. Mean latency "
        f"above 1.03 of the best at equal throughput: {sum(m > 1.03 for m in means)} cells, worst {max(means):.2f}. p99 above "
        f"1.05 of greedy where greedy is the best: {sum(p > 1.05 for p in p99s)} cells, worst {max(p99s):.2f}."
    )


PAGE = """# When does holding a batch pay?

Generated by `python -m loadtests.plan.anticipation`: the server's own loop on a virtual clock, BATCH_SIZE=32, 20 simulated
seconds per cell. A law `10 + 1 n` is a call of 10 ms and 1 ms per input. Users of a closed loop ask again after a think time;
open loops are Poisson arrivals at a share of the capacity. Each entry: requests/s / mean ms / p99 ms. *greedy* takes what has
queued as soon as the model is free; a fixed delay of 2, 5 or 10 ms holds each partial batch from its first job; *learnt* is the
server (`workers/scheduling/anticipation.py`). The last two columns are *learnt* relative to the fixed delay with the most
requests/s, to the best mean latency among the delays of equal throughput, and to greedy's p99 where greedy is among those.
"""


def page(processes: int, most_s: float) -> str:
    """Return the page. Raises TimeoutError when it would take longer than `most_s`."""
    parts = {f"{n} instance{'s' * (n > 1)}": list(cells(n)) for n in (1, 2, 4)} | {
        "The load changes": list(changes())
    }
    text, until_s = PAGE, time.monotonic() + most_s
    pool = ProcessPoolExecutor(processes, initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_DFL))
    try:
        for title, part in parts.items():
            found = pool.map(row, part, timeout=until_s - time.monotonic())
            rows = list(tqdm(found, title, total=len(part), leave=False, disable=None))
            print(f"{title}: {summary(rows)}", flush=True)
            text += f"\n## {title}\n\n{summary(rows)}\n\n{markdown([row.shown() for row in rows])}\n"
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    return text


def main() -> int:
    """Write the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--processes", type=above(0, int), default=1, help="run so many cells at once; default 1"
    )
    parser.add_argument("--minutes", type=above(0.0), default=25.0, help="give up after so many; default 25")
    options = parser.parse_args()
    print("Simulating 267 cells with five policies, about 12 minutes of one core.", flush=True)
    try:
        RESULTS.write_text(page(options.processes, 60 * options.minutes))
    except TimeoutError:
        print(f"It takes longer than {options.minutes:g} minutes here; the page was not written.")
        return 1
    return 0


if __name__ == "__main__":
    arguments.run(main)
