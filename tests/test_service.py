"""What the server says of itself while it loads, when its model hangs, and when its own loop fails."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any
from unittest.mock import Mock

import httpx2
import pytest

import server
from loadtests.modes import ROOT, free_port
from workers import offload, service
from workers.loop import STOPPING
from workers.metrics import Metrics
from workers.model import Query
from workers.service import Service
from workers.settings import Settings


class Gated:
    """A model whose loading and whose calls wait for an event each."""

    description = "gated"
    loads, calls = threading.Event(), threading.Event()

    def __init__(self, *args: Any) -> None:
        self.loads.wait(60)

    def __call__(self, queries: list[Any]) -> list[Any]:
        self.calls.wait(60)
        return [query.text for query in queries]


@pytest.fixture
def gated(monkeypatch: pytest.MonkeyPatch) -> type[Gated]:
    class Fresh(Gated):
        loads, calls = threading.Event(), threading.Event()

    monkeypatch.setattr(offload, "Model", Fresh)
    monkeypatch.setattr(service, "InputCheck", lambda settings: lambda query: query)
    return Fresh


def with_app(settings: Settings, scenario: Callable[[httpx2.AsyncClient, Service], Awaitable[None]]) -> None:
    """Run `scenario` against the app."""

    async def run() -> None:
        async with Service(settings, Metrics()).running() as running:

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
    thread.join(120)
    if failures:
        raise failures[0]


async def eventually(client: httpx2.AsyncClient, path: str, status: int) -> httpx2.Response:
    async with asyncio.timeout(60):
        while (reply := await client.get(path)).status_code != status:
            await asyncio.sleep(0.01)
    return reply


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

    with_app(Settings(), scenario)


@pytest.mark.parametrize(
    ("name", "value", "warning"),
    [
        ("workers.memory.limit_bytes", 10**6, "use fewer workers or INSTANCES"),
        ("multiprocessing.parent_process", Mock(), "WEB_CONCURRENCY=n, not --workers n"),
    ],
)
def test_a_server_that_takes_more_than_there_is_warns_when_it_starts(
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
        with_app(Settings(), scenario)
    assert warning in caplog.text


def test_an_error_of_ours_has_an_id_and_is_counted_too(
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
    with_app(Settings(), scenario)


def test_a_model_call_that_hangs_turns_health_to_503_with_the_reason_until_it_returns(
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

    with_app(Settings(HANG_S=0.2), scenario)


def test_whoever_sends_a_body_after_the_stop_is_refused_without_waiting_for_the_body(
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

    with_app(Settings(BODY_TIMEOUT_S=3600), scenario)


def test_nothing_is_kept_of_a_request_that_has_ended(gated: type[Gated]) -> None:
    async def scenario(client: httpx2.AsyncClient, service: Service) -> None:
        gated.loads.set()
        await eventually(client, "/ready", 200)
        waiting = asyncio.create_task(client.post("/", content="a text"))
        while not service.clients.waiting:
            await asyncio.sleep(0)
        service.clients.sweep()
        service.clients.sweep()  # from the second on its client is watched
        assert service.clients.watching
        gated.calls.set()
        assert (await waiting).status_code == 200
        clients, loop = service.clients, service.loop
        service.clients.sweep()
        assert not (clients.reading or clients.waiting or clients.seen or clients.watching)
        assert not (loop.live or loop.running or loop.queue or loop.queue.size or loop.calls)

    with_app(Settings(), scenario)


def test_a_service_that_ends_without_a_signal_answers_what_it_has_admitted(gated: type[Gated]) -> None:
    async def run() -> None:
        gated.loads.set()
        async with Service(Settings(), Metrics()).running() as service:
            await service.loaded.wait()
            job = asyncio.create_task(service.loop.submit(Query("a text")))
            while not service.loop.running:
                await asyncio.sleep(0)
            asyncio.get_running_loop().call_soon(gated.calls.set)
        assert job.done() and (await job).value == "a text"

    in_thread(run)


def test_a_call_that_holds_the_event_loop_does_not_hold_the_exit_longer_than_the_grace_time() -> None:
    port = free_port()
    program = f"""
import time, uvicorn, server
from workers import offload, service
class Hangs:
    description = "hangs"
    def __init__(self, *args): pass
    def __call__(self, queries):
        print("called", flush=True)
        time.sleep(3600)
offload.Model = Hangs
service.InputCheck = lambda settings: lambda query: query
uvicorn.run(server.app, port={port}, access_log=False)
"""
    env = {**os.environ, "OFFLOAD": "inline", "GRACE_S": "1"}
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True) as process:
        with httpx2.Client(transport=httpx2.HTTPTransport(retries=100)) as client:
            while client.get(f"http://127.0.0.1:{port}/ready").status_code != 200:
                assert process.poll() is None
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(b"POST / HTTP/1.1\r\nHost: server\r\nContent-Length: 6\r\n\r\na text")
            assert process.stdout and process.stdout.readline() == "called\n"
            process.terminate()
            try:
                assert process.wait(60) == -signal.SIGALRM
            finally:
                process.kill()


def test_a_bug_in_the_loop_answers_whoever_waits_and_ends_the_process_with_a_code() -> None:
    port = free_port()
    program = f"""
import asyncio, uvicorn, server
from workers.loop import ModelLoop
async def bug(self, ready):
    await self.queue.at_least(1)
    raise RuntimeError("a bug")
ModelLoop.take_batch = bug
uvicorn.run(server.app, port={port})
"""
    process = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    url = f"http://127.0.0.1:{port}"
    with httpx2.Client(base_url=url, transport=httpx2.HTTPTransport(retries=100)) as client:
        while client.get("/ready").status_code != 200 and process.poll() is None:
            pass
        reply = client.post("/", content="Snow is [MASK].")
    assert reply.status_code == 503
    _, log = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "RuntimeError: a bug" in log and "the model loop has ended" in log
