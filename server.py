"""One PyTorch model behind HTTP: one queue, one loop.

    $ uvicorn server:app
    $ curl -d "Paris is the [MASK] of France." http://127.0.0.1:8000/
    [{"score":0.95,"token":3007,"token_str":"capital","sequence":"paris is the capital of france."},...

A request's way: `fill_mask` reads and checks it, `workers/loop.py` queues it and gathers the batch, `workers/offload.py`
runs `workers/model.py` on it, and the answer comes back here. Every setting is in `workers/settings.py`.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive

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
    if service.loop.closing:  # ask before reading: a body may stall beyond GRACE_S
        raise Refused("the server is stopping; try another one")
    try:
        body = await contract.read_body(request, settings, service.reading)
    except TimeoutError:
        if service.loop.closing:
            raise Refused("the server is stopping; try another one") from None
        raise HTTPException(408, "the body did not arrive in time; send it faster", contract.CLOSE) from None
    except ClientDisconnect:
        return Response(status_code=contract.CLIENT_GONE)
    query = contract.parse(body, request.headers, settings)
    if not service.check:
        raise Refused("the model is still loading")
    size = service.check(query.text)
    budget_s = contract.client_budget_s(request.headers, settings.DEADLINE_S)

    watcher = Watcher(request.receive)
    try:
        answer = await service.loop.submit(query, size=size, budget_s=budget_s)
    except asyncio.CancelledError:
        if not watcher.client_gone:
            raise  # somebody else cancelled: the server
        return Response(status_code=contract.CLIENT_GONE)
    finally:
        watcher.stop()
    timing = (
        f"queue;dur={answer.queue_s * 1000:.2f}, model;dur={answer.model_s * 1000:.2f}, "
        f'batch;desc="size {answer.batch_size}, closed by {answer.closed_by}"'
    )
    return JSONResponse(answer.value, headers={"Server-Timing": timing})


class Watcher:
    """Cancels the current task when its client has left: Starlette itself would let it run for nobody.

    It begins to look after a moment: most answers are there by then, and a task each would double the overhead.
    """

    def __init__(self, receive: Receive, after_s: float = 0.02) -> None:
        self.receive, self.handler = receive, asyncio.current_task()
        self.looking: asyncio.Task[None] | None = None
        self.client_gone = False
        self.timer = asyncio.get_running_loop().call_later(after_s, self.start)

    def start(self) -> None:
        self.looking = asyncio.create_task(self.look())

    async def look(self) -> None:
        while (await self.receive())["type"] != "http.disconnect":
            pass
        self.client_gone = True
        assert self.handler
        self.handler.cancel()

    def stop(self) -> None:
        self.timer.cancel()
        if self.looking:
            self.looking.cancel()


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
    """GET /ready: 200 while a request would be admitted, 503 with the reason while not."""
    if reason := request.state.service.unready():
        return JSONResponse({"error": reason}, 503)
    return JSONResponse({"status": "ready"})


async def prometheus(request: Request) -> Response:
    """GET /metrics: Prometheus' text format."""
    return Response(metrics.text(), media_type="text/plain; version=0.0.4")


@contextlib.asynccontextmanager
async def lifespan(app: Starlette) -> AsyncIterator[dict[str, Any]]:
    async with Service(settings, metrics).running() as service:
        yield {"service": service}


app = Starlette(
    routes=[
        Route("/", fill_mask, methods=["POST"]),
        Route("/health", health),
        Route("/ready", ready),
        Route("/metrics", prometheus),
    ],
    lifespan=lifespan,
    middleware=[Middleware(contract.Envelope, metrics=metrics)],
    exception_handlers=contract.ERROR_HANDLERS,
)
