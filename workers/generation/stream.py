"""What a reader sees of a sequence: its pieces as they come, and how it ended."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from collections.abc import Sequence as Several
from typing import Any, NamedTuple, Protocol

from workers.errors import Unanswered
from workers.generation.scheduler import Sequence
from workers.generation.steps import Options, Token
from workers.generation.text import TextStream
from workers.jobs import Answer

MOST_UNREAD = 64  # tokens that a slow reader may leave unread before its sequence pauses


class Loop(Protocol):
    """What a stream needs of the token loop."""

    wake: asyncio.Event  # something may have come that can run

    @property
    def running(self) -> int: ...  # sequences with a slot

    def end(self, stream: "Stream", reason: str, error: Unanswered | None = None) -> None: ...


class Generated(NamedTuple):
    """What there is to say of a generated text, but not what it says."""

    prompt_tokens: int
    tokens: int
    first_token_s: float  # after its admission
    reason: str  # why it ended
    options: Options  # by which rules its tokens were chosen


class Piece(NamedTuple):
    """What is new of a sequence: its tokens, each with the text that it completed."""

    parts: list[tuple[str, Token]]
    rest: str = ""  # text that was held back
    reason: str = ""  # why it ended, stop or length; empty while it goes on

    @property
    def text(self) -> str:
        return "".join(text for text, _ in self.parts) + self.rest

    @property
    def tokens(self) -> list[Token]:
        return [token for _, token in self.parts]


class Stream(AsyncIterator[Piece]):
    """A sequence's pieces as they come. Close it when nobody reads it any more; an `async with` does.

    Raises an `Unanswered` where the sequence ends for any other reason than its own end.
    """

    def __init__(self, loop: "Loop", sequence: Sequence, text: TextStream | None) -> None:
        self.loop, self.sequence, self.text = loop, sequence, text
        self.unread: list[tuple[str, Token]] = []
        self.rest = ""
        self.error: Unanswered | None = None
        self.first_at = self.last_at = 0.0  # when its first and its last token came
        self.promised_at = 0.0  # when its first token was predicted
        self.is_read = False  # its last piece was
        self.news = asyncio.Event()
        self.timer: asyncio.TimerHandle | None = None

    async def __anext__(self) -> Piece:
        if self.is_read:
            raise StopAsyncIteration
        while not self.unread and not self.sequence.reason:
            self.news.clear()
            await self.news.wait()
        if self.error and not self.unread:
            self.is_read = True
            raise self.error
        unread, self.unread = self.unread, []
        reason = "" if self.error else self.sequence.reason
        self.is_read = bool(reason)
        if self.sequence.paused:
            self.sequence.paused = False
            self.loop.wake.set()
        return Piece(unread, self.rest if reason else "", reason)

    @property
    def has_news(self) -> bool:
        """Whether the next piece is there already."""
        return bool(self.unread or self.sequence.reason) and not self.is_read

    def close(self) -> None:
        """Free its slot at the end of the running step: nobody reads it any more."""
        self.loop.end(self, "cancelled")

    def answer(self, value: Any = None) -> Answer:
        """Return what there is to say of the sequence, however it has ended; `value`: its whole text, in an API's form."""
        sequence = self.sequence
        started_at = sequence.started_at or sequence.arrived_at
        last_at = max(self.last_at, started_at)
        generated = Generated(
            len(sequence.prompt),
            len(sequence.tokens),
            (self.first_at or last_at) - sequence.arrived_at,
            sequence.reason or "cancelled",
            sequence.options,
        )
        queue_s, model_s = started_at - sequence.arrived_at, last_at - started_at
        return Answer(value, queue_s, model_s, max(1, self.loop.running), generated.reason, generated)

    async def __aenter__(self) -> "Stream":
        return self

    async def __aexit__(self, *exc: object) -> None:
        self.close()


class Together(AsyncIterator[tuple[int, Piece]]):
    """Several streams as one: each piece with the index of its stream, which take turns. Raises the first failure.

    Close it when nobody reads it any more; an `async with` does.
    """

    def __init__(self, streams: Several[Stream]) -> None:
        self.streams, self.turns = streams, deque(enumerate(streams))
        self.news = asyncio.Event()
        for stream in streams:
            stream.news = self.news

    async def __anext__(self) -> tuple[int, Piece]:
        while not all(stream.is_read for stream in self.streams):
            for _ in self.streams:
                index, stream = self.turns[0]
                self.turns.rotate(-1)
                if stream.has_news:
                    return index, await anext(stream)
            self.news.clear()
            await self.news.wait()
        raise StopAsyncIteration

    def close(self) -> None:
        for stream in self.streams:
            stream.close()

    async def __aenter__(self) -> "Together":
        return self

    async def __aexit__(self, *exc: object) -> None:
        self.close()


async def whole(stream: Stream) -> Piece:
    """Return all of it as one piece."""
    pieces = [piece async for piece in stream]
    return Piece([part for piece in pieces for part in piece.parts], pieces[-1].rest, pieces[-1].reason)


async def whole_of_each(streams: Several[Stream]) -> list[Piece]:
    """Return all of each as one piece, in order: read side by side, as one that nobody reads pauses. Closes them.

    Raises the first failure; its `index` says whose it is, where there are several.
    """

    async def read(index: int, stream: Stream) -> Piece:
        try:
            return await whole(stream)
        except Unanswered as exc:
            exc.index = index if len(streams) > 1 else None
            raise

    try:
        return await asyncio.gather(*(read(*each) for each in enumerate(streams)))
    finally:
        for stream in streams:
            stream.close()
