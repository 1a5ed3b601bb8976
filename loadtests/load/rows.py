"""What is known of one request: a row of every run, measured or simulated."""

from typing import NamedTuple

# `wrong`: a 200 that answers something else; `lost`: no reply, or none in time; `left`: the client's own will
OUTCOMES = ("200", "503", "504", "other", "wrong", "lost", "left")


class Row(NamedTuple):
    """One request; times in seconds since the start of the run, NaN where the server said nothing."""

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
