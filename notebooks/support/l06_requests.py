"""Lesson 6: requests per second of a bare handler, without any network and over HTTP."""

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from lesson import TEXT, quick

from loadtests.bench import apps, overhead

SCOPE = {"type": "http", "method": "POST", "path": "/", "root_path": "", "query_string": b"", "headers": []}


async def call_s(times: int) -> float:
    """Seconds that a call of the bare app takes, called as uvicorn does."""

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": TEXT.encode(), "more_body": False}

    async def send(message: Any) -> None:
        pass

    began = time.perf_counter()
    for _ in range(times):
        await apps.bare(dict(SCOPE), receive, send)
    return (time.perf_counter() - began) / times


def per_s(name: str, app: str, **env: str) -> float:
    """Requests per second of 32 connections that ask without a pause; the server on one core, they on another."""

    def work() -> float:
        with overhead.serving(name, 32, app, **env) as rate:
            rate(0.3)
            return float(np.median([rate(quick(0.5, 1.5)) for _ in range(quick(1, 3))]))

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result()
