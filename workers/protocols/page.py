"""The page at GET /: try the model, see where the time went, watch the queue. PAGE=0 leaves it out.

One file, page.html, that asks nobody else for anything. It reads GET /info once and, while somebody looks, GET /live.
"""

import base64
import functools
import hashlib
import os
import re
import time
from collections import deque
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from workers.metrics import Metrics, samples
from workers.protocols.openapi import STATUSES, operation
from workers.service import Service
from workers.settings import Settings
from workers.web.access import public

FORGET_S = 5.0  # after so long without a poll nobody looks


def routes(settings: Settings) -> list[Route]:
    if not settings.PAGE:
        return []
    html = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
    reply = Response(
        html, headers={"Content-Security-Policy": policy(html), **HEADERS}, media_type="text/html"
    )

    @public  # there is nothing in it but how to ask
    async def page(request: Request) -> Response:
        """GET / and GET /docs."""
        return reply

    return [Route("/", page), Route("/docs", page), Route("/live", live)]


def operations(service: Service) -> dict[str, Any]:
    statuses = {200: "It.", **{status: STATUSES[status] for status in (403, 431)}}
    return {path: {"get": operation("The page", statuses, "text/html")} for path in ("/", "/docs")}


HEADERS = {"Cache-Control": "no-cache", "Referrer-Policy": "no-referrer", "X-Content-Type-Options": "nosniff"}


def policy(html: str) -> str:
    """What a browser may do with it: run its own script, ask this server; load nothing, be in no frame."""
    hashed = {
        tag: base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        for tag, content in re.findall(r"<(style|script)>(.*?)</\1>", html, re.DOTALL)
    }
    return (
        f"default-src 'none'; script-src 'sha256-{hashed['script']}'; style-src 'sha256-{hashed['style']}'; "
        "img-src data: blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


class Watch:
    """The last model calls, kept only while somebody looks."""

    def __init__(self, metrics: Metrics) -> None:
        self.metrics, self.polled_at, self.count = metrics, 0.0, 0
        self.batches: deque[dict[str, Any]] = deque(maxlen=48)

    def look(self) -> list[dict[str, Any]]:
        """The last model calls since somebody looks. Call it again within FORGET_S to see those in between."""
        self.polled_at = time.monotonic()
        if not self.metrics.observer:
            self.batches.clear()
            self.metrics.observer = self.see
        return list(self.batches)

    def see(self, size: int, dispatched_because: str, model_s: float, waits_s: list[float]) -> None:
        if time.monotonic() - self.polled_at > FORGET_S:
            self.metrics.observer = None
            return
        self.count += 1
        wait_s = round(max(waits_s), 4)
        self.batches.append(
            {
                "n": self.count,
                "size": size,
                "dispatched_because": dispatched_because,
                "model_s": round(model_s, 4),
                "wait_s": wait_s,
            }
        )


@functools.cache
def watch_over(metrics: Metrics) -> Watch:
    return Watch(metrics)


async def live(request: Request) -> Response:
    """GET /live: the queue now and what was counted so far, of the worker that answers."""
    service: Service = request.state.service
    loop, metrics, now = service.loop, service.metrics, time.monotonic()
    counts = {s.labels["status"]: int(s.value) for s in samples(metrics.requests, "_total")}
    oldest = min((job.enqueued_at for job in loop.queue), default=now)
    content = {
        "worker": os.getpid(),
        "workers": service.settings.WEB_CONCURRENCY,
        "up_s": round(now - service.started_at, 3),
        "unready": service.unready(),
        "depth": loop.depth,
        "running": sum(job.running and job.alive for job in loop.live),
        "running_s": round(loop.instances.longest_s, 4),
        "oldest_s": round(now - oldest, 4),
        "requests": counts,
        "queries": sum(int(s.value) for s in samples(metrics.batch_size, "_sum")),
        "batches": watch_over(metrics).look(),
    }
    return JSONResponse(content, headers={"Cache-Control": "no-store"})
