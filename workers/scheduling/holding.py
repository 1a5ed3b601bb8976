"""A partial batch is held for clients that were just answered, for as long as `anticipation.py` says."""

import asyncio
import contextlib
import math
from collections.abc import Callable

from ..jobs import Job, JobQueue
from .anticipation import Anticipation
from .estimate import WaitEstimate
from .instances import Instances

# No timer is finer.
SHORTEST_HOLD_S = 1e-6
# Of BATCH_SIZE: who comes back from such a call leaves no room for others in the next one.
FULL = 0.8


class Holding:
    """Holds a partial batch while that pays. `on_held` hears of each hold: its seconds, and how many jobs joined.

    A hold ends at once when enough jobs have come, all have left, another instance is free, or the loop closes; and early
    enough for every deadline. Jobs stay in the queue meanwhile: their clients may still leave.
    """

    def __init__(
        self,
        queue: JobQueue,
        estimate: WaitEstimate,
        instances: Instances,
        on_held: Callable[[float, int], None],
    ) -> None:
        self.queue, self.estimate, self.instances, self.on_held = queue, estimate, instances, on_held
        self.now, self.anticipation = instances.now, Anticipation()
        self._changed = asyncio.Event()  # ends the sleep of a hold

    async def hold(self) -> str:
        """Hold what has queued for as long as that pays. Return "returned" if all came who were expected, "waited" if not.

        Empty if nothing was held.
        """
        queue, held_at, first = self.queue, self.now(), len(self.queue)
        cost_model = self.estimate.cost_model
        hold_s, enough = self.plan_hold()
        self.estimate.hold_s, held_s = hold_s, 0.0
        while hold_s and queue and len(queue) < enough and not self.instances.closing and self.next_free_s():
            run_s = cost_model.predict_s(queue.size) * cost_model.margin
            deadline = min(job.deadline for job in queue)
            left_s = min(held_at + hold_s, deadline - run_s) - self.now()
            if left_s < SHORTEST_HOLD_S:
                break
            self._changed.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(left_s):
                    await self._changed.wait()
            held_s = self.now() - held_at
        if not held_s:
            return ""
        self.on_held(held_s, len(queue) - first)
        return "returned" if len(queue) >= enough else "waited"

    def plan_hold(self) -> tuple[float, int]:
        """Return how long to hold what has queued, and how many jobs in the queue end that; (0, 0) to run it now."""
        queued, usual_size = len(self.queue), self.estimate.usual_size
        most = min(self.estimate.batch_size, self.estimate.affordable / (usual_size or 1))
        if queued >= most or self.instances.closing:
            return 0.0, 0
        a, b = self.estimate.cost_model.a, self.estimate.cost_model.b * usual_size
        return self.anticipation.hold(self.now(), queued, int(most) - queued, a, b, self.next_free_s())

    def next_free_s(self) -> float:
        """Return in how many seconds an instance other than the one that gathers a batch can run a job; inf if there is none.

        Where all of the others run full batches that is a call later than they are free: their own clients come back first.
        """
        free_s, estimate = self.instances.free_s(), self.estimate
        if len(free_s) < 2:
            return math.inf
        full = FULL * estimate.batch_size * estimate.usual_size
        is_full = free_s[0] == 0 < free_s[1] and all(call.size >= full for call in self.instances.calls)
        return free_s[1] + estimate.cost_model.a * is_full

    def arrived(self, jobs: list[Job]) -> None:
        """Note that the jobs of one request were admitted."""
        self.anticipation.arrived(jobs[0].enqueued_at, len(jobs))
        self.changed()

    def answered(self, batch: list[Job], call_s: float) -> None:
        """Note that a call of `call_s` has succeeded; its batch is answered next."""
        returning = sum(job.ends_request_of for job in batch if job.alive)
        self.anticipation.answered(self.now(), returning, call_s)

    def changed(self) -> None:
        """Note that a job has left the queue, that an instance is free, or that the loop closes."""
        self._changed.set()
