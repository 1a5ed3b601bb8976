"""Lesson 4: what a call costs alone, in the server and in one large layer; simulated and measured medians; mixed lengths."""

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import pandas as pd
import torch
from lesson import BLUE, SERVER_CORES, capacity, counters, load, quick, serve_all, simulate, stop
from matplotlib.axes import Axes

from loadtests.modes import Server
from loadtests.plan import planner
from workers.settings import Settings

FIXED = {"BATCH_SIZE": 8, "FIXED_DELAY_MS": 600_000, "DEADLINE_S": 600, "QUEUE_TARGET_S": 0}  # exactly 8


def calls(most: int) -> tuple[dict[str, pd.DataFrame], dict[str, pd.DataFrame]]:
    """Time calls of the stock pipeline and of the fast path: of short texts in all sizes, of other lengths in 1 and `most`."""
    timings, lengths = {}, {}
    with planner.measuring_on(SERVER_CORES) as measure:
        for name, fast in (("stock", False), ("fast", True)):
            settings, sizes = Settings(TORCH_THREADS=1, FAST=fast), quick((1, 4, 32), planner.SIZES)
            timings[name] = measure(settings, kinds=["short"], sizes=sizes, budget_s=quick(0.5, 5))
            lengths[name] = measure(settings, sizes=(1, most), budget_s=quick(0.5, 12))
    return timings, lengths


def saturate(server: Server) -> tuple[float, float, float]:
    """At saturation: texts per second, the model's ms per text, texts in a call."""
    before = counters(server)
    per_s = capacity(server, quick(1, 5), users=64)
    after = counters(server)
    counted = ("model_call_seconds_sum", "model_queue_wait_seconds_count", "model_call_seconds_count")
    model_s, texts, calls = (after[name] - before[name] for name in counted)
    return per_s, model_s / texts * 1000, texts / calls


def server_law() -> planner.CostLaw:
    """The law of the server itself, a' + b' n: measured with a model that returns at once, one by one and in batches."""
    # Its answers are right ones, which `capacity` counts.
    instant = {"MODEL": "loadtests.bench.apps:Sleeps", "SLEEP_S": 0}
    servers = serve_all(instant, instant | {"BATCH_SIZE": 32}, cores=SERVER_CORES)
    (one_per_s, _, _), (many_per_s, _, n) = map(saturate, servers)
    stop(*servers)
    b_s = max(0.0, (n / many_per_s - 1 / one_per_s) / max(1.0, n - 1))
    return planner.CostLaw(max(0.0, 1 / one_per_s - b_s), b_s)


def named(ax: Axes, predicted: float, measured: float, y: float) -> None:
    """Name the prediction above its mark and the measurement below its own."""
    ax.annotate("predicted", (predicted, y), (0, 17), textcoords="offset points", ha="center")
    ax.annotate("measured", (measured, y), (0, -29), textcoords="offset points", ha="center", color=BLUE)


def shortest_s(call: Callable[[], Any]) -> float:
    """The shortest of some calls: what the processor can do when nobody disturbs it."""
    took = []
    for _ in range(quick(3, 5)):
        began = time.perf_counter()
        call()
        took.append(time.perf_counter() - began)
    return min(took)


@torch.inference_mode()
def layer_ms(side: int, row_counts: Collection[int]) -> dict[int, float]:
    """The time of a product with a square matrix of this side, by the number of rows that it gets."""
    weights = torch.rand(side, side)
    rows = {n: torch.rand(n, side) for n in row_counts}
    return {n: shortest_s(lambda n=n: rows[n] @ weights.T) * 1000 for n in row_counts}


def simulated_ms(law: planner.CostLaw, delay_ms: float, rate: float) -> tuple[float, float]:
    """The simulated median by the law of the model and the server: the middle one of three runs, and half of how far these are apart."""
    options: dict[str, Any] = {"batch_size": 32, "delay_ms": delay_ms, "rate_per_s": rate, "overhead_s": 0}
    options["duration_s"] = quick(5, 25)
    medians = sorted(simulate(law, seed=seed, **options).latency_ms.median() for seed in range(3))
    return medians[1], (medians[2] - medians[0]) / 2


def in_turns(
    servers: Mapping[str, Server], loads: Mapping[str, float]
) -> dict[tuple[str, str], pd.DataFrame]:
    """Run each server at each load; the same people at the same moments, and turn by turn: moods meet all alike."""
    parts: dict[tuple[str, str], list[pd.DataFrame]] = {(name, at): [] for at in loads for name in servers}
    for turn in range(quick(1, 3)):
        for name, at in parts:
            options = {"rate_per_s": loads[at], "duration_s": quick(1.5, 5), "limit_s": 20, "seed": turn}
            df = load(servers[name], "open", **options)
            parts[name, at].append(df[df.outcome == "200"])
    return {key: pd.concat(turns) for key, turns in parts.items()}


def ms_a_text(df: pd.DataFrame) -> pd.Series:
    """By kind and number of texts in the call. Of the mean: a median would forget the one long text in ten."""
    grouped = df.groupby(["kind", "texts"])
    return grouped.seconds.mean() / grouped.texts.mean() * 1000


def share_of_long(df: pd.DataFrame) -> float:
    """The share of mixed texts that are long: over 60 tokens."""
    alone = df.query("kind == 'mixed' and texts == 1")
    return float((alone.size_tokens > 60).mean())


def gains(ms: Mapping[str, pd.Series], most: int) -> dict[tuple[str, str], float]:
    """The measured gain of batches of `most`, for the fast path and the stock pipeline, mixed and short texts."""
    kinds: Sequence[tuple[str, str]] = [
        (name, kind) for name in ("fast", "stock") for kind in ("mixed", "short")
    ]
    return {(name, kind): ms[name][kind][1] / ms[name][kind][most] for name, kind in kinds}
