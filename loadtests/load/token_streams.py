"""Clients that read texts as they are written, many from one core: one uvloop, raw connections, every piece timed.

Works with any server that streams OpenAI's completions. Tokens are those of the text that came, counted by the model's
tokenizer: pieces may hold several.
"""

import asyncio
import itertools
import json
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median
from typing import Any

import httptools

PATH = "/v1/completions"
Count = Callable[[str], int]


@dataclass(frozen=True)
class Goal:
    """What a reader wants, in seconds: the first token within `ttft_s`, each next piece within `itl_s`."""

    ttft_s: float = 1.0
    itl_s: float = 0.2
    # Without a piece for so long a reader leaves.
    patience_s: float = 1.5


@dataclass
class Stream:
    """One request: when it was due, on the clock of time.perf_counter, and what came when."""

    prompt: str
    due_at: float
    pieces: list[tuple[float, str]] = field(default_factory=list)
    status: int = 0  # 0: no reply
    is_whole: bool = False

    @property
    def text(self) -> str:
        return "".join(piece for _, piece in self.pieces)

    @property
    def ttft_s(self) -> float:
        """Seconds to the first piece; infinity where none came."""
        return self.pieces[0][0] - self.due_at if self.pieces else float("inf")

    def gaps_s(self, since: float = 0.0, until: float = float("inf")) -> list[float]:
        """Seconds from each piece to the next, of those that end within these times."""
        return [b - a for (a, _), (b, _) in pairwise(self.pieces) if since <= b <= until]

    def is_good(self, goal: Goal) -> bool:
        """Whether it came to its end, and always in time."""
        return self.is_whole and self.ttft_s <= goal.ttft_s and max(self.gaps_s(), default=0.0) <= goal.itl_s

    def tokens(self, count: Count, since: float, until: float) -> int:
        """How many tokens came within these times."""
        return count("".join(piece for at, piece in self.pieces if since <= at < until))


class Connection(asyncio.Protocol):
    """A connection for one request; `ended` is set when the reply is whole, broken or given up."""

    transport: asyncio.Transport

    def __init__(self, request: bytes, stream: Stream) -> None:
        self.request, self.stream, self.rest = request, stream, b""
        self.parser = httptools.HttpResponseParser(self)
        self.ended = asyncio.Event()
        self.came = asyncio.Event()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]
        self.transport.write(self.request)

    def data_received(self, data: bytes) -> None:
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserError:
            self.leave()

    def on_headers_complete(self) -> None:
        self.stream.status = self.parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        *lines, self.rest = (self.rest + body).split(b"\n")
        for line in lines:
            if piece := text_of(line):
                self.stream.pieces.append((time.perf_counter(), piece))
                self.came.set()

    def on_message_complete(self) -> None:
        self.stream.is_whole = self.stream.status == 200 and bool(self.stream.pieces)
        self.leave()

    def connection_lost(self, exc: Exception | None) -> None:
        self.came.set()
        self.ended.set()

    def leave(self) -> None:
        """Close the connection, as a client does that wants no more."""
        if not self.ended.is_set():
            self.transport.abort()


def text_of(line: bytes) -> str:
    """Return the text in a line of the reply, an event or JSON alone; empty where there is none."""
    line = line.removeprefix(b"data:").strip()
    if not line.startswith(b"{"):
        return ""
    choices: list[dict[str, Any]] = json.loads(line).get("choices") or [{}]
    return choices[0].get("text") or ""


@dataclass
class Readers:
    """Readers of one server. `model` is the name that it wants in requests, `fields` what else each of them has."""

    url: str
    model: str = "any"
    fields: Mapping[str, Any] = field(default_factory=dict)
    headers: tuple[str, ...] = ()

    def request(self, prompt: str, max_tokens: int) -> bytes:
        """Return the bytes of a request for a greedy answer."""
        fields = {"model": self.model, "prompt": prompt, "max_tokens": max_tokens, "stream": True}
        body = json.dumps({**fields, "temperature": 0, **self.fields}).encode()
        host = self.url.split("/")[2]
        lines = (
            f"POST {PATH} HTTP/1.1",
            f"Host: {host}",
            "Content-Type: application/json",
            f"Content-Length: {len(body)}",
            *self.headers,
        )
        return "\r\n".join(lines).encode() + b"\r\n\r\n" + body

    async def begin(self, prompt: str, max_tokens: int, due_at: float = 0.0) -> Connection:
        """Connect and send; where the server can't be reached, the connection has ended."""
        stream = Stream(prompt, due_at or time.perf_counter())
        connection = Connection(self.request(prompt, max_tokens), stream)
        host, port = self.url.split("/")[2].split(":")
        try:
            await asyncio.get_running_loop().create_connection(lambda: connection, host, int(port))
        except OSError:
            connection.connection_lost(None)
        return connection

    async def read(
        self, prompt: str, max_tokens: int, due_at: float = 0.0, patience_s: float = 60.0
    ) -> Stream:
        """Read one text to its end, or leave when nothing came for `patience_s`."""
        connection = await self.begin(prompt, max_tokens, due_at)
        while not connection.ended.is_set():
            connection.came.clear()
            try:
                await asyncio.wait_for(connection.came.wait(), patience_s)
            except TimeoutError:
                connection.leave()
                await connection.ended.wait()
        return connection.stream

    async def closed(
        self, users: int, seconds: float, prompts: Sequence[str], lengths: Iterator[int]
    ) -> list[Stream]:
        """Let users ask for one text after the other, and leave after these seconds."""
        streams: list[Stream] = []
        turn = itertools.cycle(prompts)

        async def user() -> None:
            while True:
                connection = await self.begin(next(turn), next(lengths))
                streams.append(connection.stream)
                try:
                    await connection.ended.wait()
                finally:
                    connection.leave()
                    await connection.ended.wait()
                if connection.stream.status != 200:
                    await asyncio.sleep(0.1)

        tasks = [asyncio.create_task(user()) for _ in range(users)]
        await asyncio.sleep(seconds)
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        return streams

    async def open(
        self, rate_per_s: float, seconds: float, prompts: Sequence[str], lengths: Iterator[int], goal: Goal
    ) -> list[Stream]:
        """Let readers come at random times, whether or not others have their text, and wait for the last one's end."""
        rng, turn = random.Random(0), itertools.cycle(prompts)
        began_at = due_at = time.perf_counter()
        tasks = []
        while (due_at := due_at + rng.expovariate(rate_per_s)) < began_at + seconds:
            await asyncio.sleep(max(0.0, due_at - time.perf_counter()))
            read = self.read(next(turn), next(lengths), due_at, goal.patience_s)
            tasks.append(asyncio.create_task(read))
        return list(await asyncio.gather(*tasks))


def lengths(seed: int = 0, least: int = 32, most: int = 96) -> Iterator[int]:
    """Yield how many tokens each next reader wants: unlike each other, so that not all end at once."""
    rng = random.Random(seed)
    while True:
        yield rng.randint(least, most)


def throughput(streams: Iterable[Stream], count: Count, since: float, until: float) -> float:
    """Return tokens per second that came between these times."""
    return sum(stream.tokens(count, since, until) for stream in streams) / (until - since)


def goodput(streams: Sequence[Stream], goal: Goal, since: float, until: float) -> dict[str, float]:
    """Return requests per second that were due in this time, how many of them met the goal, and what the others met."""
    due = [stream for stream in streams if since <= stream.due_at < until]
    seconds = until - since
    return {
        "offered_per_s": len(due) / seconds,
        "good_per_s": sum(stream.is_good(goal) for stream in due) / seconds,
        "rejected": sum(stream.status in (429, 503) for stream in due) / max(1, len(due)),
        "late_first": sum(
            (stream.status == 200 and stream.ttft_s > goal.ttft_s) or not stream.status for stream in due
        )
        / max(1, len(due)),
    }


def pace(streams: Iterable[Stream], since: float = 0.0) -> dict[str, float]:
    """Return medians and p99 of the first tokens' times and the gaps, in ms, of streams that began after `since`."""
    some = [stream for stream in streams if stream.pieces and stream.due_at >= since]
    ttft = sorted(stream.ttft_s for stream in some)
    gaps = sorted(gap for stream in some for gap in stream.gaps_s())
    return {
        name: 1000 * value
        for title, values in (("ttft", ttft), ("itl", gaps))
        if values
        for name, value in (
            (f"{title}_p50_ms", median(values)),
            (f"{title}_p99_ms", values[int(0.99 * (len(values) - 1))]),
        )
    }
