"""Who is admitted, on a virtual clock: in time, near the target, at the full rate, whatever the cost law and the load."""

import asyncio
import math
import random
from collections import deque
from statistics import quantiles
from typing import Any, NamedTuple

import pytest

from loadtests.planner import Silent, VirtualClock
from workers.loop import Answer, Late, ModelLoop, Refused


class End(NamedTuple):
    """What came of a request of `jobs` queries that came at `at`, and when; `wait_s` of the last of them."""

    at: float
    ended: float
    jobs: int
    outcome: Any
    wait_s: float


class Law(NamedTuple):
    """A model that takes a + b * size seconds, for jobs whose sizes are drawn from these."""

    a: float
    b: float
    sizes: tuple[int, ...] = (1,)

    def seconds(self, size: float) -> float:
        return self.a + self.b * size

    @property
    def mean(self) -> float:
        return sum(self.sizes) / len(self.sizes)

    def rate(self, batch_size: int) -> float:
        """Answers a second, with full batches."""
        return batch_size / self.seconds(batch_size * self.mean)


def simulate(law: Law, arrivals: list[tuple[float, list[int]]], copies: int = 1, **options: Any) -> list[End]:
    """Run the real loop; each arrival is a time and the sizes of a request's queries."""
    ends: list[End] = []

    async def run(sizes: list[int]) -> list[int]:
        await asyncio.sleep(law.seconds(sum(sizes)))
        return sizes

    async def request(loop: ModelLoop, at: float, sizes: list[int]) -> None:
        try:
            if len(sizes) == 1:
                answers = [await loop.submit(sizes[0], size=sizes[0])]
            else:
                answers = await loop.submit_all(sizes, sizes)
            outcome: Any = Answer
            wait_s = max(answer.queue_s for answer in answers)
        except (Refused, Late) as error:
            outcome, wait_s = type(error), math.nan
        ends.append(End(at, loop.now(), len(sizes), outcome, wait_s))

    async def everything() -> None:
        loop = ModelLoop(metrics=Silent(), **options)  # type: ignore[arg-type]
        size = int(law.mean)
        await loop.warm_up(run, [[(size, size)] * n for n in {1, loop.batch_size // 2 + 1, loop.batch_size}])
        consumers = [asyncio.create_task(loop.consume(run)) for _ in range(copies)]
        began, requests = loop.now(), []
        for at, sizes in arrivals:
            await asyncio.sleep(began + at - loop.now())
            requests.append(asyncio.create_task(request(loop, loop.now(), sizes)))
        await asyncio.gather(*requests)
        for consumer in consumers:
            consumer.cancel()
        await asyncio.gather(*consumers, return_exceptions=True)
        ends[:] = [end._replace(at=end.at - began, ended=end.ended - began) for end in ends]

    with asyncio.Runner(loop_factory=VirtualClock) as runner:
        runner.run(everything())
    return ends


def poisson(
    law: Law, rate: float, until: float, jobs: int = 1, seed: int = 0
) -> list[tuple[float, list[int]]]:
    """Requests that know nothing of each other, of `jobs` queries each."""
    rng, at, arrivals = random.Random(seed), 0.0, []
    while (at := at + rng.expovariate(rate)) < until:
        arrivals.append((at, [rng.choice(law.sizes) for _ in range(jobs)]))
    return arrivals


def answered(ends: list[End], start: float, until: float) -> float:
    """Answers a second in this time."""
    return sum(e.jobs for e in ends if e.outcome is Answer and start <= e.ended < until) / (until - start)


def late(ends: list[End]) -> float:
    """The share of the admitted that were told later that they were too late."""
    return sum(e.outcome is Late for e in ends) / sum(e.outcome is not Refused for e in ends)


def p99(ends: list[End]) -> float:
    return quantiles([e.wait_s for e in ends if e.outcome is Answer], n=100)[98]


# --- batches that don't make the admitted late ------------------------------------------------------------------------


def fixed(law: Law, n: int, budget_s: float, arrivals: list[tuple[float, list[int]]], until: float) -> float:
    """Answers a second of the oracle: batches of `n` at most, admission that knows the law, and nothing else.

    A newcomer is admitted if it would be in time though every batch until its own were full.
    """
    full_s, waiting, free_at, right, i = law.seconds(n * law.mean), deque[tuple[float, int]](), 0.0, 0, 0
    while i < len(arrivals) or waiting:
        now = free_at if waiting else max(free_at, arrivals[i][0])
        while i < len(arrivals) and arrivals[i][0] <= now:
            at, (size,) = arrivals[i]
            i += 1
            idle = not waiting and free_at <= at
            if idle or max(0, free_at - at) + (len(waiting) // n + 1) * full_s <= budget_s:
                waiting.append((at, size))
        batch = [waiting.popleft() for _ in range(min(n, len(waiting)))]
        seconds = law.seconds(sum(size for _, size in batch))
        batch = [(at, size) for at, size in batch if now + seconds <= at + budget_s]
        free_at = now + (law.seconds(sum(size for _, size in batch)) if batch else 0.0)
        right += len(batch) if free_at < until else 0
    return right / until


@pytest.mark.parametrize("load", [0.5, 0.8, 1, 2, 5, 10])
@pytest.mark.parametrize(
    ("law", "batch_size", "budget_s"),
    [
        (Law(0.05, 0.3), 32, 10),
        (Law(0.2, 0.1), 32, 2),
        (Law(0.2, 0.1), 32, 1),
        (Law(0.2, 0.1), 32, 4),
        (Law(0.004, 0.001), 32, 1),
        (Law(0.004, 0.001), 32, 0.1),
        (Law(0.05, 0.01), 8, 1),
        (Law(0.1, 0.02), 64, 0.5),
        (Law(0.02, 0.001, (4, 8, 16, 64)), 32, 1),
    ],
    ids=str,
)
def test_with_batches_the_rate_is_nearly_that_of_the_best_fixed_size_and_the_admitted_are_in_time(
    law: Law, batch_size: int, budget_s: float, load: float
) -> None:
    rate = load * law.rate(batch_size)
    until = max(1500 / rate, 20 * budget_s, 10)
    until = min(until, 6000 / rate)
    arrivals = poisson(law, rate, until)
    ends = simulate(law, arrivals, batch_size=batch_size, budget_s=budget_s, target_s=0)
    sizes = sorted(
        {n for n in (1, 2, 3, 4, 5, 6, 8, 10, 12, 14, 16, 20, 24, 28, 32, 48, 64) if n <= batch_size}
    )
    best = max(fixed(law, n, budget_s, arrivals, until) for n in sizes)
    assert answered(ends, 0, until) >= 0.9 * best
    assert late(ends) <= 0.02
