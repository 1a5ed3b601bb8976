"""Transformers, "Web server inference": https://huggingface.co/docs/transformers/pipeline_webserver

    uvicorn loadtests.peers.transformers_page:app

What it takes to start today: a lifespan for `on_event`, which Starlette no longer has. The model runs on the event loop.
"""

import asyncio
import contextlib

from starlette.applications import Starlette
from starlette.responses import JSONResponse, PlainTextResponse
from starlette.routing import Route

from loadtests.peers import model


async def homepage(request):
    payload = await request.body()
    string = payload.decode("utf-8")
    response_q = asyncio.Queue()
    await request.app.model_queue.put((string, response_q))
    output = await response_q.get()
    return JSONResponse(output)


async def health(request):
    return PlainTextResponse("ok")


async def server_loop(q):
    pipe = model.load()
    while True:
        (string, response_q) = await q.get()
        [out] = pipe([string])
        await response_q.put(out)


@contextlib.asynccontextmanager
async def lifespan(app):
    app.model_queue = asyncio.Queue()
    task = asyncio.create_task(server_loop(app.model_queue))
    yield
    task.cancel()


app = Starlette(routes=[Route("/", homepage, methods=["POST"]), Route("/health", health)], lifespan=lifespan)
