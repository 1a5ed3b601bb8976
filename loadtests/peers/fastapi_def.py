"""FastAPI, a plain `def`, which runs in its thread pool: https://fastapi.tiangolo.com/async/

    uvicorn loadtests.peers.fastapi_def:app

A lock around the model keeps the forty threads of the pool from computing against each other on one core.
"""

import contextlib
import threading
from typing import Annotated

from fastapi import Body, FastAPI

from loadtests.peers import model

ml_models = {}
one_at_a_time = threading.Lock()


@contextlib.asynccontextmanager
async def lifespan(app):
    ml_models["predict"] = model.load()
    yield


app = FastAPI(lifespan=lifespan)


@app.post("/")
def predict(text: Annotated[bytes, Body(media_type="text/plain")]):
    with one_at_a_time:
        return ml_models["predict"]([text.decode()])[0]


@app.get("/health")
async def health():
    return "ok"
