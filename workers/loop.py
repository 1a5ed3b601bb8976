"""The model loop: one queue, one model, and every job answered exactly once.

    submit(query) -> queue -> take_batch -> run(queries) -> each job's own future

Everything runs on one event loop, so no thread locks are needed. `now` tells the time, by default that event loop's own,
and `async run(queries) -> answers` is the model: so the tests run it on a virtual clock with a model that is a formula.

`scheduling/` decides which jobs are admitted, how large a batch may be and whether to hold one; this file does what it says.
"""

import asyncio
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from .errors import LOADING, TOO_SHORT, Late, ModelDied, ModelFailed, Rejected
from .jobs import Answer, Job, JobQueue, expire, fail_together
from .scheduling.admission import Admission
from .scheduling.cost_model import CostModel, Run
from .scheduling.estimate import WaitEstimate
from .scheduling.instances import Instances, Ready

if TYPE_CHECKING:
    from .scheduling.holding import Holding

log = logging.getLogger("uvicorn.error")  # where `uvicorn server:app` shows its own start-up lines


class Observer:
    """What the loop reports. This one ignores it; `workers/metrics.py` counts it."""

    def batch(self, size: int, dispatched_because: str, model_s: float, waits_s: list[float]) -> None:
        """Note a model call: how many jobs were in it, and how long each had waited."""

    def held(self, seconds: float, joined: int) -> None:
        """Note that a partial batch was held, and how many jobs joined it meanwhile."""

    def abandoned(self) -> None:
        """Note that a client left before its answer."""


@dataclass(eq=False)
class ModelLoop:
    """Feeds `run` from one queue, at most `batch_size` queries at a time; several `run`s share the same queue."""

    batch_size: int = 1
    max_queue: int = 256  # jobs in each lane
    budget_s: float = 10.0
    target_s: float = 0.5  # the wait to aim at while the queue never empties; 0: none
    hang_s: float = math.inf
    metrics: Observer = field(default_factory=Observer)
    now: Callable[[], float] = lambda: asyncio.get_running_loop().time()

    def __post_init__(self) -> None:
        self.queue, self.cost_model = JobQueue(), CostModel()
        self.instances = Instances(self.cost_model.predict_s, self.hang_s, self.now, self._reject_hopeless)
        self.estimate = WaitEstimate(self.queue, self.cost_model, self.batch_size, self.budget_s)
        self.admission = Admission(self.estimate, self.instances, self.max_queue, self.target_s)
        self.holding = self.make_holding(self.queue, self.estimate, self.instances, self.metrics.held)
        self.live: set[Job] = set()  # admitted and not yet answered
        self._taking = asyncio.Lock()  # one consumer gathers a batch at a time, or two would split it

    def make_holding(self, *components: Any) -> "Holding | None":
        """Return what decides how long a partial batch is held; None for greedy batching, and where one job fills a batch."""
        if self.batch_size == 1:
            return None
        from .scheduling.holding import Holding

        return Holding(*components)

    # --- what a handler calls -----------------------------------------------------------------------------------------

    async def submit(self, query: Any, *, size: float = 1, budget_s: float = math.inf) -> Answer:
        """Return the model's answer within `budget_s` (never more than the loop's own), or raise an `Unanswered`.

        Cancel it when the client has left: its place in the queue is free at once.
        """
        (answer,) = await self.submit_all([query], [size], budget_s=budget_s)
        return answer

    async def submit_all(
        self, queries: Sequence[Any], sizes: Sequence[float], *, budget_s: float = math.inf
    ) -> list[Answer]:
        """Return the answers to all `queries`, in order, or raise the first failure; its `index` says whose it is.

        Each is a job of its own and shares batches with everybody's. All are admitted or none; when one fails or the
        client leaves, the others free their places and are not run any more.
        """
        budget_s = min(budget_s, self.budget_s)
        jobs = self._admit(queries, sizes, budget_s)
        timer = asyncio.get_running_loop().call_later(budget_s, expire, jobs)
        try:
            return [await job.future for job in jobs]
        except asyncio.CancelledError:
            for job in jobs:
                job.future.cancel()
                if job.future.cancelled():
                    self.metrics.abandoned()
            raise
        finally:
            timer.cancel()
            for job in jobs:
                self._forget(job)

    def rejection(self, budget_s: float = math.inf) -> Rejected | None:
        """Return why one more query of the usual size would be rejected now; None where it would be admitted.

        Costs a few microseconds: ask before anything of a request is read. The sentence stays the same for about a second, so
        its reply can be kept.
        """
        lane, size = self.queue.singles, self.estimate.usual_size
        if rejected := self.admission.rejection(lane, 1, size, min(budget_s, self.budget_s)):
            self.estimate.offer(lane, 1, size)  # offered load that `submit` will not see
        return rejected

    @property
    def oldest_at(self) -> float | None:
        """When the job that has waited longest came; None where none waits."""
        return min((job.enqueued_at for job in self.queue), default=None)

    @property
    def depth(self) -> int:
        """How many admitted jobs wait for the model."""
        return len(self.queue)

    @property
    def running(self) -> int:
        """How many admitted jobs the model works on."""
        return sum(job.running for job in self.live)

    # --- admission ----------------------------------------------------------------------------------------------------

    def _admit(self, queries: Sequence[Any], sizes: Sequence[float], budget_s: float) -> list[Job]:
        """Put jobs for all `queries` into the queue, or raise Rejected."""
        loop, now = asyncio.get_running_loop(), self.now()
        lane, size = self.queue.lists if len(queries) > 1 else self.queue.singles, sum(sizes)
        self.estimate.offer(lane, len(queries), size)
        if rejected := self.admission.rejection(lane, len(queries), size, budget_s):
            raise rejected
        deadline = now + budget_s
        jobs = [
            Job(q, s, now, deadline, lane, loop.create_future()) for q, s in zip(queries, sizes, strict=True)
        ]
        self.live.update(jobs)
        for index, job in enumerate(jobs):
            self.queue.put(job)
            if len(jobs) > 1:
                job.index, job.ends_request_of = index, 0
                job.future.add_done_callback(partial(fail_together, jobs))
        jobs[-1].ends_request_of = len(jobs)
        if self.holding:
            self.holding.arrived(jobs)
        return jobs

    # --- the loop -----------------------------------------------------------------------------------------------------

    async def consume(self, run: Run, ready: Ready | None = None) -> None:
        """Serve the queue with `run`, whenever its instance is `ready`, until cancelled. Start one for each instance."""
        self.instances.loaded += 1
        try:
            while True:
                # An instance that died loads again: meanwhile the work is the others'.
                await self.instances.until(ready)
                batch, dispatched_because = await self.take_batch(ready)
                if batch:
                    await self._run(run, batch, dispatched_because)
                await asyncio.sleep(0)  # a model that blocks the event loop must not shut it out forever
        finally:
            self.instances.loaded -= 1

    async def take_batch(self, ready: Ready | None = None) -> tuple[list[Job], str]:
        """Wait until a batch is due and the instance is ready; take it, and return it with why it was dispatched.

        The batch may be empty: its clients may have left, or others took the work while this instance loaded again.
        """
        async with self._taking:
            await self.queue.not_empty()
            held = await self.holding.hold() if self.holding else ""
            full = len(self.queue) >= self.batch_size
        dispatched_because = "full" if full else "draining" if self.instances.closing else held or "empty"
        await self.instances.until(ready)
        return self._take(), dispatched_because

    def _take(self) -> list[Job]:
        """Take the next batch. Jobs that can't be in time fail now: to run them would make the others late.

        But if there are no others they run: a run corrects the estimate.
        """
        queue, most = self.queue, self.estimate.affordable
        if not queue:
            return []
        batch: list[Job] = []
        late: list[Job] = []
        size, n = 0.0, min(self.batch_size, len(queue))
        run_s = self.cost_model.predict_s(min(most, queue.size * n / len(queue)))
        while queue and len(batch) < self.batch_size:
            job = queue.first()
            if batch and size + job.size / 2 > most:  # it goes in if at least half of it fits
                break
            queue.take(job)
            if not self._in_time(job, run_s):
                late.append(job)
            elif job.alive:
                batch.append(job)
                size += job.size
        if not batch:
            batch = [job for job in late if job.alive and self._in_time(job, 0)][: self.batch_size]
        for job in late:
            if job not in batch:
                job.fail(Late(TOO_SHORT))
        # Plan for the jobs to come: those of this batch were admitted by the last plan.
        self.estimate.plan(self.now(), self.instances.loaded)
        return batch

    def _in_time(self, job: Job, run_s: float) -> bool:
        """Return whether `job` would be answered by its deadline if the model took `run_s` from now."""
        return job.deadline >= self.now() + run_s

    async def _run(self, run: Run, batch: list[Job], dispatched_because: str) -> None:
        """Run the model on `batch` and answer every job of it, whatever the model throws."""
        call = self.instances.start(sum(job.size for job in batch))
        for job in batch:
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
            self.instances.end(call)
            if self.holding:
                self.holding.changed()
        model_s = self.now() - call.started_at
        waits_s = [call.started_at - job.enqueued_at for job in batch]
        self.metrics.batch(len(batch), dispatched_because, model_s, waits_s)
        self.admission.note_call(model_s)
        if error is None:
            self.cost_model.observe(call.size, model_s)
            if self.holding:
                self.holding.answered(batch, model_s)
            for job, wait_s, value in zip(batch, waits_s, values, strict=True):
                if job.alive:
                    job.future.set_result(Answer(value, wait_s, model_s, len(batch), dispatched_because))
        elif len(batch) > 1 and not isinstance(error, ModelDied):
            await self._run_singly(run, batch)
        else:
            self._fail(batch, error)

    async def _run_singly(self, run: Run, batch: list[Job]) -> None:
        """One of `batch` made it raise: run each alone, once, so that only the culprit fails.

        `isolation/quarantine.py` raises ModelFailed to have this done for a batch with a suspect.
        """
        log.warning("a batch of %d failed; running its queries one by one", len(batch))
        for job in batch:
            await asyncio.sleep(0)  # answers get out, and when one of a list fails the others are not run
            if self.queue and not self._in_time(job, self.cost_model.predict_s(job.size)):
                job.fail(Late(TOO_SHORT))
            if job.alive:
                await self._run(run, [job], "retry")

    def _fail(self, batch: list[Job], error: BaseException) -> None:
        failure = type(error) if isinstance(error, ModelFailed) else ModelFailed
        for job in batch:
            failed = failure(str(error))
            failed.__cause__ = error
            job.fail(failed)

    def _forget(self, job: Job) -> None:
        """Forget `job`: it has been answered, or its client has left."""
        job.future.cancel()
        self.queue.discard(job)
        if self.holding:
            self.holding.changed()
        self.live.discard(job)

    # --- stopping -----------------------------------------------------------------------------------------------------

    def stop_admitting(self) -> None:
        """Reject new jobs from now on, and hold no batch."""
        self.instances.closing = True
        if self.holding:
            self.holding.changed()

    async def drain(self, grace_s: float) -> None:
        """Let admitted jobs finish within `grace_s`, then reject the rest, so that every job has an answer."""
        self.stop_admitting()
        if self.live:
            await asyncio.wait([job.future for job in self.live], timeout=grace_s)
        self.reject_all("the server stopped before the model was free; try another one")

    def reject_all(self, reason: str) -> None:
        """Answer every job that is still waiting or running with `Rejected`."""
        for job in self.live:
            job.fail(Rejected(reason))

    def _reject_hopeless(self) -> None:
        """If no instance is left, reject the jobs whose deadline comes before one has loaded again."""
        if self.instances.loaded:
            return
        load_s = self.instances.load_s
        for job in self.queue:
            if not self._in_time(job, load_s):
                job.fail(Rejected(LOADING, load_s))
