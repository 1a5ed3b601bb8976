"""The items of one answer as they come, from a custom class with `streams = True`: NDJSON, a line per item.

    $ curl -N -d "one two" http://127.0.0.1:8000/
    "one"
    "two"

With `Accept: text/event-stream` they are events, and what the class says to `context.progress` is an event, too; with
`Accept: application/json` the reply is one list. Until the first item an error has its own status; afterwards it is the last
line: {"status": 504, "error": "..."}. A client that leaves ends the generator at its next item. The generator
pauses while MOST_UNREAD items are unread; a client that keeps the model waiting for more than PAUSE_S altogether gets no
more. From a model process all items come at the end.
"""

import asyncio
import contextlib
import threading
import time
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from workers.context import context_of
from workers.errors import Late, ModelFailed, Unanswered
from workers.generation.token_loop import TokenLoop
from workers.loop import ModelLoop
from workers.tasks import Query
from workers.tasks.calls import CallContext, followed
from workers.web.replies import explain, rendered
from workers.web.stream import FORMS, Parts, leaving, wanted

MOST_UNREAD = 256
PAUSE_S = 1.0
NDJSON, EVENTS = FORMS
PROGRESS = b"event: progress\ndata: %s\n\n"


def form_of(request: Request, task: Any) -> str | None:
    """Return in which form the client of this task gets items as they come; None where it gets one answer."""
    if not getattr(task, "follows", False):
        return None
    accepted = context_of(request.scope).headers.get(b"accept", b"").lower()
    return wanted(request) or (NDJSON if task.streams and b"application/json" not in accepted else None)


class ItemStream(Response):
    """The items of the answer to one query."""

    def __init__(
        self, loop: ModelLoop | TokenLoop, stall_s: float, request: Request, query: Query, form: str
    ) -> None:
        self.loop, self.stall_s, self.query, self.form = loop, stall_s, query, form
        self.context = context_of(request.scope)
        self.ended = self.is_slow = False
        self.given = self.taken = 0  # pieces of news
        self.room, self.pause_s = threading.Event(), PAUSE_S
        self.status_code, self.background = 200, None
        self.raw_headers = [(b"content-type", form.encode()), (b"cache-control", b"no-store")]
        self.news: asyncio.Queue[tuple[str, Any]] = asyncio.Queue()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        gone = asyncio.create_task(leaving(receive))
        gone.add_done_callback(lambda _: self.news.put_nowait(("gone", None)))
        job = asyncio.create_task(self.run())
        parts = Parts(scope, send, self.raw_headers, self.stall_s)
        try:
            lines = b""
            while not lines and not self.ended:
                lines = await self.lines()  # until something is there, an error has its own status
            await parts.begin()
            with contextlib.suppress(ClientDisconnect):  # nobody reads the rest
                await parts.put(lines)
                while not self.ended:
                    await parts.put(await self.lines(after_start=True))
                await parts.end()
        except TimeoutError:
            pass  # it has stopped reading: without an end of the reply the server closes the connection
        finally:
            job.cancel()
            gone.cancel()

    async def run(self) -> None:
        """Let the model answer; what is not given as it comes is given at the end."""
        loop, context, content = asyncio.get_running_loop(), self.context, self.query.content

        def listener(kind: str, value: Any) -> None:  # in the model's thread
            with contextlib.suppress(RuntimeError):  # the event loop is closed: the server has stopped
                loop.call_soon_threadsafe(self.news.put_nowait, (kind, value))
            self.given += 1
            if threading.get_ident() != here:  # with OFFLOAD=inline nobody could read meanwhile
                self.pause(content.context)

        here = threading.get_ident()
        content.context.listener = listener
        try:
            with followed([content], context.left_s):
                context.answers = await self.loop.submit_all(
                    [content], [self.query.size], budget_s=context.left_s
                )
            value = context.answers[0].value
            for item in value if content.streams else [value]:
                self.news.put_nowait(("item", item))
            if self.is_slow:
                raise Late("items come faster than they are read; read faster")
            self.news.put_nowait(("end", None))
        except Unanswered as exc:
            self.news.put_nowait(("error", exc))

    def pause(self, context: CallContext) -> None:
        """In the model's thread: wait until the client has read enough, or has had its time for that."""
        while self.given - self.taken > MOST_UNREAD and not context.cancelled:
            if self.pause_s <= 0:
                self.is_slow = context.has_left = True
                return
            began = time.monotonic()
            self.room.clear()
            self.room.wait(0.05)
            self.pause_s -= time.monotonic() - began

    async def lines(self, after_start: bool = False) -> bytes:
        """Wait for news; return them as lines. Raises ClientDisconnect, and before the first line why there is no answer."""
        news = [await self.news.get()]
        while not self.news.empty():
            news.append(self.news.get_nowait())
        self.taken += len(news)
        self.room.set()
        said = b""
        for kind, value in news:
            if kind == "gone":
                raise ClientDisconnect
            if kind in ("end", "error"):
                self.ended = True
            if kind == "error":
                if not said and not after_start:
                    raise value
                said += self.line(self.failure(value))
            elif kind == "item":
                try:
                    said += self.line(rendered(value))
                except ModelFailed as exc:
                    self.ended = True
                    return said + self.line(self.failure(exc))
            elif kind == "progress" and self.form == EVENTS:
                said += PROGRESS % rendered(value)
        return said

    def line(self, item: bytes) -> bytes:
        return FORMS[self.form] % item

    def failure(self, exc: Exception) -> bytes:
        """Return why the items end, as an item."""
        failure = explain(exc, self.context.request_id)
        return rendered({"status": failure.status, "error": failure.sentence})
