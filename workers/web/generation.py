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
from collections.abc import AsyncIterator, Callable
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from workers.context import RequestContext, context_of
from workers.errors import Unanswered
from workers.generation.stream import Piece, Stream, Together, whole_of_each
from workers.generation.token_loop import TokenLoop
from workers.tasks.text_generation import Prompt, Task
from workers.web.replies import Failure, explain, rendered
from workers.web.stream import Parts, leaving

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

    def submit(self, prompts: list[Prompt], budget_s: float = math.inf) -> list[Stream]:
        """Return the stream of what follows each prompt. Raises Rejected, for all. Close them: `async with` does."""
        return self.loop.submit_each(list(map(self.task.opened, prompts)), budget_s=budget_s)


async def written(
    generation: Generation, prompts: list[Prompt], context: RequestContext
) -> tuple[list[Stream], list[Piece]]:
    """Return the ended stream of each prompt, and all of it as one piece. If one fails or is rejected, all are."""
    streams = generation.submit(prompts, context.left_s)
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


Events = Callable[[int, Piece], bytes]


class EventStream(Response):
    """Pieces of one or more sequences as server-sent events; `events` says how a piece of the sequence with an index reads.

    A client that leaves frees its slots at the end of the running step, and so does one that takes nothing for `stall_s`.
    """

    def __init__(
        self, streams: list[Stream], events: Events, stall_s: float, failed: Callable[[Failure], Any]
    ) -> None:
        self.pieces, self.events, self.stall_s, self.failed = Together(streams), events, stall_s, failed
        self.status_code, self.background = 200, None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        gone = asyncio.create_task(leaving(receive))
        gone.add_done_callback(lambda _: self.pieces.close())
        parts = Parts(scope, send, EVENT_STREAM, self.stall_s)
        try:
            async with self.pieces:
                bodies = self.bodies()
                first = await anext(bodies)  # until it is there, an error has its own status
                await parts.begin()
                await parts.put(first)
                await self.send_rest(bodies, parts, context_of(scope).request_id)
        except TimeoutError:
            pass  # it has stopped reading: without an end of the reply the server closes the connection
        finally:
            gone.cancel()
            context_of(scope).answers += [stream.answer() for stream in self.pieces.streams]

    async def bodies(self) -> AsyncIterator[bytes]:
        """Yield the events of each piece; a comment where there has been none for HEARTBEAT_S. Raises Unanswered."""
        now = asyncio.get_running_loop().time
        said_at = now()
        while True:
            body = b""
            try:
                async with asyncio.timeout_at(said_at + HEARTBEAT_S):
                    index, piece = await anext(self.pieces)
                if piece.reason == "cancelled":
                    raise ClientDisconnect
                body = self.events(index, piece)
            except TimeoutError:
                body = HEARTBEAT
            except StopAsyncIteration:
                return
            if body:
                said_at = now()
            yield body

    async def send_rest(self, bodies: AsyncIterator[bytes], parts: Parts, request_id: str) -> None:
        """Send all that follows; where a sequence fails, tell why in a last event."""
        try:
            async for body in bodies:
                await parts.put(body)
        except ClientDisconnect:
            return
        except Unanswered as exc:
            await parts.put(event(self.failed(explain(exc, request_id))))
        await parts.end()


def event(content: Any) -> bytes:
    """Return JSON as a server-sent event."""
    return b"data: %s\n\n" % rendered(content)


class HuggingFaceEvents:
    """An event per token; the last one has the whole text."""

    def __init__(self, task: Task, prompt: Prompt) -> None:
        self.task, self.prompt = task, prompt
        self.texts: list[str] = []
        self.tokens: list[Any] = []

    def __call__(self, index: int, piece: Piece) -> bytes:
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
    streams = generation.submit([prompt], context_of(request.scope).left_s)
    events = HuggingFaceEvents(generation.task, prompt)
    return EventStream(
        streams,
        events,
        generation.stall_s,
        lambda failure: {"error": failure.sentence, "error_type": "generation"},
    )
