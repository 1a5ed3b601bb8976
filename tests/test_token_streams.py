"""Streams of tokens on the wire: in every deployment mode each token goes out as it comes, and a client that leaves frees its row."""

import asyncio
import json
import time
from collections.abc import Iterator
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import httpx2
import pytest

from loadtests.modes import MODES, Server, start
from tests.support import mode_matrix
from tests.support.client import dial, get, request, say, until
from tests.support.fake_steps import FakeSteps, expected, generating, options, prompt, read
from tests.support.virtual_clock import now, on_virtual_clock
from workers.context import context_of
from workers.errors import ModelFailed
from workers.generation.scheduler import Sequence
from workers.generation.steps import Options, Token
from workers.generation.stream import MOST_UNREAD, Stream, Together
from workers.web import generation
from workers.web.generation import HEARTBEAT, EventStream

PROMISE = "text that is generated streams, token by token"
WRITING = [mode for mode in mode_matrix.TESTED if mode_matrix.kept(PROMISE, mode)]
LONG = {
    "messages": [{"role": "user", "content": "the old dog"}],
    "max_tokens": 1500,
    "ignore_eos": True,
    "stream": True,
}


# To import torch takes five seconds of a core. One mode of each adapter, ASGI and WSGI, is enough for every commit.
EACH_COMMIT = ("recommended", "gthread-1x8")


@pytest.fixture(
    scope="module",
    params=[pytest.param(mode, marks=[] if mode in EACH_COMMIT else pytest.mark.slow) for mode in WRITING],
)
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    from tests.support.small_language_models import save

    env = {
        "MODEL": save(tmp_path_factory.mktemp("model"), max_position_embeddings=2048),
        "TASK": "text-generation",
        "TORCH_THREADS": "1",
        "KV_CACHE_MB": "20",
        "CONTEXT_TOKENS": "2048",
        "DEADLINE_S": "60",
    }
    with start(MODES[request.param], env) as server:
        yield server


def test_tokens_come_one_by_one(server: Server) -> None:
    """From the first to the last takes the client about as long as the server says that it took to write them."""
    came_at: list[float] = []
    with (
        httpx2.Client(timeout=60) as client,
        client.stream("POST", server.url + "v1/chat/completions", json=LONG) as reply,
    ):
        assert reply.headers["x-accel-buffering"] == "no" and "no-transform" in reply.headers["cache-control"]
        lines = []
        for line in reply.iter_lines():
            came_at.append(time.monotonic())
            lines.append(line)
    events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    assert lines[-2] == "data: [DONE]" and events[-1]["choices"][0]["finish_reason"] == "length"
    wrote_s = events[-1]["timings"]["time_per_output_token_ms"] / 1000 * 1499
    span_s = came_at[-1] - came_at[0]
    gaps_s = [after - before for before, after in pairwise(came_at)]
    assert span_s > wrote_s / 2, "the first token came late: something held it back"
    assert max(gaps_s) < span_s / 2, "much came at once: something gathers the tokens"


def test_client_that_leaves_a_stream_frees_its_row(server: Server) -> None:
    with dial(server) as connection:
        body = json.dumps(LONG | {"max_tokens": 2000}).encode()
        connection.sendall(request("POST", "/v1/chat/completions", body, Content_Type="application/json"))
        assert b"200 OK" in connection.recv(65536)
        connection.recv(65536)
    until(lambda: get(server, "/health").json["running"] == 0)


def test_next_request_on_the_connection_of_a_stream_is_answered(server: Server) -> None:
    with httpx2.Client(timeout=60) as client:
        for _ in range(2):
            reply = client.post(server.url + "v1/chat/completions", json=LONG | {"max_tokens": 3})
            assert reply.text.endswith("data: [DONE]\n\n")


def test_http_1_0_gets_the_whole_stream_without_chunks(server: Server) -> None:
    body = json.dumps(LONG | {"max_tokens": 3}).encode()
    raw = request("POST", "/v1/chat/completions", body, Content_Type="application/json")
    reply = say(server, raw.replace(b"HTTP/1.1", b"HTTP/1.0"))
    assert "Transfer-Encoding" not in reply.headers
    assert reply.body.startswith(b"data: {") and reply.body.endswith(b"data: [DONE]\n\n")


# --- without a server -------------------------------------------------------------------------------------------------


class Played:
    """A stream that a test writes, and what is sent of it."""

    def __init__(self) -> None:
        loop: Any = SimpleNamespace(end=lambda stream, reason: None, wake=asyncio.Event(), running=1)
        self.stream = Stream(loop, Sequence([1], Options()), None)
        self.sent: list[bytes] = []
        self.reply = EventStream(
            [self.stream],
            lambda index, piece: piece.text.encode() + piece.reason.encode(),
            60,
            lambda failure: {"error": failure.sentence},
        )

    def write(self, text: str) -> None:
        self.stream.unread.append((text, Token(1, 0.0)))
        self.stream.news.set()

    def fail(self) -> None:
        self.stream.sequence.reason, self.stream.error = "failed", ModelFailed("a row with NaN")
        self.stream.news.set()

    async def send(self, message: Any) -> None:
        if message.get("body"):
            self.sent.append(message["body"])

    async def run(self) -> None:
        async def receive() -> Any:
            await asyncio.Event().wait()

        await self.reply({"type": "http", "headers": []}, receive, self.send)


async def condition(test: Any) -> None:
    while not test():
        await asyncio.sleep(0.001)


def test_comments_come_while_nothing_else_does_and_an_error_is_the_last_event(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(generation, "HEARTBEAT_S", 0.01)

    async def run() -> list[bytes]:
        played = Played()
        reply = asyncio.create_task(played.run())
        await condition(lambda: HEARTBEAT in played.sent)
        played.write("a")
        await condition(lambda: b"a" in played.sent)
        played.fail()
        await reply
        return played.sent

    *sent, last = asyncio.run(asyncio.wait_for(run(), 60))
    assert {*sent} == {HEARTBEAT, b"a"}
    assert last.startswith(b'data: {"error"') and b"NaN" not in last


def test_comments_come_while_tokens_have_no_event_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "HEARTBEAT_S", 0.01)

    async def run() -> None:
        played = Played()
        reply = asyncio.create_task(played.run())
        while HEARTBEAT not in played.sent:
            played.write("")
            await asyncio.sleep(0)
        played.fail()
        await reply

    asyncio.run(asyncio.wait_for(run(), 60))


def test_error_before_the_first_token_has_a_status_of_its_own() -> None:
    async def run() -> list[bytes]:
        played = Played()
        played.fail()
        with pytest.raises(ModelFailed):
            await played.run()
        return played.sent

    assert asyncio.run(run()) == []


@on_virtual_clock
async def test_reader_that_takes_nothing_for_body_timeout_s_is_cut_off_and_others_never_notice() -> None:
    stuck = asyncio.Event()  # its connection's buffers are full

    async def send(message: Any) -> None:
        if message.get("body"):
            sent.append(message["body"])
            await stuck.wait()

    sent: list[bytes] = []
    async with generating(FakeSteps()) as loop:
        slow = loop.submit(prompt(900, 10), options())
        quick = asyncio.create_task(read(loop.submit(prompt(900, 10), options())))
        reply = EventStream([slow], lambda index, piece: b"a", 2.0, lambda failure: {})
        began = now()

        async def receive() -> Any:
            await asyncio.Event().wait()

        scope = {"type": "http", "headers": []}
        await reply(scope, receive, send)
        assert now() - began == pytest.approx(2.0, abs=0.1)
        assert sent == [b"a"]
        assert (slow.sequence.reason, len(slow.unread)) == ("cancelled", MOST_UNREAD)
        assert context_of(scope).answers[0].dispatched_because == "cancelled"
        assert await quick == (expected(900), "stop")


@on_virtual_clock
async def test_streams_that_are_read_together_take_turns_and_each_is_whole() -> None:
    async with generating(FakeSteps()) as loop:
        starts = (100, 500, 900)
        pieces = Together([loop.submit(prompt(start, 10), options()) for start in starts])
        tokens: dict[int, list[int]] = {0: [], 1: [], 2: []}
        order, reasons = [], {}
        async for index, piece in pieces:
            order.append(index)
            tokens[index] += [token.id for token in piece.tokens]
            reasons[index] = piece.reason
    assert [tokens[index] for index in range(3)] == [expected(start) for start in starts]
    assert set(reasons.values()) == {"stop"}
    assert max(order.index(index) for index in range(3)) < 6  # none waits for the end of another
