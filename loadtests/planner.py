"""What will a setting do? Measure the model, fit its cost law, run the real ModelLoop on a virtual clock.

    $ make plan
    $ python -m loadtests.planner --rate 50 --p99-ms 200

The law: a call with n texts takes a + b * n seconds. Batching can save a, never b.
"""

import asyncio
import math
import multiprocessing
import os
import random
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from loadtests import texts
from workers.loop import Answer, Late, ModelLoop, Refused
from workers.settings import Settings

SIZES = (1, 2, 4, 8, 16, 32)
OVERHEAD_S = 0.0007  # HTTP, checks and JSON of one request, where not measured


@dataclass(frozen=True)
class CostLaw:
    """seconds = a_s + b_s * n for a call with n texts; `spread`: the relative deviation of single calls from it."""

    a_s: float
    b_s: float
    spread: float = 0.0

    def seconds(self, n: int) -> float:
        """What a call with n texts takes on average."""
        return self.a_s + self.b_s * n

    @property
    def most_gained(self) -> float:
        """How many times more texts a second batches without end would give: (a + b) / b."""
        return self.seconds(1) / self.b_s if self.b_s else math.inf


# --- measuring --------------------------------------------------------------------------------------------------------


def measure(
    settings: Settings,
    *,
    kinds: Iterable[str] = texts.KINDS,
    sizes: Iterable[int] = SIZES,
    budget_s: float = 6.0,
    seed: int = 0,
) -> pd.DataFrame:
    """Time the real model: a row (texts, kind, size_tokens, seconds) for every call, sizes and kinds taken in turn."""
    from workers.model import InputCheck, Model, Query

    model = Model(replace(settings, BATCH_SIZE=max(sizes)))
    tokens = InputCheck(settings)
    rng = random.Random(seed)
    streams = {kind: texts.stream(kind, rng) for kind in kinds}
    rows: list[tuple[int, str, int, float]] = []
    until = time.perf_counter() + budget_s
    while not rows or time.perf_counter() < until:  # in turn: a slow moment of the machine hits all of them
        for n in sizes:
            for kind, stream in streams.items():
                queries = [Query(next(stream).text) for _ in range(n)]
                size = sum(tokens(query.text) for query in queries)
                began = time.perf_counter()
                model(queries)
                rows.append((n, kind, size, time.perf_counter() - began))
    return pd.DataFrame(rows, columns=["texts", "kind", "size_tokens", "seconds"])


def measure_on(cpus: set[int] | None, settings: Settings, **options: Any) -> pd.DataFrame:
    """`measure` in a process of its own, on `cpus` only."""
    with multiprocessing.get_context("spawn").Pool(1, _pin, (cpus,)) as pool:
        return pool.apply(measure, (settings,), options)


def _pin(cpus: set[int] | None) -> None:
    if cpus:
        os.sched_setaffinity(0, cpus)


def fit(df: pd.DataFrame) -> CostLaw:
    """The law through the median time of each number of texts, by least squares of the relative errors.

    Medians, because a time is only ever disturbed upwards; relative, because 1 ms matters more at 1 text than at 32.
    """
    median = df.groupby("texts")["seconds"].median()
    n, seconds = median.index.to_numpy(float), median.to_numpy()
    if len(n) == 1:
        return CostLaw(0.0, seconds[0] / n[0])
    matrix = np.stack([np.ones_like(n), n], axis=1) / seconds[:, None]
    (a, b), *_ = np.linalg.lstsq(matrix, np.ones_like(n), rcond=None)
    if a < 0:
        a, b = 0.0, float(np.median(seconds / n))
    elif b < 0:
        a, b = float(np.median(seconds)), 0.0
    single = df[df["texts"] == n[0]]["seconds"]
    low, high = single.quantile([0.16, 0.84])
    return CostLaw(float(a), float(b), float((high - low) / 2 / single.median()))


def predict_capacity(
    cost: CostLaw, batch_size: int = 1, instances: int = 1, *, overhead_s: float = OVERHEAD_S
) -> float:
    """Answers a second when the queue is never empty.

    On the cores that the model computes on, each request also costs `overhead_s` of HTTP.
    """
    return instances * batch_size / (cost.seconds(batch_size) + overhead_s * batch_size)


# --- simulating -------------------------------------------------------------------------------------------------------


class VirtualClock(asyncio.SelectorEventLoop):
    """An event loop that never waits: its time jumps to the next timer. (looptime can also wait for threads.)"""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 0.0
        self._selector.select = self._jump  # type: ignore[attr-defined]

    def time(self) -> float:
        return self.now_s

    def _jump(self, timeout_s: float | None) -> list[Any]:
        if timeout_s is None:
            raise RuntimeError("the simulation waits for something that will never come")
        self.now_s += timeout_s
        return []


class Silent:
    """Stands in for Metrics: counting into Prometheus is a fifth of a simulated request."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return ignore


class Arrival(NamedTuple):
    """One simulated request, as drive.run would report it."""

    due_s: float
    sent_s: float
    latency_ms: float
    outcome: str
    kind: str
    queue_ms: float
    model_ms: float
    batch_size: float
    retry_after_s: float
    attempt: int


def simulate(
    cost: CostLaw,
    *,
    batch_size: int = 1,
    window_ms: float = 0.0,
    max_queue: int = 256,
    deadline_s: float = 10.0,
    instances: int = 1,
    rate_per_s: float,
    duration_s: float = 60.0,
    seed: int = 0,
    overhead_s: float = OVERHEAD_S,
) -> pd.DataFrame:
    """Run the real ModelLoop under Poisson arrivals on a virtual clock; same columns as `drive.run`."""
    rng = random.Random(seed)

    async def model(queries: list[Any]) -> list[Any]:
        seconds = (cost.seconds(len(queries)) + overhead_s * len(queries)) * noise(rng, cost.spread)
        await asyncio.sleep(seconds)
        return queries

    async def traffic() -> list[Arrival]:
        loop = ModelLoop(
            batch_size=batch_size,
            window_s=window_ms / 1000,
            max_queue=max_queue,
            budget_s=deadline_s,
            metrics=Silent(),  # type: ignore[arg-type]
        )
        consumers = [asyncio.create_task(loop.consume(model)) for _ in range(instances)]
        await asyncio.sleep(0)
        for n in (1, batch_size) * 4:  # a server that has just started has been warmed up too
            loop.speed.observe(n, cost.seconds(n) + overhead_s * n)
        clock, rows, due_s = asyncio.get_running_loop(), [], rng.expovariate(rate_per_s)
        began, requests = clock.time(), []
        while due_s < duration_s:
            await asyncio.sleep(began + due_s - clock.time())
            requests.append(asyncio.create_task(arrive(loop, due_s, rows)))
            due_s += rng.expovariate(rate_per_s)
        await asyncio.gather(*requests)
        for consumer in consumers:
            consumer.cancel()
        await asyncio.gather(*consumers, return_exceptions=True)
        return rows

    with asyncio.Runner(loop_factory=VirtualClock) as runner:
        df = pd.DataFrame(runner.run(traffic()), columns=Arrival._fields)
    df.attrs["duration_s"] = duration_s
    return df.sort_values("due_s", ignore_index=True)


async def arrive(loop: ModelLoop, due_s: float, rows: list[Arrival]) -> None:
    """One request: submit it and note what came of it."""
    nan, answer, retry_after_s = math.nan, None, math.nan
    clock = asyncio.get_running_loop()
    began = clock.time()
    try:
        answer, outcome = await loop.submit(None), "200"
    except Refused as exc:
        outcome, retry_after_s = "503", float(exc.retry_after_s)
    except Late:
        outcome = "504"
    latency_ms = (clock.time() - began) * 1000
    times = in_ms(answer) if answer else (nan, nan, nan)
    rows.append(Arrival(due_s, due_s, latency_ms, outcome, "model", *times, retry_after_s, 0))


def ignore(*args: Any, **kwargs: Any) -> None:
    """Count nothing."""


def in_ms(answer: Answer) -> tuple[float, float, float]:
    """queue_ms, model_ms, batch_size."""
    return answer.queue_s * 1000, answer.model_s * 1000, answer.batch_size


def noise(rng: random.Random, spread: float) -> float:
    """A factor around 1: model calls are never quite alike."""
    return rng.lognormvariate(-(spread**2) / 2, spread) if spread else 1.0
