"""The same page's "Dynamic batching": https://huggingface.co/docs/transformers/pipeline_webserver#dynamic-batching

    uvicorn loadtests.peers.transformers_page_batch:app

As printed it loses the first text of each batch; here it is kept. The wait of 1 ms starts again with every text.
"""

import asyncio
import contextlib

from starlette.applications import Starlette
from starlette.routing import Route

from loadtests.peers import model
from loadtests.peers.transformers_page import health, homepage


async def server_loop(q):
    pipe = model.load()
    while True:
        (string, rq) = await q.get()
        strings = [string]
        queues = [rq]
        while True:
            try:
                (string, rq) = await asyncio.wait_for(q.get(), timeout=0.001)
            except TimeoutError:
                break
            strings.append(string)
            queues.append(rq)
        outs = pipe(strings)
        for rq, out in zip(queues, outs):
            await rq.put(out)


@contextlib.asynccontextmanager
async def lifespan(app):
    app.model_queue = asyncio.Queue()
    task = asyncio.create_task(server_loop(app.model_queue))
    yield
    task.cancel()


app = Starlette(routes=[Route("/", homepage, methods=["POST"]), Route("/health", health)], lifespan=lifespan)
