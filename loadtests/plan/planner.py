"""What will a setting do? Measure the model, fit its cost law, run the real ModelLoop on a virtual clock.

    $ make plan
    $ python -m loadtests.plan.planner --rate 50 --p99-ms 200

The law: a call with n texts takes a + b * n seconds. Batching can save a, never b.
"""

import argparse
import asyncio
import contextlib
import itertools
import math
import multiprocessing
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from tqdm import tqdm

from loadtests import arguments
from loadtests.arguments import above
from loadtests.load import generator, texts
from loadtests.load.rows import Row
from loadtests.modes import MODES, Mode, Server, start, with_model
from loadtests.plan.fixed_delay import FixedDelay
from workers import tasks
from workers.errors import Late, Rejected
from workers.jobs import Answer
from workers.loop import ModelLoop
from workers.settings import Settings

SIZES = (1, 2, 4, 8, 16, 32)
MOST_REQUESTS = 10_000  # of one simulation: some seconds of work
OVERHEAD_S = 0.0007  # HTTP, checks and JSON of one request, where not measured


@dataclass(frozen=True)
class CostLaw:
    """seconds = a_s + b_s * n for a call with n texts, on average.

    `ratios`: what calls really took, as multiples of that, by how many texts they had; empty: all took just that.
    """

    a_s: float
    b_s: float
    ratios: Mapping[int, Sequence[float]] = field(default_factory=dict, hash=False)

    def seconds(self, n: int) -> float:
        """What a call with n texts takes on average."""
        return self.a_s + self.b_s * n

    @property
    def spread(self) -> float:
        """The coefficient of variation of the smallest calls."""
        return float(np.std(self.ratios[min(self.ratios)])) if self.ratios else 0.0

    def draw_s(self, n: int, rng: random.Random) -> float:
        """What one call with n texts takes: as some call of about that size did."""
        if not self.ratios:
            return self.seconds(n)
        alike = min(self.ratios, key=lambda size: abs(math.log(size / n)))
        return self.seconds(n) * rng.choice(self.ratios[alike])

    @property
    def most_gained(self) -> float:
        """How many times more texts per second batches without end would give: (a + b) / b."""
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
    """Time the real model: a row (texts, kind, size_tokens, seconds) for every call.

    Sizes and kinds take turns with the same texts: a slow moment of the machine hits all of them, and so do long ones.
    """
    model, check = load_model(settings)
    rng = random.Random(seed)
    streams = {kind: texts.stream(kind, rng, texts.example_of(settings)) for kind in kinds}
    rows: list[tuple[int, str, int, float]] = []
    sizes = list(sizes)
    until = time.perf_counter() + budget_s
    while not rows or time.perf_counter() < until:
        for kind, stream in streams.items():
            questions = itertools.islice(stream, max(sizes))
            queries = [check(question.inputs, question.parameters) for question in questions]
            for batch in (queries[i : i + size] for size in sizes for i in range(0, len(queries), size)):
                began = time.perf_counter()
                model([query.content for query in batch])
                took_s = time.perf_counter() - began
                rows.append((len(batch), kind, sum(query.size for query in batch), took_s))
    return pd.DataFrame(rows, columns=["texts", "kind", "size_tokens", "seconds"])


@cache
def load_model(settings: Settings) -> tuple[Any, Any]:
    """The model and its task's check, loaded and warm, once for all measurements of a process."""
    task = tasks.make(settings)
    model = task.load(0)
    for batch in tasks.warm_up_batches(task, max(SIZES)):
        model([query.content for query in batch])
    if task.media:  # an image or a sound in base64, which goes over HTTP in a list
        return model, lambda inputs, parameters: task.check(inputs[0], parameters)
    return model, task.check


@contextlib.contextmanager
def measuring_on(cpus: set[int] | None) -> Iterator[Callable[..., pd.DataFrame]]:
    """`measure` in a process of its own, on `cpus` only, where the models stay loaded from one call to the next."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn, _pin, (cpus,)) as pool:
        yield lambda settings, **options: pool.submit(_measure, settings, **options).result()


def measure_together(cores: Iterable[int], settings: Settings, **options: Any) -> pd.DataFrame:
    """`measure` on each of the cores at the same time: what they share makes all of them slower."""
    with contextlib.ExitStack() as stack, ThreadPoolExecutor() as threads:
        measures = [stack.enter_context(measuring_on({core})) for core in cores]
        return pd.concat(threads.map(lambda measure_there: measure_there(settings, **options), measures))


def _measure(settings: Settings, **options: Any) -> pd.DataFrame:
    """`measure`, which Ctrl-C ends; between measurements the parent decides when the process does."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return measure(settings, **options)
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def _pin(cpus: set[int] | None) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if cpus:
        os.sched_setaffinity(0, cpus)


def fit(df: pd.DataFrame) -> CostLaw:
    """The law through the mean time of each number of texts, by least squares of the relative errors.

    Means, because it is their sum that decides on the throughput; relative, because 1 ms matters more at 1 text than at 32.
    """
    by_size = df.groupby("texts")["seconds"]
    mean = by_size.mean()
    n, seconds = mean.index.to_numpy(float), mean.to_numpy()
    ratios = {int(size): (group / group.mean()).tolist() for size, group in by_size}
    if len(n) == 1:
        return CostLaw(0.0, seconds[0] / n[0], ratios)
    matrix = np.stack([np.ones_like(n), n], axis=1) / seconds[:, None]
    (a, b), *_ = np.linalg.lstsq(matrix, np.ones_like(n), rcond=None)
    if a < 0:
        a, b = 0.0, float(np.median(seconds / n))
    elif b < 0:
        a, b = float(np.median(seconds)), 0.0
    return CostLaw(float(a), float(b), ratios)


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


def simulate(
    cost: CostLaw,
    *,
    batch_size: int = 1,
    delay_ms: float | None = None,
    max_queue: int = 256,
    deadline_s: float = 10.0,
    queue_target_s: float = Settings.QUEUE_TARGET_S,
    instances: int = 1,
    rate_per_s: float = 0.0,
    duration_s: float = 60.0,
    arrivals_s: Iterable[float] | None = None,
    seed: int = 0,
    overhead_s: float = OVERHEAD_S,
    waking_s: float = 0.0,
    refusal_s: float = 0.0,
) -> pd.DataFrame:
    """Run the real ModelLoop on a virtual clock; same columns as `generator.Generator.run`.

    Requests come by a Poisson process of `rate_per_s` for `duration_s`, or at `arrivals_s` where given. The model's core
    also does the work around the model, see Overhead: it is added to the next call. `delay_ms`: a fixed batching delay
    instead of what the server does.
    """
    rng = random.Random(seed)
    arrivals_s = poisson(rng, rate_per_s, duration_s) if arrivals_s is None else arrivals_s
    owed_s = 0.0

    async def model(queries: list[Any]) -> list[Any]:
        nonlocal owed_s
        seconds, owed_s = cost.draw_s(len(queries), rng) + owed_s, 0.0
        await asyncio.sleep(seconds)
        return queries

    async def arrive(loop: ModelLoop, due_s: float, rows: list[Row]) -> None:
        """One request: submit it and note what came of it."""
        nonlocal owed_s
        nan, answer, retry_after_s = math.nan, None, math.nan
        began = loop.now()
        owed_s += overhead_s + waking_s
        try:
            answer, outcome = await loop.submit(None), "200"
        except Rejected as exc:
            outcome, retry_after_s = "503", float(exc.retry_after_s)
            owed_s += refusal_s - overhead_s - waking_s
        except Late:
            outcome = "504"
        latency_ms = (loop.now() - began) * 1000
        times = in_ms(answer) if answer else (nan, nan, nan)
        rows.append(Row(due_s, due_s, latency_ms, outcome, "model", *times, retry_after_s, 0))

    async def traffic() -> list[Row]:
        make = ModelLoop if delay_ms is None else partial(FixedDelay, delay_s=delay_ms / 1000)
        loop = make(
            batch_size=batch_size,
            max_queue=max_queue,
            budget_s=deadline_s,
            target_s=queue_target_s,
        )
        consumers = [asyncio.create_task(loop.consume(model)) for _ in range(instances)]
        await asyncio.sleep(0)
        for n in (1, batch_size) * 4:  # a server that has just started has been warmed up too
            loop.cost_model.observe(n, cost.seconds(n) + overhead_s * n)
        clock = asyncio.get_running_loop()
        rows: list[Row] = []
        requests = []
        began = clock.time()
        for due_s in arrivals_s:
            await asyncio.sleep(began + due_s - clock.time())
            requests.append(asyncio.create_task(arrive(loop, due_s, rows)))
        await asyncio.gather(*requests)
        for consumer in consumers:
            consumer.cancel()
        await asyncio.gather(*consumers, return_exceptions=True)
        return rows

    with asyncio.Runner(loop_factory=VirtualClock) as runner:
        df = pd.DataFrame(runner.run(traffic()), columns=Row._fields)
    df.attrs["duration_s"] = duration_s
    return df.sort_values("due_s", ignore_index=True)


def poisson(rng: random.Random, rate_per_s: float, duration_s: float) -> Iterator[float]:
    """When requests come that know nothing of each other."""
    due_s = rng.expovariate(rate_per_s)
    while due_s < duration_s:
        yield due_s
        due_s += rng.expovariate(rate_per_s)


def in_ms(answer: Answer) -> tuple[float, float, float]:
    """queue_ms, model_ms, batch_size."""
    return answer.queue_s * 1000, answer.model_s * 1000, answer.batch_size


# --- planning ---------------------------------------------------------------------------------------------------------


class Overhead(NamedTuple):
    """Processor seconds that a request costs besides the model.

    `waking_s` more where it comes by itself, as strangers do, whether the model computes or not: under concurrency many share one
    waking of the event loop.
    """

    overhead_s: float = OVERHEAD_S
    waking_s: float = 0.0
    refusal_s: float = 0.0  # of a 503, in all


def measure_overhead(
    cpus: set[int] | None = None, duration_s: float = 2.0, mode: Mode = MODES["thread"]
) -> Overhead:
    """What a request costs besides the model: the real server with a model that returns at once, or never."""

    def cost_s(server: Server, outcome: str, **load: Any) -> float:
        locust.run(server.url, duration_s=0.5, **load)
        before_s = server.cpu_s()
        df = locust.run(server.url, duration_s=duration_s, **load)
        return (server.cpu_s() - before_s) / max(1, (df["outcome"] == outcome).sum())

    with generator.generator() as locust:
        with start(with_model(mode, "Checked"), cpus=cpus) as server:
            alone_s = cost_s(server, "200", scenario="open", rate_per_s=300)
            among_many_s = cost_s(server, "200", scenario="closed", users=generator.CAPACITY_USERS)
        stuck = {"MAX_QUEUE": "1", "BATCH_SIZE": "1", "DEADLINE_S": "1000"}
        with start(with_model(mode, "Stuck"), stuck, cpus=cpus) as server:
            refusal_s = cost_s(server, "503", scenario="open", rate_per_s=1000, timeout_s=0.5)
    return Overhead(among_many_s, max(0.0, alone_s - among_many_s), refusal_s)


@dataclass(frozen=True)
class Setting:
    """What the planner chooses among; `cost` is the law of one of its `instances`."""

    cost: CostLaw
    overhead: Overhead
    batch_size: int = 1
    instances: int = 1

    @property
    def name(self) -> str:
        return f"batch {self.batch_size}" + (f", {self.instances} instances" * (self.instances > 1))

    @property
    def capacity_per_s(self) -> float:
        return predict_capacity(
            self.cost, self.batch_size, self.instances, overhead_s=self.overhead.overhead_s
        )

    def slower(self, one_s: float) -> "Setting":
        """The same where a call with one text was seen to take `one_s` on average, and all others longer in proportion."""
        cost, factor = self.cost, one_s / self.cost.seconds(1)
        return replace(self, cost=replace(cost, a_s=cost.a_s * factor, b_s=cost.b_s * factor))

    def summary(self, rate_per_s: float, limit_s: float, duration_s: float = 30.0) -> dict[str, Any]:
        """What `generator.summary` would say of this setting at this rate."""
        duration_s = min(duration_s, MOST_REQUESTS / rate_per_s)
        df = simulate(
            self.cost,
            batch_size=self.batch_size,
            max_queue=max_queue(self.capacity_per_s, limit_s),
            deadline_s=limit_s,
            instances=self.instances,
            rate_per_s=rate_per_s,
            duration_s=duration_s,
            **self.overhead._asdict(),
        )
        return generator.summary(df, limit_s)


def max_queue(capacity_per_s: float, limit_s: float) -> int:
    """What can be answered within the limit: a longer queue holds only requests that will be late."""
    return max(1, math.ceil(capacity_per_s * limit_s))


def verdict(cost: CostLaw, overhead_s: float) -> str:
    """Whether batching pays, in words."""
    one = predict_capacity(cost, 1, overhead_s=overhead_s)
    gains = {n: predict_capacity(cost, n, overhead_s=overhead_s) / one for n in SIZES[1:]}
    ceiling = (cost.seconds(1) + overhead_s) / (cost.b_s + overhead_s) if cost.b_s + overhead_s else math.inf
    law = (
        f"A call with n inputs takes {cost.a_s * 1e3:.2f} ms + n x {cost.b_s * 1e3:.2f} ms, "
        f"and a request costs {overhead_s * 1e3:.2f} ms besides."
    )
    if gains[SIZES[-1]] < 1.1:
        return (
            f"{law}\nBatching does not pay: even without end it would give {ceiling:.2f} times the answers."
        )
    enough = next(n for n in SIZES[1:] if gains[n] > 0.9 * gains[SIZES[-1]])
    return (
        f"{law}\nBatching pays: {gains[SIZES[-1]]:.2f} times the answers at batches of {SIZES[-1]}, "
        f"{ceiling:.2f} times at most; batches of {enough} suffice for nine tenths of the former."
    )


def recommend(choices: list[Setting], rate_per_s: float, p99_ms: float, limit_s: float) -> Setting | None:
    """The first of `choices` that answers 99 % in time with p99 below `p99_ms`; put the simplest first."""
    for choice in choices:
        if choice.capacity_per_s > rate_per_s:
            found = choice.summary(rate_per_s, limit_s)
            if found["p99_ms"] <= p99_ms and found["good_share"] >= 0.99:
                return choice
    return None


def markdown(rows: list[dict[str, Any]]) -> str:
    """Rows as a Markdown table."""
    head = list(rows[0])
    body = [[f"{v:.0f}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows]
    widths = [max(len(cell) for cell in column) for column in zip(head, *body, strict=True)]
    lines = [head, ["-" * width for width in widths], *body]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |"
        for line in lines
    )


def table(choices: list[Setting], limit_s: float, duration_s: float) -> str:
    """Predicted latency against offered load, and goodput in overload."""
    best = max(choice.capacity_per_s for choice in choices)
    rates = [best * share for share in (0.25, 0.5, 0.8)]
    rows: list[dict[str, Any]] = []
    for choice in tqdm(choices, "Simulating", delay=2.0, leave=False, disable=None):
        row: dict[str, Any] = {"setting": choice.name, "capacity /s": choice.capacity_per_s}
        for rate in rates:
            found = choice.summary(rate, limit_s, duration_s)
            served = found["good_share"] >= 0.95
            row[f"p50 / p99 ms at {rate:.0f}/s"] = (
                f"{found['p50_ms']:.0f} / {found['p99_ms']:.0f}" if served else "overloaded"
            )
        overload = choice.summary(2 * choice.capacity_per_s, limit_s, duration_s / 2)
        row["goodput /s at 2 x"] = overload["goodput_per_s"]
        rows.append(row)
    return markdown(rows)


def choices_for(laws: dict[int, CostLaw], overhead: Overhead) -> list[Setting]:
    """All that is considered, the simplest first: one instance, small batches."""
    return [
        Setting(law, overhead, batch_size, instances)
        for instances, law in sorted(laws.items())
        for batch_size in SIZES
    ]


def main() -> int:
    """Measure, then print what to expect and what to set."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--rate", type=above(0.0), help="requests per second to plan for; default: 80 %% of one by one"
    )
    parser.add_argument("--p99-ms", type=above(0.0), help="the latency to keep; default: ten single calls")
    parser.add_argument(
        "--limit-s", type=above(0.0), default=2.0, help="an answer after this is worth nothing"
    )
    parser.add_argument("--kind", choices=texts.KINDS, default="short", help="the texts to plan for")
    parser.add_argument("--quick", action="store_true", help="measure for 2 seconds, simulate less")
    options = parser.parse_args()

    import torch  # takes seconds: not where only the simulator is wanted

    settings, cores = Settings.read(), sorted(os.sched_getaffinity(0))
    budget_s, duration_s = (2.0, 10.0) if options.quick else (8.0, 30.0)
    name = os.path.basename(settings.MODEL)
    print(f"Measuring {name} on {len(cores)} cores, about {2.5 * budget_s + 10:.0f} s ...", flush=True)
    try:
        kinds = texts.kinds_of(settings)
        with measuring_on(None) as measure_there:
            measured = measure_there(settings, kinds=kinds, budget_s=budget_s)
    except Exception as exc:  # of the model, whatever it is: the server's own log says more
        print(f"{name} can't be measured as TASK={settings.TASK}: {exc}", file=sys.stderr)
        return 2
    if options.kind not in kinds:
        parser.error(f"--kind {options.kind}: this task takes no texts of other lengths; leave it out")
    if not options.quick:
        print("Measuring what HTTP costs a request, about 30 s ...", flush=True)
    overhead = Overhead() if options.quick else measure_overhead()
    overhead_s = overhead.overhead_s
    medians = (
        measured.assign(ms=measured["seconds"] * 1e3).groupby(["kind", "texts"])["ms"].median().unstack()
    )
    what = f"{options.kind} texts" if len(kinds) > 1 else "the task's example"
    print("\nMilliseconds per call, by how many inputs it has:\n")
    print(
        markdown(
            [
                {
                    "inputs": kind if len(kinds) > 1 else "example",
                    **{str(n): f"{ms:.1f}" for n, ms in row.items()},
                }
                for kind, row in medians.iterrows()
            ]
        )
    )
    of_kind = measured[measured["kind"] == options.kind]
    laws = {1: fit(of_kind)}
    print(f"\nFor {what}: {verdict(laws[1], overhead_s)}")
    for kind in set(kinds) - {options.kind}:
        gain = predict_capacity(fit(measured[measured["kind"] == kind]), SIZES[-1], overhead_s=overhead_s)
        gain /= predict_capacity(fit(measured[measured["kind"] == kind]), overhead_s=overhead_s)
        print(f"For {kind} texts batches of {SIZES[-1]} give {gain:.2f} times the answers.")
    on_cpu = settings.DEVICE == "cpu" or (settings.DEVICE == "auto" and not torch.cuda.is_available())
    if len(cores) > 1 and on_cpu:
        single = replace(settings, TORCH_THREADS=1)
        laws[len(cores)] = fit(measure_together(cores, single, kinds=[options.kind], budget_s=budget_s / 2))

    choices = choices_for(laws, overhead)
    shown = [c for c in choices if c.batch_size in (1, 8, 32)]
    print("\nPredicted by the real loop on a virtual clock:\n", flush=True)
    print(table(shown, options.limit_s, duration_s))
    rate = options.rate or 0.8 * choices[0].capacity_per_s
    p99_ms = options.p99_ms or 1e4 * (laws[1].seconds(1) + overhead_s)
    print(f"\nFor {rate:.0f} requests per second with p99 below {p99_ms:.0f} ms:", end="")
    if not (choice := recommend(choices, rate, p99_ms, options.limit_s)):
        print(" no setting on this machine does that; ask less of it, or take a faster model or machine.")
        return 1
    found = choice.summary(rate, options.limit_s)
    offload = " OFFLOAD=process" if choice.instances > 1 else ""
    print(
        f"\n\n    BATCH_SIZE={choice.batch_size} "
        f"MAX_QUEUE={max_queue(choice.capacity_per_s, options.limit_s)} INSTANCES={choice.instances}{offload} "
        f"DEADLINE_S={options.limit_s:g}\n\n"
        f"    predicted: p50 {found['p50_ms']:.0f} ms, p99 {found['p99_ms']:.0f} ms, "
        f"{found['good_share']:.1%} answered in time; capacity {choice.capacity_per_s:.0f} requests per second"
    )
    return 0


if __name__ == "__main__":
    arguments.run(main)
