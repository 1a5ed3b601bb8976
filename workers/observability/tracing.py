"""OpenTelemetry traces, if an `OTEL_*` variable asks for them (`pip install -r requirements-optional.txt`).

    OTEL_EXPORTER_OTLP_ENDPOINT=http://127.0.0.1:4318 uvicorn server:app
    OTEL_TRACES_EXPORTER=console uvicorn server:app

A POST is a span, a child of the client's if the client sends `traceparent`; its own children are its time in the queue and in
the model. A generated text's span has `gen_ai.*` attributes: token counts, finish reason.
No span has an input or an answer. OTEL_SERVICE_NAME, OTEL_RESOURCE_ATTRIBUTES, OTEL_TRACES_SAMPLER and
the exporter's variables mean what they always mean.
"""

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from workers.context import context_of, slowest
from workers.jobs import Answer
from workers.observability import MAX_PATH_CHARS
from workers.offload import in_thread

ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
FLUSH_S = 1.0
PROTOCOLS = ("OTEL_EXPORTER_OTLP_PROTOCOL", "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL")


def traced(app: ASGIApp) -> ASGIApp:
    """Return the app with a span for each request if the environment asks for traces, else the app itself."""
    env = os.environ
    exporter = env.get("OTEL_TRACES_EXPORTER") or ("otlp" if any(map(env.get, ENDPOINTS)) else "none")
    if exporter == "none" or env.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return app
    if exporter not in ("otlp", "console"):
        raise SystemExit(
            f"OTEL_TRACES_EXPORTER={exporter!r} is not allowed: it must be otlp, console or none"
        )
    if "grpc" in map(env.get, PROTOCOLS):
        raise SystemExit("OTEL_EXPORTER_OTLP_PROTOCOL='grpc' is not allowed: it must be http/protobuf")
    try:
        return Traces(app, provider(exporter))
    except ImportError as exc:
        raise SystemExit(
            f"OTEL_* asks for traces, but {exc.name} is missing: pip install -r requirements-optional.txt"
        ) from None


def provider(exporter: str) -> Any:
    """Return the TracerProvider that exports spans in batches, from a thread of its own."""
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor, ConsoleSpanExporter

    tracers = TracerProvider()
    if exporter == "console":
        tracers.add_span_processor(BatchSpanProcessor(ConsoleSpanExporter()))
    else:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

        tracers.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return tracers


class Traces:
    """Makes a span of every POST; `provider` is OpenTelemetry's TracerProvider."""

    def __init__(self, app: ASGIApp, provider: Any) -> None:
        from opentelemetry import trace
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        logging.getLogger("opentelemetry.trace").setLevel(logging.ERROR)  # its warnings quote the headers
        self.app, self.otel, self.provider = app, trace, provider
        self.tracer = provider.get_tracer("workers.observability.tracing")
        self.extract = TraceContextTextMapPropagator().extract

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, partial(self.send_after_flush, send))
        if scope["type"] != "http" or scope["method"] != "POST":
            return await self.app(scope, receive, send)
        parent = {
            name.decode(): value.decode("latin-1")
            for name, value in scope["headers"]
            if name in (b"traceparent", b"tracestate")
        }
        span = self.tracer.start_span("POST", self.extract(parent), kind=self.otel.SpanKind.SERVER)
        context_of(scope).trace_id = f"{span.get_span_context().trace_id:032x}"
        status, replied_at = 0, 0

        async def listening(message: Message) -> None:
            nonlocal status, replied_at
            if message["type"] == "http.response.start":
                status = message["status"]
            elif message.get("body"):
                replied_at = time.time_ns()
            await send(message)

        try:
            await self.app(scope, receive, listening)
        finally:
            if span.is_recording():  # it may not be in the sample
                self.describe(span, scope, status, replied_at)
            span.end()

    async def send_after_flush(self, send: Send, message: Message) -> None:
        """Export the last spans before the end: uvicorn ends by the signal that ended it, past every atexit."""
        if message["type"] == "lifespan.shutdown.complete":
            with contextlib.suppress(TimeoutError):  # no collector takes them
                async with asyncio.timeout(FLUSH_S):
                    await in_thread(self.provider.force_flush)
        await send(message)

    def describe(self, span: Any, scope: Scope, status: int, replied_at: int) -> None:
        """Set what is known once the request has ended; of several inputs, the times of the slowest."""
        context = context_of(scope)
        if context.route:  # else clients could invent names
            span.update_name(f"POST {context.route}")
        span.set_attribute("http.request.method", "POST")
        span.set_attribute("url.path", scope["path"][:MAX_PATH_CHARS])
        span.set_attribute("http.response.status_code", status)
        span.set_attribute("request.id", context.request_id)
        if status >= 500 or not status:
            span.set_status(self.otel.StatusCode.ERROR)
        if not (answers := context.answers):
            return
        answer = slowest(answers)
        span.set_attribute("model.inputs", len(answers))
        # The reply, or the last line of it, goes out as soon as that answer is there.
        model_at = replied_at - int(answer.model_s * 1e9)
        queued_at = model_at - int(answer.queue_s * 1e9)
        within = self.otel.set_span_in_context(span)
        self.tracer.start_span("queue", within, start_time=queued_at).end(model_at)
        batch = {
            "model.batch_size": answer.batch_size,
            "model.batch_dispatched_because": answer.dispatched_because,
        }
        self.tracer.start_span("model", within, start_time=model_at, attributes=batch).end(replied_at)
        if answer.generated:
            model = scope["state"]["service"].settings.model_name
            span.set_attributes(generation_attributes(context.route, model, answers))


def generation_attributes(route: str, model: str, answers: Sequence[Answer]) -> dict[str, Any]:
    """Return what is said of generated texts, by OpenTelemetry's conventions for generative AI."""
    texts = [answer.generated for answer in answers if answer.generated]
    options = texts[0].options
    return {
        "gen_ai.operation.name": "chat" if "chat" in route else "text_completion",
        "gen_ai.request.model": model,  # whatever the client wrote: there is one
        "gen_ai.response.model": model,
        "gen_ai.request.max_tokens": options.max_tokens,
        "gen_ai.request.temperature": options.temperature,
        "gen_ai.request.top_p": options.top_p,
        "gen_ai.usage.input_tokens": sum(text.prompt_tokens for text in texts),
        "gen_ai.usage.output_tokens": sum(text.tokens for text in texts),
        "gen_ai.response.finish_reasons": [text.reason for text in texts],
        "gen_ai.response.time_to_first_chunk": max(text.first_token_s for text in texts),
    }
