"""A thread and a process both answer, survive what the model throws, and contain what only a process can contain."""

import asyncio
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import uvloop

from workers.loop import ModelDied, ModelFailed
from workers.metrics import Metrics
from workers.offload import CannotLoad, Inline, Process, Thread, attempt_load, core_shares, make, packed
from workers.settings import Settings


class Echo:
    """A model that answers with the query, or does what it says. Importable, so that a spawned process can load it."""

    description = "echo"

    def __call__(self, queries: list[Any]) -> list[Any]:
        for query in queries:
            match query:
                case "stop":
                    raise StopIteration
                case "exit":
                    raise SystemExit(3)
                case "cancel":
                    raise asyncio.CancelledError
                case "die":
                    os.kill(os.getpid(), signal.SIGKILL)
                case "hang":
                    time.sleep(3600)
        return [(query, os.getpid(), threading.current_thread().name) for query in queries]


class Gated:
    """A model that waits for an event; counts how many calls are inside at once."""

    description = "gated"

    def __init__(self) -> None:
        self.open = threading.Event()
        self.inside = self.most = 0

    def __call__(self, queries: list[Any]) -> list[Any]:
        self.inside += 1
        self.most = max(self.most, self.inside)
        self.open.wait(60)
        self.inside -= 1
        return queries


def broken() -> Echo:
    raise OSError("no such model\nsecond line")


def load_by(plan: Path) -> Echo:
    """Load, die or fail as the next line of the file says: each process takes one."""
    now, *later = plan.read_text().split()
    plan.write_text("\n".join(later))
    match now:
        case "die":
            os.kill(os.getpid(), signal.SIGKILL)
        case "fail":
            broken()
    return Echo()


def test_the_reason_is_the_last_line_where_the_message_is_a_traceback() -> None:
    def load() -> Echo:
        raise ValueError("it failed:\nTraceback (most recent call last):\n  File ...\nOSError: no such file")

    with pytest.raises(CannotLoad, match=r"^ValueError: OSError: no such file$"):
        attempt_load(load)


async def eventually(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.01)


def process(metrics: Metrics | None = None, hang_s: float = 60.0, load: Callable[[], Any] = Echo) -> Process:
    return Process(load, hang_s, metrics or Metrics())


PLACES = {"inline": partial(Inline, Echo), "thread": partial(Thread, Echo), "process": process}


@pytest.mark.parametrize("place", PLACES)
def test_errors_that_would_break_asyncio_reach_the_caller_and_the_next_call_is_served(place: str) -> None:
    async def scenario() -> None:
        offload = PLACES[place]()
        assert "echo" in await offload.start()
        for poison in ("stop", "exit", "cancel"):
            with pytest.raises(ModelFailed) as failed:
                await offload.run([poison])
            assert not isinstance(failed.value, ModelDied), "its neighbours may be tried again"
            assert [answer[0] for answer in await offload.run(["a", "b"])] == ["a", "b"]
        offload.stop()

    asyncio.run(scenario())


@pytest.mark.parametrize(
    "make", [partial(Inline, broken), partial(Thread, broken), partial(process, load=broken)]
)
def test_a_model_that_cannot_be_loaded_is_one_line(make: Callable[[], Any]) -> None:
    async def scenario() -> None:
        offload = make()
        with pytest.raises(CannotLoad, match=r"^OSError: no such model$"):
            await offload.start()

    asyncio.run(scenario())


def test_a_thread_runs_one_call_at_a_time_even_when_its_callers_have_left() -> None:
    async def scenario() -> None:
        model = Gated()
        offload = Thread(lambda: model)
        await offload.start()
        complaints: list[Any] = []
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: complaints.append(context))
        left = asyncio.create_task(offload.run(["left"]))
        await eventually(lambda: model.inside == 1)
        left.cancel()
        stays = asyncio.create_task(offload.run(["stays"]))
        model.open.set()
        assert await stays == ["stays"]
        assert model.most == 1
        assert not complaints
        offload.stop()

    asyncio.run(scenario())


def test_a_call_that_outlives_its_event_loop_ends_in_silence() -> None:
    model = Gated()
    others = set(threading.enumerate())

    async def scenario() -> None:
        offload = Thread(lambda: model)
        await offload.start()
        call = asyncio.create_task(offload.run(["a"]))
        await eventually(lambda: model.inside == 1)
        call.cancel()

    asyncio.run(scenario())
    (worker,) = set(threading.enumerate()) - others
    model.open.set()
    worker.join()  # pytest fails on an exception in a thread


def test_the_event_loop_stays_responsive_while_a_thread_computes() -> None:
    async def scenario() -> None:
        model = Gated()
        offload = Thread(lambda: model)
        await offload.start()
        call = asyncio.create_task(offload.run(["a"]))
        await eventually(lambda: model.inside == 1)  # we get to look while it is inside
        model.open.set()
        await call
        offload.stop()

    asyncio.run(scenario())


def with_process(
    scenario: Callable[[Process, Metrics], Awaitable[None]],
    loop_factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop,  # as uvicorn's
    **options: Any,
) -> None:
    async def run() -> None:
        metrics = Metrics()
        offload = process(metrics, **options)
        await offload.start()
        try:
            async with asyncio.timeout(120):
                await scenario(offload, metrics)
        finally:
            offload.stop()

    with asyncio.Runner(loop_factory=loop_factory) as runner:
        runner.run(run())


def restarts(metrics: Metrics) -> float:
    return metrics.registry.get_sample_value("model_process_restarts_total") or 0.0


@pytest.mark.parametrize("loop_factory", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_queries_and_answers_that_pass_in_pieces_arrive(
    loop_factory: Callable[[], asyncio.AbstractEventLoop],
) -> None:
    async def scenario(offload: Process, metrics: Metrics) -> None:
        long = "a" * 10**7
        for _ in range(3):
            assert [query for query, _, _ in await offload.run([long, "b"])] == [long, "b"]
        assert restarts(metrics) == 0

    with_process(scenario, loop_factory)


def test_a_killed_process_costs_its_own_queries_and_is_replaced() -> None:
    async def scenario(offload: Process, metrics: Metrics) -> None:
        ((_, first, _),) = await offload.run(["a"])
        with pytest.raises(ModelDied, match="exit code -9"):
            await offload.run(["a", "die"])
        ((_, second, _),) = await offload.run(["a"])
        assert second not in (first, os.getpid())
        assert restarts(metrics) == 1

    with_process(scenario)


@pytest.mark.parametrize("frozen", [False, True])
def test_a_hung_process_is_killed_and_replaced(frozen: bool) -> None:
    async def scenario(offload: Process, metrics: Metrics) -> None:
        hung = offload.process
        if frozen:
            os.kill(hung.pid, signal.SIGSTOP)
        with pytest.raises(ModelDied, match="did not return within"):
            await offload.run(["more than the kernel holds for it" * 10**6, "hang"])
        ((query, _, _),) = await offload.run(["a"])
        assert query == "a" and not hung.is_alive()

    with_process(scenario, hang_s=5.0)


@pytest.mark.parametrize("asked_before", [True, False])
def test_a_process_that_is_killed_while_idle_is_replaced_before_anyone_asks(
    asked_before: bool, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario(offload: Process, metrics: Metrics) -> None:
        if asked_before:
            await offload.run(["a"])
        os.kill(offload.process.pid, signal.SIGKILL)
        await eventually(lambda: restarts(metrics) == 1)
        assert "ended with exit code -9; starting another" in caplog.text
        ((query, _, _),) = await offload.run(["a"])
        assert query == "a"

    with caplog.at_level(
        "ERROR", logger="uvicorn.error"
    ):  # the lessons' helpers, imported earlier, silence it
        with_process(scenario)


def test_a_replacement_that_cannot_even_be_started_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(offload: Process, metrics: Metrics) -> None:
        def fail(*_: Any) -> None:
            raise OSError(24, "Too many open files")

        with monkeypatch.context() as patched:
            patched.setattr("socket.socketpair", fail)
            with pytest.raises(ModelDied, match="exit code -9"):
                await offload.run(["die"])
            await offload.ready()
            for _ in range(2):
                with pytest.raises(ModelDied, match="Too many open files"):
                    await offload.run(["a"])
                await offload.ready()
        with pytest.raises(ModelDied, match="Too many open files"):
            await offload.run(["a"])
        ((query, _, _),) = await offload.run(["a"])
        assert query == "a"

    with_process(scenario)


def test_a_replacement_that_cannot_load_is_replaced_in_its_turn(tmp_path: Path) -> None:
    async def scenario(offload: Process, metrics: Metrics) -> None:
        for reason in ("exit code -9", "exit code -9", "OSError: no such model"):
            with pytest.raises(ModelDied, match=reason):
                await offload.run(["die"])
        ((query, _, _),) = await offload.run(["a"])
        assert query == "a"
        assert restarts(metrics) == 3

    plan = tmp_path / "plan"
    plan.write_text("load die fail load")
    with_process(scenario, load=partial(load_by, plan))


def test_a_stop_during_a_call_cancels_it_and_starts_no_other_process() -> None:
    async def scenario(offload: Process, metrics: Metrics) -> None:
        call = asyncio.create_task(offload.run(["hang"]))
        await asyncio.sleep(0)  # it has asked
        call.cancel()
        offload.stop()
        with pytest.raises(asyncio.CancelledError):
            await call
        assert restarts(metrics) == 0

    with_process(scenario)


def test_a_stopped_process_is_not_replaced() -> None:
    async def scenario(offload: Process, metrics: Metrics) -> None:
        offload.stop()
        await asyncio.to_thread(offload.process.join, 10)
        await asyncio.sleep(0.01)  # the event loop looks at what has ended
        assert restarts(metrics) == 0

    with_process(scenario)


def test_a_stop_during_a_replacement_leaves_no_process() -> None:
    async def scenario(offload: Process, metrics: Metrics) -> None:
        for turns in range(4):
            with pytest.raises(ModelDied):
                await offload.run(["die"])
            for _ in range(turns):
                await asyncio.sleep(0)
            offload.stop()
            await asyncio.wait([offload.spawning])
            offload.process.join(10)
            assert not multiprocessing.active_children()
            await offload.start()

    with_process(scenario)


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_a_process_finishes_its_work_when_the_terminal_or_systemd_signals_it_too(stop: int) -> None:
    async def scenario(offload: Process, metrics: Metrics) -> None:
        os.kill(offload.process.pid, stop)
        ((query, _, _),) = await offload.run(["a"])
        assert query == "a"
        assert restarts(metrics) == 0

    with_process(scenario)


def test_threads_are_counted_before_a_process_is_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(8)))
    copies = make(Settings(OFFLOAD="process", INSTANCES=2), Metrics())
    assert [copy.cores for copy in copies] == [{0, 1, 2, 3}, {4, 5, 6, 7}]
    assert {copy.load.args[0].TORCH_THREADS for copy in copies} == {4}


@pytest.mark.parametrize("crowded", [{"WEB_CONCURRENCY": 2}, {"TORCH_THREADS": 5}, {"INSTANCES": 9}], ids=str)
def test_no_process_is_pinned_to_cores_that_another_one_needs(
    crowded: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(8)))
    assert set(core_shares(Settings(**{"INSTANCES": 2, **crowded}))) == {None}


@pytest.mark.parametrize("amid_a_message", [False, True])
def test_a_process_ends_when_its_server_is_gone(amid_a_message: bool) -> None:
    async def scenario(offload: Process, metrics: Metrics) -> None:
        model = offload.process
        if amid_a_message:
            offload.to_model.write(packed(["a"])[:-1])
        offload.to_model.close()
        await asyncio.to_thread(model.join, 30)
        assert model.exitcode == 0

    async def run() -> None:
        metrics = Metrics()
        offload = process(metrics)
        await offload.start()
        asyncio.get_running_loop().remove_reader(offload.process.sentinel)
        await scenario(offload, metrics)

    asyncio.run(run())
