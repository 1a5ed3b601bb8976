"""batch-inference's `aio.ModelHost`: https://github.com/microsoft/batch-inference

    uvicorn loadtests.peers.batch_inference_aio:app

Batches of 32 at most, by its default rule: 5 ms or 16 waiting. One thread for the model.
"""

import contextlib

from batch_inference.aio import ModelHost
from batch_inference.batcher import Batcher
from starlette.applications import Starlette
from starlette.responses import JSONResponse, PlainTextResponse
from starlette.routing import Route

from loadtests.peers import model


class ListBatcher(Batcher):
    def batch(self, requests):
        return ([args[0] for args in requests],), None

    def unbatch(self, batched_response, unbatch_ctx):
        return batched_response


class FillMask:
    def __init__(self):
        self.model = model.load()

    def predict_batch(self, texts):
        return self.model(texts)


async def answer(request):
    return JSONResponse(await request.app.host.predict((await request.body()).decode()))


async def health(request):
    return PlainTextResponse("ok")


@contextlib.asynccontextmanager
async def lifespan(app):
    app.host = ModelHost(model_obj=FillMask(), batcher=ListBatcher(), max_batch_size=32, wait_ms=5, wait_n=16)
    async with app.host:
        yield


app = Starlette(routes=[Route("/", answer, methods=["POST"]), Route("/health", health)], lifespan=lifespan)
