"""Lesson 1: what an event loop does, step by step. After the trace in the tutorial of trio."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Generator
from typing import Any, NamedTuple

from lesson import COLORS, apart, picture

Work = Callable[[], Awaitable[None]]


class Turn(NamedTuple):
    """A task ran from one of its waits to the next, in ms since the start."""

    task: str
    from_ms: float
    to_ms: float


class Traced:
    """A coroutine, each of whose turns is noted."""

    def __init__(self, name: str, work: Work, began: float, turns: list[Turn]) -> None:
        self.name, self.work, self.began, self.turns = name, work, began, turns

    def __await__(self) -> Generator[Any, Any, None]:
        steps = self.work().__await__()
        while True:
            from_ms = (time.perf_counter() - self.began) * 1000
            try:
                waits_for = next(steps)
            except StopIteration:
                return
            finally:
                to_ms = (time.perf_counter() - self.began) * 1000
                self.turns.append(Turn(self.name, from_ms, to_ms))
            yield waits_for


def trace(**works: Work) -> list[Turn]:
    """Run these as tasks of one event loop; return their turns in order."""
    turns: list[Turn] = []

    async def all_of_them() -> None:
        began = time.perf_counter()
        await asyncio.gather(
            *(as_coroutine(Traced(name, work, began, turns)) for name, work in works.items())
        )

    apart(lambda: asyncio.run(all_of_them()))
    return turns


async def as_coroutine(traced: Traced) -> None:
    await traced


def show(turns: list[Turn], title: str) -> None:
    """Print the turns, and draw each task's as a row."""
    for task, from_ms, to_ms in turns:
        print(f"{from_ms:4.0f} ms  >>> {task} runs … <<< after {to_ms - from_ms:.1f} ms it waits, or is done")
    names = sorted({turn.task for turn in turns}, reverse=True)
    with picture(title, "ms", "", xlim=(-2, max(turn.to_ms for turn in turns) + 5)) as ax:
        for task, from_ms, to_ms in turns:
            row = names.index(task)
            ax.barh(row, max(to_ms - from_ms, 0.6), 0.5, from_ms, color=COLORS[row])
        ax.set_yticks(range(len(names)), names)
        ax.set_ylim(-0.6, len(names) - 0.4)
        ax.figure.set_size_inches(6.4, 2.2)
