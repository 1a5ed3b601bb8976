"""The model behind the app: loads it while liveness answers, serves it, stops it within the grace time."""

import asyncio
import contextlib
import gc
import logging
import math
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import AsyncIterator
from functools import partial
from types import FrameType
from typing import Any

from workers import memory, offload, tasks
from workers.clients import SWEEP_S, Clients
from workers.loop import ModelLoop
from workers.metrics import Metrics
from workers.settings import Settings

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
            hang_s=settings.HANG_S,
            metrics=metrics,
            now=time.monotonic,  # uvloop's own time has whole milliseconds only
        )
        self.task: tasks.Task
        self.copies = offload.make(settings, metrics, lambda i: self.task.load(i))
        self.clients = Clients(settings, self.loop)
        self.exit_code = 0
        self.loaded = asyncio.Event()  # or failed to
        metrics.watch(lambda: self.loop.depth, lambda: self.loop.running)

    async def run(self) -> None:
        """Load the model, then serve it until cancelled. A failure of either ends the process: never up but deaf."""
        try:
            await asyncio.gather(self.serve(), self.tick())
        except offload.CannotLoad as exc:
            self.exit(3, f"cannot load MODEL={self.settings.MODEL}: {exc}")
        except Exception:
            log.exception("the model loop has ended")
            self.exit(1, "the model loop has ended; this is a bug")

    async def serve(self) -> None:
        """Load every copy of the model, then let each consume the one queue."""
        # Look for garbage every 10,000 objects, not every 700: those that loading makes, a tenth of whose time it would
        # take, and those of the requests in flight are none.
        gc.set_threshold(10_000)
        self.task = await asyncio.to_thread(offload.attempt_load, partial(tasks.make, self.settings))
        for description in await asyncio.gather(*(copy.start() for copy in self.copies)):
            log.info("Serving %s", description)
        for copy in self.copies:
            for batch in tasks.warm_up_batches(self.task, self.settings.BATCH_SIZE):
                await copy.run([query.content for query in batch])
        gc.collect()
        gc.freeze()  # 360,000 objects of torch and transformers: to look through them for garbage takes 0.16 s
        self.report()
        self.loaded.set()
        await asyncio.gather(*(self.loop.consume(copy.run, copy.ready) for copy in self.copies))

    async def check(self, inputs: list[Any], parameters: dict[str, Any], n_bytes: int) -> list[tasks.Query]:
        """The queries that ask this. Raises Malformed or CannotAnswer, which name the input where there are several.

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
            except (tasks.Malformed, tasks.CannotAnswer) as exc:
                if len(inputs) == 1:
                    raise
                raise type(exc)(f"input {number}: {exc}") from exc
        return queries

    def report(self) -> None:
        """One line on what this worker takes of the machine, and a warning when all of them together take too much."""
        settings = self.settings
        children = [copy.process.pid for copy in self.copies if isinstance(copy, offload.Process)]
        mine = memory.resident_bytes([os.getpid(), *(pid for pid in children if pid)])
        copies = 0 if settings.OFFLOAD == "dirty" else settings.INSTANCES  # there none of the workers has it
        log.info(
            "Worker %d, one of %d: %d copies of the model, %d threads each, %d MB",
            *(os.getpid(), settings.WEB_CONCURRENCY, copies, settings.threads_per_instance, mine / 1e6),
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
            self.clients.sweep()
            self.metrics.sample()
            await asyncio.sleep(SWEEP_S)
        signal.raise_signal(signal.SIGTERM)

    def exit(self, code: int, reason: str) -> None:
        """Stop as on SIGTERM, then exit with `code`."""
        self.exit_code = code
        log.critical(reason)
        self.loop.refuse_all(reason)
        self.loaded.set()
        signal.raise_signal(signal.SIGTERM)

    def stop(self) -> None:
        """Refuse new work and finish what is admitted, within the grace time less a second to send the answers."""
        self.loop.stop_admitting()
        self.clients.stop_reading()
        self.draining = asyncio.create_task(self.loop.drain(max(0.0, self.settings.GRACE_S - 1)))

    def stop_on_signals(self) -> None:
        """Chain `stop` before the server's own handlers, which wait for open connections before the lifespan ends.

        Only the main thread may: in any other this does nothing.
        """

        def chain(signum: signal.Signals) -> None:
            previous = signal.getsignal(signum)

            def handler(number: int, frame: FrameType | None) -> None:
                # The kernel's clock: ends the process even while a call holds the event loop. (One that holds the whole
                # interpreter holds this handler, too: there only the supervisor's SIGKILL helps.)
                signal.alarm(math.ceil(self.settings.GRACE_S))
                self.event_loop.call_soon_threadsafe(self.stop)
                if callable(previous):
                    previous(number, frame)

            if previous is not signal.SIG_IGN:
                signal.signal(signum, handler)

        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGTERM, signal.SIGINT):
                chain(signum)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator["Service"]:
        """Run it as long as the context lasts."""
        self.stop_on_signals()
        task = asyncio.create_task(self.run(), name="model loop")
        if self.settings.WEB_CONCURRENCY > 1:
            await self.loaded.wait()  # the other workers answer meanwhile: take no request only to refuse it
        yield self
        await self.loop.drain(max(0.0, self.settings.GRACE_S - 1))
        task.cancel()
        for copy in self.copies:
            copy.stop()
        if self.exit_code:
            logging.shutdown()
            os._exit(self.exit_code)  # every client has its answer, and a lifespan can't choose the exit code
