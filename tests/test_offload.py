"""A thread and a process both answer, survive what the model throws, and contain what only a process can contain."""

import asyncio
import os
import pickle
import select
import signal
import threading
import time
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import uvloop

from loadtests.modes import is_alive
from tests.support.misbehaving_model import Model
from workers.errors import CannotLoad, ModelDied, ModelFailed
from workers.isolation import core_shares, make_instances, process
from workers.isolation.process import Process, packed, pause_s, pickled
from workers.metrics import Metrics
from workers.offload import Inline, Thread, attempt_load
from workers.settings import Settings


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


def broken() -> Model:
    raise OSError("no such model\nsecond line")


def test_reason_is_the_last_line_where_the_message_is_a_traceback() -> None:
    def load() -> Model:
        raise ValueError("it failed:\nTraceback (most recent call last):\n  File ...\nOSError: no such file")

    with pytest.raises(CannotLoad, match=r"^ValueError: OSError: no such file$"):
        attempt_load(load)


def test_root_cause_is_named_where_a_library_wraps_it() -> None:
    def load() -> Model:
        try:
            try:
                raise ModuleNotFoundError("No module named '_cffi_backend'")
            except ImportError as exc:
                raise OSError("can't load the sound library") from exc
        except OSError as exc:
            raise ModuleNotFoundError("Could not import module 'pipeline'.") from exc

    with pytest.raises(CannotLoad) as error:
        attempt_load(load)
    assert str(error.value).startswith("ModuleNotFoundError: Could not import module 'pipeline'.")
    assert "ModuleNotFoundError: No module named '_cffi_backend'" in str(error.value)


async def eventually(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.01)


def in_process(
    metrics: Metrics | None = None, hang_s: float = 60.0, load: Callable[[], Any] = Model, **options: Any
) -> Process:
    return Process(load, hang_s, metrics or Metrics(), **options)


PLACES = {"inline": partial(Inline, Model), "thread": partial(Thread, Model), "process": in_process}


@pytest.mark.parametrize("place", PLACES)
def test_errors_that_would_break_asyncio_reach_the_caller_and_the_next_call_is_served(place: str) -> None:
    async def scenario() -> None:
        offload = PLACES[place]()
        assert "moody" in await offload.start()
        for poison in ("stop", "exit", "cancel", "rude"):
            with pytest.raises(ModelFailed) as failed:
                await offload.run([poison])
            assert not isinstance(failed.value, ModelDied), "its neighbours may be tried again"
            assert [answer[0] for answer in await offload.run(["a", "b"])] == ["a", "b"]
        offload.stop()

    asyncio.run(scenario())


@pytest.mark.parametrize(
    "make", [partial(Inline, broken), partial(Thread, broken), partial(in_process, load=broken)]
)
def test_model_that_cannot_be_loaded_is_one_line(make: Callable[[], Any]) -> None:
    async def scenario() -> None:
        offload = make()
        with pytest.raises(CannotLoad, match=r"^OSError: no such model$"):
            await offload.start()

    asyncio.run(scenario())


class Closing(Model):
    """Writes what is done to it into the file that CLOSED names; HANGS=close: never comes back from it."""

    def close(self) -> None:
        with open(os.environ["CLOSED"], "a") as file:
            file.write(f"closed after {self.calls}\n")
        if os.environ.get("HANGS") == "close":
            time.sleep(3600)
        raise OSError("what close() raises costs nobody anything")


@pytest.mark.parametrize("place", PLACES)
def test_model_is_closed_once_after_its_last_call(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed = tmp_path / "closed"
    monkeypatch.setenv("CLOSED", str(closed))
    make: Any = {"inline": Inline, "thread": Thread, "process": lambda load: in_process(load=load)}[place]

    async def scenario() -> None:
        offload = make(Closing)
        await offload.start()
        call = asyncio.create_task(offload.run(["a"]))
        await asyncio.sleep(0)
        await asyncio.wait_for(offload.close(), 60)
        assert (await call)[0][0] == "a"
        assert not offload.trouble and not getattr(offload, "replacing", None)
        offload.stop()

    asyncio.run(scenario())
    assert closed.read_text() == "closed after 1\n"


@pytest.mark.parametrize("place", PLACES)
def test_model_that_hangs_while_it_closes_can_be_stopped(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLOSED", str(tmp_path / "closed"))
    monkeypatch.setenv("HANGS", "close")
    make: Any = {"inline": Inline, "thread": Thread, "process": lambda load: in_process(load=load)}[place]

    async def scenario() -> None:
        offload = make(Closing)
        await offload.start()
        closing = asyncio.create_task(offload.close())
        await eventually((tmp_path / "closed").exists)
        assert not closing.done()
        closing.cancel()
        offload.stop()
        if isinstance(offload, Process):
            await eventually(lambda: offload.process.returncode is not None)

    asyncio.run(scenario())


def test_thread_runs_one_call_at_a_time_even_when_its_callers_have_left() -> None:
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


def test_call_that_outlives_its_event_loop_ends_in_silence() -> None:
    model = Gated()
    others = set(threading.enumerate())

    async def scenario() -> None:
        offload = Thread(lambda: model)
        await offload.start()
        call = asyncio.create_task(offload.run(["a"]))
        await eventually(lambda: model.inside == 1)
        call.cancel()
        offload.stop()

    asyncio.run(scenario())
    (worker,) = set(threading.enumerate()) - others
    model.open.set()
    worker.join()  # pytest fails on an exception in a thread


def test_event_loop_stays_responsive_while_a_thread_computes() -> None:
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
        offload = in_process(metrics, **options)
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


def kill(offload: Process) -> None:
    os.kill(offload.process.pid, signal.SIGKILL)


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the model's loads do, each as its next word says; the pauses between them are short."""
    plan = tmp_path / "plan"
    monkeypatch.setenv("PLAN", str(plan))
    monkeypatch.setattr(process, "PAUSE_S", 0.001)
    return plan


@pytest.mark.parametrize("loop_factory", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_queries_and_answers_that_pass_in_pieces_arrive(
    loop_factory: Callable[[], asyncio.AbstractEventLoop],
) -> None:
    async def scenario(offload: Process, metrics: Metrics) -> None:
        long = "a" * 10**7
        for _ in range(3):
            assert [query for query, _ in await offload.run([long, "b"])] == [long, "b"]
        assert len((await offload.run(["huge"]))[0]) == 10**8
        assert restarts(metrics) == 0

    with_process(scenario, loop_factory)


def test_what_cannot_be_sent_or_goes_to_the_terminal_costs_its_own_call() -> None:
    async def scenario(offload: Process, metrics: Metrics) -> None:
        for odd in ("function", lambda: None, ValueError):
            with pytest.raises((ModelFailed, pickle.PicklingError, AttributeError)):
                await offload.run([odd, "function"])
            assert (await offload.run(["print"]))[0][0] == "print"
        assert restarts(metrics) == 0

    with_process(scenario)


def test_log_tells_where_in_its_process_the_model_failed() -> None:
    async def scenario(offload: Process, metrics: Metrics) -> None:
        with pytest.raises(ModelFailed) as failed:
            await offload.run(["stop"])
        (note,) = failed.value.__notes__
        assert "misbehaving_model.py" in note and note.endswith("StopIteration\n")

    with_process(scenario)


def test_tensors_arrive_as_numbers_and_lists_where_torch_is_missing() -> None:
    import torch

    answer = {"vector": torch.arange(2.0), "score": torch.tensor(0.5, dtype=torch.bfloat16), "n": 3}
    assert b"torch" not in pickled(answer)
    assert pickle.loads(pickled(answer)) == {"vector": [0.0, 1.0], "score": 0.5, "n": 3}


@pytest.mark.parametrize(("poison", "code"), [("die", -9), ("leave", 7)])
def test_process_that_dies_costs_its_own_queries_and_is_replaced_however_often(
    poison: str, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries: list[int] = []
    monkeypatch.setattr(process, "pause_s", lambda n: tries.append(n) or 0)

    async def scenario(offload: Process, metrics: Metrics) -> None:
        ((_, last),) = await offload.run(["a"])
        for number in range(process.TRIES + 1):
            with pytest.raises(ModelDied, match=f"exit code {code}"):
                await offload.run(["a", poison])
            if number % 2:
                ((_, pid),) = await offload.run(["a"])
                assert pid not in (last, os.getpid())
                last = pid
        await offload.loaded.wait()
        assert restarts(metrics) == process.TRIES + 1
        assert tries == [0] * (process.TRIES + 1), "nobody is kept waiting: each of them had been asked"

    with_process(scenario)


def kill_once_it_has_spoken(offload: Process) -> None:
    """Hold the event loop until what it says lies there unread, and it is dead."""
    select.select([offload.to_model.get_extra_info("socket")], [], [], 60)
    kill(offload)
    while offload.process.returncode is None:
        time.sleep(0.01)


def test_process_that_answers_and_dies_costs_nobody_an_answer() -> None:
    async def scenario(offload: Process, metrics: Metrics) -> None:
        call = asyncio.create_task(offload.run(["a"]))
        await asyncio.sleep(0)
        kill_once_it_has_spoken(offload)
        ((query, _),) = await call
        assert query == "a"
        ((query, _),) = await offload.run(["b"])
        assert query == "b"

    with_process(scenario)


def test_process_that_loads_and_dies_has_not_loaded() -> None:
    async def scenario() -> None:
        offload = in_process()
        start = asyncio.create_task(offload.start())
        await eventually(lambda: hasattr(offload, "process"))
        kill_once_it_has_spoken(offload)
        with pytest.raises(CannotLoad, match="ended with exit code -9"):
            await start

    asyncio.run(scenario())


@pytest.mark.parametrize("frozen", [False, True])
def test_hung_process_is_killed_and_replaced(frozen: bool) -> None:
    async def scenario(offload: Process, metrics: Metrics) -> None:
        hung = offload.process
        if frozen:
            os.kill(hung.pid, signal.SIGSTOP)
        with pytest.raises(ModelDied, match="did not return within"):
            await offload.run(["more than the kernel holds for it" * 10**6, "hang"])
        ((query, _),) = await offload.run(["a"])
        assert query == "a" and hung.wait(30) == -signal.SIGKILL

    with_process(scenario, hang_s=3.0)


def test_process_that_closes_its_connection_is_killed_and_replaced() -> None:
    async def scenario(offload: Process, metrics: Metrics) -> None:
        deaf = offload.process
        with pytest.raises(ModelDied, match="closed its connection"):
            await offload.run(["close"])
        ((query, _),) = await offload.run(["a"])
        assert query == "a" and deaf.wait(30) == -signal.SIGKILL

    with_process(scenario)


@pytest.mark.parametrize("idle", [False, True])
def test_what_a_model_has_forked_neither_hides_its_death_nor_outlives_it(idle: bool) -> None:
    async def scenario(offload: Process, metrics: Metrics) -> None:
        (fork,) = await offload.run(["fork"])
        forked = psutil.Process(fork)
        if idle:
            kill(offload)
            await eventually(lambda: restarts(metrics) == 1)
        else:
            with pytest.raises(ModelDied, match="exit code -9"):
                await offload.run(["die"])
        await eventually(lambda: not is_alive(forked))
        ((query, _),) = await offload.run(["a"])
        assert query == "a"

    with_process(scenario)


@pytest.mark.parametrize("asked_before", [True, False])
def test_process_that_is_killed_while_idle_is_replaced_before_anyone_asks(
    asked_before: bool, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario(offload: Process, metrics: Metrics) -> None:
        if asked_before:
            await offload.run(["a"])
        await offload.loaded.wait()
        kill(offload)
        await eventually(lambda: restarts(metrics) == 1)
        assert "ended with exit code -9; starting another" in caplog.text
        await offload.loaded.wait()
        ((query, _),) = await offload.run(["a"])
        assert query == "a"

    with_process(scenario)


def test_replacement_that_cannot_even_be_started_is_tried_again(
    monkeypatch: pytest.MonkeyPatch, plan: Path
) -> None:
    async def scenario(offload: Process, metrics: Metrics) -> None:
        def fail(*_: Any) -> None:
            raise OSError(24, "Too many open files")

        with monkeypatch.context() as patched:
            patched.setattr("socket.socketpair", fail)
            with pytest.raises(ModelDied, match="exit code -9"):
                await offload.run(["die"])
            await eventually(lambda: "Too many open files" in offload.trouble)
        ((query, _),) = await offload.run(["a"])
        assert query == "a" and not offload.trouble

    with_process(scenario)


def test_replacement_is_tried_again_whatever_kept_it_from_starting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no more threads can be started, for one: that is not an OSError."""

    async def scenario(offload: Process, metrics: Metrics) -> None:
        spawn, failures = offload._spawn, iter([RuntimeError("can't start new thread")])

        async def failing() -> str:
            for failure in failures:
                raise failure
            return await spawn()

        monkeypatch.setattr(offload, "_spawn", failing)
        kill(offload)
        await eventually(lambda: restarts(metrics) == 2 and offload.loaded.is_set())
        assert (await offload.run(["a"]))[0][0] == "a"

    monkeypatch.setattr(process, "PAUSE_S", 0.001)
    with_process(scenario)


@pytest.mark.parametrize("idle", [False, True])
def test_replacement_that_cannot_load_is_tried_again_and_is_trouble_after_a_few_tries(
    idle: bool, plan: Path
) -> None:
    async def scenario(offload: Process, metrics: Metrics) -> None:
        if idle:
            kill(offload)
        else:
            with pytest.raises(ModelDied, match="exit code -9"):
                await offload.run(["die"])
        await eventually(lambda: offload.trouble)
        assert offload.trouble.endswith("OSError: no such model")
        ((query, _),) = await offload.run(["a"])
        assert query == "a" and not offload.trouble
        assert restarts(metrics) == process.TRIES + 1

    plan.write_text("load fail die " + "fail " * (process.TRIES - 2) + "load")
    with_process(scenario)


def test_replacement_that_hangs_while_it_loads_is_replaced_too(
    plan: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario(offload: Process, metrics: Metrics) -> None:
        kill(offload)
        await eventually(lambda: "it did not load within" in caplog.text)
        os.unlink(plan)
        ((query, _),) = await offload.run(["a"])
        assert query == "a"

    plan.write_text("load wait")
    with_process(scenario, hang_s=2.0)


def test_process_that_loads_but_dies_before_anyone_asks_is_trouble_too(plan: Path) -> None:
    async def scenario(offload: Process, metrics: Metrics) -> None:
        for _ in range(process.TRIES + 1):
            assert not offload.trouble
            await offload.loaded.wait()
            kill(offload)
            await eventually(lambda: not offload.loaded.is_set())
        await eventually(lambda: offload.trouble)
        assert "exit code -9" in offload.trouble

    with_process(scenario)


def test_pauses_between_tries_grow_to_a_minute() -> None:
    assert [pause_s(tries) for tries in (0, 1, 2, 3, 4, 1000)] == [0, 1, 2, 4, 8, 60]


def test_stop_during_a_call_cancels_it_and_starts_no_other_process() -> None:
    async def scenario(offload: Process, metrics: Metrics) -> None:
        call = asyncio.create_task(offload.run(["hang"]))
        await asyncio.sleep(0)  # it has asked
        call.cancel()
        offload.stop()
        with pytest.raises(asyncio.CancelledError):
            await call
        assert restarts(metrics) == 0

    with_process(scenario)


def test_call_that_is_given_up_gives_its_answers_to_nobody() -> None:
    async def scenario(offload: Process, metrics: Metrics) -> None:
        call = asyncio.create_task(offload.run(["a"]))
        await asyncio.sleep(0)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        assert await asyncio.to_thread(offload.process.wait, 30) == -signal.SIGKILL

    with_process(scenario)


def test_stopped_process_is_not_replaced() -> None:
    async def scenario(offload: Process, metrics: Metrics) -> None:
        offload.stop()
        await asyncio.to_thread(offload.process.wait, 30)
        await asyncio.sleep(0.01)  # the event loop looks at what has ended
        assert restarts(metrics) == 0

    with_process(scenario)


def test_stop_during_a_replacement_leaves_no_process() -> None:
    async def scenario(offload: Process, metrics: Metrics) -> None:
        others = psutil.Process().children()  # some other test's, such as multiprocessing's tracker
        others.remove(psutil.Process(offload.process.pid))
        for turns in range(4):
            with pytest.raises(ModelDied):
                await offload.run(["die"])
            for _ in range(turns):
                await asyncio.sleep(0)
            offload.stop()
            assert offload.replacing
            await asyncio.wait([offload.replacing])
            offload.process.wait(30)
            assert set(psutil.Process().children()) <= set(others)
            await offload.start()

    with_process(scenario)


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_process_finishes_its_work_when_systemd_signals_it_too(stop: int) -> None:
    async def scenario(offload: Process, metrics: Metrics) -> None:
        os.kill(offload.process.pid, stop)
        ((query, _),) = await offload.run(["a"])
        assert query == "a"
        assert restarts(metrics) == 0

    with_process(scenario)


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="no system call to pin with")
def test_process_keeps_to_the_cores_it_is_given() -> None:
    core = max(os.sched_getaffinity(0))

    async def scenario(offload: Process, metrics: Metrics) -> None:
        assert await offload.run(["cores"]) == [[core]]

    with_process(scenario, cores={core})


def test_pinned_process_takes_all_of_its_own_cores_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(8)))
    instances = make_instances(Settings(OFFLOAD="process", INSTANCES=2), Metrics(), Model())  # type: ignore[arg-type]
    hellos = [pickle.loads(instance.hello[8:]) for instance in instances if isinstance(instance, Process)]
    assert [cores for _, cores in hellos] == [{0, 1, 2, 3}, {4, 5, 6, 7}]
    for load, cores in hellos:
        monkeypatch.setattr("os.sched_getaffinity", lambda pid, its=cores: its)
        assert pickle.loads(load).args[0].threads_per_instance == 4


@pytest.mark.parametrize("crowded", [{"WEB_CONCURRENCY": 2}, {"TORCH_THREADS": 5}, {"INSTANCES": 9}], ids=str)
def test_no_process_is_pinned_to_cores_that_another_one_needs(
    crowded: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(8)))
    assert set(core_shares(Settings(**{"INSTANCES": 2, **crowded}))) == {None}


@pytest.mark.parametrize("amid_a_message", [False, True])
def test_process_ends_when_its_server_is_gone(amid_a_message: bool) -> None:
    async def scenario(offload: Process, metrics: Metrics) -> None:
        model = offload.process
        offload.loaded.clear()  # it is not to be replaced
        if amid_a_message:
            offload.to_model.write(packed(["a"])[:-1])
        offload.to_model.close()
        assert await asyncio.to_thread(model.wait, 30) == 0

    with_process(scenario)
