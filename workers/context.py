"""RequestContext: what is known of one HTTP request while it is in progress.

It stands beside the folders, since all of them share it: `web/` fills it, a task's check looks at the time left, protocols
choose its form of errors, and the request log reads it at the end.
"""

import math
import random
import re
import time
from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from workers.jobs import Answer

REQUEST_ID = re.compile(r"[\w.-]{1,128}", re.ASCII)
KEY = "request_context"  # in the ASGI scope

ErrorBody = Callable[[int, str], Any]  # the JSON of an error: of its status and its sentence


def error_body(status: int, sentence: str) -> dict[str, str]:
    """Return the JSON of an error, for all but the protocols that have a form of their own."""
    return {"error": sentence}


@dataclass(slots=True, eq=False)
class RequestContext:
    """Made by the first middleware that sees the request; `web/middleware.py` fills it."""

    headers: dict[bytes, bytes]  # names in lower case: Starlette's own look-ups walk through all of them
    request_id: str  # the client's own if it is short and plain
    arrived_at: float = field(default_factory=time.monotonic)
    path: str = ""  # without root_path, and without a slash at the end
    # The path as its route has it, empty if there is none: what metrics and spans may be named after.
    route: str = ""
    budget_s: float = math.inf  # from its arrival until its answer is worth nothing
    error_body: ErrorBody = error_body
    answers: list[Answer] = field(default_factory=list)  # what was answered: for the log and the spans
    trace_id: str = ""
    given_up: bool = False  # its client has left, or its time is over: work for it may stop

    @property
    def left_s(self) -> float:
        """The seconds left of its budget, at least 0."""
        return max(0.0, self.budget_s - (time.monotonic() - self.arrived_at))


def context_of(scope: MutableMapping[str, Any]) -> RequestContext:
    """Return the context of the request with this ASGI scope."""
    context: RequestContext | None = scope.get(KEY)
    if context is None:
        headers = dict(scope["headers"])
        context = scope[KEY] = RequestContext(headers, request_id(headers.get(b"x-request-id", b"")))
    return context


def slowest(answers: Sequence[Answer]) -> Answer:
    """Return the answer that its request waited for."""
    return answers[0] if len(answers) == 1 else max(answers, key=lambda a: a.queue_s + a.model_s)


def request_id(header: bytes) -> str:
    """Return the id that the client sent if it is short and plain, else a new one."""
    clients_id = header.decode("latin-1")
    # Not uuid4: it makes a system call, and meanwhile the model's thread would take our turn.
    return clients_id if REQUEST_ID.fullmatch(clients_id) else f"{random.getrandbits(128):032x}"
