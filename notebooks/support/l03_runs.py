"""Lesson 3: runs of strangers against a server, and what its own counters and a simulation say of them."""

import signal
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd
from lesson import capacity, counters, get, load, quick

from loadtests.modes import Server


def saturate(server: Server, seconds: float) -> tuple[float, float]:
    """Return the capacity in texts per second, and the seconds between two calls."""
    before = counters(server)
    per_s = capacity(server, seconds)
    after = counters(server)
    calls, model_s = (
        after[name] - before[name] for name in ("model_call_seconds_count", "model_call_seconds_sum")
    )
    return per_s, max(0.0, 1 / per_s - model_s / calls)


def strangers(server: Server, rate_per_s: float, between_s: float, run_s: float, seed: int) -> pd.DataFrame:
    """Random arrivals: a row for each text that was answered, with its call's time; in `attrs` S and rho of the whole run."""
    df = load(server, "open", rate_per_s=rate_per_s, duration_s=run_s, limit_s=60, seed=seed)
    df = df[df.outcome == "200"].sort_values("sent_s", ignore_index=True)
    df["call_s"] = df.model_ms / 1000 + between_s
    df.attrs |= {"S": df.call_s.mean(), "rho": len(df) / run_s * df.call_s.mean()}
    return df


def run_at(server: Server, fraction: float, run_s: float) -> pd.DataFrame:
    """Strangers at this fraction of the capacity, which is measured just before."""
    per_s, between_s = saturate(server, quick(0.5, 1.5))
    df = strangers(server, fraction * per_s, between_s, run_s, seed=int(fraction * 100))
    df.attrs |= {"capacity": per_s, "asked": fraction * per_s * run_s}
    return df


def pause_factor(runs: Sequence[pd.DataFrame]) -> float:
    """How many times as long a call after a pause takes as one right behind another: the median of the runs."""
    free = [df.queue_ms < 1 for df in runs]  # the model was free when they came
    return float(
        np.nanmedian([df.model_ms[one].mean() / df.model_ms[~one].mean() for df, one in zip(runs, free)])
    )


def band(
    waits_of: Callable[..., np.ndarray], rhos: Sequence[float], texts: float
) -> tuple[np.ndarray, np.ndarray]:
    """Mean waits of simulated runs, calls alike, that would have `texts` calls at full load: nine in ten lie between the two."""

    def short_runs(rho: float) -> list[float]:
        n, rng = max(1, int(rho * texts)), np.random.default_rng(0)
        return [
            waits_of(rng.exponential(1 / rho, n).cumsum(), np.ones(n)).mean() for _ in range(quick(20, 60))
        ]

    least, most = np.array([np.quantile(short_runs(rho), (0.05, 0.95)) for rho in rhos]).T
    return least, most


def in_calls(wait: float) -> str:
    """A wait for a sentence: "3.2"."""
    return f"{wait:.1f}" if wait < 1e3 else "without end"


def parts_ms(df: pd.DataFrame) -> dict[str, float]:
    """Where the time of a run's answers went, in ms on average."""
    late_ms = (df.sent_s - df.due_s) * 1000
    return {
        "sent late by the client": late_ms.mean(),
        "queue": df.queue_ms.mean(),
        "model": df.model_ms.mean(),
        "HTTP, both sides": (df.latency_ms - late_ms - df.queue_ms - df.model_ms).mean(),
        "all, ms": df.latency_ms.mean(),
    }


class Looks:
    """Looks at the length of a server's queue ten times per second: more often would cost the server time."""

    def __init__(self, server: Server) -> None:
        self.server, self.seen, self.done = server, list[int](), threading.Event()

    def __enter__(self) -> "Looks":
        self.before, self.began = counters(self.server), time.perf_counter()
        threading.Thread(target=self.look, daemon=True).start()
        return self

    def look(self) -> None:
        while not self.done.wait(0.1):
            self.seen.append(get(self.server, "health").json["queue_depth"])

    def __exit__(self, *error: object) -> None:
        """Note what all waits grew by per second: λW."""
        seconds, name = time.perf_counter() - self.began, "model_queue_wait_seconds_sum"
        self.done.set()
        self.little = (counters(self.server)[name] - self.before[name]) / seconds


def with_hiccup(server: Server, scenario: str, **options: Any) -> pd.DataFrame:
    """A run in whose middle the server stands still for a second."""
    name = "model_queue_wait_seconds_count"
    started = counters(server)[name]

    def hiccup() -> None:
        while counters(server).get(name, 0) < started + 10:
            time.sleep(0.02)
        time.sleep(1)
        server.process.send_signal(signal.SIGSTOP)
        time.sleep(1)
        server.process.send_signal(signal.SIGCONT)

    thread = threading.Thread(target=hiccup)
    thread.start()
    df = load(server, scenario, limit_s=60, **options)
    thread.join()
    return df
