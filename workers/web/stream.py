"""Answers as they come: a list of inputs with `Accept: application/x-ndjson` or `text/event-stream` gets one line per input.

    {"index":1,"answer":…,"queue_ms":0.1,"model_ms":8.4,"batch":"size 4, dispatched because empty"}
    {"index":0,"status":500,"error":"the model failed on input 0; …"}

An input with an error in it is a 4xx for all, before the first line. After that each input is on its own, as if sent
alone: its place in the queue, its rejection (503, with "retry_after_s"), its deadline (504), its failure (500); the others
go on. Lines come in the order in which they are done. When a client disconnects, or reads nothing for BODY_TIMEOUT_S, its
other inputs are removed from the queue.
"""

import asyncio

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
        parts = Parts(scope, send, self.raw_headers, self.stall_s)
        try:
            await parts.begin()
            waiting = set(lines)
            while waiting:
                done, _ = await asyncio.wait({*waiting, gone}, return_when=asyncio.FIRST_COMPLETED)
                if gone in done:
                    return
                waiting -= done
                await parts.put(b"".join(line.result() for line in lines if line in done))
            await parts.end()
        except TimeoutError:
            pass  # it has stopped reading: without an end of the reply the server closes the connection
        finally:
            for task in (*lines, gone):
                task.cancel()

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


class Parts:
    """A reply of unknown length, sent part by part; over HTTP/1.0, which has no chunks, in one piece at its end."""

    def __init__(self, scope: Scope, send: Send, headers: list[tuple[bytes, bytes]], stall_s: float) -> None:
        self.send, self.headers, self.stall_s = send, headers, stall_s
        self.has_chunks = scope.get("http_version") != "1.0"
        self.kept: list[bytes] = []

    async def begin(self) -> None:
        """Send the headers."""
        if self.has_chunks:
            await self.send({"type": "http.response.start", "status": 200, "headers": self.headers})

    async def put(self, body: bytes) -> None:
        """Send a part. Raises TimeoutError where the client takes nothing for `stall_s`."""
        if not self.has_chunks:
            self.kept.append(body)
        elif body:
            async with asyncio.timeout(self.stall_s):
                await self.send({"type": "http.response.body", "body": body, "more_body": True})
                # uvicorn waits for a slow client only at the next send. So send once more, nothing.
                await self.send({"type": "http.response.body", "body": b"", "more_body": True})

    async def end(self) -> None:
        """Say that the reply is complete. Without that the server closes the connection, and the client knows that it is not."""
        body = b"".join(self.kept)
        if not self.has_chunks:
            headers = [*self.headers, (b"content-length", b"%d" % len(body))]
            await self.send({"type": "http.response.start", "status": 200, "headers": headers})
        await self.send({"type": "http.response.body", "body": body})


async def leaving(receive: Receive) -> None:
    """Return when the client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass
