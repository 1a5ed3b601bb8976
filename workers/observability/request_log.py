"""LOG_FORMAT=json: one line per request, and every other log record, as JSON. Never an input or an answer.

    {"time":"2026-11-26T00:00:00.000+00:00","level":"INFO","message":"request","id":"e60b…","method":"POST","path":"/",
     "status":200,"ms":9.1,"inputs":1,"queue_ms":0.1,"model_ms":8.4,"batch_size":4,"dispatched_because":"empty"}

A generated text's line has "prompt_tokens", "generated_tokens", "first_token_ms" and "finish_reason", too: stop, length, or why it
was cut short (cancelled: the client disconnected, or read nothing for BODY_TIMEOUT_S).
Successful probes and pages have no line. Of rejections (503) the first REJECTIONS_PER_S in each second have one; the next
line after a gap says in "unlogged" how many were left out.
"""

import json
import logging
import time
from datetime import UTC, datetime
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from workers.context import RequestContext, context_of, slowest
from workers.observability import MAX_PATH_CHARS
from workers.settings import Settings

log = logging.getLogger("uvicorn.error")

REJECTIONS_PER_S = 10


def logged(app: ASGIApp, settings: Settings) -> ASGIApp:
    """Return the app with a log line for each request if LOG_FORMAT asks for it, else the app itself."""
    if settings.LOG_FORMAT != "json":
        return app
    log_json()
    access = logging.getLogger("uvicorn.access")  # would log the same again, as text
    access.handlers, access.propagate = [], False
    return RequestLog(app)


def log_json() -> None:
    """Let uvicorn and Gunicorn log JSON, too, from now on."""
    for name in ("uvicorn", "uvicorn.error", "gunicorn.error"):
        for handler in logging.getLogger(name).handlers:
            handler.setFormatter(Json())
    if logging.lastResort:  # for loggers without a handler: OpenTelemetry, the model's libraries
        logging.lastResort.setFormatter(Json())


class RequestLog:
    """Middleware that logs how each request ended."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self.second, self.rejections, self.unlogged = 0, 0, 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        context, status = context_of(scope), 0  # 0: the connection ended without a reply

        async def listening(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, listening)
        finally:
            if (scope["method"] == "POST" or status >= 400) and not self.is_left_out(status):
                fields = request_fields(scope, context, status)
                if self.unlogged:
                    fields["unlogged"], self.unlogged = self.unlogged, 0
                log.info("request", extra={"fields": fields})

    def is_left_out(self, status: int) -> bool:
        """Return whether this second has had enough lines of rejections."""
        if status != 503:
            return False
        if (second := int(time.monotonic())) != self.second:
            self.second, self.rejections = second, 0
        self.rejections += 1
        too_many = self.rejections > REJECTIONS_PER_S
        self.unlogged += too_many
        return too_many


def request_fields(scope: Scope, context: RequestContext, status: int) -> dict[str, Any]:
    """Return the fields of a request's line; of several inputs, the times of the slowest."""
    fields = {
        "id": context.request_id,
        "method": scope["method"],
        "path": scope["path"][:MAX_PATH_CHARS],
        "status": status,
        "ms": round((time.monotonic() - context.arrived_at) * 1000, 2),
    }
    if context.trace_id:
        fields["trace_id"] = context.trace_id
    if answers := context.answers:
        answer = slowest(answers)
        fields |= {
            "inputs": len(answers),
            "queue_ms": round(answer.queue_s * 1000, 2),
            "model_ms": round(answer.model_s * 1000, 2),
            "batch_size": answer.batch_size,
            "dispatched_because": answer.dispatched_because,
        }
        if generated := answer.generated:
            texts = [one.generated for one in answers if one.generated]
            fields |= {
                "prompt_tokens": sum(text.prompt_tokens for text in texts),
                "generated_tokens": sum(text.tokens for text in texts),
                "first_token_ms": round(generated.first_token_s * 1000, 2),
                "finish_reason": generated.reason,
            }
    return fields


class Json(logging.Formatter):
    """Formats a record as one line of JSON."""

    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        # ASCII: a path may hold U+2028 or a terminal's control characters.
        return json.dumps(fields, separators=(",", ":"))
