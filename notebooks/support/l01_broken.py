"""The recipe that everybody copies, with its bugs. After "Web server inference" in the documentation of Transformers.

Written so that it starts today: the original hangs its start-up on `@app.on_event`, which Starlette no longer has.
"""

import asyncio
import contextlib

from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route
from transformers import pipeline


async def endpoint(request):
    text = (await request.body()).decode()
    reply = asyncio.Queue()
    await app.model_queue.put((text, reply))
    return JSONResponse(await reply.get())


async def model_loop(queue):
    pipe = pipeline("fill-mask", model="models/minilm-mlm", dtype="float32")
    while True:
        text, reply = await queue.get()
        await reply.put(pipe(text))


@contextlib.asynccontextmanager
async def lifespan(app):
    app.model_queue = asyncio.Queue()
    app.task = asyncio.create_task(model_loop(app.model_queue))
    yield


app = Starlette(routes=[Route("/", endpoint, methods=["POST"])], lifespan=lifespan)
