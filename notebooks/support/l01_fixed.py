"""The recipe, repaired: a function becomes a server in 30 lines. `server.py` is the complete one."""

import asyncio
import contextlib
from functools import partial

from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route

from workers import tasks
from workers.errors import Late, ModelFailed, Rejected
from workers.loop import ModelLoop
from workers.offload import Thread
from workers.settings import Settings
from workers.tasks.common.text import Content


async def endpoint(request):
    text = (await request.body()).decode()
    try:
        answer = await request.state.loop.submit(Content(text, {}, []))
    except (Rejected, Late, ModelFailed) as error:
        status = {Rejected: 503, Late: 504}.get(type(error), 500)
        return JSONResponse({"error": type(error).__name__}, status)
    return JSONResponse(answer.value, headers={"batch-size": str(answer.batch_size)})


@contextlib.asynccontextmanager
async def lifespan(app):
    loop = ModelLoop(batch_size=8, max_queue=32, budget_s=5)
    thread = Thread(partial(tasks.load_alone, Settings(FAST=False, BATCH_SIZE=8)))
    await thread.start()
    consumer = asyncio.create_task(loop.consume(thread.run))
    yield {"loop": loop}
    await loop.drain(grace_s=5)
    consumer.cancel()


app = Starlette(routes=[Route("/", endpoint, methods=["POST"])], lifespan=lifespan)
