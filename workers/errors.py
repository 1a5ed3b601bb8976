"""Every exception of the server, and the HTTP status that each becomes.

Unanswered                    an input that gets no answer
 ├── Rejected            503  not admitted: stopping, loading, queue full, or it would be too late anyway
 ├── Late                504  its deadline passed, or was certain to pass, before its answer
 └── ModelFailed         500  the model raised on this very input
      ├── ModelDied      500  the process that held it died or hung: it is not tried again
      └── Quarantined    422  its process has died of this input too often
ValueError
 ├── Malformed           400  not of the form that the task takes
 └── Unprocessable       422  well-formed, but the model can't answer it
      └── Quarantined
CannotLoad                    the model can't be loaded: the server says why and exits
"""

import math

TOO_SHORT = "the time left is shorter than the model takes; allow more time"
STOPPING = "the server is shutting down; retry"
LOADING = "the model is still loading"
# How sentences end whose error has a `retry_after_s`: in HTTP's Retry-After, in a line of a stream, in gRPC's RetryInfo.
RETRY_LATER = "retry after the time that comes with this error"
QUEUE_FULL = f"the queue is full; {RETRY_LATER}"


class Unanswered(Exception):
    """Why there is no answer; `index` says to which of a request's inputs, where there are several."""

    index: int | None = None


class Rejected(Unanswered):
    """Not admitted. `retry_after_s`: in how many whole seconds the work ahead should be done, at least 1."""

    def __init__(self, reason: str, retry_after_s: float = 0.0) -> None:
        super().__init__(reason)
        self.retry_after_s = max(1, math.ceil(retry_after_s))


class Late(Unanswered):
    """The deadline came, or was certain to come, before the answer."""


class ModelFailed(Unanswered):
    """The model raised; the cause is chained."""


class ModelDied(ModelFailed):
    """The model's process died or hung with these inputs in it; running them again might kill the next one."""


class Malformed(ValueError):
    """The input does not have the form that the task takes; the message says what to send."""


class Unprocessable(ValueError):
    """The input is well-formed, but the model can't answer it; the message says what to change."""


class Quarantined(ModelFailed, Unprocessable):
    """The model's process has died of this input too often. Not the server's fault, so 422."""


class CannotLoad(RuntimeError):
    """The model can't be loaded; the message says why, in one line."""
