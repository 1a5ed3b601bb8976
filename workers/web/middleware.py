"""The door: what every request meets first and every reply last. Plain ASGI around the app's routes."""

import asyncio
import functools
import inspect
import json
import random
import re
from collections.abc import Awaitable, Callable, Sequence
from itertools import chain
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route, Router
from starlette.types import Message, Receive, Scope, Send

from workers.errors import Rejected
from workers.metrics import Metrics
from workers.web import parsing, replies

REQUEST_ID = re.compile(rb"[\w.-]{1,128}")
# Clients that ask again at once, whatever Retry-After says, would keep the core busy with refusals, and nothing would be
# left for the model. So beyond REJECTIONS_PER_S each rejection waits for its turn, but only up to HOLD_S: then the client can
# still ask another server.
REJECTIONS_PER_S, HOLD_S = 1000, 0.1
TICK_S = 0.02  # those who wait share one waking

Endpoint = Callable[[Request], Awaitable[Response]]
Headers = tuple[tuple[bytes, bytes], ...]


class RequestMiddleware:
    """Gives every request an id, refuses those that the model has no room for, and turns every error into a reply.

    `protocols`: the routes beside `POST /`, and how their errors read. `guard`: why a request isn't let in, if it isn't.
    Every POST is a request to the model.
    """

    def __init__(
        self,
        router: Router,
        metrics: Metrics,
        protocols: Sequence[tuple[Route, replies.ErrorBody]] = (),
        guard: Callable[[Scope], Exception | None] = lambda scope: None,
    ) -> None:
        self.router, self.metrics, self.protocols, self.guard = router, metrics, protocols, guard
        self.endpoints: dict[tuple[str, str], Endpoint] = {
            (method, route.path): route.endpoint  # a look-up costs a tenth of the router's walk
            for route in router.routes
            if isinstance(route, Route)
            and not route.param_convertors
            and inspect.iscoroutinefunction(route.endpoint)
            for method in route.methods or ()
        }
        self.error_body = functools.lru_cache(maxsize=256)(self._error_body)
        self.next_refusal_at = 0.0
        self.turns: dict[int, asyncio.Event] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.router(scope, receive, send)
        scope["app"] = self  # so that the router raises its 404, and we give it our form
        scope["fields"] = fields = dict(scope["headers"])  # Starlette's own look-ups walk through all of them
        scope["error"] = self.error_body(scope["path"])
        request_id = fields.get(b"x-request-id", b"")
        if not REQUEST_ID.fullmatch(request_id):
            # Not uuid4: it makes a system call, and meanwhile the model's thread would take our turn.
            request_id = b"%032x" % random.getrandbits(128)
        scope["request_id"] = request_id
        request = Request(scope, receive)
        # First: what looks into a header takes 0.2 s a megabyte.
        if sum(map(len, chain.from_iterable(scope["headers"]))) > parsing.MAX_HEADER_BYTES:
            sentence = f"send at most {parsing.MAX_HEADER_BYTES} bytes of headers"
            return await self.reply(
                request, send, self.error_reply(scope, HTTPException(431, sentence, replies.CLOSE))
            )
        if not_let_in := self.guard(scope):
            return await self.reply(request, send, self.error_reply(scope, not_let_in))
        if scope["method"] == "POST":
            budget_s = parsing.client_budget_s(request)
            if refused := scope["state"]["service"].loop.rejection(budget_s):
                return await self.refuse(refused, scope, send)
        await self.reply(request, send)

    async def reply(self, request: Request, send: Send, reply: Any = None) -> None:
        """Send this reply; without one, what the request's endpoint or the router gives, or the error that it raises."""
        scope, receive, started = request.scope, request.receive, False

        def send_with_id(message: Message) -> Awaitable[None]:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                # A new list: a reply may be sent to many, and each has its own id.
                message["headers"] = [*message["headers"], (b"x-request-id", scope["request_id"])]
                if scope["method"] == "POST":
                    self.metrics.requests_with(message["status"]).inc()
            return send(message)

        try:
            if not reply:
                endpoint = self.endpoints.get((scope["method"], scope["path"]))
                reply = await endpoint(request) if endpoint else self.router
            await reply(scope, receive, send_with_id)
        except Exception as exc:
            if started:
                raise  # half of a reply: the server closes the connection
            await self.error_reply(scope, exc)(scope, receive, send_with_id)

    def error_reply(self, scope: Scope, exc: Exception) -> JSONResponse:
        """Return the reply to `exc` in the form of the protocol that was asked."""
        failure = replies.explain(exc, scope["request_id"].decode())
        if failure.status == 405:  # Starlette names the methods of one of the path's routes
            allowed = ", ".join(sorted(method for method, path in self.endpoints if path == scope["path"]))
            failure = failure._replace(headers={"Allow": allowed} if allowed else failure.headers)
        return replies.error_reply(failure, scope["error"])

    async def refuse(self, refused: Rejected, scope: Scope, send: Send) -> None:
        """Reply without having read the body: under overload most of the work is this.

        The server reads the body and throws it away, unless the client waits for a "100 Continue" before it sends one.
        """
        now = asyncio.get_running_loop().time()
        self.next_refusal_at = max(now, min(self.next_refusal_at + 1 / REJECTIONS_PER_S, now + HOLD_S))
        if self.next_refusal_at > now + 0.001:
            await self.turn(self.next_refusal_at).wait()
        body, headers = rejection(scope["error"], str(refused), refused.retry_after_s)
        if b"expect" in scope["fields"]:
            headers = (*headers, (b"connection", b"close"))  # its body may come or not
        self.metrics.requests_with(503).inc()
        headers = (*headers, (b"x-request-id", scope["request_id"]))
        await send({"type": "http.response.start", "status": 503, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    def turn(self, at: float) -> asyncio.Event:
        """An event that is set at the end of the tick that `at` falls into."""
        tick = int(at / TICK_S) + 1
        if tick not in self.turns:
            self.turns[tick] = asyncio.Event()
            asyncio.get_running_loop().call_at(tick * TICK_S, lambda: self.turns.pop(tick).set())
        return self.turns[tick]

    def _error_body(self, path: str) -> replies.ErrorBody:
        """How errors read under this path."""
        matching = (error for route, error in self.protocols if route.path_regex.match(path))
        return next(matching, replies.error_body)


@functools.lru_cache(maxsize=64)
def rejection(error: replies.ErrorBody, sentence: str, retry_after_s: int) -> tuple[bytes, Headers]:
    """Body and headers of a rejection, made once for each reason."""
    body = json.dumps(error(503, sentence)).encode()
    length, retry_after = b"%d" % len(body), b"%d" % retry_after_s
    headers = (
        (b"content-type", b"application/json"),
        (b"content-length", length),
        (b"retry-after", retry_after),
    )
    return body, headers
