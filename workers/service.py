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
from typing import Any, cast

from starlette.requests import Request

from workers import resources as memory
from workers import tasks
from workers.context import RequestContext, context_of
from workers.errors import LOADING, CannotLoad, ModelFailed, Rejected
from workers.generation.token_loop import TokenLoop
from workers.isolation import make_instances, make_quarantine
from workers.isolation.auto import measured
from workers.jobs import Answer
from workers.loop import ModelLoop
from workers.metrics import Metrics
from workers.observability import leave_out_polls
from workers.observability.process_metrics import ProcessMetrics
from workers.offload import Offload, attempt_load, failed_at, in_thread, model_stacks
from workers.process_manager import is_one_of_uvicorns_workers, is_relieved, is_supervised
from workers.scheduling.instances import stuck
from workers.scheduling.warm_up import warm_up
from workers.settings import MOST, Settings
from workers.tasks.calls import followed
from workers.web import parsing
from workers.web.checks import QUICK_BYTES, QUICK_JSON_BYTES, CheckThreads, check_all
from workers.web.generation import Generation
from workers.web.inflight import SWEEP_S, InFlight
from workers.web.parsing import ParsedBody

log = logging.getLogger("uvicorn.error")

LAST_S = 0.5  # of the grace time: for the exit itself
HANDOVER_S = 2.0  # to answer requests on connections that a worker has taken before its successor took over


class Service:
    """One model, its loop and its life. Made inside a running event loop."""

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self.settings, self.metrics = settings, metrics
        self.started_at = time.monotonic()
        self.event_loop = asyncio.get_running_loop()
        self.loop = make_loop(settings, metrics)
        self.instances: list[Offload] = []
        self.descriptions: list[Any] = []  # of each instance: a `tasks.ModelInfo`
        self.in_flight = InFlight(settings, self.loop)
        self.checks = CheckThreads()
        self.quarantine = make_quarantine(settings, metrics)
        self.exit_code, self.failure = 0, ""
        self.started = asyncio.Event()  # every instance is loaded, or none will be
        self.alarmed = False
        self.stops_at = math.inf  # when it was asked to stop
        self._task: tasks.Task | None = None
        self.generation: Generation | None = None  # where the model writes text, token by token
        metrics.watch("model_queue_depth", "Jobs that wait for the model", lambda: self.loop.depth)
        metrics.watch("model_running", "Jobs that the model works on", lambda: self.loop.running)
        metrics.watch("model_instances_loaded", "Instances of the model", lambda: self.loop.instances.loaded)
        metrics.watch(
            "model_stuck_seconds",
            "How long a call has been running that may never return",
            lambda: self.loop.instances.stuck_s,
            "livemax",
        )
        self.process_metrics = ProcessMetrics(metrics, self.model_pids)

    @property
    def task(self) -> tasks.Task:
        """Return what is served. Raises Rejected while that is being made."""
        if self._task is None:
            raise Rejected(LOADING)
        return self._task

    def generating(self) -> Generation:
        """Return what generates text, where TASK=text-generation. Raises Rejected while the model loads."""
        if not self.generation:
            raise Rejected(LOADING)
        return self.generation

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
                f"cannot load MODEL={self.settings.MODEL}: {exc}{failed_at(exc)}",
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
        self._task = task = await in_thread(partial(attempt_load, partial(tasks.make, self.settings)))
        self.in_flight.expect(task.media)
        self.checks.most_bytes = self.in_flight.most_bytes
        if isinstance(self.loop, TokenLoop):
            self.generation = generation = Generation(
                self.loop, cast(Any, task), self.settings.BODY_TIMEOUT_S
            )
            await in_thread(lambda: attempt_load(generation.task.read_chat_template))
        self.settings = await in_thread(partial(attempt_load, partial(measured, self.settings, task)))
        self.instances = make_instances(self.settings, self.metrics, task)
        self.descriptions = await asyncio.gather(*(instance.start() for instance in self.instances))
        for description in self.descriptions:
            log.info("Serving %s", description)
            if learn := getattr(task, "learn", None):
                learn(description)
        self.limit_batches()
        self.loop.instances.load_s = time.monotonic() - began
        await self.warm_up(task)
        # What a load has left stays: to look through 360,000 objects for garbage takes 0.16 s.
        gc.collect()
        gc.freeze()
        self.report()
        self.started.set()
        # A step is not an input: what crashed the process in one won't come again.
        watch = self.quarantine and isinstance(self.loop, ModelLoop)
        around = self.quarantine.around if self.quarantine and watch else lambda run: run
        await asyncio.gather(
            *(self.loop.consume(around(instance.run), instance.ready) for instance in self.instances)
        )

    def limit_batches(self) -> None:
        """Let a batch have no more inputs than the model gains from."""
        most = min(getattr(info, "max_batch", MOST) for info in self.descriptions)
        if most < self.settings.BATCH_SIZE and isinstance(self.loop, ModelLoop):
            self.loop.batch_size = self.loop.estimate.batch_size = most
            log.info("BATCH_SIZE counts as %d: the model gains nothing from more", most)

    async def warm_up(self, task: tasks.Task) -> None:
        """Time every instance on the examples, the way there and back included. Raises CannotLoad where one fails on them."""
        size = self.loop.batch_size if isinstance(self.loop, ModelLoop) else self.settings.BATCH_SIZE
        batches = await in_thread(lambda: tasks.warm_up_batches(task, size))
        try:
            for instance in self.instances:
                if isinstance(self.loop, TokenLoop):
                    await self.loop.warm_up(instance.run)
                    continue
                await warm_up(self.loop.cost_model, instance.run, batches, self.loop.now)
        except ModelFailed as exc:
            raise CannotLoad(f"it fails on its own example: {exc}") from exc

    async def parse(self, request: Request, body: bytes) -> ParsedBody:
        """Return what a body asks of the task. Raises what `parsing.parse` raises, Late and Rejected."""
        context = context_of(request.scope)
        is_one = getattr(self.task, "is_one", parsing.never)
        work = partial(parsing.parse, body, context, self.task.media, self.settings.MAX_INPUTS, is_one)
        return await self.checks.run(context, len(body), work, QUICK_JSON_BYTES)

    async def ask(
        self, request: Request, inputs: list[Any], parameters: dict[str, Any], n_bytes: int
    ) -> tuple[list[Answer], int]:
        """Check the inputs and let the model answer each. Return the answers, and the size of all inputs: tokens of texts.

        Raises what `check` and the loop raise; ClientDisconnect when the client leaves.
        """
        context = context_of(request.scope)

        async def answered() -> tuple[list[Answer], int]:
            queries = await self.check(context, inputs, parameters, n_bytes)
            contents, sizes = [query.content for query in queries], [query.size for query in queries]
            with followed(contents, context.left_s):
                context.answers = await self.loop.submit_all(contents, sizes, budget_s=context.left_s)
            return context.answers, sum(sizes)

        return await self.in_flight.unless_left(request, answered())

    async def checked(self, request: Request, asked: ParsedBody, n_bytes: int) -> list[tasks.Query]:
        """Return what `check` does. Raises ClientDisconnect, too, when the client leaves."""
        check = self.check(context_of(request.scope), asked.inputs, asked.parameters, n_bytes)
        return await self.in_flight.unless_left(request, check)

    async def check(
        self, context: RequestContext, inputs: list[Any], parameters: dict[str, Any], n_bytes: int
    ) -> list[tasks.Query]:
        """Return the queries that ask this. Raises Malformed or Unprocessable, which name the input where there are several.

        Raises Late and Rejected, too: what takes long has the request's deadline and a bound of its own.
        """
        work = partial(check_all, self.check_one, inputs, parameters, context)
        # An image or a sound of a few bytes may take long to decode, as may labels times texts.
        at_once = not self.task.media and getattr(self.task, "checks_at_once", True)
        return await self.checks.run(context, n_bytes, work, QUICK_BYTES if at_once else 0)

    def check_one(self, one: Any, parameters: dict[str, Any]) -> tasks.Query:
        """Return the query that asks for `one` input. Raises what the task's check does, and Quarantined."""
        query = self.task.check(one, parameters)
        if self.quarantine:
            self.quarantine.check(query.content)
        return query

    def model_pids(self) -> list[int]:
        """Return the ids of the model's own processes."""
        return [pid for instance in self.instances if (pid := instance.pid)]

    def report(self) -> None:
        """Log what this worker takes of the machine; warn where all of them together take too much, or one call too long."""
        settings = self.settings
        mine = memory.resident_bytes([os.getpid(), *self.model_pids()])
        # With "dirty" the model is in Gunicorn's own pool, in none of these workers.
        instances = 0 if settings.OFFLOAD == "dirty" else settings.INSTANCES
        log.info(
            "Ready: worker %d, one of %d: %s of the model, %s each, %d MB",
            os.getpid(),
            settings.WEB_CONCURRENCY,
            counted(instances, "instance"),
            counted(settings.threads_per_instance, "thread"),
            mine / 1e6,
        )
        if warning := memory.warning(settings.WEB_CONCURRENCY, mine, memory.limit_bytes()):
            log.warning(warning)
        if is_one_of_uvicorns_workers() and settings.WEB_CONCURRENCY == 1:
            log.warning(
                "each worker takes all cores for its own; start n with WEB_CONCURRENCY=n, not --workers n"
            )
        # Of the smallest example; 0 where there is none.
        if (call_s := self.loop.cost_model.shortest_s) > settings.DEADLINE_S:
            log.warning(
                "one call of the model takes %g s, more than DEADLINE_S=%g: no request can be answered in time; "
                "raise DEADLINE_S, or serve a smaller model",
                round(call_s, 1 if call_s < 10 else 0),
                settings.DEADLINE_S,
            )

    async def tick(self) -> None:
        """Every SWEEP_S look after the requests in flight, the gauges and the master.

        The gauges must be fresh for scrapes that come to another worker. A worker must not outlive its master: Gunicorn's
        watch theirs in `gunicorn/common.py`, but those of `uvicorn --workers` would go on serving.
        """
        master = multiprocessing.parent_process()
        while not master or master.is_alive():
            self.in_flight.sweep()
            self.metrics.sample()
            if self.instances and all(instance.trouble for instance in self.instances):
                raise CannotLoad(self.instances[0].trouble)
            if self.loop.instances.stuck_s and not self.failure and is_supervised():
                self.exit(
                    1,
                    self.trouble(),
                    f"{self.trouble()}; it ends, so that another is started\n{model_stacks()}",
                )
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
        """Return why this process should be restarted; empty while it should be left alone."""
        if stuck_s := self.loop.instances.stuck_s:
            return f"{stuck(stuck_s)}; restart this server"
        return self.failure

    def unready(self) -> str:
        """Return why no request at all can be answered now; empty while an instance is loaded, not stuck, not stopping."""
        if reason := self.loop.instances.unready():
            return reason
        return "" if any(instance.loaded.is_set() for instance in self.instances) else LOADING

    def stop(self) -> None:
        """Reject new work and finish what is admitted, within the grace time less a second to send the answers.

        To ask again changes nothing: the grace time counts from the first time.
        """
        if self.stops_at < math.inf:
            return
        self.stops_at = time.monotonic()
        self.started.set()  # nothing needs to wait for it any more
        grace_s = self.settings.GRACE_S
        handover_s = min(HANDOVER_S, grace_s / 4) if is_relieved() else 0.0
        if handover_s:
            self.event_loop.call_later(handover_s, self.stop_admitting, grace_s - 1 - handover_s)
        else:
            self.stop_admitting(grace_s - 1)

    def stop_admitting(self, drain_s: float) -> None:
        """Reject new work from now on, and fail in `drain_s` what is not answered by then."""
        self.loop.stop_admitting()
        self.in_flight.stop_reading()
        self.draining = asyncio.create_task(self.loop.drain(max(0.0, drain_s)))

    async def close(self) -> None:
        """Let every instance of the model close itself, in what is left of the grace time."""
        grace_s = self.settings.GRACE_S
        left_s = self.stops_at + grace_s - min(LAST_S, grace_s / 4) - time.monotonic()
        closing = asyncio.gather(*(instance.close() for instance in self.instances), return_exceptions=True)
        try:
            await asyncio.wait_for(closing, max(0.0, left_s))
        except TimeoutError:
            log.warning("the model was not closed within GRACE_S=%g", grace_s)

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
            # interpreter holds this handler, too: there only the process manager's SIGKILL helps.)
            signal.setitimer(signal.ITIMER_REAL, self.settings.GRACE_S)
        with contextlib.suppress(RuntimeError):  # the event loop is closed
            # A second Ctrl-C waits for nothing, and Gunicorn's worker is gone before its lifespan ends.
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
        leave_out_polls()
        self.work = asyncio.create_task(self.run(), name="model loop")
        try:
            if self.settings.WEB_CONCURRENCY > 1 or os.environ.get("OTHERS_ANSWER"):
                # Other workers answer meanwhile: take no request only to reject it.
                await self.started.wait()
            yield self
            # A test's or a notebook's end comes without a signal.
            self.stops_at = min(self.stops_at, time.monotonic())
            await self.loop.drain(max(0.0, self.settings.GRACE_S - 1))
            await self.close()
        finally:
            self.checks.stop()
            self.let_go()
        if self.exit_code:
            logging.shutdown()
            os._exit(self.exit_code)  # every client has its answer, and a lifespan can't choose the exit code


def counted(n: int, noun: str) -> str:
    """Return "1 thread", "2 threads"."""
    return f"{n} {noun}{'' if n == 1 else 's'}"


def make_loop(settings: Settings, metrics: Metrics) -> ModelLoop | TokenLoop:
    """Return the loop that the settings ask for: whole answers in batches, or text token by token."""
    if settings.is_token_by_token:
        return TokenLoop(
            most_waiting=settings.MAX_QUEUE * settings.MAX_TOKENS,
            step_tokens=settings.STEP_TOKENS,
            budget_s=settings.DEADLINE_S,
            hang_s=settings.HANG_S,
            metrics=metrics,
            now=time.monotonic,
        )
    return ModelLoop(
        batch_size=settings.BATCH_SIZE,
        max_queue=settings.MAX_QUEUE,
        budget_s=settings.DEADLINE_S,
        target_s=settings.QUEUE_TARGET_S,
        hang_s=settings.HANG_S,
        metrics=metrics,
        now=time.monotonic,  # uvloop's own time has whole milliseconds only
    )
