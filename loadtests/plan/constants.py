"""What a tenth and ten times of each hand-set number of the scheduler does to its clients, on a virtual clock.

    $ python -m loadtests.plan.constants

The table in `workers/scheduling/__init__.py` is written from its output, by hand.
"""

import asyncio
import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any, NamedTuple

import numpy as np

from loadtests.plan.planner import VirtualClock
from workers.errors import Unanswered
from workers.loop import ModelLoop
from workers.scheduling.warm_up import warm_up

# Where each number stands. Those of `anticipation.py` are measured by `loadtests.plan.anticipation`, too.
CONSTANTS = {
    "admission": "STANDING_TARGETS ALLOWED_REQUESTS ALLOWED_BATCHES REJECTION_BATCHES HOPELESS_FACTOR RETRIAL_FACTOR",
    "estimate": "OUTSIZED USUAL_SHARE PAYS",
    "cost_model": "OUTLIER_FACTOR OUTLIER_STEP RECENT_CALLS TYPICAL_CALLS ERROR_CALLS MARGIN",
    "instances": "OVERDUE_FACTOR OVERDUE_S",
    "anticipation": "REMEMBERED_CALLS MIN_GAIN",
}


class Request(NamedTuple):
    """At `at` seconds, one input for each size."""

    at: float
    sizes: list[float]


@dataclass
class Scenario:
    """Requests, and a model whose call takes `a + b * size` seconds times what `slower` says of the time."""

    name: str
    requests: list[Request]
    a: float = 0.02
    b: float = 0.002
    batch_size: int = 8
    instances: int = 1
    slower: Callable[[float, random.Random], float] = lambda now, rng: 1.0
    users: int = 0  # closed loops that ask again 1 to 3 ms after each answer
    budget_s: float = 10.0
    target_s: float = 0.5


class Outcome(NamedTuple):
    """Answers a second, the 99th percentile of their latency, and which share of the admitted ended too late."""

    per_s: float
    p99_s: float
    late: float


def poisson(
    rate: float, until: float, sizes: tuple[float, ...] = (1,), jobs: int = 1, seed: int = 0
) -> list[Request]:
    rng, at, requests = random.Random(seed), 0.0, []
    while (at := at + rng.expovariate(rate)) < until:
        requests.append(Request(at, [rng.choice(sizes) for _ in range(jobs)]))
    return requests


def stalls(at: float, for_s: float) -> Callable[[float, random.Random], float]:
    """One call, the first after `at`, takes `for_s` longer than it should."""
    pending = [True]

    def slower(now: float, rng: random.Random) -> float:
        if now < at or not pending:
            return 1.0
        pending.clear()
        return for_s / 0.02

    return slower


def scenarios() -> Iterator[Scenario]:
    """Yield situations that the numbers were set for. A full batch of 8 takes 36 ms: 222 answers per second."""
    yield Scenario("2x overload", poisson(440, 20))
    yield Scenario("2x overload, sizes 1 to 64", poisson(60, 20, (1, 4, 16, 64)))
    yield Scenario("2x overload, a slow model", poisson(12, 60), a=0.8, b=0.1)
    bursts = [Request(10.0 * n, [1]) for n in range(4) for _ in range(300)]
    yield Scenario(
        "bursts of 300 after an overload",
        [*poisson(440, 10, seed=1), *[r._replace(at=r.at + 12) for r in bursts]],
    )
    yield Scenario(
        "lists of 16 beside single ones", sorted([*poisson(150, 20), *poisson(8, 20, jobs=16, seed=1)])
    )
    yield Scenario(
        "4 times slower from 5 s on", poisson(150, 20), slower=lambda now, _: 4.0 if now > 5 else 1.0
    )
    noise = lambda _, rng: rng.lognormvariate(-0.125, 0.5)  # noqa: E731
    yield Scenario("overload, noisy calls", poisson(440, 20), slower=noise)
    giants = [Request(1.0 + 2 * n, [2000]) for n in range(20)]
    yield Scenario("a giant of 4 s every other second", sorted([*poisson(100, 40), *giants]))
    hopeless = [Request(0.5 + n / 2, [15_000]) for n in range(120)]
    yield Scenario("few requests, and giants of 30 s", sorted([*poisson(1, 60), *hopeless]))
    rejected = [Request(n / 10, [50_000]) for n in range(200)]
    yield Scenario("2x overload, and giants that are rejected", sorted([*poisson(440, 20), *rejected]))
    yield Scenario("2x overload, 0.3 s allowed", poisson(440, 20), budget_s=0.3, target_s=0)
    yield Scenario(
        "2x overload, noisy, 0.3 s allowed", poisson(440, 20), slower=noise, budget_s=0.3, target_s=0
    )
    yield Scenario(
        "5x overload, large batches, 1 s allowed", poisson(2000, 10), batch_size=64, budget_s=1, target_s=0
    )
    yield Scenario("the only instance stalls 20 s", poisson(150, 40), slower=stalls(5, 20))
    yield Scenario("one of 2 instances stalls 8 s", poisson(330, 20), instances=2, slower=stalls(5, 8))
    yield Scenario("32 users who come back", [], a=0.1, b=0.0, batch_size=32, users=32)


def run(scenario: Scenario) -> Outcome:
    """Return what the clients of `scenario` see."""
    rng, latencies_s, late = random.Random(0), list[float](), [0]

    async def model(sizes: list[float]) -> list[float]:
        slower = scenario.slower(asyncio.get_running_loop().time(), rng)
        await asyncio.sleep((scenario.a + scenario.b * sum(sizes)) * slower)
        return sizes

    async def ask(loop: ModelLoop, sizes: list[float]) -> None:
        began = loop.now()
        try:
            await loop.submit_all(sizes, sizes)
            latencies_s.extend([loop.now() - began] * len(sizes))
        except Unanswered as error:
            late[0] += len(sizes) * (type(error).__name__ == "Late")

    async def user(loop: ModelLoop) -> None:
        while loop.now() < 10:
            await ask(loop, [1])
            await asyncio.sleep(rng.uniform(0.001, 0.003))

    async def traffic() -> float:
        loop = ModelLoop(
            batch_size=scenario.batch_size,
            max_queue=10_000,
            budget_s=scenario.budget_s,
            target_s=scenario.target_s,
        )
        sizes = [1, scenario.batch_size // 2 + 1, scenario.batch_size]
        await warm_up(loop.cost_model, model, [[(1, 1)] * n for n in sizes], loop.now)
        consumers = [asyncio.create_task(loop.consume(model)) for _ in range(scenario.instances)]
        began = loop.now()
        async with asyncio.TaskGroup() as clients:
            for _ in range(scenario.users):
                clients.create_task(user(loop))
            for request in scenario.requests:
                await asyncio.sleep(began + request.at - loop.now())
                clients.create_task(ask(loop, request.sizes))
        ended = loop.now() - began
        for consumer in consumers:
            consumer.cancel()
        await asyncio.gather(*consumers, return_exceptions=True)
        return ended

    with asyncio.Runner(loop_factory=VirtualClock) as runner:
        seconds = runner.run(traffic())
    n = len(latencies_s)
    p99_s = float(np.quantile(latencies_s, 0.99)) if n else math.inf
    return Outcome(n / seconds, p99_s, late[0] / max(1, n + late[0]))


@contextmanager
def changed(module: Any, name: str, factor: float) -> Iterator[float]:
    """Let the constant be `factor` times as large; a number of calls is at least 1 and stays a whole number."""
    usual = getattr(module, name)
    value = max(1, round(usual * factor)) if name.endswith("_CALLS") else usual * factor
    setattr(module, name, value)
    try:
        yield value
    finally:
        setattr(module, name, usual)


def differs(usual: Outcome, found: Outcome) -> bool:
    """Return whether clients would notice: 3 % of the answers, a fifth of the tail, 1 % more that are too late."""
    return (
        abs(found.per_s / usual.per_s - 1) > 0.03
        or abs(found.p99_s / usual.p99_s - 1) > 0.2
        or abs(found.late - usual.late) > 0.01
    )


def main() -> None:
    usual = {scenario.name: run(scenario) for scenario in scenarios()}
    for name, outcome in usual.items():
        print(f"{name:40} {outcome.per_s:7.1f} a second, p99 {outcome.p99_s:6.3f} s, late {outcome.late:.1%}")
    for file, names in CONSTANTS.items():
        module = import_module(f"workers.scheduling.{file}")
        for name in names.split():
            for factor in (0.1, 10):
                with changed(module, name, factor) as value:
                    print(f"\n{file}.{name} = {value:g}", flush=True)
                    for scenario in scenarios():
                        found, was = run(scenario), usual[scenario.name]
                        if differs(was, found):
                            print(
                                f"    {scenario.name:40} {was.per_s:.1f} -> {found.per_s:.1f} a second, "
                                f"p99 {was.p99_s:.2f} -> {found.p99_s:.2f} s, late {was.late:.1%} -> {found.late:.1%}"
                            )


if __name__ == "__main__":
    main()
