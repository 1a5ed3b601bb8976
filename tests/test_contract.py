"""The HTTP contract of DESIGN.md, sentence by sentence, over a real socket, in every deployment mode.

What a mode can't do by its nature is in `promises.py`, whose table is in docs/promises.md.
"""

import contextlib
import os
import re
import select
import shutil
import signal
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import MODEL

from loadtests.modes import MODES, Server, start
from tests.support.client import (
    PARIS,
    POISON,
    SLOW,
    Crowd,
    Reply,
    below,
    dial,
    get,
    hear,
    metric,
    post,
    post_json,
    request,
    say,
    until,
    workers,
)
from tests.support.mode_matrix import (
    GUNICORNS_PAGE,
    ITS_REPLICAS,
    ITS_SHARE,
    ITS_THREADS,
    NEVER,
    TESTED,
    WHILE_A_THREAD_IS_FREE,
    WHILE_A_WORKER_IS_FREE,
    exception,
    kept,
)

GATHERS = "batches span all connections"
WORKERS = {mode: 2 if mode in ("uvicorn-2", "sync-2", "dirty", "haproxy-2") else 1 for mode in TESTED}
HAPROXY = pytest.mark.skipif(not shutil.which("haproxy"), reason="haproxy is not installed")


def modes(*quick: str) -> list[Any]:
    """Return the modes as parameters; those that are not `quick` belong to the slow tests."""
    return [
        pytest.param(
            mode, marks=[*[HAPROXY] * (mode == "haproxy-2"), *[pytest.mark.slow] * (mode not in quick)]
        )
        for mode in TESTED
    ]


@pytest.fixture(scope="module", params=modes(*set(TESTED) - {"haproxy-2"}))
def mode(request: pytest.FixtureRequest) -> str:
    return request.param


# The servers that all tests of a mode share. The last test of each ends it.


@contextlib.contextmanager
def started(mode: str, **settings: str) -> Iterator[Server]:
    """A server in which every worker is ready. Its model is the stand-in, unless said otherwise."""
    usual = {"MODEL": "tests.support.fake_models:FillMask", "MAX_BODY_BYTES": "16384"}
    with start(MODES[mode], usual | settings) as server:
        until(lambda: len(workers(server)) == WORKERS[mode])  # ready tells of one only
        yield server


# To import torch takes five seconds of a core. One mode of each adapter, ASGI and WSGI, is enough for every commit.
@pytest.fixture(scope="module", params=modes("recommended", "gthread-1x8"))
def real(request: pytest.FixtureRequest) -> Iterator[Server]:
    """The bundled model on one core."""
    with started(request.param, MODEL=str(MODEL), TORCH_THREADS="1", BODY_TIMEOUT_S="1") as server:
        yield server


@pytest.fixture(scope="module")
def server(mode: str) -> Iterator[Server]:
    """One text a call, one place in its queue; patient with nobody."""
    with started(mode, BATCH_SIZE="1", MAX_QUEUE="1", BODY_TIMEOUT_S="1") as server:
        yield server


@pytest.fixture(scope="module")
def sick(mode: str) -> Iterator[Server]:
    """Its batches, on which one word is poison, wait for company."""
    delay_ms = "0" if exception(GATHERS, mode) == NEVER else "500"
    with started(mode, BATCH_SIZE="4", FIXED_DELAY_MS=delay_ms, DEADLINE_S="20") as server:
        yield server


@pytest.fixture(scope="module")
def patient(mode: str) -> Iterator[Server]:
    """It waits as good as for ever until a batch is full, where one ever is."""
    delay_ms = {ITS_THREADS: "1000", NEVER: "50"}.get(exception(GATHERS, mode) or "", "60000")
    with started(mode, BATCH_SIZE="16", FIXED_DELAY_MS=delay_ms, DEADLINE_S="90", GRACE_S="30") as server:
        yield server


@pytest.fixture(scope="module")
def spawning(mode: str) -> Iterator[Server]:
    """The model in a process of its own. Waits as good as for ever for a body."""
    its = {"OFFLOAD": "process", "DEADLINE_S": "20", "BODY_TIMEOUT_S": "60", "GRACE_S": "30", "HANG_S": "5"}
    with started(mode, BATCH_SIZE="1", **its) as server:
        yield server


# --- what is asked and answered ---------------------------------------------------------------------------------------


def same(answer: Any, expected: Any) -> None:
    """The same tokens in the same order, scores within 1e-4."""
    assert [c["token_str"] for c in answer] == [c["token_str"] for c in expected]
    assert [c["sequence"] for c in answer] == [c["sequence"] for c in expected]
    assert [c["score"] for c in answer] == pytest.approx([c["score"] for c in expected], abs=1e-4)


def test_raw_text_gets_what_the_plain_pipeline_answers(real: Server, oracle: Any) -> None:
    for text in (PARIS, "Wörter wie [MASK] sind 難しい.", "a" * 300 + " [MASK]"):
        reply = post(real, text)
        assert reply.status == 200
        same(reply.json, oracle(text))


def test_two_masks_get_a_list_for_each(real: Server, oracle: Any) -> None:
    text = "The [MASK] sat on the [MASK]."
    for answer, expected in zip(post(real, text).json, oracle(text), strict=True):
        same(answer, expected)


def test_json_takes_top_k_and_targets(real: Server, oracle: Any) -> None:
    same(post_json(real, {"inputs": PARIS}).json, oracle(PARIS))
    same(post_json(real, {"inputs": PARIS, "parameters": {"top_k": 2}}).json, oracle(PARIS, top_k=2))
    targets = ["city", "capital"]
    reply = post_json(real, {"inputs": PARIS, "parameters": {"targets": targets}})
    same(reply.json, oracle(PARIS, targets=targets))


def test_hugging_face_client_just_works(real: Server, oracle: Any) -> None:
    from huggingface_hub import InferenceClient

    found = InferenceClient(model=real.url).fill_mask(PARIS, top_k=3)
    same([dict(candidate) for candidate in found], oracle(PARIS, top_k=3))


def test_answer_says_where_the_time_went(server: Server) -> None:
    timing = post(server, PARIS).headers["Server-Timing"]
    assert timing.startswith("queue;dur=")
    assert ", model;dur=" in timing
    assert 'batch;desc="size 1, dispatched because full"' in timing


def test_request_id_is_taken_over_or_made(server: Server) -> None:
    assert post(server, PARIS, X_Request_ID="mine-1").headers["X-Request-ID"] == "mine-1"
    made = [post(server, PARIS).headers["X-Request-ID"] for _ in range(2)]
    assert all(made)
    assert made[0] != made[1]
    assert post(server, PARIS, X_Request_ID="{bad}").headers["X-Request-ID"] != "{bad}"


def test_connection_is_kept_for_the_next_request(server: Server, mode: str) -> None:
    with dial(server) as connection:
        connection.sendall(request("POST", "/", PARIS.encode()))
        assert hear(connection).status == 200
        if kept("keeps connections open", mode):
            for ask in (request("GET", "/health"), request("POST", "/", PARIS.encode())):
                connection.sendall(ask)
                assert hear(connection).status == 200
        else:
            assert connection.recv(1) == b"", "it is closed"


# --- what is refused, at once and in one form -------------------------------------------------------------------------

WRONG = {
    "empty": (b"", {}, 400),
    "blank": (b" \n", {}, 400),
    "not UTF-8": (b"caf\xe9 [MASK]", {}, 400),
    "malformed JSON": (b'{"inputs": ', {"Content_Type": "application/json"}, 400),
    "JSON that is no object": (b"[1]", {"Content_Type": "application/json"}, 400),
    "unknown field": (b'{"inputs": "a [MASK]", "model": "x"}', {"Content_Type": "application/json"}, 400),
    "parameters that are no object": (
        b'{"inputs": "a [MASK]", "parameters": []}',
        {"Content_Type": "application/json"},
        400,
    ),
    "an endless number": (b'{"inputs": ' + b"1" * 5000 + b"}", {"Content_Type": "application/json"}, 400),
    "unknown parameter": (
        b'{"inputs": "a [MASK]", "parameters": {"seed": 1}}',
        {"Content_Type": "application/json"},
        400,
    ),
    "top_k 0": (
        b'{"inputs": "a [MASK]", "parameters": {"top_k": 0}}',
        {"Content_Type": "application/json"},
        400,
    ),
    "no targets": (
        b'{"inputs": "a [MASK]", "parameters": {"targets": []}}',
        {"Content_Type": "application/json"},
        400,
    ),
    "lone surrogate": (b'{"inputs": "\\ud800 [MASK]"}', {"Content_Type": "application/json"}, 400),
    "too large": (b"a" * 16_385, {}, 413),
    "too large, in chunks": (
        b"4000\r\n" + b"a" * 0x4000 + b"\r\n4000\r\n" + b"a" * 0x4000 + b"\r\n0\r\n\r\n",
        {"Transfer_Encoding": "chunked"},
        413,
    ),
    "compressed": (b"x\x9c", {"Content_Encoding": "gzip"}, 415),
    "another media type": (b"<a/>", {"Content_Type": "application/xml"}, 415),
    "another charset": (b"a [MASK]", {"Content_Type": "text/plain; charset=latin-1"}, 415),
    "no mask": (b"Paris is nice.", {}, 422),
    "too many masks": (b"[MASK] " * 9, {}, 422),
    "too many tokens": (b"a [MASK]" + b" a" * 512, {}, 422),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_input_is_rejected_with_a_sentence(real: Server, what: str) -> None:
    body, headers, status = WRONG[what]
    reply = post(real, body, **headers)
    assert reply.status == status
    assert reply.error
    assert reply.headers["X-Request-ID"]


def test_body_with_too_large_a_length_is_rejected_before_it_is_sent(server: Server) -> None:
    reply = say(server, request("POST", Content_Length="1000000000"))
    assert reply.status == 413
    assert "16384" in reply.error


def test_body_far_too_large_is_rejected_while_it_is_sent(server: Server, mode: str) -> None:
    is_kept = kept("a body far too large gets its 413", mode)
    with contextlib.nullcontext() if is_kept else contextlib.suppress(ConnectionError):
        assert post(server, b"a" * 5_000_000).status == 413
    assert post(server, PARIS).status == 200


def test_body_that_is_rejected_unread_is_not_the_next_request(server: Server) -> None:
    smuggled = request("POST", "/", b"a [MASK]") * 300
    with dial(server) as connection:
        connection.sendall(request("POST", "/", smuggled) + request("GET", "/health"))
        replies = b""
        with contextlib.suppress(ConnectionError):  # it may be closed instead
            while b"uptime_s" not in replies and (part := connection.recv(65_536)):
                replies += part
    assert replies.startswith(b"HTTP/1.1 413") and replies.count(b"HTTP/1.1 ") <= 2


def test_chunked_body_is_read(real: Server) -> None:
    body = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (b"Paris is ", b"the [MASK] of France."))
    reply = post(real, body + b"0\r\n\r\n", Transfer_Encoding="chunked")
    assert reply.json[0]["token_str"] == "capital"


def test_stalled_bodies_get_408_and_hold_nobody_up(server: Server, mode: str) -> None:
    with contextlib.ExitStack() as connections:
        one_by_one = exception(GATHERS, mode) == NEVER
        stalled = [connections.enter_context(dial(server)) for _ in range(1 if one_by_one else 8)]
        for connection in stalled:
            connection.sendall(request("POST", below(server, "/"), Content_Length="100") + b"Paris")
        for connection in stalled:
            assert (reply := hear(connection)).status == 408
            assert reply.error
        assert post(server, PARIS).status == 200


def test_stalled_bodies_do_not_keep_others_from_being_read(spawning: Server, mode: str) -> None:
    one_by_one = exception(GATHERS, mode) == NEVER
    with contextlib.ExitStack() as connections:
        stalled = [connections.enter_context(dial(spawning)) for _ in range(1 if one_by_one else 7)]
        for connection in stalled:
            connection.sendall(request("POST", Content_Length="100") + b"Paris")
        assert post(spawning, PARIS).status == 200
        assert not select.select(stalled, [], [], 0)[0], "they still stall"


def test_unknown_path_and_method_are_json_too(server: Server) -> None:
    assert (reply := get(server, "/nothing")).status == 404
    assert reply.error
    assert (reply := say(server, request("PUT", "/"))).status == 405
    assert reply.error
    assert reply.headers["Allow"] == "GET, HEAD, POST"


def test_both_content_length_and_transfer_encoding_are_rejected(server: Server) -> None:
    body = b"0\r\n\r\nPOST / HTTP/1.1\r\nHost: smuggled\r\nContent-Length: 8\r\n\r\na [MASK]"
    with dial(server) as connection:
        connection.sendall(
            request("POST", "/", body, Content_Length=str(len(body)), Transfer_Encoding="chunked")
        )
        assert hear(connection).status == 400  # by the HTTP parser, in its own words
        assert connection.recv(1) == b"", "the smuggled request must not be answered"


def test_over_long_headers_are_rejected(server: Server, mode: str) -> None:
    many = {f"X_{i}": "a" * 8000 for i in range(9)}
    assert (reply := post(server, PARIS, **many)).status == 431
    assert reply.error
    reply = post(server, PARIS, X="a" * 70_000)
    assert reply.status in (400, 431)
    if exception("over-long headers are rejected in JSON", mode) == GUNICORNS_PAGE:
        assert reply.headers.get_content_type() in ("text/html", "text/plain")
        assert "X-Request-ID" not in reply.headers, "the app has never seen it"
    else:
        assert reply.error


# --- operating it -----------------------------------------------------------------------------------------------------


def test_health_tells_depth_running_model_and_uptime(server: Server) -> None:
    reply = get(server, "/health")
    assert reply.status == 200
    assert reply.json["status"] == "ok"
    assert reply.json.keys() == {"status", "model", "queue_depth", "running", "uptime_s"}


def test_ready_once_the_model_is_loaded(server: Server) -> None:
    assert (reply := get(server, "/ready")).status == 200
    assert reply.json == {"status": "ready"}


def test_metrics_count_requests_by_status(server: Server) -> None:
    before = {status: metric(server, f'model_requests_total{{status="{status}"}}') for status in (200, 422)}
    histograms = ("model_call_seconds", "model_queue_wait_seconds", "model_batch_size")
    observed = [metric(server, f"{name}_count") for name in histograms]
    post(server, PARIS)
    post(server, "no mask")
    assert metric(server, 'model_requests_total{status="200"}') == before[200] + 1
    assert metric(server, 'model_requests_total{status="422"}') == before[422] + 1
    assert [metric(server, f"{name}_count") for name in histograms] == [count + 1 for count in observed]
    assert get(server, "/metrics").headers.get_content_type() == "text/plain"


# --- load -------------------------------------------------------------------------------------------------------------


def numbered(n: int, text: str = PARIS) -> list[str]:
    """n texts that can be told apart by their answers."""
    return [f"{i} . {text}" for i in range(n)]


def is_own(i: int, answer: Any) -> bool:
    """Whether it answers the i-th of `numbered`."""
    return answer[0]["sequence"].startswith(f"{i}.") or answer[0]["sequence"].startswith(f"{i} .")


def test_many_at_once_each_get_their_own_answer(sick: Server, crowd: Crowd, mode: str) -> None:
    replies = [reply.result() for reply in crowd.post(sick, *numbered(40))]
    assert [reply.status for reply in replies] == [200] * 40
    assert all(is_own(i, reply.json) for i, reply in enumerate(replies))


def batch(reply: Reply) -> tuple[int, str]:
    """The size of the batch that the answer comes from, and what closed it."""
    assert reply.status == 200
    said = re.search(r'batch;desc="size (\d+), dispatched because (\w+)"', reply.headers["Server-Timing"])
    assert said
    return int(said[1]), said[2]


def test_batch_gathers_the_connections_that_it_can(patient: Server, crowd: Crowd, mode: str) -> None:
    how = exception(GATHERS, mode)
    if how == ITS_SHARE:
        gathers_those_of_its_worker(patient)
        return
    n = 32 if how == ITS_REPLICAS else 16
    batches = {batch(reply.result()) for reply in crowd.post(patient, *[PARIS] * n)}
    if how in (None, ITS_REPLICAS):
        assert batches == {(16, "full")}, "replicas get equal shares"
    elif how == ITS_THREADS:
        assert 1 < max(batches)[0] <= 8
    else:
        assert how == NEVER
        assert {size for size, _ in batches} == {1}


def gathers_those_of_its_worker(server: Server) -> None:
    """Sixteen wait, enough for a batch, but one of them in the other worker: they wait on until it has one more."""
    with contextlib.ExitStack() as connections:

        def send(raw: bytes) -> socket.socket:
            connection = connections.enter_context(dial(server))
            connection.sendall(raw)
            return connection

        first = send(ask := request("POST", "/", PARIS.encode()))
        until(lambda: metric(server, "model_queue_depth") == 1)
        mates: list[socket.socket] = []
        others: list[socket.socket] = []
        while len(mates) < 15 or not others:
            connection = send(request("GET", "/health"))
            (mates if hear(connection).json["queue_depth"] else others).append(connection)
        for connection in (others[0], *mates[:14]):
            connection.sendall(ask)
        until(lambda: metric(server, "model_queue_depth") == 16)
        mates[14].sendall(ask)
        assert [batch(hear(connection)) for connection in (first, *mates[:15])] == [(16, "full")] * 16
        until(lambda: metric(server, "model_queue_depth") == 1)


def test_poison_fails_alone_and_its_neighbours_get_answers(sick: Server, crowd: Crowd) -> None:
    replies = [reply.result() for reply in crowd.post(sick, *numbered(3), POISON)]
    assert [reply.status for reply in replies] == [200, 200, 200, 500]
    assert all(is_own(i, reply.json) for i, reply in enumerate(replies[:3]))
    culprit = replies[3]
    assert "Traceback" not in culprit.error
    assert "index" not in culprit.error
    assert culprit.headers["X-Request-ID"] in sick.log()
    assert post(sick, PARIS).status == 200


def test_client_that_asks_again_before_the_answer_has_not_left(sick: Server, mode: str) -> None:
    if not kept("keeps connections open", mode):
        pytest.skip("its next request would need another connection")
    with dial(sick) as connection:
        connection.sendall(request("POST", "/", PARIS.encode()))
        get(sick, "/health")  # so it reads the first one alone
        connection.sendall(request("POST", "/", PARIS.encode()))
        assert [hear(connection).status for _ in range(2)] == [200, 200]


def test_client_may_shorten_its_deadline(sick: Server) -> None:
    reply = post(sick, PARIS, Prefer="wait=0")
    assert reply.status == 504
    assert reply.error
    for seconds in ("1000", "4.5"):
        assert post(sick, PARIS, Prefer=f"wait={seconds}").status == 200


def test_too_much_work_gets_503_with_retry_after(server: Server, crowd: Crowd, mode: str) -> None:
    replies = [reply.result() for reply in crowd.post(server, *[SLOW] * 24)]
    statuses = {reply.status for reply in replies}
    if not kept("too much work is rejected (503)", mode):
        assert statuses == {200}, "they waited, unseen, where nobody can refuse them"
        return
    assert statuses == {200, 503}
    for reply in replies:
        if reply.status == 503:
            assert reply.error
            assert int(reply.headers["Retry-After"]) >= 1


def test_client_that_leaves_frees_its_place(spawning: Server, mode: str) -> None:
    before, calls = metric(spawning, "model_abandoned_total"), metric(spawning, "model_call_seconds_count")
    # A sync worker waits 2 s for a client to close what it has answered, so there are few of them.
    n = 24 if kept("a client that disconnects frees its place", mode) else 4
    with contextlib.ExitStack() as connections:
        for i in range(n):
            connection = connections.enter_context(dial(spawning))
            if i % 2:  # it leaves by a reset
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            connection.sendall(request("POST", below(spawning, "/"), SLOW.encode()))
        until(lambda: metric(spawning, "model_call_seconds_count") > calls)
    if kept("a client that disconnects frees its place", mode):
        until(lambda: metric(spawning, "model_abandoned_total") > before)
        until(lambda: get(spawning, "/health").json["queue_depth"] == 0)
        assert metric(spawning, "model_call_seconds_count") < calls + n
    else:
        until(lambda: metric(spawning, "model_call_seconds_count") == calls + n)
    assert post(spawning, PARIS).status == 200


def test_health_answers_while_the_model_runs(server: Server, mode: str, tmp_path: Path) -> None:
    how = exception("/health answers while the model runs", mode)
    free = {WHILE_A_THREAD_IS_FREE: 8, WHILE_A_WORKER_IS_FREE: 2}.get(how or "")
    gate = tmp_path / "gate"
    with contextlib.ExitStack() as connections:
        busy = [connections.enter_context(dial(server)) for _ in range(2 * free if free else 24)]
        for connection in busy:
            text = SLOW if free else f"{PARIS} until:{gate}"
            connection.sendall(request("POST", below(server, "/"), text.encode()))
        assert get(server, "/health").status == 200
        answered = len(select.select(busy, [], [], 0)[0])
        if free:
            assert answered > len(busy) - free, "its turn came when only the others were still busy"
        else:
            assert answered < len(busy)
        gate.touch()
        for connection in busy:
            hear(connection)


# --- how it ends ------------------------------------------------------------------------------------------------------


def test_second_ctrl_c_exits_at_once(patient: Server, crowd: Crowd, mode: str, tmp_path: Path) -> None:
    """The last test of `patient`: its calls would last for ever, where a request holds no thread; the grace time 30 s."""
    holds = exception(GATHERS, mode) in (ITS_THREADS, NEVER)
    replies = crowd.post(patient, *[SLOW if holds else f"{PARIS} until:{tmp_path / 'never'}"] * 32)
    until(lambda: "waiting" in patient.log() or any(reply.done() for reply in replies))
    began = time.monotonic()
    while patient.process.poll() is None:  # again and again: two at once may be one
        os.killpg(patient.process.pid, signal.SIGINT)  # as a terminal does: to all of its processes
        time.sleep(0.2)
        assert time.monotonic() - began < 20, "it did not wait for the grace time's end"
    for reply in replies:
        reply.exception()


def test_sigterm_under_load_answers_everybody_exactly_once(server: Server, crowd: Crowd, mode: str) -> None:
    """The last test of `server`."""
    texts = numbered(16, SLOW)
    replies = crowd.post(server, *texts)
    # A connection that waits in the kernel is reset when the socket closes: wait until the server has seen them all.
    in_it = 2 * WORKERS[mode]  # one runs and one waits in each worker
    until(lambda: sum(reply.done() for reply in replies) >= len(replies) - in_it)
    server.process.send_signal(signal.SIGTERM)
    began = time.monotonic()
    outcomes: dict[str, int] = {}
    for i, future in enumerate(replies):
        try:
            reply = future.result(timeout=60)
        except OSError as exc:
            outcomes[type(exc).__name__] = outcomes.get(type(exc).__name__, 0) + 1
            continue
        honest = (200, 503) if kept("SIGTERM lets admitted work finish", mode) else (200, 500, 503)
        assert reply.status in honest
        assert is_own(i, reply.json) if reply.status == 200 else reply.error
    server.process.wait(60)
    assert time.monotonic() - began < 20
    assert (not outcomes) is kept("SIGTERM resets no connection", mode), outcomes


def test_dead_worker_is_replaced_and_none_outlives_its_master(sick: Server, mode: str) -> None:
    """The last test of `sick`."""
    os.kill(workers(sick)[0], signal.SIGKILL)
    if not kept("a dead worker is replaced", mode):
        assert sick.process.wait(60) == -signal.SIGKILL
        return
    until(lambda: len(workers(sick)) == WORKERS[mode] + 1)
    assert post(sick, PARIS).status == 200
    others = sick.processes()[1:]
    sick.process.kill()
    _, alive = psutil.wait_procs(others, timeout=30)
    for orphan in alive:
        orphan.kill()
    assert not alive


def test_killed_model_process_costs_its_own_batch_only(spawning: Server, crowd: Crowd, mode: str) -> None:
    replies = crowd.post(spawning, *numbered(24, SLOW))
    until(lambda: any(reply.done() for reply in replies))
    model_processes(spawning)[0].kill()
    failed = [future.result() for future in replies if future.result().status != 200]
    # 503: who comes while another one loads. A call that Gunicorn has lost with its dirty worker ends at the deadline.
    fails = (
        (500, 503)
        if kept("with `OFFLOAD=process`, a killed model process costs its own batch", mode)
        else (500, 503, 504)
    )
    assert all(reply.status in fails and reply.error for reply in failed)
    assert all(is_own(i, f.result().json) for i, f in enumerate(replies) if f.result().status == 200)
    if kept("with `OFFLOAD=process`, a killed model process costs its own batch", mode):
        assert sum(reply.status == 500 for reply in failed) <= 1, "only the request that was in it"
        until(lambda: metric(spawning, "model_process_restarts_total") == 1)
        assert "starting another" in spawning.log()
        until(lambda: post(spawning, PARIS).status == 200)
    else:
        assert failed
        until(lambda: post(spawning, PARIS).status == 200)


def model_processes(server: Server) -> list[psutil.Process]:
    """The processes that hold a model: spawned, or below Gunicorn's arbiter of dirty workers."""
    if server.mode.name == "dirty":
        return [p for p in server.processes()[1:] if p.ppid() != server.process.pid]
    return [p for p in server.processes() if "workers.isolation.process" in " ".join(p.cmdline())]


def test_stalled_body_does_not_hold_sigterm(spawning: Server, mode: str) -> None:
    """The last test of `spawning`."""
    with dial(spawning) as stalled:
        stalled.sendall(request("POST", Content_Length="100") + b"Paris")
        get(spawning, "/health")  # so it has the other, too
        began = time.monotonic()
        spawning.process.send_signal(signal.SIGTERM)
        if kept("a stalled body gets 408, and 503 on SIGTERM", mode):
            assert hear(stalled).status == 503
        else:
            assert stalled.recv(1) == b""
        spawning.process.wait(60)
        assert time.monotonic() - began < 20, "it did not wait for the grace time's end"


WRONG_SETTINGS = {
    "MODEL='/nowhere/at-all' is not allowed: it must be a folder with a config.json, a hub id, or module:Class": {
        "MODEL": "/nowhere/at-all"
    },
    "cannot load MODEL=tests.support.misbehaving_model:Missing: ImportError: there is no class": {
        "MODEL": "tests.support.misbehaving_model:Missing"
    },
    "MAX_QUEUE='0' is not allowed: it must be an integer from 1 to 1,000,000,000": {"MAX_QUEUE": "0"},
}


def test_wrong_setting_ends_the_server_with_a_sentence(mode: str) -> None:
    with contextlib.ExitStack() as all_at_once:
        servers = {
            sentence: all_at_once.enter_context(start(MODES[mode], wrong, wait=False))
            for sentence, wrong in WRONG_SETTINGS.items()
        }
        for sentence, server in servers.items():
            assert server.process.wait(120) != 0
            assert sentence in server.log()
        traceback = any("Traceback" in server.log() for server in servers.values())
        if kept("an invalid setting stops the start with one line", mode):
            assert not traceback  # elsewhere Gunicorn shows one, unless it gives up before


def test_model_that_fails_on_its_example_is_never_ready(mode: str) -> None:
    settings = {"MODEL": "tests.support.misbehaving_model:Fails"}
    with start(MODES[mode], settings, wait=False) as server:
        if kept("a model that fails on its example ends the start", mode):
            assert server.process.wait(120) != 0
            assert "no weights for that" in server.log()
        else:
            until(lambda: server.log().count("no weights for that") > 1)
            assert server.process.poll() is None
