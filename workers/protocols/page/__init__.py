"""The page at GET /: try the model, see where the time went, watch the queue. PAGE=0 leaves it out.

page.html, or chat.html where text is generated token by token, with the files of this folder put in that it names: one reply that
loads nothing from elsewhere. It reads GET /info once and polls GET /live while its tab is visible.
"""

import base64
import functools
import hashlib
import os
import re
import time
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from workers.errors import LOADING
from workers.generation.token_loop import TokenLoop
from workers.metrics import Metrics
from workers.protocols import samples
from workers.protocols.openapi import STATUSES, operation
from workers.protocols.page.recent import RecentBatches, RecentSteps
from workers.service import Service
from workers.settings import Settings
from workers.tasks.calls import RUNNING
from workers.web.access import public

HERE = Path(__file__).parent


def routes(settings: Settings) -> list[Route]:
    if not settings.PAGE:
        return []
    html = whole("chat.html" if settings.is_token_by_token else "page.html")
    reply = Response(
        html, headers={"Content-Security-Policy": policy(html), **HEADERS}, media_type="text/html"
    )

    @public  # it holds no data
    async def page(request: Request) -> Response:
        """GET / and GET /docs."""
        return reply

    return [Route("/", page), Route("/docs", page), Route("/live", live)]


def whole(name: str) -> str:
    """Return this page with the files put in that its comments name."""
    html = (HERE / name).read_text(encoding="utf-8")
    for part in ("style.css", "common.js", "chat.js"):
        html = html.replace(f"/* {part} */\n", (HERE / part).read_text(encoding="utf-8"))
    return html


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


@functools.cache
def recent_batches(metrics: Metrics) -> RecentBatches:
    return RecentBatches(metrics)


@functools.cache
def recent_steps(loop: TokenLoop) -> RecentSteps:
    return RecentSteps(loop)


def generation(loop: TokenLoop, after: str) -> dict[str, Any]:
    """Return the token loop now: its last steps, those after the one with this number, and its counts."""
    counts = {s.labels["kind"]: int(s.value) for s in samples(loop.counts.tokens, "_total")}
    number = int(after) if after.isascii() and after.isdigit() and len(after) < 16 else 0
    return {"tokens": counts, **recent_steps(loop).poll(number)}


async def live(request: Request) -> Response:
    """GET /live: the queue now and the counts so far, of the worker that answers; ?after=N: of the steps those after N."""
    service: Service = request.state.service
    loop, metrics, now = service.loop, service.metrics, time.monotonic()
    counts = {s.labels["status"]: int(s.value) for s in samples(metrics.requests, "_total")}
    unready = service.unready()
    oldest = loop.oldest_at or now
    content: dict[str, Any] = {
        "worker": os.getpid(),
        "workers": service.settings.WEB_CONCURRENCY,
        "up_s": round(now - service.started_at, 3),
        "unready": unready,
        "is_loading": unready == LOADING,
        "depth": loop.depth,
        "running": loop.running,
        "running_s": round(loop.instances.longest_s, 4),
        "oldest_s": round(now - oldest, 4),
        "progress": sorted(c.fraction for c in set(RUNNING) if c.fraction is not None),  # of custom classes
        "requests": counts,
        "queries": sum(int(s.value) for s in samples(metrics.batch_size, "_sum")),
    }
    if isinstance(loop, TokenLoop):
        content["generation"] = generation(loop, request.query_params.get("after", ""))
    else:
        content["batches"] = recent_batches(metrics).poll()
    return JSONResponse(content, headers={"Cache-Control": "no-store"})
