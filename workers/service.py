"""The model behind the app: loads it while liveness answers, serves it, stops it within the grace time."""

import asyncio
import contextlib
import gc
import logging
import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections.abc import AsyncIterator
from dataclasses import replace
from functools import partial
from types import FrameType
from typing import Any

from workers import resources as memory
from workers import tasks
from workers.errors import LOADING, CannotLoad, Malformed, ModelFailed, Rejected, Unprocessable
from workers.isolation.process import Process
from workers.isolation.quarantine import Quarantine
from workers.loop import ModelLoop
from workers.metrics import Metrics
from workers.observability.process_metrics import ProcessMetrics
from workers.offload import Inline, Offload, Thread, attempt_load, in_thread, in_words
from workers.scheduling.instances import stuck
from workers.settings import Settings
from workers.web.inflight import SWEEP_S, InFlight

log = logging.getLogger("uvicorn.error")

QUICK_BYTES = 1024  # of text take 3 ms to tokenise at worst


class Service:
    """One model, its loop and its life. Made inside a running event loop."""

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self.settings, self.metrics = settings, metrics
        self.started_at = time.monotonic()
        self.event_loop = asyncio.get_running_loop()
        self.loop = ModelLoop(
            batch_size=settings.BATCH_SIZE,
            window_s=settings.BATCH_WINDOW_MS / 1000,
            max_queue=settings.MAX_QUEUE,
            budget_s=settings.DEADLINE_S,
            target_s=settings.QUEUE_TARGET_S,
            hang_s=settings.HANG_S,
            metrics=metrics,
            now=time.monotonic,  # uvloop's own time has whole milliseconds only
        )
        self.instances: list[Offload] = []
        self.descriptions: list[str] = []  # of each: what, how large, where
        self.in_flight = InFlight(settings, self.loop)
        self.quarantine = Quarantine(metrics)
        self.exit_code, self.failure = 0, ""
        self.started = asyncio.Event()  # every instance is loaded, or none will be
        self.alarmed = False
        self._task: tasks.Task | None = None
        metrics.watch("model_queue_depth", "Jobs that wait for the model", lambda: self.loop.depth)
        metrics.watch("model_running", "Jobs that the model works on", lambda: self.loop.running)
        metrics.watch("model_instances_loaded", "Instances of the model", lambda: self.loop.instances.loaded)
        metrics.watch(
            "model_stuck_seconds",
            "How long a call has been running that may never end",
            lambda: self.loop.instances.stuck_s,
            "livemax",
        )
        self.process_metrics = ProcessMetrics(metrics, self.model_pids)

    @property
    def task(self) -> tasks.Task:
        """What is served. Raises Rejected while that is being made."""
        if self._task is None:
            raise Rejected(LOADING)
        return self._task

    async def run(self) -> None:
        """Load the model, then serve it until cancelled. If either fails the process ends, so that it can be restarted."""
        try:
            await asyncio.gather(self.serve(), self.tick())
        except CannotLoad as exc:
            # 3 tells Gunicorn that another worker could not be started either.
            code = 1 if self.started.is_set() else 3
            self.exit(
                code,
                "the model cannot be loaded",
                f"cannot load MODEL={self.settings.MODEL}: {exc}{where(exc)}",
            )
        except Exception:
            log.exception("the model loop has ended")
            self.exit(1, "the model loop has ended; this is a bug")

    async def serve(self) -> None:
        """Load every instance of the model, then let each consume the one queue."""
        # Look for garbage every 10,000 objects, not every 700: neither what loading makes nor the requests in flight are
        # garbage, and looking would take a tenth of the loading.
        gc.set_threshold(10_000)
        began = time.monotonic()
        make = partial(tasks.make, self.settings)
        self._task = task = await in_thread(lambda: attempt_load(make))
        self.in_flight.expect(task.media)
        self.instances = make_instances(self.settings, self.metrics, task)
        self.descriptions = await asyncio.gather(*(instance.start() for instance in self.instances))
        for description in self.descriptions:
            log.info("Serving %s", description)
        self.loop.instances.load_s = time.monotonic() - began
        await self.warm_up(task)
        memory.keep_what_is_there()
        self.report()
        self.started.set()
        runs = [(self.quarantine.around(instance.run), instance.loaded.wait) for instance in self.instances]
        await asyncio.gather(*(self.loop.consume(*run) for run in runs))

    async def warm_up(self, task: tasks.Task) -> None:
        """Time every instance on the examples, the way there and back included. Raises CannotLoad where one fails on them."""
        batches = await in_thread(lambda: tasks.warm_up_batches(task, self.settings.BATCH_SIZE))
        try:
            for instance in self.instances:
                await self.loop.cost_model.warm_up(instance.run, batches, self.loop.now)
        except ModelFailed as exc:
            raise CannotLoad(f"it fails on its own example: {exc}") from exc

    async def check(self, inputs: list[Any], parameters: dict[str, Any], n_bytes: int) -> list[tasks.Query]:
        """The queries that ask this. Raises Malformed or Unprocessable, which name the input where there are several.

        Long ones are checked in a thread: 16 KB of long words would hold the event loop for 40 ms.
        """
        if n_bytes > QUICK_BYTES:
            return await asyncio.to_thread(self.check_all, inputs, parameters)
        return self.check_all(inputs, parameters)

    def check_all(self, inputs: list[Any], parameters: dict[str, Any]) -> list[tasks.Query]:
        queries = []
        for number, one in enumerate(inputs):
            try:
                queries.append(self.task.check(one, parameters))
                self.quarantine.check(queries[-1].content)
            except (Malformed, Unprocessable) as exc:
                if len(inputs) == 1:
                    raise
                raise type(exc)(f"input {number}: {exc}") from exc
            except BaseException as exc:
                # SystemExit would end the server, StopIteration would never leave its thread.
                raise ModelFailed(in_words(exc)) from exc
        return queries

    def model_pids(self) -> list[int]:
        """The model's own processes."""
        started = [
            instance
            for instance in self.instances
            if isinstance(instance, Process) and hasattr(instance, "process")
        ]
        return [instance.process.pid for instance in started]

    def report(self) -> None:
        """One line on what this worker takes of the machine, and a warning when all of them together take too much."""
        settings = self.settings
        mine = memory.resident_bytes([os.getpid(), *self.model_pids()])
        # With "dirty" the model is in Gunicorn's own pool, in none of these workers.
        instances = 0 if settings.OFFLOAD == "dirty" else settings.INSTANCES
        log.info(
            "Worker %d, one of %d: %d instances of the model, %d threads each, %d MB",
            *(os.getpid(), settings.WEB_CONCURRENCY, instances, settings.threads_per_instance, mine / 1e6),
        )
        if warning := memory.warning(settings.WEB_CONCURRENCY, mine, memory.limit_bytes()):
            log.warning(warning)
        if multiprocessing.parent_process() and settings.WEB_CONCURRENCY == 1:
            log.warning(
                "each worker takes all cores for its own; start n with WEB_CONCURRENCY=n, not --workers n"
            )

    async def tick(self) -> None:
        """Every SWEEP_S look after the clients, the gauges and the master.

        The gauges must be fresh for scrapes that come to another worker. A worker must not outlive its master: Gunicorn's
        watch theirs in `deployment.py`, but those of `uvicorn --workers` would go on serving.
        """
        master = multiprocessing.parent_process()
        while not master or master.is_alive():
            self.in_flight.sweep()
            self.metrics.sample()
            if self.instances and all(instance.trouble for instance in self.instances):
                raise CannotLoad(self.instances[0].trouble)
            await self.process_metrics.sleep(SWEEP_S)
        signal.raise_signal(signal.SIGTERM)

    def exit(self, code: int, reason: str, details: str = "") -> None:
        """Stop as on SIGTERM, then exit with `code`. The `details` are for the log only."""
        self.exit_code, self.failure = code, reason
        log.critical(details or reason)
        self.loop.reject_all(reason)
        self.started.set()
        signal.raise_signal(signal.SIGTERM)

    def trouble(self) -> str:
        """Why this process should be restarted; empty while it should be left alone."""
        if stuck_s := self.loop.instances.stuck_s:
            return f"{stuck(stuck_s)}; restart this server"
        return self.failure

    def unready(self) -> str:
        """Why no request at all can be answered now; empty while an instance is loaded, not stuck, not stopping."""
        if reason := self.loop.unready():
            return reason
        return "" if any(instance.loaded.is_set() for instance in self.instances) else LOADING

    def stop(self) -> None:
        """Refuse new work and finish what is admitted, within the grace time less a second to send the answers."""
        self.loop.stop_admitting()
        self.in_flight.stop_reading()
        self.started.set()  # nobody needs to wait for it any more
        self.draining = asyncio.create_task(self.loop.drain(max(0.0, self.settings.GRACE_S - 1)))

    def stop_on_signals(self) -> None:
        """Chain `stop` before the server's own handlers, which wait for open connections before the lifespan ends.

        Only the main thread may: in any other this does nothing.
        """
        if threading.current_thread() is not threading.main_thread():
            return
        for number in (signal.SIGTERM, signal.SIGINT):
            if (previous := signal.getsignal(number)) is not signal.SIG_IGN:
                signal.signal(number, partial(self._on_signal, previous))
        # Gunicorn's quick shutdown, which a uvicorn worker ignores until it is killed.
        if callable(signal.getsignal(signal.SIGQUIT)):
            signal.signal(signal.SIGQUIT, lambda number, frame: signal.raise_signal(signal.SIGTERM))

    def _on_signal(self, previous: Any, number: int, frame: FrameType | None) -> None:
        again, self.alarmed = self.alarmed, True
        if not again:
            # The kernel's clock: ends the process even while a call holds the event loop. (One that holds the whole
            # interpreter holds this handler, too: there only the supervisor's SIGKILL helps.)
            signal.setitimer(signal.ITIMER_REAL, self.settings.GRACE_S)
        with contextlib.suppress(RuntimeError):  # the event loop is closed
            # A second Ctrl-C waits for nobody, and Gunicorn's worker is gone before its lifespan ends.
            at_once = again and number == signal.SIGINT
            self.event_loop.call_soon_threadsafe(self.let_go if at_once else self.stop)
        if callable(previous):
            previous(number, frame)

    def let_go(self) -> None:
        """End the work and every instance of the model, now."""
        self.work.cancel()
        for instance in self.instances:
            instance.stop()

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator["Service"]:
        """Run it as long as the context lasts."""
        self.stop_on_signals()
        self.work = asyncio.create_task(self.run(), name="model loop")
        try:
            if self.settings.WEB_CONCURRENCY > 1:
                # The other workers answer meanwhile: take no request only to refuse it.
                await self.started.wait()
            yield self
            await self.loop.drain(max(0.0, self.settings.GRACE_S - 1))
        finally:
            self.let_go()
        if self.exit_code:
            logging.shutdown()
            os._exit(self.exit_code)  # every client has its answer, and a lifespan can't choose the exit code


def where(exc: CannotLoad) -> str:
    """The line of an own class's file at which loading it failed, where this process knows it."""
    frames = traceback.extract_tb(exc.__cause__.__traceback__) if exc.__cause__ else []
    ours = (os.path.dirname(__file__), os.path.dirname(os.__file__), "<")  # and Python's
    own = [one for one in frames if not one.filename.startswith(ours) and "site-packages" not in one.filename]
    return f" ({os.path.basename(own[-1].filename)}, line {own[-1].lineno})" if own else ""


def make_instances(settings: Settings, metrics: Metrics, task: tasks.Task) -> list[Offload]:
    """Return the `INSTANCES` places where `OFFLOAD` says that inference runs."""
    instances = range(settings.INSTANCES)
    if settings.OFFLOAD == "dirty":
        from workers.isolation.dirty import Dirty  # only there is Gunicorn needed

        return [Dirty(settings.HANG_S) for _ in instances]
    if settings.OFFLOAD == "process":
        # A process with cores of its own shares them with no other instance.
        alone = replace(settings, INSTANCES=1)
        return [
            Process(
                partial(tasks.load_alone, alone if share else settings, i), settings.HANG_S, metrics, share
            )
            for i, share in zip(instances, core_shares(settings))
        ]
    kind = Inline if settings.OFFLOAD == "inline" else Thread
    beside = settings.INSTANCES - 1
    return [kind(partial(tasks.load, task, settings, i, beside=beside)) for i in instances]


def core_shares(settings: Settings) -> list[set[int] | None]:
    """Each model process's own cores, so that their threads don't chase each other; None: wherever there is room.

    None, too, where their threads are more than the cores, or another worker would pin its own to the same ones.
    """
    n, threads = settings.INSTANCES, settings.threads_per_instance
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if n == 1 or settings.WEB_CONCURRENCY > 1 or n * threads > len(cores):
        return [None] * n
    return [set(cores[i * len(cores) // n : (i + 1) * len(cores) // n]) for i in range(n)]
