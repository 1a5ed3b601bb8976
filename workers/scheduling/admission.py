"""Who is let in: nobody who would be late; and where there is always a queue, only so many that the wait stays near a target.

The second is CoDel's idea, "controlled delay" (doi.org/10.1145/2208917.2209336): a queue that drains now and then is a
burst, and may be as long as it likes; one that never does helps nobody.
"""

import math

from workers.errors import Rejected
from workers.jobs import JobQueue, Lane
from workers.scheduling.cost_model import CostModel
from workers.scheduling.estimate import WaitEstimate

# PATIENCE: a queue that was not empty for this many targets is not a burst any more.
# FEW: a wait as long as this many requests like it take is always allowed, however slow the model is.
PATIENCE, FEW = 2, 6


class Admission:
    """Decides early whether a request is let in. `max_queue`: jobs in each lane; `target_s`: 0 for none."""

    def __init__(
        self,
        queue: JobQueue,
        cost_model: CostModel,
        batch_size: int,
        max_queue: int,
        budget_s: float,
        target_s: float,
    ) -> None:
        self.queue, self.cost_model = queue, cost_model
        self.max_queue, self.target_s = max_queue, target_s
        self.estimate = WaitEstimate(queue, cost_model, batch_size, budget_s)
        self.drained_at = self.refused_at = -math.inf

    def rejection(
        self, now: float, free_s: list[float], lane: Lane, jobs: int, size: float, budget_s: float
    ) -> Rejected | None:
        """Why `jobs` of one request, `size` altogether, are not admitted now; None where they are.

        `free_s`: in how many seconds each instance of the model will be free, the first one first.
        """
        if not self.queue:
            self.note_drained(now)
        idle = not free_s[0] and not self.queue
        if idle and jobs == 1:
            return None  # always when idle: a slow estimate must not lock the server shut
        # At worst each job runs by itself on the instance that is free last, and then comes a full batch. If even that is
        # soon enough, as it mostly is, there is no need for the estimate.
        singly_s = free_s[-1] + self.cost_model.predict_s(self.queue.size + size, len(self.queue) + jobs)
        singly_s += self.estimate.full_s
        enough_s = min(budget_s, self.target_s or budget_s) / self.cost_model.margin
        if singly_s < enough_s and len(lane.jobs) + jobs <= self.max_queue:
            return None
        wait_s, done_s = self.estimate(free_s, lane, jobs, size)
        if len(lane.jobs) + jobs > self.max_queue and not idle:
            return Rejected("the queue is full; retry after the time given", wait_s)
        if done_s * self.cost_model.margin > budget_s:
            return Rejected(f"it would take {math.ceil(done_s)} s; retry after the time given", wait_s)
        stands = self.target_s and now - self.drained_at > PATIENCE * self.target_s
        if stands and wait_s > self._limit_s(jobs):
            self.refused_at = now
            return Rejected("too much is waiting; retry after the time given", wait_s)
        return None

    def _limit_s(self, jobs: int) -> float:
        """How long `jobs` of one request may wait where there is always a queue.

        The longest of three: the target; FEW requests like this one; one and a half full batches, so that one can
        fill while another runs.
        """
        return max(self.target_s, FEW * jobs * self.estimate.usual_s, 1.5 * self.estimate.full_s)

    def note_drained(self, now: float) -> None:
        """The queue is empty, so it was a burst. But if we refused others a short time ago, that is why it is empty.

        Twenty full batches: with a slow model the targets alone are too short a time to tell.
        """
        if now - self.refused_at > PATIENCE * self.target_s + 20 * self.estimate.full_s:
            self.drained_at = now
