"""From answers and exceptions to replies: JSON of what the model returned; `explain` for all that failed."""

import asyncio
import contextlib
import json
import logging
import math
from collections.abc import Mapping
from operator import methodcaller
from typing import Any, NamedTuple

import orjson
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from workers.context import ErrorBody, slowest
from workers.errors import Late, Malformed, ModelFailed, Rejected, Unprocessable
from workers.jobs import Answer
from workers.tasks import Media

log = logging.getLogger("uvicorn.error")

CLOSE = {"Connection": "close"}  # the unread rest of the body would be parsed as the next request
PART_BYTES = 262_144  # of a reply that are sent at once
CLIENT_GONE = 499  # nginx's status for a client that left: counted, never sent
SENTENCES = {  # in place of Starlette's own phrases
    "Not Found": "not found; see GET /openapi.json",
    "Method Not Allowed": "this method is not allowed here; see the Allow header",
}


class Failure(NamedTuple):
    """Why a request, or one of its inputs, gets no answer, in the terms of HTTP. Each protocol renders it in its own form."""

    status: int
    sentence: str  # says what to do
    retry_after_s: int = 0  # 0: not said
    headers: Mapping[str, str] = {}


def explain(exc: Exception, request_id: str) -> Failure:
    """Return what to tell the client of `exc`. Logs an unexpected one, with the request's id and its traceback."""
    match exc:
        case HTTPException():
            sentence = SENTENCES.get(exc.detail, exc.detail)
            return Failure(exc.status_code, sentence, headers=exc.headers or {})
        case Malformed():
            return Failure(400, str(exc))
        case Unprocessable():
            return Failure(422, str(exc))
        case Rejected():
            return Failure(503, str(exc), exc.retry_after_s)
        case Late():
            return Failure(504, str(exc))
        case ClientDisconnect():
            return Failure(CLIENT_GONE, "the client has left")
    index = getattr(exc, "index", None)
    what = "this request" if index is None else f"input {index}"
    log.error("request %s failed", request_id, exc_info=exc)
    return Failure(500, f"the model failed on {what}; report it with the X-Request-ID of this reply")


def error_reply(failure: Failure, error_body: ErrorBody) -> JSONResponse:
    """The HTTP reply to a failure."""
    headers = dict(failure.headers)
    if failure.retry_after_s:
        headers["Retry-After"] = str(failure.retry_after_s)
    return JSONResponse(error_body(failure.status, failure.sentence), failure.status, headers)


class AnswerResponse(Response):
    """The content as JSON, with where the time of the slowest answer went. A long one goes out in parts.

    A client that takes no part within BODY_TIMEOUT_S gets no more: else anybody could fill the memory with replies.
    """

    def __init__(self, answers: list[Answer], content: Any) -> None:
        self.status_code, self.background = 200, None
        try:
            self.body = content.body if isinstance(content, Media) else rendered(content)
        except ModelFailed as exc:
            exc.index = culprit(answers)
            raise
        media_type = content.media_type.encode() if isinstance(content, Media) else b"application/json"
        self.raw_headers = [  # by hand: Starlette's way takes as long as the loop takes for a job of a batch
            (b"content-type", media_type),
            (b"content-length", b"%d" % len(self.body)),
            (b"server-timing", timing(answers).encode()),
        ]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = bytes(self.body)
        if len(body) <= PART_BYTES:
            return await super().__call__(scope, receive, send)
        stall_s = scope["state"]["service"].settings.BODY_TIMEOUT_S
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        # Without the end of the reply the server closes the connection.
        with contextlib.suppress(TimeoutError):
            for start in range(0, len(body), PART_BYTES):
                async with asyncio.timeout(stall_s):
                    part = body[start : start + PART_BYTES]
                    more = start + PART_BYTES < len(body)
                    await send({"type": "http.response.body", "body": part, "more_body": more})


def timing(answers: list[Answer]) -> str:
    """Return where the time of the slowest answer went, as a Server-Timing header."""
    answer = slowest(answers)
    return (
        f"queue;dur={answer.queue_s * 1000:.2f}, model;dur={answer.model_s * 1000:.2f}, "
        f'batch;desc="size {answer.batch_size}, dispatched because {answer.dispatched_because}"'
    )


ENCODER = json.JSONEncoder(
    ensure_ascii=False, allow_nan=False, separators=(",", ":"), default=methodcaller("tolist")
)
# orjson writes a NumPy float32 with only the digits that it has: half as many as the same number as a float64 would take.
OPTIONS = (
    orjson.OPT_SERIALIZE_NUMPY
    | orjson.OPT_PASSTHROUGH_SUBCLASS
    | orjson.OPT_PASSTHROUGH_DATACLASS
    | orjson.OPT_PASSTHROUGH_DATETIME
)


def rendered(content: Any) -> bytes:
    """Return it as JSON; NumPy's and torch's numbers are JSON, too. Raises ModelFailed where JSON can't say it, as NaN."""
    try:
        # The standard library says more, ten times as slowly.
        with contextlib.suppress(orjson.JSONEncodeError):
            body = orjson.dumps(content, methodcaller("tolist"), OPTIONS)
            if b"null" not in body or is_finite(content):  # orjson says null for NaN, too
                return body
        return ENCODER.encode(content).encode()
    except Exception as exc:  # NaN, an object of its own, a text with half of a character
        raise ModelFailed(f"the model's output cannot be serialised to JSON: {exc}") from exc


def is_finite(content: Any) -> bool:
    """Return whether all numbers in it are finite."""
    todo = [content]
    while todo:
        match one := todo.pop():
            case float():
                if not math.isfinite(one):
                    return False
            case dict():
                todo.extend(one.values())
            case list() | tuple():
                todo.extend(one)
            case _ if hasattr(one, "tolist"):
                todo.append(one.tolist())
    return True


def culprit(answers: list[Answer]) -> int | None:
    """Return which of several answers JSON can't say."""
    for index, answer in enumerate(answers if len(answers) > 1 else []):
        try:
            rendered(answer.value)
        except ModelFailed:
            return index
    return None
