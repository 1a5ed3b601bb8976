"""What calls of several sizes take, measured before the first request. The loop does not need it to run."""

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

from .cost_model import CostModel, Run

# Each batch is measured this often, but no further turn begins after one that took longer than this.
WARM_UP_TURNS, WARM_UP_S = 3, 3.0


async def warm_up(
    cost_model: CostModel, run: Run, batches: Sequence[Sequence[tuple[Any, float]]], now: Callable[[], float]
) -> None:
    """Let `cost_model` learn how long `run` takes on `batches` of (query, size), at three sizes or more; then `consume`.

    Raises what the model raises.
    """
    times_s = await shortest_s(run, [[query for query, _ in batch] for batch in batches], now)
    for batch, seconds in zip(batches, times_s, strict=True):
        cost_model.observe(sum(size for _, size in batch), seconds)


async def shortest_s(run: Run, batches: Sequence[list[Any]], now: Callable[[], float]) -> list[float]:
    """Return the shortest of the times that `run` takes on each batch: nothing makes a call shorter than it is."""
    took_s: list[list[float]] = [[] for _ in batches]
    for turn in range(1 + WARM_UP_TURNS):
        began = now()
        for queries, times_s in zip(batches, took_s, strict=True):
            started_at = now()
            await run(queries)
            if turn:  # the first time is the kernels'
                times_s.append(now() - started_at)
            await asyncio.sleep(0)  # an inline model must not keep a heartbeat waiting for all of it
        if turn and now() - began > WARM_UP_S:
            break
    return [min(times_s) for times_s in took_s]
