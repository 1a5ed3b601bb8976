"""One PyTorch model behind HTTP: one queue, one loop.

    $ uvicorn server:app
    $ curl -d "Paris is the [MASK] of France." http://127.0.0.1:8000/
    [{"score":0.95,"token":3007,"token_str":"capital","sequence":"paris is the capital of france."},...

The way of a request: `answer` reads it, its task in `workers/tasks/` checks it, `workers/loop.py` queues it and gathers
the batch, `workers/offload.py` runs the task's model on it, and the answer comes back here. All settings are in
`workers/settings.py`.
"""

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route, Router
from starlette.types import ASGIApp

from workers.apis import discover
from workers.errors import Rejected
from workers.metrics import Metrics
from workers.service import Service
from workers.settings import Settings
from workers.web import generation, items, stream
from workers.web.access import AccessControl, public, with_cors
from workers.web.middleware import RequestMiddleware
from workers.web.replies import AnswerResponse

settings = Settings.read()
metrics = Metrics()


async def answer(request: Request) -> Response:
    """POST /: the model's answer to one input, or to each of a list."""
    service: Service = request.state.service
    body = await service.in_flight.read(request)
    asked = await service.parse(request, body)
    if asked.is_list and (form := stream.wanted(request)):
        queries = await service.checked(request, asked, len(body))
        return stream.Streamed(service.loop, settings.BODY_TIMEOUT_S, request, queries, form)
    if service.generation and not asked.is_list and asked.parameters.get("stream") is True:
        (query,) = await service.checked(request, asked, len(body))
        return generation.streamed(service.generation, request, query.content)
    if not asked.is_list and (form := items.form_of(request, service.task)):
        (query,) = await service.checked(request, asked, len(body))
        return items.ItemStream(service.loop, settings.BODY_TIMEOUT_S, request, query, form)
    answers, _ = await service.ask(request, asked.inputs, asked.parameters, len(body))
    values = [answer.value for answer in answers]
    return AnswerResponse(answers, values if asked.is_list else values[0])


@public
async def health(request: Request) -> Response:
    """GET /health: 200 while healthy, 503 with the reason when the process should be restarted."""
    service: Service = request.state.service
    trouble = service.trouble()
    status = {
        "status": "stuck" if trouble else "ok" if service.loop.instances.loaded else "loading",
        "model": settings.model_name,
        "queue_depth": service.loop.depth,
        "running": service.loop.running,
        "uptime_s": round(time.monotonic() - service.started_at, 1),
    }
    if trouble:
        status["error"] = trouble
    return JSONResponse(status, 503 if trouble else 200)


@public
async def ready(request: Request) -> Response:
    """GET /ready: 200 while an instance of the model is loaded, whatever the load; 503 with the reason when there is none, or it is
    stuck or stopping."""
    service: Service = request.state.service
    if reason := service.unready():
        raise Rejected(reason)
    return JSONResponse({"status": "ready"})


async def prometheus(request: Request) -> Response:
    """GET /metrics: the Prometheus text format."""
    text = await asyncio.to_thread(metrics.text)  # reads files of every worker
    return Response(text, media_type="text/plain; version=0.0.4")


@contextlib.asynccontextmanager
async def lifespan(app: Any) -> AsyncIterator[dict[str, Any]]:
    async with Service(settings, metrics).running() as service, contextlib.AsyncExitStack() as beside:
        for api in discover():
            await beside.enter_async_context(api.serving(service))
        yield {"service": service}


def observed(app: ASGIApp) -> ASGIApp:
    """The app with traces and a log of its requests, where they are asked for: only then are they imported."""
    if any(name.startswith("OTEL_") for name in os.environ):
        from workers.observability.tracing import traced

        app = traced(app)
    if settings.LOG_FORMAT == "json":
        from workers.observability.request_log import logged

        app = logged(app, settings)
    return app


api_routes = [(route, api.error_body) for api in discover() for route in api.routes(settings)]
routes = [
    Route("/", answer, methods=["POST"]),
    Route("/health", health),
    Route("/ready", ready),
    Route("/metrics", public(prometheus) if settings.METRICS_OPEN else prometheus),
    *(route for route, _ in api_routes),
]
access = AccessControl(settings, routes)
middleware = RequestMiddleware(Router(routes, lifespan=lifespan), metrics, api_routes, access)
app = observed(with_cors(middleware, settings))
