"""One PyTorch model behind HTTP: one queue, one loop.

    $ uvicorn server:app
    $ curl -d "Paris is the [MASK] of France." http://127.0.0.1:8000/
    [{"score":0.95,"token":3007,"token_str":"capital","sequence":"paris is the capital of france."},...

A request's way: `fill_mask` reads and checks it, `workers/loop.py` queues it and gathers the batch, `workers/offload.py`
runs `workers/model.py` on it, and the answer comes back here. Every setting is in `workers/settings.py`.
"""

import contextlib
import time
from collections.abc import AsyncIterator
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from workers import contract
from workers.loop import Refused
from workers.metrics import Metrics
from workers.service import Service
from workers.settings import Settings

settings = Settings.read()
metrics = Metrics()


async def fill_mask(request: Request) -> Response:
    """POST /: the model's answer to one text."""
    service: Service = request.state.service
    body = await service.clients.read_body(request)
    if refused := service.loop.refusal():  # before any work goes into what is refused
        raise refused
    assert service.check  # or the loop would have refused: no model yet
    query = service.check(contract.parse(body, request, settings))
    budget_s = contract.client_budget_s(request)
    answer = await service.clients.wait(
        request, service.loop.submit(query, size=len(query.ids), budget_s=budget_s)
    )
    timing = (
        f"queue;dur={answer.queue_s * 1000:.2f}, model;dur={answer.model_s * 1000:.2f}, "
        f'batch;desc="size {answer.batch_size}, closed by {answer.closed_by}"'
    )
    return contract.Answered(answer.value, headers={"Server-Timing": timing})


async def health(request: Request) -> Response:
    """GET /health: 200 while the process should be left alone, 503 with the reason when it should be restarted."""
    service: Service = request.state.service
    stuck_s = service.loop.stuck_s()
    status = {
        "status": "stuck" if stuck_s else "ok" if service.loop.consumers else "loading",
        "model": settings.MODEL,
        "queue_depth": service.loop.depth,
        "running": service.loop.running,
        "uptime_s": round(time.monotonic() - service.started_at, 1),
    }
    if stuck_s:
        status["error"] = f"the model has not returned for {stuck_s:.0f} s; restart this server"
    return JSONResponse(status, 503 if stuck_s else 200)


async def ready(request: Request) -> Response:
    """GET /ready: 200 once a copy of the model is loaded, 503 with the reason while none is, when stuck, when stopping."""
    if reason := request.state.service.loop.unready():
        raise Refused(reason)
    return JSONResponse({"status": "ready"})


async def prometheus(request: Request) -> Response:
    """GET /metrics: Prometheus' text format."""
    return Response(metrics.text(), media_type="text/plain; version=0.0.4")


@contextlib.asynccontextmanager
async def lifespan(app: Any) -> AsyncIterator[dict[str, Any]]:
    async with Service(settings, metrics).running() as service:
        yield {"service": service}


app = contract.Envelope(
    Starlette(
        routes=[
            Route("/", fill_mask, methods=["POST"]),
            Route("/health", health),
            Route("/ready", ready),
            Route("/metrics", prometheus),
        ],
        lifespan=lifespan,
        exception_handlers=contract.ERROR_HANDLERS,
    ),
    metrics,
)
