"""Text generation over HTTP: what protocols ask the token loop by, and a text as a stream of events.

    POST / {"inputs": "Paris is", "stream": true}

    data: {"index":0,"token":{"id":253,"text":" the","logprob":-1.2,"special":false},"generated_text":null,"details":null}
    ...
    data: {"index":4,"token":{...},"generated_text":" the capital of France.","details":{"finish_reason":"length",...}}

That is the form of Hugging Face's text-generation-inference, which its clients know. The first event comes with the first
token; until then an error has its own status. Afterwards it is an event, the last one: {"error": "..."}. Where nothing comes
for HEARTBEAT_S, a comment does, which clients skip: proxies close connections on which nothing moves.
"""

import asyncio
import math
from collections.abc import Callable
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from workers.context import RequestContext, context_of
from workers.errors import Unanswered
from workers.generation.stream import Piece, Stream, whole_of_each
from workers.generation.token_loop import TokenLoop
from workers.tasks.text_generation import Prompt, Task
from workers.web.replies import Failure, explain, rendered
from workers.web.stream import leaving, put

EVENT_STREAM = [
    (b"content-type", b"text/event-stream"),
    (b"cache-control", b"no-store, no-transform"),  # no proxy compresses it, which would hold it back
    (b"x-accel-buffering", b"no"),  # nginx would wait until it has a buffer full
]
HEARTBEAT_S = 10.0  # HAProxy's `timeout server` is 15 s in deploy/, other proxies' a minute
HEARTBEAT = b": waiting\n\n"


class Generation:
    """What a protocol needs to generate text: prompts in, streams out."""

    def __init__(self, loop: TokenLoop, task: Task, stall_s: float) -> None:
        self.loop, self.task, self.stall_s = loop, task, stall_s
        loop.opened = task.opened
        loop.answered = lambda prompt, piece: task.answered(prompt, piece.text, piece.tokens, piece.reason)

    def submit(self, prompt: Prompt, budget_s: float = math.inf) -> Stream:
        """Return the stream of what follows this prompt. Raises Rejected. Close it: `async with` does."""
        (stream,) = self.loop.submit_each([self.task.opened(prompt)], budget_s=budget_s)
        return stream


async def written(
    generation: Generation, prompts: list[Prompt], context: RequestContext
) -> tuple[list[Stream], list[Piece]]:
    """Return the ended stream of each prompt, and all of it as one piece. If one fails or is rejected, all are."""
    asked = [generation.task.opened(prompt) for prompt in prompts]
    streams = generation.loop.submit_each(asked, budget_s=context.left_s)
    try:
        return streams, await whole_of_each(streams)
    finally:
        context.answers += [stream.answer() for stream in streams]


def times(stream: Stream) -> dict[str, float]:
    """Return where the time of a sequence went, in ms: in the queue, until the first token, per token after that.

    And how many tokens of its prompt a sequence before had left in its slot.
    """
    sequence = stream.sequence
    decode_s = (stream.last_at - stream.first_at) / max(1, len(sequence.tokens) - 1)
    seconds = {
        "queue_ms": sequence.started_at - sequence.arrived_at,
        "time_to_first_token_ms": stream.first_at - sequence.arrived_at,
        "time_per_output_token_ms": decode_s,
    }
    found = {name: round(value * 1000, 2) for name, value in seconds.items()}
    return found | {"cached_tokens": sequence.reused}


Events = Callable[[Piece], bytes]


class EventStream(Response):
    """A sequence's pieces as server-sent events; `events` says how a piece reads.

    A client that leaves frees its slot at the end of the running step, and so does one that takes nothing for `stall_s`.
    """

    def __init__(
        self, stream: Stream, events: Events, stall_s: float, failed: Callable[[Failure], Any]
    ) -> None:
        self.stream, self.events, self.stall_s, self.failed = stream, events, stall_s, failed
        self.status_code, self.background = 200, None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        gone = asyncio.create_task(leaving(receive))
        gone.add_done_callback(lambda _: self.stream.close())
        try:
            async with self.stream:
                piece = await self.next_piece()  # until it is there, an error has its own status
                if piece and piece.reason == "cancelled":
                    raise ClientDisconnect
                await send({"type": "http.response.start", "status": 200, "headers": EVENT_STREAM})
                await self.send_events(piece, scope, send)
        except TimeoutError:
            pass  # it has stopped reading: without an end of the reply the server closes the connection
        finally:
            gone.cancel()
            context_of(scope).answers.append(self.stream.answer())

    async def send_events(self, piece: Piece | None, scope: Scope, send: Send) -> None:
        """Send this piece and all that follow; where the sequence fails, tell why in a last event."""
        try:
            while not piece or not piece.reason:
                await self.put(send, self.events(piece) if piece else HEARTBEAT)
                piece = await self.next_piece()
            if piece.reason == "cancelled":
                return
            last = self.events(piece)
        except Unanswered as exc:
            last = event(self.failed(explain(exc, context_of(scope).request_id)))
        await self.put(send, last)
        await send({"type": "http.response.body", "body": b""})

    async def next_piece(self) -> Piece | None:
        """Return the next piece; None where nothing has come for HEARTBEAT_S. Raises Unanswered."""
        try:
            async with asyncio.timeout(HEARTBEAT_S):
                return await anext(self.stream)
        except TimeoutError:
            return None

    async def put(self, send: Send, body: bytes) -> None:
        if body:  # a piece may have no text yet
            await put(send, body, self.stall_s)


def event(content: Any) -> bytes:
    """Return JSON as a server-sent event."""
    return b"data: %s\n\n" % rendered(content)


class HuggingFaceEvents:
    """An event per token; the last one has the whole text."""

    def __init__(self, task: Task, prompt: Prompt) -> None:
        self.task, self.prompt = task, prompt
        self.texts: list[str] = []
        self.tokens: list[Any] = []

    def __call__(self, piece: Piece) -> bytes:
        return b"".join(map(event, self.contents(piece)))

    def contents(self, piece: Piece) -> list[dict[str, Any]]:
        """Return what the events of this piece say."""
        events: list[dict[str, Any]] = []
        for text, token in piece.parts:
            self.texts.append(text)
            self.tokens.append(token)
            shown = self.task.shown(token, text)
            events.append(
                {"index": len(self.tokens) - 1, "token": shown, "generated_text": None, "details": None}
            )
        if piece.reason and events:
            self.texts.append(piece.rest)
            events[-1]["token"]["text"] += piece.rest
            text = "".join(self.texts)
            events[-1]["generated_text"] = self.prompt.whole(text)
            events[-1]["details"] = self.task.details(self.prompt, self.tokens, piece.reason)
        return events


def streamed(generation: Generation, request: Request, prompt: Prompt) -> Response:
    """Return the reply that streams what follows this prompt, in Hugging Face's form. Raises Rejected."""
    stream = generation.submit(prompt, context_of(request.scope).left_s)
    events = HuggingFaceEvents(generation.task, prompt)
    return EventStream(
        stream,
        events,
        generation.stall_s,
        lambda failure: {"error": failure.sentence, "error_type": "generation"},
    )
