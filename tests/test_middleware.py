"""The door: what a request meets before the model does. On stand-ins for the model, in a real server where it matters."""

import asyncio
import contextlib
import http.client
import json
import math
import os
import shutil
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import AsyncMock, Mock

import httpx2
import looptime
import numpy as np
import pytest
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route, Router

from loadtests.modes import MODES, ROOT, Server, start
from tests.support.client import dial, get, hear, metric, post, request, say, until
from workers.context import RequestContext, context_of
from workers.errors import Late, ModelFailed, Rejected
from workers.loop import ModelLoop
from workers.metrics import Metrics
from workers.service import Service
from workers.settings import Settings
from workers.tasks import Query, zero_shot_classification
from workers.web import replies
from workers.web.checks import MAX_BODIES, CheckThreads, check_all
from workers.web.inflight import InFlight
from workers.web.middleware import HOLD_S, REJECTIONS_PER_S, TICK_S, RequestMiddleware

STAND_IN = """
    class Upper:
        example = "a text"

        def __call__(self, inputs):
            return [text.upper() for text in inputs]

        def check(self, inputs, parameters):
            if not isinstance(inputs, str):
                raise ValueError("send a text")
"""
PROTOCOL = '''
    """POST /shout/{how}: {"say": "a text"} -> {"said": "A TEXT!"}."""

    import json

    from starlette.requests import Request
    from starlette.responses import JSONResponse
    from starlette.routing import Route


    def routes(settings):
        return [Route("/shout/{how}", shout, methods=["POST"])]


    def error_body(status, sentence):
        return {"code": status, "message": sentence}


    async def shout(request: Request) -> JSONResponse:
        service = request.state.service
        body = await service.in_flight.read(request)
        (answer,), _ = await service.ask(request, [json.loads(body)["say"]], {}, len(body))
        return JSONResponse({"said": answer.value + "!"})
'''


@contextlib.contextmanager
def served(folder: Path, **env: str) -> Iterator[httpx2.Client]:
    """The server of `folder` with its `stand_in.Upper` as the model, and a client of it."""
    (folder / "stand_in.py").write_text(textwrap.dedent(STAND_IN))
    with (
        start(MODES["thread"], {"MODEL": "stand_in:Upper", **env}, folder=folder) as server,
        httpx2.Client(base_url=server.url, timeout=60) as client,
    ):
        yield client


def copy_of_the_core(folder: Path) -> Path:
    """What whoever takes the app over instances: server.py and workers/, without the other protocols."""
    shutil.copy(ROOT / "server.py", folder)
    shutil.copytree(
        ROOT / "workers", folder / "workers", ignore=shutil.ignore_patterns("protocols", "__pycache__")
    )
    return folder


def test_core_serves_without_the_other_protocols(tmp_path: Path) -> None:
    with served(copy_of_the_core(tmp_path)) as client:
        assert client.post("/", content="a text").json() == "A TEXT"


def test_file_in_protocols_is_a_protocol_whose_errors_are_in_its_own_words(tmp_path: Path) -> None:
    folder = copy_of_the_core(tmp_path)
    (folder / "workers" / "protocols").mkdir()
    (folder / "workers" / "protocols" / "shout.py").write_text(textwrap.dedent(PROTOCOL))
    with served(folder, MAX_BODY_BYTES="99") as client:
        reply = client.post("/shout/loud", content=json.dumps({"say": "a text"}))
        assert (reply.status_code, reply.json()) == (200, {"said": "A TEXT!"})
        reply = client.post("/shout/loud", content='{"say": 1}')
        assert (reply.status_code, reply.json()) == (422, {"code": 422, "message": "send a text"})
        reply = client.post("/shout/loud", content="x" * 100)
        assert reply.status_code == reply.json()["code"] == 413
        assert client.get("/shout/loud").json()["code"] == 405
        reply = client.post("/", content=b"\xff")
        assert reply.status_code == 400 and reply.json().keys() == {"error"}
        metrics = client.get("/metrics").text
        assert 'model_requests_total{status="422"} 1.0' in metrics, "its requests count as the model's"


# --- a server that is full --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One request runs until the file is there, one waits, and there is no room for a third."""
    release = tmp_path_factory.mktemp("full") / "release"
    settings = {
        "MODEL": "tests.support.fake_models:Obedient",
        "MAX_QUEUE": "1",
        "DEADLINE_S": "3600",
        "HANG_S": "3600",
    }
    with start(MODES["thread"], settings) as server, contextlib.ExitStack() as connections:
        body = json.dumps({"inputs": {"until": str(release)}}).encode()
        for gauge in ("model_running", "model_queue_depth"):
            connections.enter_context(dial(server)).sendall(
                request("POST", "/", body, Content_Type="application/json")
            )
            until(lambda gauge=gauge: metric(server, gauge) == 1)
        yield server
        release.touch()


def test_rejection_comes_before_the_body_and_its_connection_goes_on(full: Server) -> None:
    before = metric(full, 'model_requests_total{status="503"}')
    with dial(full) as connection:
        connection.sendall(request("POST", Content_Length="1000", X_Request_ID="mine"))
        refused = hear(connection)
        assert refused.status == 503 and refused.error
        assert int(refused.headers["Retry-After"]) >= 1
        assert refused.headers["X-Request-ID"] == "mine"
        connection.sendall(b"GET /health HTTP/1.1\r\n\r\n".ljust(1000) + request("GET", "/ready"))
        assert hear(connection).json == {"status": "ready"}, "the body was read as the next request"
    assert metric(full, 'model_requests_total{status="503"}') == before + 1


def test_body_far_too_large_is_rejected_without_a_reset(full: Server) -> None:
    with dial(full) as connection:
        connection.sendall(request("POST", body=b"x" * 10_000_000) + request("GET", "/ready"))
        assert hear(connection).status in (413, 503)
        with contextlib.suppress(ConnectionError, http.client.HTTPException):  # or it is closed
            assert hear(connection).status == 200


def test_header_of_megabytes_is_rejected_before_it_is_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a full server, too, where the one that says how long to wait is read first."""
    looked: list[Any] = []
    monkeypatch.setattr("workers.web.parsing.client_budget_s", looked.append)
    middleware, service, sent = RequestMiddleware(Router([]), Metrics()), Full(), []

    async def send(message: Any) -> None:
        sent.append(message.get("status"))

    headers = [(b"prefer", b"wait" + b" " * 4_000_000)]
    scope = {"type": "http", "method": "POST", "path": "/", "headers": headers, "state": {"service": service}}
    asyncio.run(middleware(scope, Mock(), send))
    assert sent[0] == 431 and not looked


def test_client_that_expects_100_continue_is_rejected_without_it(full: Server) -> None:
    with dial(full) as connection:
        connection.sendall(request("POST", Content_Length="1000", Expect="100-continue"))
        refused = hear(connection)
        assert (refused.status, refused.headers["Connection"]) == (503, "close")
        assert connection.recv(1) == b""


def test_full_server_is_ready(full: Server) -> None:
    assert post(full, "a text").status == 503
    assert get(full, "/ready").status == 200


def test_too_many_bytes_of_headers_are_rejected_whatever_they_ask(full: Server) -> None:
    assert say(full, request("GET", "/health", X_Long="x" * 66_000)).status == 431


class Full:
    """Stands for a service whose loop refuses everybody."""

    def __init__(self) -> None:
        self.loop = ModelLoop()
        self.loop.stop_admitting()


def test_many_rejections_are_slowed_down_and_a_few_are_not() -> None:
    middleware, service = RequestMiddleware(Router([]), Metrics()), Full()
    waits_s: list[float] = []

    async def refused() -> None:
        async def send(message: Any) -> None:
            assert message.get("status", 503) == 503

        now = asyncio.get_running_loop().time
        began = now()
        scope = {"type": "http", "method": "POST", "path": "/", "headers": [], "state": {"service": service}}
        await middleware(scope, Mock(), send)
        waits_s.append(now() - began)

    async def impatient() -> None:
        for _ in range(20):
            await refused()
            await asyncio.sleep(0.02)

    async def storm() -> None:
        for _ in range(100):
            await refused()
            await asyncio.sleep(2 / REJECTIONS_PER_S)
        assert not any(waits_s)
        await asyncio.gather(*(impatient() for _ in range(400)))

    with asyncio.Runner(loop_factory=lambda: looptime.new_event_loop(start=0, end=100)) as runner:
        runner.run(storm())
    assert max(waits_s) == pytest.approx(HOLD_S, abs=1.01 * TICK_S)
    assert sum(waits_s) / 8000 > 0.8 * HOLD_S


# --- before the queue -------------------------------------------------------------------------------------------------


def test_long_work_before_the_queue_is_off_the_event_loop_and_short_work_is_not() -> None:
    async def scenario() -> None:
        checks, context = CheckThreads(), RequestContext({}, "an-id")
        assert await checks.run(context, 1000, threading.get_ident) == threading.get_ident()
        assert await checks.run(context, 2000, threading.get_ident) != threading.get_ident()
        assert await checks.run(context, 2000, threading.get_ident, quick_bytes=3000) == threading.get_ident()

    asyncio.run(scenario())


@pytest.mark.parametrize(("checks_at_once", "media"), [(True, ()), (False, ()), (True, ("image/",))])
def test_short_body_of_a_task_that_takes_its_time_is_checked_off_the_event_loop(
    checks_at_once: bool, media: tuple[str, ...]
) -> None:
    """Zero-shot: 1 KB holds 64 texts and 100 labels, which are 6,400 pairs."""
    assert not zero_shot_classification.Task.checks_at_once

    async def scenario() -> None:
        task = SimpleNamespace(media=media, checks_at_once=checks_at_once)
        found: list[Any] = []
        service: Any = SimpleNamespace(
            task=task,
            checks=CheckThreads(),
            check_one=lambda *_: found.append(threading.get_ident()),
        )
        await Service.check(service, RequestContext({}, "an-id"), ["a"], {}, 100)
        assert (found == [threading.get_ident()]) == (checks_at_once and not media)

    asyncio.run(scenario())


def test_long_work_is_rejected_at_once_when_the_threads_are_taken_and_short_work_goes_on() -> None:
    async def scenario() -> None:
        checks, gate = CheckThreads(), threading.Event()
        checks.most_bytes = 100_000
        running = [
            asyncio.create_task(checks.run(RequestContext({}, "an-id"), 100_000, gate.wait))
            for _ in range(MAX_BODIES)
        ]
        await asyncio.sleep(0)
        with pytest.raises(Rejected, match="too many long requests"):
            await checks.run(RequestContext({}, "an-id"), 100_000, gate.wait)
        assert await checks.run(RequestContext({}, "an-id"), 2000, lambda: "short") == "short"
        gate.set()
        assert all(await asyncio.gather(*running))
        assert await checks.run(RequestContext({}, "an-id"), 100_000, lambda: "free again") == "free again"

    asyncio.run(scenario())


def test_work_before_the_queue_has_the_requests_deadline_and_its_place_until_it_has_ended() -> None:
    async def scenario() -> None:
        checks, gate = CheckThreads(), threading.Event()
        context = RequestContext({}, "an-id", budget_s=0.01)
        with pytest.raises(Late):
            await checks.run(context, 100_000, gate.wait)
        assert context.given_up, "the work can tell that nobody waits"
        assert checks.pending_bytes == [0, 100_000], "its memory is not free yet"
        gate.set()
        async with asyncio.timeout(60):
            while checks.pending_bytes != [0, 0]:
                await asyncio.sleep(0)

    asyncio.run(scenario())


def test_check_of_a_list_stops_when_its_client_has_left_or_its_time_is_over() -> None:
    checked: list[Any] = []
    context = RequestContext({}, "an-id")

    def check(one: Any, parameters: Any) -> Query:
        checked.append(one)
        context.given_up = len(checked) == 2
        return Query(one)

    with pytest.raises(Late):
        check_all(check, list("abcdef"), {}, context)
    assert checked == ["a", "b"]
    with pytest.raises(Late):
        check_all(check, list("abcdef"), {}, RequestContext({}, "an-id", budget_s=0))


def test_deadline_counts_from_the_arrival() -> None:
    seen: list[float] = []

    async def endpoint(request: Request) -> Response:
        seen.append(context_of(request.scope).left_s)
        return Response()

    async def scenario() -> None:
        middleware = RequestMiddleware(Router([Route("/", endpoint, methods=["POST"])]), Metrics())
        loop = ModelLoop(budget_s=10)
        loop.instances.loaded = 1
        for late_s, prefer in ((4, b""), (4, b"wait=5"), (7, b"wait=5")):
            scope = {"type": "http", "method": "POST", "path": "/", "headers": [(b"prefer", prefer)]}
            context_of(scope).arrived_at -= late_s
            state = {"state": {"service": SimpleNamespace(loop=loop)}}
            await middleware(scope | state, Mock(), AsyncMock())

    asyncio.run(scenario())
    assert seen == [pytest.approx(6, abs=1), pytest.approx(1, abs=1), 0]


def test_long_paths_of_strangers_are_not_kept() -> None:
    middleware = RequestMiddleware(Router([]), Metrics())
    for path in ("/" + "x" * 60_000, "/short"):
        scope = {"type": "http", "method": "GET", "path": path, "headers": []}
        asyncio.run(middleware(scope, Mock(), AsyncMock()))
    assert middleware.cached_error_body.cache_info().currsize == 1


def test_what_is_optional_is_imported_only_when_it_is_asked_for() -> None:
    program = "import sys, server; print([m for m in sys.modules if m.endswith(('request_log', 'tracing'))])"

    def imported(**env: str) -> str:
        plain = {name: value for name, value in os.environ.items() if not name.startswith("OTEL_")}
        return subprocess.check_output([sys.executable, "-c", program], cwd=ROOT, env=plain | env, text=True)

    assert imported() == "[]\n"
    assert "request_log" in imported(LOG_FORMAT="json")


# --- clients ----------------------------------------------------------------------------------------------------------


def test_who_leaves_has_left_the_queue_after_two_sweeps() -> None:
    async def scenario() -> None:
        loop = ModelLoop(max_queue=300)
        loop.instances.loaded = 1  # which takes nothing
        clients, left = InFlight(Settings(), loop), asyncio.Event()

        async def receive() -> dict[str, str]:
            await left.wait()
            return {"type": "http.disconnect"}

        scope = {"type": "http", "method": "POST", "path": "/", "headers": []}
        waiting = [
            asyncio.create_task(clients.unless_left(Request(scope, receive), loop.submit("")))
            for _ in range(300)
        ]
        await asyncio.sleep(0)
        assert loop.depth == 300
        left.set()
        clients.sweep()
        clients.sweep()
        outcomes = await asyncio.gather(*waiting, return_exceptions=True)
        assert all(isinstance(outcome, ClientDisconnect) for outcome in outcomes)
        assert not loop.live and not clients.watching

    asyncio.run(scenario())


def test_health_tells_the_models_name_and_no_path(tmp_path: Path) -> None:
    assert Settings().model_name == "minilm-mlm"
    with served(copy_of_the_core(tmp_path)) as client:
        assert client.get("/health").json()["model"] == "stand_in:Upper"


# --- JSON -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [
        [0.1, 1e-7, 1e22, -0.0, 5e-324, 1.7976931348623157e308, 0, -1, 2**63, 2**80],
        [float(x) for x in np.random.default_rng(0).standard_normal(1000).astype(np.float32)],
        {"a": None, "b": [True, False], "ü": "€ \U0001f600 \u2028", 'quote"': "\\"},
        {1: "an int", None: 0},
        "nullify",
        (Query("a named tuple", 2), (1, (2,))),
        [],
    ],
)
def test_answer_means_what_the_standard_library_would_have_written(value: Any) -> None:
    assert json.loads(replies.rendered(value)) == json.loads(json.dumps(value))


def test_null_in_an_answer_does_not_make_it_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """The standard library's encoder takes ten times as long, on the event loop."""
    monkeypatch.setattr(replies, "ENCODER", None)
    assert (
        replies.rendered(["a null text", None, {"a": (0.5, np.float32(1))}])
        == b'["a null text",null,{"a":[0.5,1.0]}]'
    )


@pytest.mark.parametrize("dtype", ["f4", "f8"])
def test_array_reads_back_as_the_very_numbers_of_its_type(dtype: str) -> None:
    array = np.random.default_rng(0).standard_normal((3, 4)).astype(dtype)
    found = json.loads(replies.rendered({"vectors": array, "one": array[:, 1], "best": array[0, 0]}))
    assert np.array_equal(np.array(found["vectors"], dtype), array)
    assert np.array_equal(np.array(found["one"], dtype), array[:, 1])
    assert np.dtype(dtype).type(found["best"]) == array[0, 0]


@pytest.mark.parametrize(
    "value",
    [
        math.nan,
        [1.0, math.inf],
        {"a null text": [{"b": np.float32("nan")}]},
        np.array([1.0, math.nan]),
        {"a": object()},
        "\ud800",
        {(1, 2): 3},
        {1, 2},
    ],
)
def test_what_json_cannot_say_is_the_models_failure(value: Any) -> None:
    with pytest.raises(ModelFailed, match="cannot be serialised to JSON"):
        replies.rendered(value)
