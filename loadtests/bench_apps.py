"""For bench.py and planner.py: a bare Starlette handler, and the real server with a model that costs nothing."""

import importlib
import json
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from workers import offload, service

ANSWER = [
    {"score": 0.19, "token": 2000 + i, "token_str": "capital", "sequence": "paris is the capital of france."}
    for i in range(5)
]


class Instant:
    """Answers every query with the same five candidates, at once."""

    description = "a model that returns at once"

    def __init__(self, *args: Any) -> None:
        pass

    def __call__(self, queries: list[Any]) -> list[Any]:
        return [ANSWER] * len(queries)


async def echo(request: Request) -> JSONResponse:
    """What any server must do at least: read the body, return JSON of the same size."""
    await request.body()
    return JSONResponse(ANSWER)


async def is_ready(request: Request) -> JSONResponse:
    return JSONResponse(json.dumps({"status": "ready"}))


bare = Starlette(routes=[Route("/", echo, methods=["POST"]), Route("/ready", is_ready)])


def __getattr__(name: str) -> Any:
    """Made only when asked for, because making them replaces the model.

    instant        the server with a model and an input check that cost nothing
    checked        the server with a model that costs nothing
    checked_wsgi   the same for Gunicorn's sync and gthread workers
    """
    if name not in ("instant", "checked", "checked_wsgi"):
        raise AttributeError(name)
    offload.Model = Instant  # type: ignore[assignment, misc]
    if name == "instant":
        service.InputCheck = lambda settings: lambda query: query._replace(ids=(1, 2, 3))  # type: ignore[assignment, misc]
    return importlib.import_module("workers.wsgi" if name == "checked_wsgi" else "server").app
