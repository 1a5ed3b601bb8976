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
# An idle server rejects a job that would take so many times the limit, and after a call that did take so long the next
# such job for so many times that call's length: one such client can take 1/20 of the model's time.
HOPELESS_FACTOR, RETRIAL_FACTOR = 2, 20


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
        hang_s: float = math.inf,
    ) -> None:
        self.queue, self.cost_model = queue, cost_model
        self.max_queue, self.target_s = max_queue, target_s
        self.estimate = WaitEstimate(queue, cost_model, batch_size, budget_s)
        self.budget_s, self.hopeless_s = budget_s, min(HOPELESS_FACTOR * budget_s, hang_s)
        self.drained_at = self.refused_at = self.no_trial_until = -math.inf

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
            # The only reason when idle: a wrong estimate must not lock the server shut.
            return self._hopeless(now, size)
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
        if (run_s := self.cost_model.predict_s(size / jobs)) > self.budget_s:
            return self._too_long(run_s)
        if done_s * self.cost_model.margin > budget_s:
            return Rejected(f"it would take {math.ceil(done_s)} s; retry after the time given", wait_s)
        stands = self.target_s and now - self.drained_at > PATIENCE * self.target_s
        if stands and wait_s > self._limit_s(jobs):
            self.refused_at = now
            return Rejected("too much is waiting; retry after the time given", wait_s)
        return None

    def _hopeless(self, now: float, size: float) -> Rejected | None:
        """Return why an idle server rejects a job of `size`: it would keep the model from others far beyond all deadlines.

        A wrong cost model corrects itself by jobs of sizes that it has measured: those are tried now and then.
        """
        run_s, is_measured = self.cost_model.predict_s(size), size <= self.cost_model.largest_size
        if (
            run_s <= self.hopeless_s
            or not self.cost_model.is_law
            or (is_measured and now >= self.no_trial_until)
        ):
            return None
        return self._too_long(run_s)

    def _too_long(self, run_s: float) -> Rejected:
        limit = f"this server's limit of {self.budget_s:g} s"
        return Rejected(
            f"one call with this input takes about {run_s:.0f} s, longer than {limit}; send a shorter input",
            run_s,
        )

    def note_call(self, now: float, call_s: float) -> None:
        """Note that a call ended now which took `call_s`."""
        if call_s > self.hopeless_s:
            self.no_trial_until = now + RETRIAL_FACTOR * call_s

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
