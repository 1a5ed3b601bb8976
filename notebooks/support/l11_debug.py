"""A small server as many tutorials leave it: debugging is on. `uvicorn notebooks.support.l11_debug:app`"""

from pathlib import Path

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route
from transformers import pipeline

MODEL = Path(__file__).resolve().parents[2] / "models" / "minilm-mlm"
pipe = pipeline("fill-mask", model=MODEL, dtype="float32")


async def endpoint(request: Request) -> JSONResponse:
    return JSONResponse(pipe((await request.body()).decode()))


app = Starlette(debug=True, routes=[Route("/", endpoint, methods=["POST"])])
