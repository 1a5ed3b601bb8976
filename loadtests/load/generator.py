"""Put load on a server and get every request as a row.

with drive.generator() as locust:
    df = locust.run(server.url, "open", rate_per_s=50, duration_s=10)
drive.summary(df, limit_s=2.0)["p99_ms"]
"""

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from loadtests.load.rows import OUTCOMES

ROOT = Path(__file__).resolve().parents[2]
SCENARIOS = ("closed", "open", "ramp", "steps", "spike", "overload", "mixed", "slow", "impatient", "retry")
CAPACITY_USERS = 64
MOST_PER_S = 1500.0  # more than this the generator's core can't send on time


class Generator:
    """A Locust process that runs one scenario after another; importing Locust, a second's work, is done once."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self.process = process

    def run(
        self,
        url: str,
        scenario: str,
        *,
        duration_s: float,
        rate_per_s: float | None = None,
        users: int | None = None,
        limit_s: float = 2.0,
        seed: int = 0,
        texts: str = "short",
        **options: Any,
    ) -> pd.DataFrame:
        """Run one of SCENARIOS against `url` and return a row for every request, none left out.

        due_s, sent_s   seconds since the start at which it was due and was sent; a difference is the generator's fault
        latency_ms      from when it was due
        outcome         one of OUTCOMES; `wrong`: a 200 that answers something else; `lost`: no reply in `timeout_s`
        kind            model or health
        queue_ms, model_ms, batch_size, retry_after_s   what the server said, NaN where it didn't
        attempt         0, or the number of the retry

        `users` is for the closed loop, `rate_per_s` for the others; see locustfile.OPTIONS for more.
        """
        if scenario not in SCENARIOS:
            raise ValueError(f"{scenario} is not a scenario; choose from {', '.join(SCENARIOS)}")
        options |= {"duration_s": duration_s, "limit_s": limit_s, "seed": seed, "texts": texts}
        if rate_per_s is not None:
            options["rate_per_s"] = rate_per_s
        users = (users or 8) if scenario == "closed" else 1
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "rows.csv"
            job = {"scenario": scenario, "url": url, "out": str(out), "users": users, "options": options}
            assert self.process.stdin and self.process.stdout
            self.process.stdin.write(json.dumps(job) + "\n")
            self.process.stdin.flush()
            if self.process.stdout.readline().strip() != "0":
                raise RuntimeError("the load generator failed; its traceback is on standard error")
            df = pd.read_csv(out, dtype={"outcome": str, "kind": str})
        df.attrs["duration_s"] = duration_s
        return df.sort_values("due_s", ignore_index=True)


@contextlib.contextmanager
def generator(cpus: set[int] | None = None) -> Iterator[Generator]:
    """A load generator, on `cpus` only."""
    with subprocess.Popen(
        [sys.executable, "-m", "loadtests.load.locust_process"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,  # it forks: end all of them at once
        preexec_fn=(lambda: os.sched_setaffinity(0, cpus)) if cpus else None,
    ) as process:
        try:
            yield Generator(process)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise


def good(df: pd.DataFrame, limit_s: float) -> pd.Series:
    """Which rows count: a right 200 within the client's own limit."""
    return (df["outcome"] == "200") & (df["latency_ms"] <= limit_s * 1000)


def summary(df: pd.DataFrame, limit_s: float = 2.0) -> dict[str, Any]:
    """Rates, percentiles of all correct responses (late ones too), a count for every outcome, the generator's lateness.

    Goodput is counted while the load lasts, from `limit_s` after its start (or half of it): in overload a queue that was
    empty at first, or is emptied afterwards, is not a speed.
    """
    model = df[df["kind"] == "model"]
    duration_s = df.attrs.get("duration_s") or float(df["due_s"].max())
    answered = model[model["outcome"] == "200"]
    first = model[model["attempt"] == 0]
    late_ms = (first["sent_s"] - first["due_s"]) * 1000
    p50, p95, p99 = answered["latency_ms"].quantile([0.5, 0.95, 0.99])
    counts = model["outcome"].value_counts()
    in_time = model[good(model, limit_s)]
    skip_s = min(limit_s, duration_s / 2)
    done_s = in_time["due_s"] + in_time["latency_ms"] / 1000
    return {
        "offered_per_s": len(first) / duration_s,
        "goodput_per_s": float(((done_s >= skip_s) & (done_s < duration_s)).sum()) / (duration_s - skip_s),
        "good_share": len(in_time) / max(1, len(first)),
        "p50_ms": float(p50),
        "p95_ms": float(p95),
        "p99_ms": float(p99),
        **{outcome: int(counts.get(outcome, 0)) for outcome in OUTCOMES},
        "lateness_p99_ms": float(late_ms.quantile(0.99)),
    }


def throughput_per_s(df: pd.DataFrame, skip_s: float = 0.0) -> float:
    """Correct responses per second, counted when they arrive, from `skip_s` to the end of the run."""
    done_s = df["due_s"] + df["latency_ms"] / 1000
    right = (df["outcome"] == "200") & (df["kind"] == "model")
    end_s = df.attrs["duration_s"]
    return float((right & (done_s >= skip_s) & (done_s < end_s)).sum()) / (end_s - skip_s)


def recovery_s(df: pd.DataFrame, limit_s: float = 2.0, spike_s: float = 1.0, window_s: float = 0.5) -> float:
    """From a spike: seconds from its end until a window of arrivals fares as before it; inf: not within the run.

    As before: 95 % right and in time, and the median at most twice that of the time before the spike.
    """
    model = df[df["kind"] == "model"]
    before_s = (df.attrs["duration_s"] - spike_s) / 3
    before = model[(model["due_s"] < before_s) & (model["outcome"] == "200")]
    usual_ms = 2 * before["latency_ms"].median()
    start_s = before_s + spike_s
    for i in range(int((df.attrs["duration_s"] - start_s - window_s) / 0.1) + 1):
        since_s = start_s + i * 0.1
        window = model[(model["due_s"] >= since_s) & (model["due_s"] < since_s + window_s)]
        if len(window) and good(window, limit_s).mean() >= 0.95 and window["latency_ms"].median() <= usual_ms:
            return i * 0.1
    return math.inf
