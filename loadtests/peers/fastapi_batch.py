"""FastAPI and an asyncio batch predictor: https://fastapi.tiangolo.com/advanced/events/ and the recipe of many a post.

    uvicorn loadtests.peers.fastapi_batch:app

A queue; 32 texts or 10 ms after the first; the model is called on the event loop.
"""

import asyncio
import contextlib

from fastapi import FastAPI, Request

from loadtests.peers import model

MAX_BATCH_SIZE, MAX_WAIT_S = 32, 0.01
queue = asyncio.Queue()


async def batch_predictor(predict):
    loop = asyncio.get_running_loop()
    while True:
        batch, deadline = [await queue.get()], loop.time() + MAX_WAIT_S
        with contextlib.suppress(TimeoutError):
            while len(batch) < MAX_BATCH_SIZE:
                batch.append(await asyncio.wait_for(queue.get(), deadline - loop.time()))
        for (_, future), answer in zip(batch, predict([text for text, _ in batch])):
            future.set_result(answer)


@contextlib.asynccontextmanager
async def lifespan(app):
    task = asyncio.create_task(batch_predictor(model.load()))
    yield
    task.cancel()


app = FastAPI(lifespan=lifespan)


@app.post("/")
async def predict(request: Request):
    text, future = (await request.body()).decode(), asyncio.Future()
    await queue.put((text, future))
    return await future


@app.get("/health")
async def health():
    return "ok"
