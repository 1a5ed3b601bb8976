"""The model loop: one queue, one model, and every job answered exactly once.

    submit(query) -> queue -> take_batch -> run(queries) -> each job's own future

Everything runs on one event loop, so no thread locks are needed. `now` tells the time, by default that event loop's own,
and `async run(queries) -> answers` is the model: so the tests run it on a virtual clock with a model that is a formula.

"""

import asyncio
import contextlib
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from workers.errors import LOADING, STOPPING, TOO_SHORT, Late, ModelDied, ModelFailed, Rejected
from workers.jobs import Answer, Job, JobQueue, Lane, empty_within, expire, fail_together
from workers.metrics import Metrics
from workers.scheduling.admission import Admission
from workers.scheduling.anticipation import Anticipation
from workers.scheduling.cost_model import CostModel, Run
from workers.scheduling.instances import Instances, Ready, stuck

log = logging.getLogger("uvicorn.error")  # where `uvicorn server:app` shows its own start-up lines


@dataclass(eq=False)
class ModelLoop:
    """Feeds `run` from one queue, at most `batch_size` queries at a time; several `run`s share the same queue."""

    batch_size: int = 1
    max_queue: int = 256  # jobs in each lane
    budget_s: float = 10.0
    target_s: float = 0.5  # the wait to aim at while the queue never empties; 0: none
    hang_s: float = math.inf
    metrics: Metrics = field(default_factory=Metrics)
    now: Callable[[], float] = lambda: asyncio.get_running_loop().time()

    def __post_init__(self) -> None:
        self.queue, self.cost_model = JobQueue(), CostModel()
        self.instances = Instances(self.cost_model, self.hang_s, self.now, self._reject_hopeless)
        self.admission = Admission(
            self.queue,
            self.cost_model,
            self.batch_size,
            self.max_queue,
            self.budget_s,
            self.target_s,
            self.hang_s,
        )
        self.estimate, self.anticipation = self.admission.estimate, Anticipation()
        self.live: set[Job] = set()  # admitted and not yet answered
        self.running = 0  # those of them that the model works on
        self.closing = False
        self._taking = asyncio.Lock()  # one consumer gathers a batch at a time, or two would split it
        # Ends the sleep of a hold: a job came or left, an instance is free, or we stop.
        self._news = asyncio.Event()
        self._held_deadline = math.inf  # the earliest one of the jobs that are held
        self._drained = asyncio.Event()

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
        """Why one more query of the usual size would be refused now; None where it would not.

        Costs a few microseconds: ask before anything of a request is read. The reason stays the same for a second.
        """
        lane, size = self.queue.singles, self.estimate.usual_size
        if refused := self._rejection(lane, 1, size, min(budget_s, self.budget_s)):
            self.estimate.offer(lane, 1, size)  # offered load that `submit` will not see
        return refused

    def unready(self) -> str:
        """Why no request at all can be answered; empty while an instance is loaded, not stuck, not stopping.

        It does not follow load: a balancer would take every replica out at once.
        """
        if self.closing:
            return STOPPING
        if not self.instances.loaded:
            return LOADING
        return stuck(stuck_s) if (stuck_s := self.instances.stuck_s) else ""

    @property
    def oldest_at(self) -> float | None:
        """When the job that has waited longest came; None where none waits."""
        return min((job.enqueued_at for job in self.queue), default=None)

    @property
    def depth(self) -> int:
        """How many admitted jobs wait for the model."""
        return len(self.queue)

    # --- admission ----------------------------------------------------------------------------------------------------

    def _admit(self, queries: Sequence[Any], sizes: Sequence[float], budget_s: float) -> list[Job]:
        """Put jobs for all `queries` into the queue, or raise Rejected."""
        loop, now = asyncio.get_running_loop(), self.now()
        lane, size = self.queue.lists if len(queries) > 1 else self.queue.singles, sum(sizes)
        self.estimate.offer(lane, len(queries), size)
        if refused := self._rejection(lane, len(queries), size, budget_s):
            raise refused
        deadline = now + budget_s
        jobs = [
            Job(q, s, now, deadline, lane, loop.create_future()) for q, s in zip(queries, sizes, strict=True)
        ]
        self.live.update(jobs)
        if self.batch_size > 1:
            self.anticipation.arrived(now, len(jobs))
        self._held_deadline = min(self._held_deadline, deadline)
        self._news.set()
        for index, job in enumerate(jobs):
            self.queue.put(job)
            if len(jobs) > 1:
                job.index, job.ends_request_of = index, 0
                job.future.add_done_callback(partial(fail_together, jobs))
        jobs[-1].ends_request_of = len(jobs)
        return jobs

    def _rejection(self, lane: Lane, jobs: int, size: float, budget_s: float) -> Rejected | None:
        """Why `jobs` of one request, `size` altogether, are not admitted now; None where they are."""
        if self.closing:
            return Rejected(STOPPING)
        free_s = self.instances.free_s()
        unfit = self.instances.unfit(free_s)
        return unfit or self.admission.rejection(self.now(), free_s, lane, jobs, size, budget_s)

    # --- the loop -----------------------------------------------------------------------------------------------------

    async def consume(self, run: Run, ready: Ready | None = None) -> None:
        """Serve the queue with `run`, whenever its instance is `ready`, until cancelled. Start it once for every instance."""
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
        """Wait until a batch is due and the instance is ready; take it, and tell why it closed.

        The batch may be empty: if this instance had died, others took the work while it loaded again.
        """
        async with self._taking:
            dispatched_because = await self._gather()
        await self.instances.until(ready)
        return self._take(), dispatched_because

    async def _gather(self) -> str:
        """Wait until a batch is due; return why. Its jobs stay in the queue: their clients may still leave.

        A batch is due when the model is free and there is a job, unless it pays to hold it for clients that were just
        answered. A hold ends at once when all of its jobs have left, another instance is free, or the server stops; and
        early enough for every deadline.
        """
        while True:
            await self.queue.not_empty()
            held_s, enough = await self._hold()
            if len(self.queue) >= self.batch_size:
                return "full"
            if self.closing:
                return "draining"
            if self.queue:
                return "empty" if not held_s else "returned" if len(self.queue) >= enough else "waited"

    async def _hold(self) -> tuple[float, int]:
        """Hold what is queued for as long as that pays; return for how long it was, and how many jobs were expected."""
        queue, held_at, first = self.queue, self.now(), len(self.queue)
        hold_s, enough = self.plan_hold()
        self.estimate.hold_s = hold_s
        self._held_deadline = min(job.deadline for job in queue) if hold_s else math.inf
        while queue and len(queue) < enough and not self.closing and self.next_free_s():
            run_s = self.cost_model.predict_s(queue.size) * self.cost_model.margin
            left_s = min(held_at + hold_s, self._held_deadline - run_s) - self.now()
            if left_s < 1e-6:  # no timer is finer
                break
            self._news.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(left_s):
                    await self._news.wait()
        held_s = self.now() - held_at
        if held_s:
            self.metrics.held(held_s, len(queue) - first)
        return held_s, enough

    def plan_hold(self) -> tuple[float, int]:
        """Return how long to hold what is queued, and how many jobs in the queue end that."""
        queued, usual_size = len(self.queue), self.estimate.usual_size
        most = min(self.batch_size, self.estimate.affordable / (usual_size or 1))
        if queued >= most or self.closing:
            return 0.0, 0
        a, b = self.cost_model.a, self.cost_model.b * usual_size
        return self.anticipation.hold(self.now(), queued, int(most) - queued, a, b, self.next_free_s())

    def next_free_s(self) -> float:
        """Return in how many seconds an instance other than the one that gathers a batch is free; inf if there is none."""
        free_s = self.instances.free_s()
        return free_s[1] if len(free_s) > 1 else math.inf

    def _take(self) -> list[Job]:
        """Take the next batch. A job that can't be in time fails now: to run it would make the others late."""
        queue, now, most = self.queue, self.now(), self.estimate.affordable
        if not queue:
            return []  # another instance was faster
        batch: list[Job] = []
        late: list[Job] = []
        size, n = 0.0, min(self.batch_size, len(queue))
        ends_at = now + self.cost_model.predict_s(min(most, queue.size * n / len(queue)))
        while queue and len(batch) < self.batch_size:
            job = queue.first()
            if batch and size + job.size / 2 > most:  # it goes in if at least half of it fits
                break
            queue.take(job)
            if job.deadline < ends_at:
                late.append(job)
            elif job.alive:
                batch.append(job)
                size += job.size
        if not queue:
            self.admission.note_drained(now)
        if not batch:  # see `_worth_running`
            batch = [job for job in late if job.alive and now < job.deadline][: self.batch_size]
        for job in late:
            if job not in batch:
                job.fail(Late(TOO_SHORT))
        # Plan for the jobs to come: those of this batch were admitted by the last plan.
        self.estimate.plan(now, self.instances.loaded)
        return batch

    def _worth_running(self, job: Job) -> bool:
        """Whether to run `job`. If it can't be in time it fails now, unless nobody waits: a run corrects the estimate."""
        if self.queue and job.deadline < self.now() + self.cost_model.predict_s(job.size):
            job.fail(Late(TOO_SHORT))
        return job.alive

    async def _run(self, run: Run, batch: list[Job], dispatched_because: str) -> None:
        """Run the model on `batch` and answer every job of it, whatever the model throws."""
        call = self.instances.start(sum(job.size for job in batch))
        for job in batch:
            if not job.running:  # a job that is run again singly is counted already
                self.running += 1
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
            self._news.set()
        model_s = self.now() - call.started_at
        waits_s = [call.started_at - job.enqueued_at for job in batch]
        self.metrics.batch(len(batch), dispatched_because, model_s, waits_s)
        self.admission.note_call(self.now(), model_s)
        if error is None:
            self.cost_model.observe(call.size, model_s)
            if self.batch_size > 1:
                returning = sum(job.ends_request_of for job in batch if job.alive)
                self.anticipation.answered(self.now(), returning, model_s, self.instances.loaded)
            for job, wait_s, value in zip(batch, waits_s, values, strict=True):
                if job.alive:
                    job.future.set_result(Answer(value, wait_s, model_s, len(batch), dispatched_because))
        elif len(batch) > 1 and not isinstance(error, ModelDied):
            await self._run_singly(run, batch)
        else:
            self._fail(batch, error)

    async def _run_singly(self, run: Run, batch: list[Job]) -> None:
        """One of `batch` made it raise: run each alone, once, so that only the culprit pays."""
        log.warning("a batch of %d failed; running its queries one by one", len(batch))
        for job in batch:
            await asyncio.sleep(0)  # answers get out, and when one of a list fails the others are not run
            if self._worth_running(job):
                await self._run(run, [job], "retry")

    def _fail(self, batch: list[Job], error: BaseException) -> None:
        failure = type(error) if isinstance(error, ModelFailed) else ModelFailed
        for job in batch:
            failed = failure(str(error))
            failed.__cause__ = error
            job.fail(failed)

    def _forget(self, job: Job) -> None:
        """`job` has been answered, or nobody waits for it any more."""
        job.future.cancel()
        self.queue.discard(job)
        self._news.set()
        self.live.discard(job)
        if job.running:
            self.running -= 1
        if not self.live:
            self._drained.set()

    # --- stopping -----------------------------------------------------------------------------------------------------

    def stop_admitting(self) -> None:
        """Reject new jobs from now on, and end a hold."""
        self.closing = True
        self._news.set()

    async def drain(self, grace_s: float) -> None:
        """Let what is admitted finish within `grace_s`, then refuse the rest: nobody is left without an answer."""
        self.stop_admitting()
        if not await empty_within(grace_s, self.live, self._drained):
            self.reject_all("the server stopped before the model was free; try another one")

    def reject_all(self, reason: str) -> None:
        """Answer every job that is still waiting or running with `Rejected`."""
        for job in self.live:
            job.fail(Rejected(reason))

    def _reject_hopeless(self) -> None:
        """If no instance is left, refuse those who can't wait until one has loaded again."""
        if self.instances.loaded:
            return
        load_s = self.instances.load_s
        for job in self.queue:
            if job.deadline < self.now() + load_s:
                job.fail(Rejected(LOADING, load_s))
