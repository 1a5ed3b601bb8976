"""The ASGI middleware: what every request meets first and every reply last.

Ids, limits, access, load shedding before the body is read, one form for every error, and the counts of replies.
"""

import asyncio
import functools
import inspect
import json
from collections.abc import Awaitable, Callable, Sequence
from itertools import chain
from typing import Any
from urllib.parse import urlsplit

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route, Router
from starlette.types import Message, Receive, Scope, Send

from workers.context import ErrorBody, RequestContext, context_of
from workers.context import error_body as default_error_body
from workers.errors import Rejected
from workers.metrics import Metrics
from workers.web import parsing, replies

# Clients that ask again at once, whatever Retry-After says, would keep the core busy with rejections, and nothing would be
# left for the model. So beyond REJECTIONS_PER_S each rejection waits for its turn, but only up to HOLD_S: then the client can
# still ask another server.
REJECTIONS_PER_S, HOLD_S = 1000, 0.1
TICK_S = 0.02  # rejections that wait share one timer
CACHED_PATH_BYTES = 200  # longer ones are not kept

Endpoint = Callable[[Request], Awaitable[Response]]
Headers = tuple[tuple[bytes, bytes], ...]


class RequestMiddleware:
    """Gives every request a context, rejects those that the model has no room for, and turns every error into a reply.

    `errors`: the routes with a form of their own for errors. `access`: why a request is not allowed, None if it is.
    Every POST is a request to the model.
    """

    def __init__(
        self,
        router: Router,
        metrics: Metrics,
        errors: Sequence[tuple[Route, ErrorBody]] = (),
        access: Callable[[Scope], Exception | None] = lambda scope: None,
    ) -> None:
        self.router, self.metrics, self.errors, self.access = router, metrics, errors, access
        router.redirect_slashes = False  # its absolute Location would name http:// behind a proxy with TLS
        self.endpoints: dict[tuple[str, str], Endpoint] = {
            (method, route.path): route.endpoint  # a look-up costs a tenth of the router's walk
            for route in router.routes
            if isinstance(route, Route)
            and not route.param_convertors
            and inspect.iscoroutinefunction(route.endpoint)
            for method in route.methods or ()
        }
        self.cached_error_body = functools.lru_cache(maxsize=256)(self.error_body)
        self.next_rejection_at = 0.0
        self.turns: dict[int, asyncio.Event] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.router(scope, receive, send)
        scope["app"] = self  # so that the router raises its 404, and we give it our form
        context = context_of(scope)
        context.path, authority = target_of(scope)
        error_body = self.cached_error_body if len(context.path) <= CACHED_PATH_BYTES else self.error_body
        context.error_body = error_body(context.path)
        if (scope["method"], context.path) in self.endpoints:
            context.route = context.path
        request = Request(scope, receive)
        try:
            read_headers(scope, context, authority)
        except HTTPException as exc:
            return await self.reply(request, send, self.error_reply(context, exc))
        if not_allowed := self.access(scope):
            return await self.reply(request, send, self.error_reply(context, not_allowed))
        if scope["method"] == "POST":
            loop = scope["state"]["service"].loop
            prefer = context.headers.get(b"prefer")
            context.budget_s = min(
                loop.budget_s, parsing.client_budget_s(prefer) if prefer else loop.budget_s
            )
            if rejected := loop.rejection(context.left_s):
                return await self.reject(rejected, context, send)
        await self.reply(request, send)

    async def reply(self, request: Request, send: Send, reply: Any = None) -> None:
        """Send this reply; without one, what the request's endpoint or the router gives, or the error that it raises."""
        scope, receive, context, started = request.scope, request.receive, context_of(request.scope), False

        def send_with_id(message: Message) -> Awaitable[None]:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                # A new list: a reply may be sent to many, and each has its own id.
                message["headers"] = [*message["headers"], (b"x-request-id", context.request_id.encode())]
                if scope["method"] == "POST":
                    self.metrics.requests_with(message["status"]).inc()
            return send(message)

        try:
            if not reply:
                endpoint = self.endpoints.get((scope["method"], context.path))
                reply = await endpoint(request) if endpoint else self.router
            await reply(scope, receive, send_with_id)
        except Exception as exc:
            if started:
                raise  # half of a reply: the server closes the connection
            await self.error_reply(context, exc)(scope, receive, send_with_id)

    def error_reply(self, context: RequestContext, exc: Exception) -> JSONResponse:
        """Return the reply to `exc` in the form of the protocol that was asked."""
        failure = replies.explain(exc, context.request_id)
        if failure.status == 405:  # Starlette names the methods of one of the path's routes
            allowed = ", ".join(sorted(method for method, path in self.endpoints if path == context.path))
            failure = failure._replace(headers={"Allow": allowed} if allowed else failure.headers)
        return replies.error_reply(failure, context.error_body)

    async def reject(self, rejected: Rejected, context: RequestContext, send: Send) -> None:
        """Reply without having read the body: under overload most of the work is this.

        The server reads the body and throws it away, unless the client waits for a "100 Continue" before it sends one.
        """
        now = asyncio.get_running_loop().time()
        self.next_rejection_at = max(now, min(self.next_rejection_at + 1 / REJECTIONS_PER_S, now + HOLD_S))
        if self.next_rejection_at > now + 0.001:
            await self.turn(self.next_rejection_at).wait()
        body, headers = rejection(context.error_body, str(rejected), rejected.retry_after_s)
        if b"expect" in context.headers:
            headers = (*headers, (b"connection", b"close"))  # its body may come or not
        self.metrics.requests_with(503).inc()
        headers = (*headers, (b"x-request-id", context.request_id.encode()))
        await send({"type": "http.response.start", "status": 503, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    def turn(self, at: float) -> asyncio.Event:
        """Return an event that is set at the end of the tick that `at` falls into."""
        tick = int(at / TICK_S) + 1
        if tick not in self.turns:
            self.turns[tick] = asyncio.Event()
            asyncio.get_running_loop().call_at(tick * TICK_S, lambda: self.turns.pop(tick).set())
        return self.turns[tick]

    def error_body(self, path: str) -> ErrorBody:
        """Return the form of errors under this path."""
        matching = (error for route, error in self.errors if route.path_regex.match(path))
        return next(matching, default_error_body)


def target_of(scope: Scope) -> tuple[str, str]:
    """Return the path that routes know, without root_path or a slash at the end, and the authority if the target has one.

    From now on the router sees the same path.
    """
    path, root, authority = scope["path"], scope.get("root_path", ""), ""
    if path.startswith(("http://", "https://")):  # absolute-form, as Gunicorn's asgi worker passes it on
        _, authority, path, *_ = urlsplit(path)
    # Twice, where a proxy in front leaves the prefix in and uvicorn adds its own.
    while root and path.startswith(root) and path[len(root) : len(root) + 1] in ("", "/"):
        path = path[len(root) :]
    path = path.removesuffix("/") or "/"
    scope["path"] = root + path
    return path, authority


def read_headers(scope: Scope, context: RequestContext, authority: str) -> None:
    """Let `context.headers` have each header once. Raises HTTPException 400 or 431 with a sentence.

    What looks into a header takes 0.2 s per megabyte, so nothing does before this.
    """
    raw = scope["headers"]
    if sum(map(len, chain.from_iterable(raw))) > parsing.MAX_HEADER_BYTES:
        raise HTTPException(431, f"send at most {parsing.MAX_HEADER_BYTES} bytes of headers", replies.CLOSE)
    if len(context.headers) < len(raw):
        context.headers = parsing.combined(raw)
    if authority:  # counts, whatever Host says: RFC 9112, 3.2.2
        context.headers[b"host"] = authority.encode("latin-1", "replace")
    if scope.get("http_version") == "1.1" and b"host" not in context.headers:
        raise HTTPException(400, "there is no Host header; send one", replies.CLOSE)


@functools.lru_cache(maxsize=64)
def rejection(error: ErrorBody, sentence: str, retry_after_s: int) -> tuple[bytes, Headers]:
    """Return body and headers of a rejection, made once per reason."""
    body = json.dumps(error(503, sentence)).encode()
    length, retry_after = b"%d" % len(body), b"%d" % retry_after_s
    headers = (
        (b"content-type", b"application/json"),
        (b"content-length", length),
        (b"retry-after", retry_after),
    )
    return body, headers
