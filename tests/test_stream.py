"""Answers as they come: a line for each input of a list, as soon as it is there."""

import asyncio
import contextlib
import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from starlette.requests import Request

from loadtests.modes import MODES, Server, start
from tests.support.client import dial, get, metric, request, say, until
from workers.jobs import Answer
from workers.tasks import Query
from workers.web.stream import Streamed

NDJSON = {"Accept": "application/x-ndjson"}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    settings = {
        "MODEL": "tests.support.fake_models:Obedient",
        "MAX_QUEUE": "4",
        "BODY_TIMEOUT_S": "1",
        "DEADLINE_S": "60",
        "MAX_BODY_BYTES": "9000000",
    }
    with start(MODES["thread"], settings) as server:
        yield server


@contextlib.contextmanager
def asked(server: Server, inputs: list[Any], **headers: str) -> Iterator[httpx2.Response]:
    with (
        httpx2.Client(timeout=30) as client,
        client.stream("POST", server.url, json={"inputs": inputs}, headers=NDJSON | headers) as reply,
    ):
        yield reply


def whole(server: Server, inputs: list[Any], **headers: str) -> dict[int, Any]:
    """The lines by their index, which is taken out."""
    with asked(server, inputs, **headers) as reply:
        assert reply.status_code == 200
        lines = [json.loads(line) for line in reply.iter_lines()]
    return {line.pop("index"): line for line in lines}


def test_line_is_there_before_the_next_answer(server: Server, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    with asked(server, ["first", {"until": str(gate)}, "third"]) as reply:
        lines = reply.iter_lines()
        first = json.loads(next(lines))
        assert (first["index"], first["answer"]) == (0, "first")
        assert first["batch"].startswith("size 1, dispatched because")
        assert {"queue_ms", "model_ms"} < first.keys()
        gate.touch()
        assert [json.loads(line)["index"] for line in lines] == [1, 2]
    assert reply.headers["content-type"] == "application/x-ndjson"
    assert reply.headers["x-request-id"]


def test_events_are_the_same_lines(server: Server) -> None:
    with asked(server, ["a", "b"], Accept="text/event-stream") as reply:
        events = reply.read().decode().split("\n\n")
    assert [json.loads(event.removeprefix("data: "))["answer"] for event in events[:-1]] == ["a", "b"]
    assert events[-1] == ""


def test_one_that_fails_fails_alone(server: Server) -> None:
    lines = whole(server, ["a", {"nan": 1}, "c"])
    assert [lines[0]["answer"], lines[2]["answer"]] == ["a", "c"]
    assert lines[1]["status"] == 500
    assert "the model failed on input 1" in lines[1]["error"]


def test_what_finds_no_room_or_no_time_says_so_in_its_line(server: Server, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    blocking = {"until": str(gate)}
    with asked(server, [blocking] * 6, Prefer="wait=1") as reply:
        lines = {line["index"]: line for line in map(json.loads, reply.iter_lines())}
    gate.touch()
    assert len(lines) == 6
    statuses = [lines[index]["status"] for index in range(6)]
    assert set(statuses) == {503, 504}
    assert all(line["retry_after_s"] >= 1 for line in lines.values() if line["status"] == 503)


def test_wrong_input_is_rejected_before_the_first_line(server: Server) -> None:
    with asked(server, []) as reply:
        assert reply.status_code == 400
        assert reply.headers["content-type"] == "application/json"


def test_client_that_leaves_frees_the_rest(server: Server, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    before = metric(server, "model_abandoned_total")
    with asked(server, [{"until": str(gate)}, "b", "c"]):
        until(lambda: get(server, "/health").json["queue_depth"] == 2)
    until(lambda: get(server, "/health").json["queue_depth"] == 0)
    gate.touch()
    until(lambda: get(server, "/health").json["running"] == 0)
    assert metric(server, "model_abandoned_total") == before + 3


def test_client_that_stops_reading_is_let_go_and_frees_the_rest(server: Server, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    body = json.dumps({"inputs": ["x" * 8_000_000, {"until": str(gate)}, "c"]}).encode()
    with dial(server) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.sendall(
            request("POST", "/", body, Accept="application/x-ndjson", Content_Type="application/json")
        )
        until(lambda: get(server, "/health").json["queue_depth"] == 1)
        until(lambda: get(server, "/health").json["queue_depth"] == 0)  # nobody has opened the gate
        gate.touch()


def test_without_asking_for_it_a_list_is_one_reply(server: Server) -> None:
    with asked(server, ["a", "b"], Accept="*/*") as reply:
        assert json.loads(reply.read()) == ["a", "b"]


def test_http_1_0_gets_no_chunks(server: Server) -> None:
    raw = request(
        "POST", "/", b'{"inputs": ["a", "b"]}', Accept="application/x-ndjson", Content_Type="application/json"
    )
    reply = say(server, raw.replace(b"HTTP/1.1", b"HTTP/1.0"))
    assert "Transfer-Encoding" not in reply.headers
    assert int(reply.headers["Content-Length"]) == len(reply.body)
    assert [json.loads(line)["answer"] for line in reply.body.splitlines()] == ["a", "b"]


def test_slow_reader_is_noticed_before_the_next_answer() -> None:
    """uvicorn waits for a client that reads nothing only at the next send: it must not be the next answer's."""

    class OneAnswer:
        async def submit_all(self, queries: list[str], sizes: list[float], **how: Any) -> list[Answer]:
            if queries == ["never"]:
                await asyncio.get_running_loop().create_future()
            return [Answer(queries[0], 0, 0, 1, "full")]

    async def scenario() -> None:
        scope = {"type": "http", "method": "POST", "path": "/", "headers": []}
        queries = [Query("now"), Query("never")]
        streamed = Streamed(OneAnswer(), 0.01, Request(scope), queries, "application/x-ndjson")  # type: ignore[arg-type]
        sent: list[Any] = []

        async def send(message: Any) -> None:
            if sent and sent[-1].get("body"):
                await asyncio.get_running_loop().create_future()  # the line before is not taken
            sent.append(message)

        async with asyncio.timeout(60):
            await streamed(scope, asyncio.get_running_loop().create_future, send)

    asyncio.run(scenario())


def test_behind_a_thread_all_lines_come_at_the_end() -> None:
    with start(MODES["gthread-1x8"], {"MODEL": "tests.support.fake_models:Obedient"}) as server:
        assert {index: line["answer"] for index, line in whole(server, ["a", "b"]).items()} == {
            0: "a",
            1: "b",
        }
