"""What clients do wrong, or do and leave, over a real socket in four deployment modes; the model does as it is told."""

import contextlib
import json
import os
import re
import resource
import signal
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from loadtests.modes import MODES, Mode, Server, start
from tests.support.client import Crowd, dial, hear, metric, post, post_json, request, say, until, workers
from tests.support.fake_models import BROKEN

OBEDIENT = {"MODEL": "tests.support.fake_models:Obedient"}
THREADS = {"thread": 8, "asgi": 8, "gthread-1x8": 8, "sync-2": 2}  # so many requests hold all that a mode has
FAILED = "the model failed on this request; report it with the X-Request-ID of this reply"


@pytest.fixture(scope="module", params=THREADS)
def mode(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def server(mode: str) -> Iterator[Server]:
    """Four texts a call."""
    with start(MODES[mode], {**OBEDIENT, "BATCH_SIZE": "4", "MAX_BODY_BYTES": "300000"}) as server:
        until(lambda: len(workers(server)) == (2 if mode == "sync-2" else 1))
        yield server


def run_so_far(server: Server) -> float:
    """How many inputs the model has been given."""
    return metric(server, "model_batch_size_sum")


def counted(server: Server, status: int) -> float:
    return metric(server, f'model_requests_total{{status="{status}"}}')


# --- bodies -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 65_535, 65_536, 65_537, 131_072, 200_000])
def test_body_of_any_length_arrives_whole(server: Server, size: int) -> None:
    text = "".join(chr(ord("a") + i % 26) for i in range(size))
    chunks = b"".join(
        b"%x\r\n%s\r\n" % (len(part), part) for part in (text[:1].encode(), text[1:].encode()) if part
    )
    assert post(server, text).json == text
    assert post(server, chunks + b"0\r\n\r\n", Transfer_Encoding="chunked").json == text


def test_body_longer_than_allowed_is_a_413_with_and_without_a_length(server: Server) -> None:
    body = b"a" * 300_001
    assert post(server, body).status == 413
    reply = post(server, b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body), Transfer_Encoding="chunked")
    assert (reply.status, "300000" in reply.error) == (413, True)


LONG = request("POST", Content_Length="1000")
CHUNKED = request("POST", Transfer_Encoding="chunked")
CUT_OFF = {
    "in a body with a length": LONG + b"a" * 30,
    "before a body with a length": LONG,
    "far into a body with a length": request("POST", Content_Length="100000") + b"a" * 65_536,
    "in a chunk": CHUNKED + b"64\r\n" + b"a" * 30,
    "between two chunks": CHUNKED + b"2\r\naa\r\n",
    "in the length of a chunk": CHUNKED + b"2\r\naa\r\n1",
    "at the end of a chunk": CHUNKED + b"2\r\naa",
}


@pytest.mark.parametrize("where", CUT_OFF)
def test_body_that_is_cut_off_is_not_run(server: Server, where: str) -> None:
    run, left = run_so_far(server), counted(server, 499)
    with dial(server) as connection:
        connection.sendall(CUT_OFF[where])
        connection.shutdown(socket.SHUT_WR)
        assert connection.recv(1) == b"", "it is closed without a word"
    until(lambda: counted(server, 499) == left + 1)
    assert run_so_far(server) == run


def test_clients_that_reset_amid_their_bodies_are_not_server_errors(server: Server) -> None:
    log, left, errors = len(server.log()), counted(server, 499), counted(server, 500)
    for _ in range(20):
        connection = dial(server)
        connection.sendall(LONG + b"a" * 30)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.close()
    until(lambda: counted(server, 499) == left + 20)
    assert counted(server, 500) == errors
    assert "Traceback" not in server.log()[log:]


def test_chunks_that_are_none_are_a_400(server: Server) -> None:
    with dial(server) as connection:
        connection.sendall(CHUNKED + b"nonsense\r\na text\r\n0\r\n\r\n")
        assert hear(connection).status == 400
        with contextlib.suppress(ConnectionResetError):
            assert connection.recv(1) == b"", "nobody knows where the next request begins"


# --- failures that are ours -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("told", ["nan", "bug"])
def test_failure_nobody_foresaw_is_a_500_in_our_form_and_one_entry_in_the_log(
    server: Server, told: str
) -> None:
    log, errors = len(server.log()), counted(server, 500)
    reply = post_json(server, {"inputs": {told: 1}}, X_Request_ID=f"this-{told}")
    assert (reply.status, reply.error) == (500, FAILED)
    assert reply.headers["X-Request-ID"] == f"this-{told}"
    assert counted(server, 500) == errors + 1
    written = server.log()[log:]
    assert written.count(f"request this-{told} failed") == 1
    assert len(re.findall("ERROR", written)) == 1


def test_answer_that_is_not_json_spares_the_others_of_its_batch(
    server: Server, crowd: Crowd, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    blocker = crowd.submit(post_json, server, {"inputs": {"until": str(gate)}})
    asked = [{"inputs": "a"}, {"inputs": {"nan": 1}}, {"inputs": "b"}]
    replies = [crowd.submit(post_json, server, content) for content in asked]
    gate.touch()
    assert blocker.result().status == 200
    assert [reply.result().status for reply in replies] == [200, 500, 200]
    assert [replies[0].result().json, replies[2].result().json] == ["a", "b"]


# --- clients that leave -----------------------------------------------------------------------------------------------


def test_model_runs_nothing_for_clients_that_have_left(server: Server, mode: str, tmp_path: Path) -> None:
    """On a busy machine the last of them may find a call that takes too long, and are refused."""

    def answered_so_far() -> float:
        return counted(server, 499) + counted(server, 503)

    run, before, gate = run_so_far(server), answered_so_far(), tmp_path / "gate"
    until_then = json.dumps({"inputs": {"until": str(gate)}}).encode()
    with contextlib.ExitStack() as connections:
        held = [connections.enter_context(dial(server)) for _ in range(THREADS[mode])]
        for connection in held:
            connection.sendall(request("POST", "/", until_then, Content_Type="application/json"))
        for _ in range(100):
            with dial(server) as leaver:
                leaver.sendall(request("POST", "/", b"a text"))
        if mode in ("thread", "asgi"):
            until(lambda: answered_so_far() == before + 100)
        gate.touch()
        assert [hear(connection).status for connection in held] == [200] * len(held)
    until(lambda: answered_so_far() == before + 100)
    assert run_so_far(server) == run + len(held)


def test_client_that_closes_its_side_has_left(server: Server, tmp_path: Path) -> None:
    """TCP can't tell one that only has nothing more to send."""
    left, gate = counted(server, 499), tmp_path / "gate"
    content = json.dumps({"inputs": {"until": str(gate)}}).encode()
    with dial(server) as connection:
        connection.sendall(request("POST", "/", content, Content_Type="application/json"))
        connection.shutdown(socket.SHUT_WR)
        assert connection.recv(1) == b"", "it is closed without an answer"
    until(lambda: counted(server, 499) == left + 1)
    gate.touch()


def test_who_does_not_close_a_closed_connection_holds_nobody_up(server: Server) -> None:
    """Gunicorn would wait two seconds for each."""
    began = time.monotonic()
    with contextlib.ExitStack() as connections:
        for _ in range(8):
            connection = connections.enter_context(dial(server))
            connection.sendall(request("POST", "/", b"a text", Connection="close"))
            assert hear(connection).status == 200
    assert time.monotonic() - began < 8


# --- what is not what it seems ----------------------------------------------------------------------------------------


def test_text_with_an_upgrade_is_answered_or_rejected_with_the_reason(server: Server, mode: str) -> None:
    """As `curl --http2` sends it to a server whose address begins with http."""
    upgrade = {
        "Connection": "Upgrade, HTTP2-Settings",
        "Upgrade": "h2c",
        "HTTP2-Settings": "AAMAAABkAAQAoAAAAAIAAAAA",
    }
    for raw in (
        request("POST", "/", b"a text", **upgrade),
        request("POST", "/", b"6\r\na text\r\n0\r\n\r\n", Transfer_Encoding="chunked", **upgrade),
    ):
        reply = say(server, raw)
        if mode == "thread":
            assert (reply.status, "Upgrade" in reply.error) == (400, True)
            assert reply.headers["Connection"] == "close"
        else:
            assert (reply.status, reply.json) == (200, "a text")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32", "utf-32-be"])
def test_json_is_utf_8(server: Server, encoding: str) -> None:
    reply = post(server, '{"inputs": "a text"}'.encode(encoding), Content_Type="application/json")
    assert reply.status == 400
    assert reply.error


@pytest.mark.parametrize("content_type", ["multipart/form-data; boundary=x", 'text/plain; charset="latin-1"'])
def test_other_types_are_a_415(server: Server, content_type: str) -> None:
    reply = post(server, b"a text", Content_Type=content_type)
    assert (reply.status, "send " in reply.error) == (415, True)


def test_wait_that_is_not_understood_is_ignored(server: Server) -> None:
    for prefer in ("wait=0.5s", 'foo="a, wait=0"', "respond-async; wait=0"):
        assert post(server, "a text", Prefer=prefer).status == 200
    assert post(server, "a text", Prefer="respond-async, wait=0").status == 504


# --- workers that can't load ------------------------------------------------------------------------------------------


def test_replacement_that_cannot_load_ends_nobody_else_and_comes_once_it_can(tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    mode = Mode("gthread 2x8", "gunicorn -c workers/gunicorn/gthread.conf.py --workers 2")
    with start(mode, {**OBEDIENT, BROKEN: str(broken)}) as server:
        until(lambda: len(workers(server)) == 2)
        broken.touch()
        os.kill(workers(server)[0], signal.SIGKILL)
        until(
            lambda: (
                server.log().count(
                    "cannot load MODEL=tests.support.fake_models:Obedient: OSError: Too many open files"
                )
                == 2
            )
        )
        # The next replacement may have taken the request while it loads: then it says 503.
        until(lambda: post(server, "a text").status == 200)
        broken.unlink()
        until(lambda: len(workers(server)) == 3)
        assert post(server, "a text").status == 200


@pytest.mark.parametrize("config", ["workers/gunicorn/gthread.conf.py", "gunicorn.conf.py"])
def test_model_that_never_loads_ends_the_start_with_its_reason(tmp_path: Path, config: str) -> None:
    mode = Mode("broken", f"gunicorn -c {config} --workers 2")
    with start(mode, {**OBEDIENT, BROKEN: str(tmp_path)}, wait=False) as server:
        assert server.process.wait(30) != 0
        assert (
            "cannot load MODEL=tests.support.fake_models:Obedient: OSError: Too many open files"
            in server.log()
        )


@pytest.fixture
def few_files() -> Iterator[None]:
    """Processes that are started now may open 64 files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_more_connections_than_files_cost_no_worker(few_files: None) -> None:
    with start(MODES["gthread-1x8"], OBEDIENT) as server, contextlib.ExitStack() as connections:
        resource.setrlimit(resource.RLIMIT_NOFILE, (1024, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
        for _ in range(100):
            connections.enter_context(dial(server)).sendall(LONG)
        connections.close()
        assert post(server, "a text").status == 200
        assert server.log().count("Booting worker") == 1
