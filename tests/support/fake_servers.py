"""Servers that are wrong in one way each, to see that the load test notices: `uvicorn tests.support.fake_servers:swaps`."""

import asyncio
import json
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from loadtests.bench.apps import answer


async def text_of(request: Request) -> str:
    return (await request.body()).decode()


async def honest(request: Request) -> Response:
    timing = 'queue;dur=1.5, model;dur=2.5, batch;desc="size 4, dispatched because empty"'
    return JSONResponse(answer(await text_of(request)), headers={"Server-Timing": timing})


class Swapper:
    """Gives each of two waiting clients the other's answer."""

    waiting: asyncio.Future[str] | None = None

    async def __call__(self, request: Request) -> Response:
        text = await text_of(request)
        if self.waiting is None:
            mine = asyncio.get_running_loop().create_future()
            self.waiting, self.waiting_text = mine, text
            return JSONResponse(answer(await mine))
        other, self.waiting = self.waiting, None
        other.set_result(text)
        return JSONResponse(answer(self.waiting_text))


class Loser:
    """Never answers every third request, and cuts the reply of the one after it."""

    count = 0

    async def __call__(self, request: Request) -> Response:
        self.count += 1
        if self.count % 3 == 0:
            await asyncio.Event().wait()
        if self.count % 3 == 1:
            return Response(b"[", headers={"Content-Length": "1000"})
        return JSONResponse(answer(await text_of(request)))


async def lies(request: Request) -> Response:
    """200, whatever happened."""
    text = await text_of(request)
    bodies = [{"error": "it failed"}, [], answer(text)[:4], answer(text)[::-1], [None] * 5, "ok"]
    worse = answer(text)
    worse[4]["score"] = float("nan")
    bodies.append(worse)
    lies_told = request.app.state
    lies_told.count = getattr(lies_told, "count", -1) + 1
    return Response(json.dumps(bodies[lies_told.count % len(bodies)]))


async def stalls(request: Request) -> Response:
    await asyncio.Event().wait()
    raise AssertionError


async def refuses(request: Request) -> Response:
    return JSONResponse({"error": "later"}, 503, {"Retry-After": "1"})


class Varied:
    """One status after the other."""

    count = -1

    async def __call__(self, request: Request) -> Response:
        self.count += 1
        return JSONResponse({"error": "no"}, (503, 504, 500, 422)[self.count % 4])


async def is_ready(request: Request) -> Response:
    return JSONResponse({"status": "ok"})


def serving(handler: Any) -> Starlette:
    async def endpoint(request: Request) -> Response:
        return await handler(request)

    routes = [Route("/", endpoint, methods=["POST"]), Route("/ready", is_ready), Route("/health", is_ready)]
    return Starlette(routes=routes)


honest_app, lies_app, stalls_app, refuses_app = map(serving, (honest, lies, stalls, refuses))
swaps_app, loses_app, varied_app = map(serving, (Swapper(), Loser(), Varied()))
