"""uvicorn examples.fastapi_app:app -- the model loop in your own FastAPI app.

$ curl -d '{"text": "Paris is the [MASK] of France."}' -H "Content-Type: application/json" http://127.0.0.1:8000/fill
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from pydantic import BaseModel

from workers import Late, ModelFailed, ModelLoop, Rejected, Thread
from workers.scheduling.warm_up import warm_up


class Question(BaseModel):
    text: str


def load() -> Any:
    """In the model's thread. Return a function from a list of inputs to as many answers."""
    from transformers import pipeline

    pipe = pipeline("fill-mask", model="models/minilm-mlm")
    return lambda texts: [pipe(text)[0]["token_str"] for text in texts]


@contextlib.asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[dict[str, ModelLoop]]:
    loop, thread = ModelLoop(batch_size=8, max_queue=64, budget_s=5), Thread(load)
    await thread.start()
    await warm_up(loop.cost_model, thread.run, [[("a [MASK].", 1)] * n for n in (1, 4, 8)], loop.now)
    consumer = asyncio.create_task(loop.consume(thread.run))
    yield {"loop": loop}
    await loop.drain(grace_s=5)
    consumer.cancel()
    thread.stop()


app = FastAPI(lifespan=lifespan)


@app.post("/fill")
async def fill(question: Question, request: Request) -> dict[str, str]:
    try:
        answer = await request.state.loop.submit(question.text)
    except Rejected as exc:
        raise HTTPException(503, str(exc), {"Retry-After": str(exc.retry_after_s)}) from exc
    except Late as exc:
        raise HTTPException(504, str(exc)) from exc
    except ModelFailed as exc:
        raise HTTPException(500, "the model failed on this text") from exc
    return {"answer": answer.value}
