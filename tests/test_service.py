"""What the server says of itself while it loads, when its model hangs or can't be had again; and that it ends when told."""

import asyncio
import contextlib
import itertools
import os
import re
import signal
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import httpx2
import psutil
import pytest

import server
from loadtests.modes import MODES, Server, is_alive, start
from tests.support.client import dial, get, hear, post, request, until
from workers.errors import STOPPING
from workers.isolation import process
from workers.loop import ModelLoop
from workers.metrics import Metrics
from workers.service import Service
from workers.settings import Settings

GATED = "test_service:Gated"
MOODY = "tests.support.misbehaving_model:Model"


class Gated:
    """A model whose loading and whose calls wait for an event each."""

    loads, calls = threading.Event(), threading.Event()

    def __init__(self) -> None:
        self.loads.wait(60)

    def __call__(self, inputs: list[Any]) -> list[Any]:
        self.calls.wait(60)
        return inputs


@pytest.fixture
def gated(monkeypatch: pytest.MonkeyPatch) -> type[Gated]:
    monkeypatch.setattr(Gated, "loads", threading.Event())
    monkeypatch.setattr(Gated, "calls", threading.Event())
    return Gated


@pytest.fixture(autouse=True)
def raised(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The signals that a service in this process sends itself: they would end the tests."""
    signals: list[int] = []
    monkeypatch.setattr("signal.raise_signal", signals.append)
    return signals


Scenario = Callable[[httpx2.AsyncClient, Service], Awaitable[None]]


def with_app(scenario: Scenario, **settings: Any) -> None:
    """Run `scenario` against the app."""

    async def run() -> None:
        async with Service(Settings(**{"MODEL": GATED, **settings}), Metrics()).running() as running:

            async def app(scope: Any, receive: Any, send: Any) -> None:
                await server.app({**scope, "state": {"service": running}}, receive, send)

            transport = httpx2.ASGITransport(app=app, raise_app_exceptions=False)
            async with httpx2.AsyncClient(transport=transport, base_url="http://server") as client:
                await scenario(client, running)

    in_thread(run)


def in_thread(run: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run it on an event loop in a thread: only the main one may take the signals."""
    failures: list[BaseException] = []

    def target() -> None:
        try:
            asyncio.run(run())
        except BaseException as exc:
            failures.append(exc)

    thread = threading.Thread(target=target)
    thread.start()
    thread.join(240)
    assert not thread.is_alive(), "it does not end"
    if failures:
        raise failures[0]


async def eventually(client: httpx2.AsyncClient, path: str, status: int) -> httpx2.Response:
    async with asyncio.timeout(60):
        while (reply := await client.get(path)).status_code != status:
            await asyncio.sleep(0.01)
    return reply


# --- what it says -----------------------------------------------------------------------------------------------------


def test_liveness_answers_while_the_model_loads_and_readiness_does_not(gated: type[Gated]) -> None:
    async def scenario(client: httpx2.AsyncClient, service: Service) -> None:
        health = await client.get("/health")
        assert (health.status_code, health.json()["status"]) == (200, "loading")
        ready, refused = await client.get("/ready"), await client.post("/", content="a text")
        for reply in (ready, refused):
            assert (reply.status_code, reply.json()) == (503, {"error": "the model is still loading"})
        assert int(refused.headers["Retry-After"]) >= 1
        gated.loads.set()
        gated.calls.set()
        await eventually(client, "/ready", 200)
        assert (await client.get("/health")).json()["status"] == "ok"
        assert (await client.post("/", content="a text")).json() == "a text"

    with_app(scenario)


@pytest.mark.parametrize(
    ("name", "value", "warning"),
    [
        ("workers.resources.limit_bytes", 10**6, "use fewer workers or INSTANCES"),
        ("multiprocessing.parent_process", Mock(), "WEB_CONCURRENCY=n, not --workers n"),
    ],
)
def test_server_that_takes_more_than_there_is_warns_when_it_starts(
    name: str,
    value: Any,
    warning: str,
    gated: type[Gated],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def scenario(client: httpx2.AsyncClient, service: Service) -> None:
        gated.loads.set()
        await eventually(client, "/ready", 200)

    monkeypatch.setattr(name, lambda: value)
    with caplog.at_level("WARNING", logger="uvicorn.error"):
        with_app(scenario)
    assert warning in caplog.text


class Slow:
    """A model whose every call takes longer than the deadline that the test sets."""

    example = "a text"

    def __call__(self, inputs: list[Any]) -> list[Any]:
        time.sleep(0.1)
        return inputs


def test_call_longer_than_the_deadline_is_reported_at_the_start(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def scenario(client: httpx2.AsyncClient, service: Service) -> None:
        await eventually(client, "/ready", 200)

    with caplog.at_level("WARNING", logger="uvicorn.error"):
        with_app(scenario, MODEL="test_service:Slow", DEADLINE_S=0.05)
    assert "one call of the model takes 0.1 s, more than DEADLINE_S=0.05" in caplog.text


def test_reload_is_not_taken_for_several_workers(
    gated: type[Gated], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario(client: httpx2.AsyncClient, service: Service) -> None:
        gated.loads.set()
        await eventually(client, "/ready", 200)

    monkeypatch.setattr("multiprocessing.parent_process", lambda: Mock())
    monkeypatch.setattr("sys.argv", ["uvicorn", "server:app", "--reload"])
    with caplog.at_level("INFO", logger="uvicorn.error"):
        with_app(scenario, TORCH_THREADS=1)
    assert "--workers" not in caplog.text
    assert "1 instance of the model, 1 thread each" in caplog.text


def test_error_of_ours_has_an_id_and_is_counted_too(
    gated: type[Gated], monkeypatch: pytest.MonkeyPatch
) -> None:
    def count() -> float:
        return server.metrics.registry.get_sample_value("model_requests_total", {"status": "500"}) or 0.0

    async def scenario(client: httpx2.AsyncClient, service: Service) -> None:
        gated.loads.set()
        await eventually(client, "/ready", 200)
        before = count()
        reply = await client.post("/", content="a text")
        assert reply.status_code == 500 and "error" in reply.json()
        assert reply.headers["X-Request-ID"] and count() == before + 1

    monkeypatch.setattr(gated, "__call__", lambda self, queries: [object() for _ in queries])  # no JSON
    with_app(scenario)


def test_model_call_that_hangs_turns_health_to_503_with_the_reason_until_it_returns(
    gated: type[Gated],
) -> None:
    async def scenario(client: httpx2.AsyncClient, service: Service) -> None:
        gated.loads.set()
        await eventually(client, "/ready", 200)
        hanging = asyncio.create_task(client.post("/", content="a text"))
        stuck = await eventually(client, "/health", 503)
        assert "has not returned" in stuck.json()["error"] and stuck.json()["running"] == 1
        assert (await client.get("/ready")).status_code == 503
        assert (await client.post("/", content="another")).status_code == 503
        gated.calls.set()
        assert (await hanging).json() == "a text"
        await eventually(client, "/health", 200)

    with_app(scenario, HANG_S=0.2)


def test_supervised_server_whose_model_hangs_answers_and_ends_so_that_another_is_started(
    gated: type[Gated],
    raised: list[int],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def scenario(client: httpx2.AsyncClient, service: Service) -> None:
        gated.loads.set()
        await eventually(client, "/ready", 200)
        reply = await client.post("/", content="a text")
        assert reply.status_code == 503 and "has not returned" in reply.json()["error"]
        assert raised == [signal.SIGTERM] and service.exit_code == 1
        service.exit_code = 0  # it would end these tests
        gated.calls.set()

    monkeypatch.setenv("SERVER_SOFTWARE", "gunicorn")
    with caplog.at_level("CRITICAL", logger="uvicorn.error"):
        with_app(scenario, HANG_S=0.2)
    assert "in __call__" in caplog.text, "where it hangs"


def test_stuck_worker_of_gunicorn_is_replaced() -> None:
    """Gunicorn itself only sees that the event loop is alive."""
    with serving(mode="recommended", HANG_S="1") as server:
        server.wait_until_ready()
        assert "has not returned" in post(server, "hang").error
        until(lambda: server.log().count("Serving ") == 2)
        until(lambda: served(server))
        assert post(server, "a text").status == 200


# --- a model process that has died ------------------------------------------------------------------------------------


@pytest.fixture
def loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """Tell it what the model's further loads do: "fail", "wait" for another word, "succeed"."""
    plan = tmp_path / "plan"
    monkeypatch.setenv("PLAN", str(plan))
    monkeypatch.setattr(process, "PAUSE_S", 0.001)
    return lambda word: plan.unlink() if word == "succeed" else plan.write_text(word)


def test_while_the_only_instance_loads_again_requests_are_rejected_with_the_time_that_the_last_load_took(
    loads: Callable[[str], Any],
) -> None:
    async def scenario(client: httpx2.AsyncClient, service: Service) -> None:
        await eventually(client, "/ready", 200)
        assert 0 < service.loop.instances.load_s < 60
        service.loop.instances.load_s = 59.5
        loads("wait")
        assert (await client.post("/", content="die")).status_code == 500
        for ask in (client.get("/ready"), client.post("/", content="a text")):
            reply = await ask
            assert (reply.status_code, reply.json()) == (503, {"error": "the model is still loading"})
        assert 1 < int(reply.headers["Retry-After"]) <= 60
        assert (await client.get("/health")).status_code == 200
        loads("succeed")
        await eventually(client, "/ready", 200)
        assert (await client.post("/", content="calls")).json() >= 2  # that one, and its example: it is warm

    with_app(scenario, MODEL=MOODY, OFFLOAD="process")


def test_input_that_ends_its_process_three_times_is_rejected_before_the_queue_alone_or_in_a_list() -> None:
    async def scenario(client: httpx2.AsyncClient, service: Service) -> None:
        for _ in range(3):
            await eventually(client, "/ready", 200)
            assert (await client.post("/", content="leave")).status_code == 500
        await eventually(client, "/ready", 200)
        processes = [
            instance.process.pid for instance in service.instances if isinstance(instance, process.Process)
        ]
        for _ in range(10):
            refused = await client.post("/", content="leave")
            assert refused.status_code == 422
        sentence = "the model's process ended each of the 3 times that it had this input; change it, or ask again in 10 minutes"
        assert refused.json() == {"error": sentence}
        several = await client.post("/", json={"inputs": ["a text", "leave"]})
        assert (several.status_code, several.json()) == (422, {"error": f"input 1: {sentence}"})
        assert (await client.post("/", content="a text")).json() == ["a text", *processes]
        assert (await client.get("/ready")).status_code == 200

    with_app(scenario, MODEL=MOODY, OFFLOAD="process")


def test_server_whose_only_instance_died_idle_is_not_ready_until_another_is_loaded(
    loads: Callable[[str], Any],
) -> None:
    async def scenario(client: httpx2.AsyncClient, service: Service) -> None:
        await eventually(client, "/ready", 200)
        loads("wait")
        (instance,) = service.instances
        assert isinstance(instance, process.Process)
        os.kill(instance.process.pid, signal.SIGKILL)
        await eventually(client, "/ready", 503)
        loads("succeed")
        await eventually(client, "/ready", 200)

    with_app(scenario, MODEL=MOODY, OFFLOAD="process")


def test_instance_that_died_idle_takes_no_job_while_it_loads_again(loads: Callable[[str], Any]) -> None:
    async def scenario(client: httpx2.AsyncClient, service: Service) -> None:
        await eventually(client, "/ready", 200)
        loads("wait")
        dead, alive = service.instances
        assert isinstance(dead, process.Process) and isinstance(alive, process.Process)
        for _ in range(2):
            os.kill(dead.process.pid, signal.SIGKILL)
            while dead.loaded.is_set():
                await asyncio.sleep(0.01)
            for _ in range(10):
                assert (await client.post("/", content="a text")).json() == ["a text", alive.process.pid]
            assert (await client.get("/ready")).status_code == 200
            loads("succeed")
            await dead.loaded.wait()
            loads("wait")
            dead, alive = alive, dead
        loads("succeed")

    with_app(scenario, MODEL=MOODY, OFFLOAD="process", INSTANCES=2)


def test_model_that_cannot_be_loaded_again_ends_the_server_with_the_reason(
    loads: Callable[[str], Any], raised: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario(client: httpx2.AsyncClient, service: Service) -> None:
        await eventually(client, "/ready", 200)
        loads("fail")
        assert (await client.post("/", content="die")).status_code == 500
        failing = await eventually(client, "/health", 503)
        assert failing.json()["error"] == "the model cannot be loaded"
        assert raised == [signal.SIGTERM] and service.exit_code == 1
        service.exit_code = 0  # it would end these tests

    with caplog.at_level("CRITICAL", logger="uvicorn.error"):
        with_app(scenario, MODEL=MOODY, OFFLOAD="process")
    assert (
        f"cannot load MODEL={MOODY}: {process.TRIES} model processes in a row have failed, the last one with: "
        "OSError: no such model" in caplog.text
    )


def test_instance_that_cannot_be_loaded_again_does_not_end_the_other(
    loads: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(client: httpx2.AsyncClient, service: Service) -> None:
        await eventually(client, "/ready", 200)
        loads("fail")
        assert (await client.post("/", content="die")).status_code == 500
        while not any(instance.trouble for instance in service.instances):
            assert (await client.post("/", content="a text")).status_code == 200
            await asyncio.sleep(0.01)
        ticks: list[None] = []
        monkeypatch.setattr(service.metrics, "sample", lambda: ticks.append(None))
        while len(ticks) < 2 and not service.exit_code:
            await asyncio.sleep(0.01)
        ended, service.exit_code = service.exit_code, 0
        assert not ended
        loads("succeed")
        while any(instance.trouble for instance in service.instances):
            assert (await client.post("/", content="a text")).status_code == 200
            await asyncio.sleep(0.01)
        assert (await client.get("/health")).status_code == 200

    with_app(scenario, MODEL=MOODY, OFFLOAD="process", INSTANCES=2)


# --- what it does with a class of one's own ---------------------------------------------------------------------------


@contextlib.contextmanager
def serving(model: str = "Model", mode: str = "thread", **env: str) -> Iterator[Server]:
    """A server with the moody model, that is not waited for."""
    with start(
        MODES[mode], {"MODEL": f"tests.support.misbehaving_model:{model}", "GRACE_S": "2", **env}, wait=False
    ) as server:
        yield server


@pytest.mark.parametrize("offload", ["thread", "process"])
@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        ("Fails", "ValueError: no weights for that"),
        ("Forgets", "ValueError: it gives 0 answers to 1 inputs"),
    ],
)
def test_model_that_fails_on_its_own_example_ends_the_start_with_one_sentence(
    offload: str, model: str, sentence: str
) -> None:
    with serving(model, OFFLOAD=offload) as server:
        assert server.process.wait(60) == 3
        assert f"cannot load MODEL=tests.support.misbehaving_model:{model}: {sentence}" in server.log()
        assert "Traceback" not in server.log()
        if (offload, model) == ("thread", "Fails"):
            assert re.search(r"no weights for that \(misbehaving_model\.py, line \d+\)", server.log())


def test_unknown_model_of_the_hub_ends_the_start_with_one_sentence() -> None:
    with serving(MODEL="nobody/no-such-model", HF_HUB_OFFLINE="1") as server:
        assert server.process.wait(60) == 3
        assert "cannot load MODEL=nobody/no-such-model: OSError: " in server.log()
        assert "Traceback" not in server.log()


def test_answers_that_cannot_leave_their_process_end_the_start_with_one_sentence() -> None:
    with serving("Secretive", OFFLOAD="process") as server:
        assert server.process.wait(60) == 3
        assert (
            "cannot load MODEL=tests.support.misbehaving_model:Secretive: it fails on its own example: "
            in server.log()
        )
        assert "Secretive.answer.<locals>.<lambda>" in server.log() and "Traceback" not in server.log()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells what a process has mapped")
def test_web_process_needs_no_torch_where_it_does_not_run_the_model() -> None:
    with serving(OFFLOAD="process") as server:
        server.wait_until_ready()
        assert post(server, "a text").status == 200
        maps = Path(f"/proc/{server.process.pid}/maps").read_text()
        assert "libtorch" not in maps and "transformers" not in maps
        assert psutil.Process(server.process.pid).memory_info().rss < 100e6


# --- how it ends ------------------------------------------------------------------------------------------------------


def ends(server: Server, *signals: int) -> int:
    """Its exit code after these signals, one after the other; fails where a process of it lives on."""
    everybody = server.processes()
    for number in signals:
        os.killpg(server.process.pid, number)  # a terminal signals them all
        time.sleep(0.05)  # two at once may be one
    code = server.process.wait(60)
    until(lambda: not any(map(is_alive, everybody)))
    return code


STRATEGIES = {
    "SIGTERM": [signal.SIGTERM],
    "SIGTERM three times": [signal.SIGTERM] * 3,
    "Ctrl-C": [signal.SIGINT],
    "Ctrl-C twice": [signal.SIGINT] * 2,
    "SIGHUP": [signal.SIGHUP],
}


@pytest.fixture
def hangup() -> Iterator[None]:
    """SIGHUP ends a server, as it does from a terminal; under nohup it would inherit that it is ignored."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


def every_end() -> Iterator[Any]:
    """Yield where the model hangs, where it runs, and how the server is told to end.

    For every commit the plain SIGTERM everywhere, and each signal during a call; the others belong to the slow tests.
    """
    for hangs, offload, way in itertools.product(
        ("import", "load", "warm-up", "call"), ("thread", "process"), STRATEGIES
    ):
        quick = way == "SIGTERM" or (hangs == "call" and offload == "process")
        yield pytest.param(hangs, offload, way, marks=[] if quick else pytest.mark.slow)


@pytest.mark.usefixtures("hangup")
@pytest.mark.parametrize(("hangs", "offload", "way"), list(every_end()))
def test_server_whose_model_hangs_ends_within_its_grace_time_and_so_do_its_processes(
    hangs: str, offload: str, way: str
) -> None:
    its = {"OFFLOAD": offload, "HANGS": hangs, "GRACE_S": "3" if hangs == "call" else "20"}
    with serving(**its) as server, contextlib.ExitStack() as connections:
        until(lambda: "hanging" in server.log() if hangs != "call" else served(server))
        if hangs == "call":
            connection = connections.enter_context(dial(server))
            connection.sendall(request("POST", "/", b"hang"))
            until(lambda: "hanging" in server.log())
        code = ends(server, *STRATEGIES[way])
        assert code != -signal.SIGALRM or hangs == "call"
        assert "Traceback" not in server.log() or way == "Ctrl-C twice"  # uvicorn's own
        if hangs == "call" and way == "SIGTERM":
            assert hear(connection).status == 503


def served(server: Server) -> bool:
    with contextlib.suppress(OSError):
        return get(server, "/ready").status == 200
    return False


@pytest.mark.parametrize("way", ["SIGTERM", "Ctrl-C"])
@pytest.mark.parametrize("offload", ["thread", "process"])
@pytest.mark.parametrize("hangs", ["load", "call"])
def test_so_it_does_under_gunicorn(hangs: str, offload: str, way: str) -> None:
    with serving(mode="recommended", OFFLOAD=offload, HANGS=hangs) as server, contextlib.ExitStack() as stack:
        until(lambda: "hanging" in server.log() if hangs != "call" else served(server))
        if hangs == "call":
            connection = stack.enter_context(dial(server))
            connection.sendall(request("POST", "/", b"hang"))
            until(lambda: "hanging" in server.log())
        ends(server, *STRATEGIES[way])
        if hangs == "call":
            assert hear(connection).status == 503


@pytest.mark.parametrize(("mode", "workers"), [("recommended", 1), ("uvicorn-2", 2)])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("hangs", ["", "load"])
def test_gunicorns_workers_end_before_their_master_or_the_alarm_kills_them(
    hangs: str, number: int, mode: str, workers: int
) -> None:
    with serving(mode=mode, HANGS=hangs, GRACE_S="5") as server:
        until(lambda: server.log().count("hanging" if hangs else "Serving ") == workers)
        server.process.send_signal(number)  # to the master alone
        server.process.wait(60)
        assert "SIGKILL" not in server.log() and "SIGALRM" not in server.log()


def test_signals_again_and_again_do_not_put_the_end_off() -> None:
    with serving(OFFLOAD="inline") as server:
        server.wait_until_ready()
        with dial(server) as connection:
            connection.sendall(request("POST", "/", b"hang"))
            until(lambda: "hanging" in server.log())
            end = time.monotonic() + 60
            while server.process.poll() is None:
                assert time.monotonic() < end
                server.process.send_signal(signal.SIGTERM)
                time.sleep(0.1)
            assert server.process.returncode == -signal.SIGALRM


@pytest.mark.parametrize("mode", ["thread", "recommended"])
def test_second_ctrl_c_waits_for_no_frozen_model_and_leaves_nothing(mode: str) -> None:
    with serving(mode=mode, OFFLOAD="process", GRACE_S="30") as server:
        server.wait_until_ready()
        assert post(server, "fork").status == 200  # its fork, too, is to end
        model, _ = (p for p in server.processes() if "workers.isolation.process" in " ".join(p.cmdline()))
        model.suspend()
        with dial(server) as connection:
            connection.sendall(request("POST", "/", b"a text"))
            until(lambda: '"running":1' in get(server, "/health").body.decode())
            ends(server, signal.SIGINT, signal.SIGINT)


@pytest.mark.skipif(sys.platform != "linux", reason="there a process dies with its parent")
def test_killed_server_leaves_no_model_behind_not_even_a_frozen_one() -> None:
    with serving(OFFLOAD="process") as server:
        server.wait_until_ready()
        (model,) = server.processes()[1:]
        model.suspend()
        server.process.kill()
        until(lambda: not is_alive(model))


def test_what_a_model_has_forked_ends_with_the_server() -> None:
    with serving(OFFLOAD="process") as server:
        server.wait_until_ready()
        assert post(server, "fork").status == 200
        assert len(server.processes()) == 3
        ends(server, signal.SIGTERM)


def test_instances_of_the_model_end_with_the_service() -> None:
    async def run() -> None:
        async with Service(Settings(MODEL=MOODY, OFFLOAD="process"), Metrics()).running() as service:
            await service.started.wait()
        (instance,) = service.instances
        assert isinstance(instance, process.Process)
        assert await asyncio.to_thread(instance.process.wait, 30) == 0, "it closed the model itself"

    in_thread(run)


@pytest.mark.parametrize("hangs", [False, True])
def test_model_is_closed_within_the_grace_time(
    hangs: bool, gated: type[Gated], caplog: pytest.LogCaptureFixture
) -> None:
    closed: list[str] = []

    async def close() -> None:
        closed.append("begun")
        if hangs:
            await asyncio.Event().wait()
        closed.append("done")

    async def scenario(client: httpx2.AsyncClient, service: Service) -> None:
        gated.loads.set()
        await eventually(client, "/ready", 200)
        for instance in service.instances:
            instance.close = close  # type: ignore[method-assign]

    with_app(scenario, GRACE_S=1)
    assert closed == (["begun"] if hangs else ["begun", "done"])
    assert ("the model was not closed within GRACE_S=1" in caplog.text) is hangs


def test_second_sigterm_does_not_lengthen_the_grace_time(
    gated: type[Gated], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(client: httpx2.AsyncClient, service: Service) -> None:
        service.stop()
        stops_at, draining = service.stops_at, service.draining
        monkeypatch.setattr(time, "monotonic", lambda clock=time.monotonic: clock() + 5)
        service.stop()
        assert (service.stops_at, service.draining) == (stops_at, draining)
        monkeypatch.undo()

    with_app(scenario)


def test_request_after_the_stop_is_rejected_without_waiting_for_its_body(
    gated: type[Gated],
) -> None:
    async def stalled() -> AsyncIterator[bytes]:
        yield b"a "
        await asyncio.Event().wait()

    async def scenario(client: httpx2.AsyncClient, service: Service) -> None:
        service.stop()
        async with asyncio.timeout(60):
            reply = await client.post("/", content=stalled())
        assert (reply.status_code, reply.json()) == (503, {"error": STOPPING})

    with_app(scenario, BODY_TIMEOUT_S=3600)


def test_nothing_is_kept_of_a_request_that_has_ended(gated: type[Gated]) -> None:
    async def scenario(client: httpx2.AsyncClient, service: Service) -> None:
        gated.loads.set()
        await eventually(client, "/ready", 200)
        waiting = asyncio.create_task(client.post("/", content="a text"))
        while not service.in_flight.waiting:
            await asyncio.sleep(0)
        service.in_flight.sweep()
        service.in_flight.sweep()  # from the second on its client is watched
        assert service.in_flight.watching
        gated.calls.set()
        assert (await waiting).status_code == 200
        clients, loop = service.in_flight, service.loop
        service.in_flight.sweep()
        assert not (clients.reading or clients.waiting or clients.seen or clients.watching)
        assert not (loop.live or loop.running or loop.queue or loop.queue.size or loop.instances.calls)

    with_app(scenario)


def test_service_that_ends_without_a_signal_answers_what_it_has_admitted(gated: type[Gated]) -> None:
    async def run() -> None:
        gated.loads.set()
        async with Service(Settings(MODEL=GATED), Metrics()).running() as service:
            await service.started.wait()
            job = asyncio.create_task(service.loop.submit("a text"))
            while not service.loop.running:
                await asyncio.sleep(0)
            asyncio.get_running_loop().call_soon(gated.calls.set)
        assert job.done() and (await job).value == "a text"

    in_thread(run)


def test_bug_in_the_loop_answers_every_client_and_ends_the_process_with_a_code(
    gated: type[Gated],
    raised: list[int],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def bug(self: ModelLoop, ready: Any) -> Any:
        await self.queue.not_empty()
        raise RuntimeError("a bug")

    async def scenario(client: httpx2.AsyncClient, service: Service) -> None:
        gated.loads.set()
        await eventually(client, "/ready", 200)
        assert (await client.post("/", content="a text")).status_code == 503
        assert raised == [signal.SIGTERM] and service.exit_code == 1
        service.exit_code = 0  # it would end these tests

    monkeypatch.setattr(ModelLoop, "take_batch", bug)
    with caplog.at_level("CRITICAL", logger="uvicorn.error"):
        with_app(scenario)
    assert "the model loop has ended" in caplog.text
