"""The page at GET /: try the model, see where the time went, watch the queue. PAGE=0 leaves it out.

One file, page.html, that loads nothing from elsewhere. It reads GET /info once and polls GET /live while its tab is visible.
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

from workers.errors import LOADING
from workers.metrics import Metrics
from workers.protocols import samples
from workers.protocols.openapi import STATUSES, operation
from workers.service import Service
from workers.settings import Settings
from workers.web.access import public

FORGET_S = 5.0  # without a poll: then no page is open


def routes(settings: Settings) -> list[Route]:
    if not settings.PAGE:
        return []
    html = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
    reply = Response(
        html, headers={"Content-Security-Policy": policy(html), **HEADERS}, media_type="text/html"
    )

    @public  # it holds no data
    async def page(request: Request) -> Response:
        """GET / and GET /docs."""
        return reply

    return [Route("/", page), Route("/docs", page), Route("/live", live)]


def operations(service: Service) -> dict[str, Any]:
    statuses = {200: "The page.", **{status: STATUSES[status] for status in (403, 431)}}
    return {path: {"get": operation("The web UI", statuses, "text/html")} for path in ("/", "/docs")}


HEADERS = {"Cache-Control": "no-cache", "Referrer-Policy": "no-referrer", "X-Content-Type-Options": "nosniff"}


def policy(html: str) -> str:
    """Return the Content-Security-Policy: its own script and this server only, nothing loaded, in no frame."""
    hashed = {
        tag: base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        for tag, content in re.findall(r"<(style|script)>(.*?)</\1>", html, re.DOTALL)
    }
    return (
        f"default-src 'none'; script-src 'sha256-{hashed['script']}'; style-src 'sha256-{hashed['style']}'; "
        "img-src data: blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


class RecentBatches:
    """The last model calls, recorded only while a page polls them."""

    def __init__(self, metrics: Metrics) -> None:
        self.metrics, self.polled_at, self.count = metrics, 0.0, 0
        self.batches: deque[dict[str, Any]] = deque(maxlen=48)

    def poll(self) -> list[dict[str, Any]]:
        """Return the last model calls since the first poll. Poll again within FORGET_S to miss none."""
        self.polled_at = time.monotonic()
        if not self.metrics.observer:
            self.batches.clear()
            self.metrics.observer = self.record
        return list(self.batches)

    def record(self, size: int, dispatched_because: str, model_s: float, waits_s: list[float]) -> None:
        """Record a model call; stop when no page polls any more."""
        if time.monotonic() - self.polled_at > FORGET_S:
            self.metrics.observer = None
            return
        self.count += 1
        self.batches.append(
            {
                "n": self.count,
                "size": size,
                "dispatched_because": dispatched_because,
                "model_s": round(model_s, 4),
                "wait_s": round(max(waits_s, default=0.0), 4),
            }
        )


@functools.cache
def recent_batches(metrics: Metrics) -> RecentBatches:
    return RecentBatches(metrics)


async def live(request: Request) -> Response:
    """GET /live: the queue now and the counts so far, of the worker that answers."""
    service: Service = request.state.service
    loop, metrics, now = service.loop, service.metrics, time.monotonic()
    counts = {s.labels["status"]: int(s.value) for s in samples(metrics.requests, "_total")}
    unready = service.unready()
    oldest = loop.oldest_at or now
    content = {
        "worker": os.getpid(),
        "workers": service.settings.WEB_CONCURRENCY,
        "up_s": round(now - service.started_at, 3),
        "unready": unready,
        "is_loading": unready == LOADING,
        "depth": loop.depth,
        "running": loop.running,
        "running_s": round(loop.instances.longest_s, 4),
        "oldest_s": round(now - oldest, 4),
        "requests": counts,
        "queries": sum(int(s.value) for s in samples(metrics.batch_size, "_sum")),
        "batches": recent_batches(metrics).poll(),
    }
    return JSONResponse(content, headers={"Cache-Control": "no-store"})
