"""Lesson 5: what becomes of a batch with a text in it that the model can't take, in the real loop."""

import asyncio
import functools
import time
from typing import Any

from workers import offload, tasks
from workers.loop import ModelLoop
from workers.settings import Settings


class Watched:
    """The model in a thread; notes how many texts each call had, and how many ms it took."""

    def __init__(self, settings: Settings) -> None:
        self.place = offload.Thread(functools.partial(tasks.load_alone, settings))
        self.calls: list[tuple[int, float]] = []

    async def __call__(self, contents: list[Any]) -> list[Any]:
        began = time.perf_counter()
        try:
            return await self.place.run(contents)
        finally:
            self.calls.append((len(contents), (time.perf_counter() - began) * 1000))

    async def batch_of(self, contents: list[Any]) -> tuple[list[Any], list[tuple[int, float]]]:
        """What becomes of these in one batch, and the calls that it took."""
        self.calls.clear()
        loop = ModelLoop(batch_size=8)
        consumer = asyncio.create_task(loop.consume(self))
        fates = await asyncio.gather(*(loop.submit(one) for one in contents), return_exceptions=True)
        consumer.cancel()
        return fates, list(self.calls)
