"""Lesson 5: what becomes of a batch with an input in it that the model can't take, and of one that ends the process."""

import asyncio
import functools
import time
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from lesson import TEXT, ask, counters, serve

from workers import errors, offload, tasks
from workers.loop import ModelLoop
from workers.settings import Settings

SETTINGS = replace(Settings(), TORCH_THREADS=1, BATCH_SIZE=8, FAST=False)


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


@dataclass
class Poisoned:
    """What became of the eight of the last batch, its calls (size and ms), and medians over all batches, in ms."""

    fates: list[Any]
    calls: list[tuple[int, float]]
    clean_ms: float
    poisoned_ms: float
    failed_ms: float
    alone_ms: float


async def poison(rounds: int) -> Poisoned:
    """Batches of eight good texts, and batches in which the fourth is bad: carried past the check of the task."""
    watched, good = Watched(SETTINGS), tasks.make(SETTINGS).check(TEXT, {}).content
    bad = good._replace(inputs="no mask here")
    await watched.place.start()
    clean, failing = [], []
    for _ in range(rounds):
        clean.append((await watched.batch_of([good] * 8))[1])
        fates, calls = await watched.batch_of([good] * 3 + [bad] + [good] * 4)
        failing.append(calls)
    watched.place.stop()
    # The bad text's own call is the fourth of those alone; it fails early.
    alone = [ms for calls in failing for i, (_, ms) in enumerate(calls) if i not in (0, 4)]
    totals = ([sum(ms for _, ms in calls) for calls in kind] for kind in (clean, failing))
    clean_ms, poisoned_ms = (float(np.median(total)) for total in totals)
    failed_ms = float(np.median([calls[0][1] for calls in failing]))
    return Poisoned(fates, calls, clean_ms, poisoned_ms, failed_ms, float(np.median(alone)))


def rejected_because(text: str) -> str:
    """What the task says of a text before it gets into the queue; empty where it lets it in."""
    try:
        tasks.make(SETTINGS).check(text, {})
    except errors.Unprocessable as error:
        return str(error)
    return ""


def killings(times: int) -> tuple[list[tuple[int, float, int]], int]:
    """Send an input that ends the process, again and again: status, ms until ready again, status of an innocent one; deaths."""
    server, seen = serve(MODEL="notebooks.support.l11_fails:Fails", OFFLOAD="process"), []
    for _ in range(times):
        reply = ask(server, "die, please")
        began = time.monotonic()
        server.wait_until_ready()
        seen.append((reply.status, 1000 * (time.monotonic() - began), ask(server, "an innocent text").status))
    return seen, int(counters(server)["model_process_restarts_total"])
