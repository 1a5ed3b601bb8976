"""What the server knows of one HTTP request while it is in progress: the one object that all layers share."""

import math
import random
import re
import time
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass, field
from typing import Any

from workers.jobs import Answer

REQUEST_ID = re.compile(r"[\w.-]{1,128}", re.ASCII)
KEY = "request_context"  # in the ASGI scope

ErrorBody = Callable[[int, str], Any]  # the JSON of an error: of its status and its sentence


def error_body(status: int, sentence: str) -> dict[str, str]:
    """The form of every error, but for protocols with their own."""
    return {"error": sentence}


@dataclass(slots=True, eq=False)
class RequestContext:
    """Made by the first that sees the request: request log, tracing or the middleware, which then fills it."""

    headers: dict[bytes, bytes]  # names in lower case: Starlette's own look-ups walk through all of them
    request_id: str  # the client's own if it is short and plain
    arrived_at: float = field(default_factory=time.monotonic)
    path: str = ""  # without root_path, and without a slash at the end
    route: str = (
        ""  # the path as its route has it, empty if there is none: what metrics and spans may be named after
    )
    budget_s: float = math.inf  # from its arrival until its answer is worth nothing
    error_body: ErrorBody = error_body
    answers: list[Answer] = field(default_factory=list)  # what was answered: for the log and the spans
    trace_id: str = ""
    given_up: bool = False  # its client has left, or its time is over: work for it may stop

    @property
    def left_s(self) -> float:
        """The seconds that are left of its budget, at least 0."""
        return max(0.0, self.budget_s - (time.monotonic() - self.arrived_at))


def context_of(scope: MutableMapping[str, Any]) -> RequestContext:
    """Return the context of the request with this ASGI scope."""
    context: RequestContext | None = scope.get(KEY)
    if context is None:
        headers = dict(scope["headers"])
        context = scope[KEY] = RequestContext(headers, request_id(headers.get(b"x-request-id", b"")))
    return context


def request_id(sent: bytes) -> str:
    """Return the id that the client sent if it is short and plain, else a new one."""
    found = sent.decode("latin-1")
    # Not uuid4: it makes a system call, and meanwhile the model's thread would take our turn.
    return found if REQUEST_ID.fullmatch(found) else f"{random.getrandbits(128):032x}"
