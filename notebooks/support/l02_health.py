"""Lesson 2: what a run says of /health while the model worked."""

import pandas as pd


def busy_spans(df: pd.DataFrame) -> list[tuple[float, float]]:
    """Return for each burst of the run when it came and when its last answer did, in seconds."""
    model = df[df.kind == "model"]
    ends = (model.due_s + model.latency_ms / 1000).groupby(model.due_s).max()
    return list(zip(ends.index, ends))


def while_busy(df: pd.DataFrame) -> tuple[float, float, float]:
    """Return the median and the longest wait for /health during bursts, in ms, and the share of texts in a batch of their own."""
    spans, health = busy_spans(df), df[df.kind == "health"]
    waits = health[[any(a <= t < b for a, b in spans) for t in health.due_s]].latency_ms
    return waits.median(), waits.max(), (df.batch_size == 1).sum() / df.batch_size.count()
