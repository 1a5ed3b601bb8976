"""The whole pattern in one file: one model, one queue, one event loop.

    $ uvicorn minimal:app
    $ curl -d "Paris is the [MASK] of France." http://127.0.0.1:8000/

A request puts its text into a bounded queue and waits. One task takes the texts that have queued and runs the model on them
in a thread, so the event loop stays free. `server.py` is the production version; docs/architecture.md says what it adds.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

BATCH_SIZE = 8
MAX_QUEUE = 64  # when so many requests wait, the next one gets a 503
TIMEOUT_S = 5.0  # a request that has no answer by then gets a 504

Model = Callable[[list[str]], list[Any]]


class ModelFailed(Exception):
    """The model raised on this very text, or gave no answer to it."""


class Job(NamedTuple):
    text: str
    answer: asyncio.Future[Any]


class ModelLoop:
    """Feeds `run` from one queue, at most BATCH_SIZE texts at a time; answers every job once."""

    def __init__(self, run: Callable[[list[str]], Awaitable[list[Any] | BaseException]]) -> None:
        self.run, self.queue = run, asyncio.Queue[Job](MAX_QUEUE)

    async def submit(self, text: str) -> Any:
        """Return the model's answer. Raises QueueFull, TimeoutError or ModelFailed."""
        job = Job(text, asyncio.get_running_loop().create_future())
        self.queue.put_nowait(job)
        async with asyncio.timeout(TIMEOUT_S):
            return await job.answer  # the timeout cancels it; if still queued, it is never run

    async def consume(self) -> None:
        """Serve the queue until cancelled."""
        while True:
            await self._run(await self.take_batch())

    async def take_batch(self) -> list[Job]:
        """Wait for a job, then take what has queued."""
        batch = [await self.queue.get()]
        while len(batch) < BATCH_SIZE and not self.queue.empty():
            batch.append(self.queue.get_nowait())
        return batch

    async def _run(self, batch: list[Job]) -> None:
        """Answer every job. If the model raises, run each text alone: only the bad one fails."""
        if not (batch := [job for job in batch if not job.answer.done()]):
            return
        try:
            answers = await self.run([job.text for job in batch])
            if isinstance(answers, BaseException) or len(answers) != len(batch):
                raise ModelFailed(answers)
        except Exception as error:
            if len(batch) > 1:
                for job in batch:
                    await self._run([job])
            elif not batch[0].answer.done():
                batch[0].answer.set_exception(error)
            return
        for job, answer in zip(batch, answers):
            if not job.answer.done():
                job.answer.set_result(answer)


def attempt(model: Model, texts: list[str]) -> list[Any] | BaseException:
    """In the thread. An exception is returned, not raised: a future can't carry a StopIteration."""
    try:
        return model(texts)
    except BaseException as error:
        return error


def load() -> Model:
    from transformers import pipeline

    pipe = pipeline("fill-mask", model="models/minilm-mlm")
    return lambda texts: pipe(texts, batch_size=len(texts)) if len(texts) > 1 else [pipe(texts[0])]


async def answer(request: Request) -> JSONResponse:
    text = (await request.body()).decode(errors="replace")
    try:
        return JSONResponse(await request.state.model_loop.submit(text))
    except asyncio.QueueFull:
        return JSONResponse({"error": "the queue is full; retry in a second"}, 503, {"Retry-After": "1"})
    except TimeoutError:
        return JSONResponse({"error": f"no answer within {TIMEOUT_S:g} s"}, 504)
    except ModelFailed:
        return JSONResponse({"error": "the model failed on this text"}, 500)


async def health(request: Request) -> JSONResponse:
    return JSONResponse({"queue_depth": request.state.model_loop.queue.qsize()})


@contextlib.asynccontextmanager
async def lifespan(app: Starlette) -> AsyncIterator[dict[str, Any]]:
    with ThreadPoolExecutor(1) as thread:
        call = partial(asyncio.get_running_loop().run_in_executor, thread)
        model_loop = ModelLoop(partial(call, attempt, await call(load)))
        consumer = asyncio.create_task(model_loop.consume())
        yield {"model_loop": model_loop}
        consumer.cancel()


app = Starlette(routes=[Route("/", answer, methods=["POST"]), Route("/health", health)], lifespan=lifespan)
