"""For bench.py and planner.py: models that cost nothing, or never return, and a bare Starlette handler."""

import json
import os
import time
from dataclasses import replace
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

SLEEP_S = float(os.environ.get("SLEEP_S", "0.02"))
WORDS = ("thing", "one", "man", "day", "way")


def answer(text: str) -> list[dict[str, Any]]:
    """What a fill-mask model would say, had it only ever read about things."""
    return [
        {
            "score": 0.5 / (i + 1),
            "token": i,
            "token_str": word,
            "sequence": text.lower().replace("[mask]", word),
        }
        for i, word in enumerate(WORDS)
    ]


ANSWER = answer("Paris is the [MASK] of France.")


class Instant:
    """MODEL=loadtests.bench.apps:Instant answers every input with the same five candidates, at once."""

    def __call__(self, inputs: list[Any]) -> list[Any]:
        return [ANSWER] * len(inputs)


class Checked:
    """Answers each text with five candidates, at once, after the check of the model that CHECKED_MODEL names."""

    def __init__(self) -> None:
        from workers import tasks
        from workers.settings import Settings

        model = os.environ.get("CHECKED_MODEL") or Settings().MODEL
        self.task = tasks.make(replace(Settings.read(), MODEL=model))

    def check(self, inputs: Any, parameters: dict[str, Any]) -> str:
        self.task.check(inputs, parameters)
        return inputs if isinstance(inputs, str) else ""

    def __call__(self, inputs: list[str]) -> list[Any]:
        return [answer(text) for text in inputs]


class Stuck:
    """Never returns, so that every request is rejected."""

    def __call__(self, inputs: list[Any]) -> list[Any]:
        time.sleep(3600)
        return inputs


class Sleeps:
    """Takes SLEEP_S a call, by default 20 ms, and computes nothing: so several replicas share a machine undisturbed."""

    def __call__(self, inputs: list[Any]) -> list[Any]:
        time.sleep(SLEEP_S)
        return [answer(text) for text in inputs]


async def echo(request: Request) -> JSONResponse:
    """What any server must do at least: read the body, return JSON of the same size."""
    await request.body()
    return JSONResponse(ANSWER)


async def is_ready(request: Request) -> JSONResponse:
    return JSONResponse(json.dumps({"status": "ready"}))


bare = Starlette(routes=[Route("/", echo, methods=["POST"]), Route("/ready", is_ready)])
