"""Lesson 4: the real loop on a virtual clock, for users who come back and for strangers, with and without holding batches."""

import asyncio
import contextlib
import random
from dataclasses import dataclass, field
from typing import Any

from lesson import BLUE, ORANGE, apart, picture

from loadtests.plan.planner import CostLaw, VirtualClock
from workers.loop import ModelLoop


class Greedy(ModelLoop):
    """The loop that holds nothing: when the model is free it takes what has queued."""

    def make_holding(self, *components: Any) -> None:
        return None


@dataclass
class Seen:
    """What the clients and the model saw: answers per second, their mean latency, how many had been held, and each call."""

    per_s: float = 0.0
    mean_ms: float = 0.0
    held: float = 0.0  # share of the answers whose batch was held
    calls: list[tuple[float, float, int]] = field(default_factory=list)  # start and length in s, size

    @property
    def sizes(self) -> list[int]:
        return [size for _, _, size in self.calls]

    def __str__(self) -> str:
        """For a table: texts per second, mean ms, share held."""
        return f"{self.per_s:.0f}, {self.mean_ms:.0f}, {self.held:.0%}"


def watch(
    make: Any,
    cost: CostLaw,
    *,
    users: int = 0,
    think_s: tuple[float, float] = (0.001, 0.003),
    rate_per_s: float = 0.0,
    duration_s: float = 10.0,
) -> Seen:
    """Let `users` ask again some time within `think_s` after each answer, and strangers come at `rate_per_s`."""
    rng, seen, answers = random.Random(0), Seen(), []

    async def model(inputs: list[Any]) -> list[Any]:
        now, call_s = asyncio.get_running_loop().time(), cost.seconds(len(inputs))
        seen.calls.append((now, call_s, len(inputs)))
        await asyncio.sleep(call_s)
        return inputs

    async def ask(loop: ModelLoop) -> None:
        began = loop.now()
        answer = await loop.submit(None)
        answers.append((loop.now() - began, answer.dispatched_because in ("returned", "waited")))

    async def user(loop: ModelLoop) -> None:
        while loop.now() < duration_s:
            await asyncio.sleep(rng.uniform(*think_s))
            await ask(loop)

    async def traffic() -> None:
        loop = make(batch_size=32, budget_s=1e6, target_s=0.0)
        consumer = asyncio.create_task(loop.consume(model))
        for n in (1, 8, 32):  # a server has warmed up
            loop.cost_model.observe(n, cost.seconds(n))
        async with asyncio.TaskGroup() as clients:
            for _ in range(users):
                clients.create_task(user(loop))
            while rate_per_s and loop.now() < duration_s:
                await asyncio.sleep(rng.expovariate(rate_per_s))
                clients.create_task(ask(loop))
        consumer.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await consumer

    def run() -> None:
        with asyncio.Runner(loop_factory=VirtualClock) as runner:
            runner.run(traffic())

    apart(run)
    seen.per_s = len(answers) / duration_s
    seen.mean_ms = 1000 * sum(latency_s for latency_s, _ in answers) / len(answers)
    seen.held = sum(held for _, held in answers) / len(answers)
    return seen


def draw(calls_of: dict[str, list[tuple[float, float, int]]]) -> None:
    """Ten calls of each loop as bars on a line of time, with the number of texts in each."""
    with picture("A short hold makes one call of two", "ms", "", xlim=(0, 420), ylim=(-0.6, 1.6)) as ax:
        for y, (calls, color) in enumerate(zip(calls_of.values(), (BLUE, ORANGE))):
            began = calls[10][0]
            for at, took, n in calls[10:20]:
                x = (at - began) * 1000
                ax.barh(y, took * 1000, 0.5, x, color=color, edgecolor="white", clip_on=True)
                ax.text(x + took * 500, y, str(n), color="white", ha="center", va="center", clip_on=True)
        ax.set_yticks(range(len(calls_of)), list(calls_of))
