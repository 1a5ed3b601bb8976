"""batch-inference's `ModelHost` for threads: https://github.com/microsoft/batch-inference

    uvicorn loadtests.peers.batch_inference_threads:app

As its page has it, a plain `def` asks the host and waits: a batch can't be larger than the threads that wait, 40 here.
"""

import contextlib

import anyio
from batch_inference import ModelHost
from starlette.applications import Starlette
from starlette.responses import JSONResponse, PlainTextResponse
from starlette.routing import Route

from loadtests.peers.batch_inference_aio import FillMask, ListBatcher


async def answer(request):
    text = (await request.body()).decode()
    return JSONResponse(await anyio.to_thread.run_sync(request.app.host.predict, text))


async def health(request):
    return PlainTextResponse("ok")


@contextlib.asynccontextmanager
async def lifespan(app):
    app.host = ModelHost(model_obj=FillMask(), batcher=ListBatcher(), max_batch_size=32, wait_ms=5, wait_n=16)
    with app.host:
        yield


app = Starlette(routes=[Route("/", answer, methods=["POST"]), Route("/health", health)], lifespan=lifespan)
