"""A language model that is a formula, for the token loop on a virtual clock."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

from workers.generation.scheduler import work
from workers.generation.step_cost import StepCost
from workers.generation.steps import Limits, Options, Outcome, Row, Token
from workers.generation.stream import Stream
from workers.generation.token_loop import TokenLoop
from workers.scheduling.instances import Ready

END, POISON, NAN = 1, 666, 667
LAW = (0.02, 0.0015, 0.001, 0.000001)  # seconds: a step, a prompt's token, a sequence, a cached token


class FakeSteps:
    """Answers steps: the next token is 1000 + how many there were, and the END after as many as the prompt's first token.

    Raises on a prompt with POISON, gives no probabilities for one with NAN. It checks what each slot holds: a row whose
    earlier tokens are not there is a bug of the scheduler.
    """

    def __init__(self, slots: int = 4, capacity: int = 4096, law: tuple[float, ...] = LAW) -> None:
        self.limits, self.cost = Limits(slots, capacity), StepCost(*law)
        self.cache: dict[int, list[int]] = {}
        self.steps: list[list[Row]] = []
        self.is_warm = False
        self.error: BaseException | None = None  # to raise once

    async def __call__(self, contents: list[Any]) -> list[Any]:
        (rows,) = contents
        if rows is None:
            return [self.limits]
        self.steps.append(rows)
        await asyncio.sleep(self.cost.predict_s(work(rows)))
        if self.error:
            error, self.error = self.error, None
            raise error
        if any(POISON in row.ids for row in rows):
            raise RuntimeError("poison")
        assert len({row.slot for row in rows}) == len(rows), "two rows write to one slot"
        return [[self.outcome(row) for row in rows]]

    def outcome(self, row: Row) -> Outcome:
        if not self.is_warm:
            return Token(END, 0.0)
        held = self.cache.setdefault(row.slot, [])
        assert row.start <= len(held) and row.start + len(row.ids) <= self.limits.capacity
        held[row.start :] = row.ids
        if NAN in held:
            return "its probabilities are not numbers"
        if not row.choice:
            return None
        n = row.choice.generated
        return Token(END if n + 1 >= held[0] else 1000 + n, 0.0)


def prompt(answer: int, length: int, *more: int) -> list[int]:
    """A prompt of this length (and more) whose answer has so many tokens, the END included."""
    return [answer, *(7 for _ in range(length - 1)), *more]


def options(max_tokens: int = 1000, **more: Any) -> Options:
    return Options(max_tokens=max_tokens, end_ids=frozenset([END]), **more)


@contextlib.asynccontextmanager
async def generating(
    model: FakeSteps, *, ready: Ready | None = None, **settings: Any
) -> AsyncIterator[TokenLoop]:
    """A warmed-up token loop with its consumer, for the length of a with block."""
    loop = TokenLoop(**{"budget_s": 1000.0} | settings)
    await loop.warm_up(model)
    model.is_warm = True
    model.steps.clear()
    consumer = asyncio.create_task(loop.consume(model, ready))
    await asyncio.sleep(0)
    try:
        yield loop
        assert not consumer.done(), "the loop has died"
    finally:
        consumer.cancel()
        await asyncio.gather(consumer, return_exceptions=True)


async def read(stream: Stream) -> tuple[list[int], str]:
    """The stream's tokens, and why it ended."""
    tokens, reason = [], ""
    async for piece in stream:
        tokens += [token.id for token in piece.tokens]
        reason = piece.reason
    return tokens, reason


def expected(answer: int, max_tokens: int = 1000) -> list[int]:
    """The tokens that follow a prompt with this first token."""
    whole = [*(1000 + n for n in range(answer - 1)), END]
    return whole[:max_tokens]
