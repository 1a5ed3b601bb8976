"""Requests in flight: bodies that stall, clients that have left.

One sweep checks all of them. Two timers and a task per request would cost a quarter of what the server adds.
A request that is still there at its second sweep gets a task that notices when the client leaves. Most are answered before that.
"""

import asyncio
import time
from collections.abc import Awaitable
from typing import Any, TypeVar

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.types import Receive

from workers.context import context_of
from workers.errors import STOPPING, Rejected
from workers.generation.token_loop import TokenLoop
from workers.loop import ModelLoop
from workers.settings import Settings
from workers.web.replies import CLOSE

T = TypeVar("T")
Handler = asyncio.Task[Any]
TEXT_BYTES, MEDIA_BYTES = 2**20, 2**24
SWEEP_S = 0.05  # a client that disconnects has left the queue after two


class InFlight:
    """Reads bodies, and ends work for clients that have left. Call `sweep` every SWEEP_S."""

    def __init__(self, settings: Settings, loop: ModelLoop | TokenLoop) -> None:
        self.settings, self.loop = settings, loop
        self.most_bytes = settings.MAX_BODY_BYTES or TEXT_BYTES
        self.reading: dict[Handler, float] = {}  # until when
        self.waiting: dict[Handler, Receive] = {}
        self.seen: set[Handler] = set()  # those that already waited at the last sweep
        self.watching: dict[Handler, asyncio.Task[None]] = {}  # the task that notices when the client leaves

    async def read(self, request: Request) -> bytes:
        """Return the whole body.

        Raises HTTPException 413 as soon as it is known to be too large, 408 when it stalls; Rejected once the server
        stops; ClientDisconnect. (Starlette's own `max_body_size` answers in plain text, past every handler, where
        Content-Length tells; uvicorn waits for a body forever.)
        """
        headers = context_of(request.scope).headers
        declared = headers.get(b"content-length", b"0")
        self.check_length(int(declared) if declared.isdigit() else 0)
        handler = this_task()
        self.reading[handler] = time.monotonic() + self.settings.BODY_TIMEOUT_S
        body, more = bytearray(), True
        try:
            while more:
                message = await request.receive()
                if message["type"] == "http.disconnect":
                    raise ClientDisconnect
                body += message.get("body", b"")
                more = message.get("more_body", False)
                self.check_length(len(body))
        except asyncio.CancelledError:
            if handler in self.reading:
                raise  # cancelled by the server, not by a sweep
            handler.uncancel()
            if self.loop.instances.closing:
                raise Rejected(STOPPING) from None
            raise HTTPException(408, "the body did not arrive in time; send it faster", CLOSE) from None
        finally:
            self.reading.pop(handler, None)
        if not body and b"upgrade" in headers:
            # uvicorn takes what comes after such headers as another protocol.
            raise HTTPException(
                400, "request body lost because of the Upgrade header; remove it (curl --http1.1)", CLOSE
            )
        return bytes(body)

    def expect(self, media: tuple[str, ...]) -> None:
        """Set the longest body, now that the task's media types are known. Until then it is that of a text."""
        self.most_bytes = self.settings.MAX_BODY_BYTES or (MEDIA_BYTES if media else TEXT_BYTES)

    def check_length(self, length: int) -> None:
        """Raise HTTPException 413 if a body is too long."""
        if length > self.most_bytes:
            sentence = f"the body is too large; send at most {self.most_bytes} bytes"
            raise HTTPException(413, sentence)

    async def unless_left(self, request: Request, work: Awaitable[T]) -> T:
        """Return what `work` gives. Raises ClientDisconnect, and cancels `work`, when the client leaves before that."""
        handler = this_task()
        self.waiting[handler] = request.receive
        try:
            return await work
        except asyncio.CancelledError:
            if handler in self.waiting:
                raise
            handler.uncancel()
            raise ClientDisconnect from None
        finally:
            self.waiting.pop(handler, None)
            if watch := self.watching.pop(handler, None):
                watch.cancel()

    async def watch(self, handler: Handler, receive: Receive) -> None:
        """Cancel `handler` when its client leaves: Starlette itself would let it run on."""
        while (await receive())["type"] != "http.disconnect":
            pass
        cancel(self.waiting, [handler])

    def sweep(self) -> None:
        """Cancel the reading of stalled bodies; start to watch the clients that waited at the last sweep and still do."""
        now = time.monotonic()
        cancel(self.reading, [handler for handler, until in self.reading.items() if until < now])
        for handler in (self.waiting.keys() & self.seen) - self.watching.keys():
            self.watching[handler] = asyncio.create_task(self.watch(handler, self.waiting[handler]))
        self.seen = set(self.waiting)

    def stop_reading(self) -> None:
        """Reject requests whose bodies have not arrived, once the loop is closing."""
        cancel(self.reading, list(self.reading))


def this_task() -> Handler:
    task = asyncio.current_task()
    assert task
    return task


def cancel(handlers: dict[Handler, Any], some: list[Handler]) -> None:
    """Cancel `some`, which know by their absence from `handlers` that it was this."""
    for handler in some:
        del handlers[handler]
        handler.cancel()
