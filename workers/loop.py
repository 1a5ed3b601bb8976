"""The model loop: one queue, one model, and every job answered exactly once.

    submit(query) -> queue -> take_batch -> run(queries) -> each job's own future

Everything runs on one event loop, so there are no locks on state. The loop asks `now`, that event loop's own clock unless
told otherwise, for the time and takes `async run(queries) -> answers` for the model: the tests run it on a virtual clock
with a model that is a formula.

Exception
 +- Refused       not admitted: stopping, queue full, or it would be too late anyway     (503)
 +- Late          its deadline passed, or was certain to pass, before the model had it   (504)
 +- ModelFailed   the model raised on this very query                                    (500)
     +- ModelDied     the process that held it died or hung: not tried again             (500)
"""

import asyncio
import logging
import math
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from workers.metrics import Metrics
from workers.speed import Speed

log = logging.getLogger("uvicorn.error")  # where `uvicorn server:app` shows its own start-up lines

Run = Callable[[list[Any]], Awaitable[Sequence[Any]]]
Ready = Callable[[], Awaitable[Any]]
MARGIN = 1.1  # predictions are taken this much longer: an admitted job that ends late has cost model time for nothing

STOPPING = "the server is stopping; try another one"


class Refused(Exception):
    """Not admitted. `retry_after_s`: when the work now ahead will be done, at the measured speed."""

    def __init__(self, reason: str, retry_after_s: float = 0.0) -> None:
        super().__init__(reason)
        self.retry_after_s = max(1, math.ceil(retry_after_s))


class Late(Exception):
    """The deadline came, or was certain to come, before the answer."""


class ModelFailed(Exception):
    """The model raised; the cause is chained."""


class ModelDied(ModelFailed):
    """The model's process died or hung with these queries in it; running them again might kill the next one."""


class Answer(NamedTuple):
    """What the model returned for one query, and where its time went."""

    value: Any
    queue_s: float
    model_s: float
    batch_size: int
    closed_by: str


@dataclass(eq=False, slots=True)
class Job:
    """One query, its size in the model's unit of cost (tokens), its times on the loop's clock, its future answer."""

    query: Any
    size: int
    enqueued_at: float
    deadline: float
    future: asyncio.Future[Answer]
    running: bool = False

    @property
    def alive(self) -> bool:
        """Whether anybody still waits for the answer."""
        return not self.future.done()


class JobQueue(asyncio.Queue[Job]):
    """asyncio's FIFO queue, from which a job can be taken back in O(1) when its client has left."""

    def _init(self, maxsize: int) -> None:
        self._queue: OrderedDict[Job, None] = OrderedDict()
        self.size = 0

    def _put(self, job: Job) -> None:
        self._queue[job] = None
        self.size += job.size

    def _get(self) -> Job:
        job, _ = self._queue.popitem(last=False)
        self.size -= job.size
        return job

    def discard(self, job: Job) -> None:
        """Take `job` out if it is still in."""
        if job in self._queue:
            del self._queue[job]
            self.size -= job.size


class Call(NamedTuple):
    """One call of the model in progress."""

    started_at: float
    size: int


def expire(job: Job) -> None:
    """End `job` with `Late`, at its deadline, unless it has ended."""
    fail(job, Late(f"no answer within {job.deadline - job.enqueued_at:g} s; allow more time"))


def fail(job: Job, error: Exception) -> None:
    """End `job` with `error` unless it has ended."""
    if job.alive:
        job.future.set_exception(error)
        job.future.exception()  # its client may leave in this very tick; asyncio complains of what nobody looked at


@dataclass(eq=False)
class ModelLoop:
    """Feeds `run` from one queue, `batch_size` queries at most at a time; several `run`s share the same queue."""

    batch_size: int = 1
    window_s: float = 0.0
    max_queue: int = 256
    budget_s: float = 10.0
    hang_s: float = math.inf
    metrics: Metrics = field(default_factory=Metrics)
    now: Callable[[], float] = lambda: asyncio.get_running_loop().time()

    def __post_init__(self) -> None:
        self.queue: JobQueue = JobQueue()
        self.speed = Speed()
        self.live: set[Job] = set()  # admitted and not yet answered
        self.running = 0  # those of them that the model works on
        self.calls: list[Call] = []  # the oldest first
        self.consumers = 0
        self.load_s = 0.0  # how long the last load of the model took; set by whoever loads it
        self.closing = False
        self._taking = asyncio.Lock()  # one consumer gathers a batch at a time, or two would split it
        self._window: asyncio.Timeout | None = None
        self._drained = asyncio.Event()

    # --- what a handler calls -----------------------------------------------------------------------------------------

    async def submit(self, query: Any, *, size: int = 1, budget_s: float = math.inf) -> Answer:
        """Return the model's answer within `budget_s` (never more than the loop's own), or raise one of the above.

        Cancel it when the client has left: its place in the queue is free at once.
        """
        loop, now = asyncio.get_running_loop(), self.now()
        budget_s = min(budget_s, self.budget_s)
        self.admit(size, budget_s)
        job = Job(query, size, now, now + budget_s, loop.create_future())
        self.live.add(job)
        self.queue.put_nowait(job)
        timer = loop.call_later(budget_s, expire, job)
        try:
            return await job.future
        except asyncio.CancelledError:
            self.metrics.abandoned()
            raise
        finally:
            timer.cancel()
            self.queue.discard(job)
            self.live.discard(job)
            self.running -= job.running
            if not self.live:
                self._drained.set()

    async def submit_all(
        self, queries: Sequence[Any], sizes: Sequence[int], *, budget_s: float = math.inf
    ) -> list[Answer]:
        """Return the model's answers to all of `queries`, each a job of its own."""
        if len(queries) == 1:
            return [await self.submit(queries[0], size=sizes[0], budget_s=budget_s)]
        async with asyncio.TaskGroup() as group:
            jobs = [
                group.create_task(self.submit(query, size=size, budget_s=budget_s))
                for query, size in zip(queries, sizes)
            ]
        return [job.result() for job in jobs]

    @property
    def depth(self) -> int:
        """How many admitted jobs wait for the model, in the queue or in an open window."""
        return len(self.live) - self.running

    def stuck_s(self) -> float:
        """How long the longest model call beyond `hang_s` has been running, 0 when none is."""
        longest_s = self.now() - self.calls[0].started_at if self.calls else 0.0
        return longest_s if longest_s > self.hang_s else 0.0

    def predicted_wait_s(self) -> float:
        """When the model would start on a job that came now, from the measured speed and the work ahead."""
        speed, batches = self.speed, -(-self.depth // self.batch_size)
        wait_s = speed.predict_s(self.queue.size, batches) if batches else 0.0
        if self.calls:
            now = self.now()
            for call in self.calls:
                wait_s += max(0.0, call.started_at + speed.predict_s(call.size) - now)
        return wait_s / (self.consumers or 1)

    def admit(self, size: int, budget_s: float) -> None:
        """Raise Refused where a job that came now would not be admitted."""
        if self.closing:
            raise Refused(STOPPING)
        if not self.consumers:
            raise Refused("the model is still loading", self.load_s)
        if stuck_s := self.stuck_s():
            raise Refused(f"the model has not returned for {stuck_s:.0f} s")
        if not self.live and not self.calls:
            return  # always when idle: a slow estimate must not lock the server shut
        wait_s = self.predicted_wait_s()
        if self.depth >= self.max_queue:
            raise Refused(f"{self.depth} requests are waiting; retry after the time given", wait_s)
        if (wait_s + self.speed.predict_s(size)) * MARGIN > budget_s:
            raise Refused(f"the wait would be {wait_s:.1f} s; retry after the time given", wait_s)

    # --- the loop -----------------------------------------------------------------------------------------------------

    async def consume(self, run: Run, ready: Ready | None = None) -> None:
        """Serve the queue with `run`, whenever it is `ready`, until cancelled. Start it once for every copy of the model."""
        self.consumers += 1
        try:
            while True:
                if ready:
                    await ready()  # a copy that died loads again: meanwhile the work is the others'
                async with self._taking:
                    batch, closed_by = await self.take_batch()
                if ready:
                    await ready()  # it may have died while it waited for work: no call of the model
                if batch := self._worth_running(batch):
                    await self._run(run, batch, closed_by)
                await asyncio.sleep(0)  # a model that blocks the event loop must not shut it out for ever
        finally:
            self.consumers -= 1

    async def take_batch(self) -> tuple[list[Job], str]:
        """Wait for a job, then take what is queued, up to `batch_size`; tell why the batch closed.

        Without a window the loop never idles while it holds work: a queue that filled while the model ran is the
        batch. With one, there is a single deadline, counted from the first job's arrival.
        """
        batch = [await self.queue.get()]
        while True:
            batch = [job for job in batch if job.alive]
            while len(batch) < self.batch_size and not self.queue.empty():
                batch.append(self.queue.get_nowait())
            if len(batch) == self.batch_size:
                return batch, "full"
            if self.closing:
                return batch, "draining"
            if not batch or not self.window_s:
                return batch, "idle"
            run_s = self.speed.predict_s(sum(job.size for job in batch)) * MARGIN
            closes_at, closed_by = min(
                (batch[0].enqueued_at + self.window_s, "window"),
                (min(job.deadline for job in batch) - run_s, "deadline"),
            )
            try:
                async with asyncio.timeout(closes_at - self.now()) as self._window:
                    batch.append(await self.queue.get())
            except TimeoutError:
                return batch, "draining" if self.closing else closed_by
            finally:
                self._window = None

    def _worth_running(self, batch: list[Job]) -> list[Job]:
        """Drop whom nobody waits for; answer at once those who can't make it: they would make everyone else late."""
        batch = [job for job in batch if job.alive]
        latest = self.now() + self.speed.predict_s(sum(job.size for job in batch))
        in_time = [job for job in batch if job.deadline >= latest]
        if not in_time and self.queue.empty():
            return batch  # nobody else to protect, and only a run can correct a slow estimate
        for job in batch:
            if job.deadline < latest:
                fail(job, Late("the time left is shorter than the model takes; allow more time"))
        return in_time

    async def _run(self, run: Run, batch: list[Job], closed_by: str) -> None:
        """Run the model on `batch` and answer every job of it, whatever the model throws."""
        call = Call(self.now(), sum(job.size for job in batch))
        self.calls.append(call)
        for job in batch:
            self.running += not job.running
            job.running = True
        error: BaseException | None = None
        try:
            values = await run([job.query for job in batch])
            if len(values) != len(batch):
                raise ModelFailed(f"the model gave {len(values)} answers to {len(batch)} queries")
        except asyncio.CancelledError:
            raise  # the server has stopped: every job has been answered
        except BaseException as exc:  # also SystemExit and MemoryError: no query may end the loop
            error = exc
        finally:
            self.calls.remove(call)
        model_s = self.now() - call.started_at
        waits_s = [call.started_at - job.enqueued_at for job in batch]
        self.metrics.batch(len(batch), closed_by, model_s, waits_s)
        if error is None:
            self.speed.observe(call.size, model_s)
            for job, wait_s, value in zip(batch, waits_s, values, strict=True):
                if job.alive:
                    job.future.set_result(Answer(value, wait_s, model_s, len(batch), closed_by))
        elif len(batch) > 1 and not isinstance(error, ModelDied):
            await self._run_singly(run, batch)
        else:
            self._fail(batch, error)

    async def _run_singly(self, run: Run, batch: list[Job]) -> None:
        """One of `batch` made it raise: run each alone, once, so that only the culprit pays."""
        log.warning("a batch of %d failed; running its queries one by one", len(batch))
        for job in batch:
            if alone := self._worth_running([job]):
                await self._run(run, alone, "retry")

    def _fail(self, batch: list[Job], error: BaseException) -> None:
        failure = type(error) if isinstance(error, ModelFailed) else ModelFailed
        for job in batch:
            failed = failure(str(error))
            failed.__cause__ = error
            fail(job, failed)

    # --- stopping -----------------------------------------------------------------------------------------------------

    def stop_admitting(self) -> None:
        """Refuse new jobs from now on and close an open window."""
        self.closing = True
        if self._window and not self._window.expired():
            self._window.reschedule(0)

    async def drain(self, grace_s: float) -> None:
        """Let what is admitted finish within `grace_s`, then refuse the rest: nobody is left without an answer."""
        self.stop_admitting()
        try:
            async with asyncio.timeout(grace_s):
                while self.live:
                    self._drained.clear()
                    await self._drained.wait()
        except TimeoutError:
            self.refuse_all("the server stopped before the model was free; try another one")

    def refuse_all(self, reason: str) -> None:
        """Answer every job that is still waiting or running with `Refused`."""
        for job in self.live:
            fail(job, Refused(reason))
