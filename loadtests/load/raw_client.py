"""More clients than Locust's greenlets can be, from one core: raw connections on one uvloop, replies only counted."""

import asyncio
import os
import random
import statistics
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

import uvloop

HEALTH_EVERY_S = 0.025


def on_core(cpu: int, work: Coroutine[Any, Any, Any]) -> Any:
    """What `work` gives; this thread stays on that core."""
    os.sched_setaffinity(0, {cpu})
    return uvloop.run(work)


def http(url: str, body: str | bytes, path: str = "/", media_type: str = "text/plain") -> bytes:
    """The bytes of a POST."""
    host, content = url.split("/")[2], body.encode() if isinstance(body, str) else body
    head = f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: {media_type}\r\n"
    return f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content


class Connection(asyncio.Protocol):
    """One connection, one request at a time; `then` gets the status of its reply."""

    buffer = b""
    then: Callable[[int], None]
    transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]

    def ask(self, request: bytes, then: Callable[[int], None]) -> None:
        self.then = then
        self.transport.write(request)

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        head, separator, body = self.buffer.partition(b"\r\n\r\n")
        if not separator:
            return
        fields = head.lower()
        if b"transfer-encoding: chunked" in fields:
            whole = body.endswith(b"0\r\n\r\n")
        else:
            whole = len(body) >= int(fields.partition(b"content-length:")[2].split(b"\r\n", 1)[0])
        if not whole:
            return
        self.buffer = b""
        self.then(int(head[9:12]))


async def connect(url: str) -> Connection:
    """A connection of its own."""
    host, port = url.split("/")[2].split(":")
    return (await asyncio.get_running_loop().create_connection(Connection, host, int(port)))[1]


@dataclass
class Crowd:
    """Clients of one server, who all send the same texts; what they got, a second, is counted from `limit_s` on."""

    url: str
    texts: list[str]
    limit_s: float = 1.0
    media_type: str = "text/plain"
    right: int = 0  # 200 within `limit_s` from when it was due
    refused: int = 0
    other: int = 0
    health_s: list[float] = field(default_factory=list)

    def count(self, status: int, due_at: float) -> None:
        now = time.perf_counter()
        if self.began_at + self.limit_s <= now < self.ends_at:
            in_time = status == 200 and now - due_at <= self.limit_s
            self.right += in_time
            self.refused += status == 503
            self.other += status != 503 and not in_time

    async def run(self, duration_s: float, load: Callable[[], "asyncio.Task[None]"]) -> None:
        """Let `load` last for `duration_s`, and ask for /health meanwhile."""
        self.began_at = time.perf_counter()
        self.ends_at = self.began_at + duration_s
        tasks = [load(), asyncio.create_task(self.check_health())]
        await asyncio.sleep(duration_s)
        for task in tasks:
            task.cancel()
        self.seconds = duration_s - self.limit_s
        await asyncio.wait(tasks)

    async def check_health(self) -> None:
        """Forty times a second, on a schedule, one after the other."""
        connection, due_at = await connect(self.url), time.perf_counter()
        while True:
            answered = asyncio.Event()
            connection.ask(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n", lambda status: answered.set())  # noqa: B023
            await answered.wait()
            self.health_s.append(time.perf_counter() - due_at)
            due_at += HEALTH_EVERY_S
            await asyncio.sleep(max(0.0, due_at - time.perf_counter()))

    async def arrive(self, rate_per_s: float) -> None:
        """Strangers come at random times, whether or not others have been answered."""
        rng = random.Random(0)
        idle, due_at = [await connect(self.url) for _ in range(64)], time.perf_counter()
        requests = [http(self.url, text, media_type=self.media_type) for text in self.texts]

        async def ask(due_at: float) -> None:
            connection = idle.pop() if idle else await connect(self.url)

            def then(status: int) -> None:
                self.count(status, due_at)
                idle.append(connection)

            connection.ask(rng.choice(requests), then)

        under_way: set[asyncio.Task[None]] = set()
        while True:
            due_at += rng.expovariate(rate_per_s)
            if (pause_s := due_at - time.perf_counter()) > 0:
                await asyncio.sleep(pause_s)
            task = asyncio.create_task(ask(due_at))
            under_way.add(task)
            task.add_done_callback(under_way.discard)

    async def insist(self, users: int, pause_s: float) -> None:
        """Users who ask again as soon as they have an answer, and `pause_s` after a rejection, whatever Retry-After says."""
        loop = asyncio.get_running_loop()
        under_way: set[asyncio.Task[None]] = set()

        async def ask_anew(request: bytes) -> None:
            ask(await connect(self.url), request)

        def ask(connection: Connection, request: bytes) -> None:
            if connection.transport.is_closing():  # by the server, after its last reply
                task = loop.create_task(ask_anew(request))
                under_way.add(task)
                task.add_done_callback(under_way.discard)
                return
            due_at = time.perf_counter()

            def then(status: int) -> None:
                self.count(status, due_at)
                loop.call_later(pause_s if status == 503 else 0.0, ask, connection, request)

            connection.ask(request, then)

        for i in range(users):
            text = self.texts[i % len(self.texts)]
            ask(await connect(self.url), http(self.url, text, media_type=self.media_type))
        await loop.create_future()

    @property
    def right_per_s(self) -> float:
        return self.right / self.seconds

    @property
    def health_p99_s(self) -> float:
        return statistics.quantiles(self.health_s, n=100)[-1]
