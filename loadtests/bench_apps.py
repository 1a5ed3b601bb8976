"""For bench.py and planner.py: a bare Starlette handler, and models that cost nothing, for MODEL=."""

from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from workers import tasks
from workers.settings import Settings

ANSWER = [
    {"score": 0.19, "token": 2000 + i, "token_str": "capital", "sequence": "paris is the capital of france."}
    for i in range(5)
]


class Instant:
    """MODEL=loadtests.bench_apps:Instant answers every input with the same five candidates, at once."""

    example = "Paris is the [MASK] of France."

    def __call__(self, inputs: list[Any]) -> list[Any]:
        return [ANSWER] * len(inputs)


class Checked(Instant):
    """The same behind the embedded model's own input check."""

    def __init__(self) -> None:
        self.task = tasks.make(Settings())

    def check(self, inputs: Any, parameters: dict[str, Any]) -> Any:
        return self.task.check(inputs, parameters).content


async def echo(request: Request) -> JSONResponse:
    """What any server must do at least: read the body, return JSON of the same size."""
    await request.body()
    return JSONResponse(ANSWER)


async def is_ready(request: Request) -> JSONResponse:
    return JSONResponse({"status": "ready"})


bare = Starlette(routes=[Route("/", echo, methods=["POST"]), Route("/ready", is_ready)])
