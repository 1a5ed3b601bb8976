"""Answers as they come: a list of inputs with `Accept: application/x-ndjson` or `text/event-stream` gets one line per input.

    {"index":1,"answer":…,"queue_ms":0.1,"model_ms":8.4,"batch":"size 4, dispatched because empty"}
    {"index":0,"status":500,"error":"the model failed on input 0; …"}

An input with an error in it is a 4xx for all, before the first line. After that each input is on its own, as if sent
alone: its place in the queue, its rejection (503, with "retry_after_s"), its deadline (504), its failure (500); the others
go on. Lines come in the order in which they are done. When a client disconnects, or reads nothing for BODY_TIMEOUT_S, its
other inputs are removed from the queue.
"""

import asyncio
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from workers.context import context_of
from workers.errors import Unanswered
from workers.generation.token_loop import TokenLoop
from workers.loop import ModelLoop
from workers.tasks import Query
from workers.tasks.calls import followed
from workers.web.replies import explain, rendered

Line = asyncio.Task[Any]
FORMS = {"application/x-ndjson": b"%s\n", "text/event-stream": b"data: %s\n\n"}


def wanted(request: Request) -> str | None:
    """Return in which form the client asks for its answers as they come; None if it does not."""
    accepted = context_of(request.scope).headers.get(b"accept", b"").decode("latin-1").lower()
    return next((form for form in FORMS if form in accepted), None)


class Streamed(Response):
    """The answers to these queries, one line per input."""

    def __init__(
        self,
        loop: ModelLoop | TokenLoop,
        stall_s: float,
        request: Request,
        queries: list[Query],
        form: str,
    ) -> None:
        self.loop, self.stall_s, self.queries, self.form = loop, stall_s, queries, form
        self.budget_s = context_of(request.scope).left_s
        self.status_code, self.background = 200, None
        self.raw_headers = [(b"content-type", form.encode()), (b"cache-control", b"no-store")]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        lines = [
            asyncio.create_task(self.line(scope, index, query)) for index, query in enumerate(self.queries)
        ]
        gone = asyncio.create_task(leaving(receive))
        try:
            if scope.get("http_version") == "1.0":  # knows no chunks, so no reply of unknown length
                return await self.send_at_once(lines, gone, send)
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            waiting = set(lines)
            while waiting:
                done, _ = await asyncio.wait({*waiting, gone}, return_when=asyncio.FIRST_COMPLETED)
                if gone in done:
                    return
                waiting -= done
                body = b"".join(line.result() for line in lines if line in done)
                await put(send, body, self.stall_s)
            await send({"type": "http.response.body", "body": b""})
        except TimeoutError:
            pass  # it has stopped reading: without an end of the reply the server closes the connection
        finally:
            for task in (*lines, gone):
                task.cancel()

    async def send_at_once(self, lines: list[Line], gone: Line, send: Send) -> None:
        """Send all lines in one reply with a length; nothing if the client leaves before."""
        whole = asyncio.gather(*lines)
        await asyncio.wait({whole, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not gone.done():
            await send_whole(send, self.raw_headers, b"".join(whole.result()))

    async def line(self, scope: Scope, index: int, query: Query) -> bytes:
        """Return the line of one input."""
        try:
            with followed([query.content], self.budget_s):
                (answer,) = await self.loop.submit_all([query.content], [query.size], budget_s=self.budget_s)
            context_of(scope).answers.append(answer)
            batch = f"size {answer.batch_size}, dispatched because {answer.dispatched_because}"
            times = {"queue_ms": round(answer.queue_s * 1000, 2), "model_ms": round(answer.model_s * 1000, 2)}
            said = rendered({"index": index, "answer": answer.value, **times, "batch": batch})
        except Unanswered as exc:
            exc.index = index
            failure = explain(exc, context_of(scope).request_id)
            retry = {"retry_after_s": failure.retry_after_s} if failure.retry_after_s else {}
            said = rendered({"index": index, "status": failure.status, "error": failure.sentence, **retry})
        return FORMS[self.form] % said


async def put(send: Send, body: bytes, stall_s: float) -> None:
    """Send a part of a reply. Raises TimeoutError where the client takes nothing for `stall_s`."""
    async with asyncio.timeout(stall_s):
        await send({"type": "http.response.body", "body": body, "more_body": True})
        # uvicorn waits for a slow client only at the next send. So send once more, nothing.
        await send({"type": "http.response.body", "body": b"", "more_body": True})


async def send_whole(send: Send, headers: list[tuple[bytes, bytes]], body: bytes) -> None:
    """Send a reply whose length is known, as HTTP/1.0 needs it."""
    headers = [*headers, (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def leaving(receive: Receive) -> None:
    """Return when the client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass
