"""Admission: reject a request that would be late; and where there is always a queue, keep the wait near a target.

The second is CoDel's idea, "controlled delay" (doi.org/10.1145/2208917.2209336): a queue that empties now and then is a
burst, and may be as long as it likes; one that never does only makes everybody wait.
"""

import math

from ..errors import QUEUE_FULL, RETRY_LATER, Rejected
from ..jobs import Lane
from .estimate import WaitEstimate
from .instances import Instances

# A queue that has not been empty for this many targets is not a burst any more.
STANDING_TARGETS = 2
# A request may always wait as long as this many like it take, however slow the model is.
ALLOWED_REQUESTS = 6
# It may always wait for this many full batches: so one can fill while another runs.
ALLOWED_BATCHES = 1.5
# A queue that emptied within this many full batches of a rejection emptied because of it. With a slow model the targets
# alone are too short a time to tell.
REJECTION_BATCHES = 20
# An idle server rejects a job that would take so many times the limit, and after a call that did take so long the next
# such job for so many times that call's length: one such client can take 1/20 of the model's time.
HOPELESS_FACTOR, RETRIAL_FACTOR = 2, 20


class Admission:
    """Decides early whether a request is admitted. `max_queue`: jobs in each lane; `target_s`: 0 for none."""

    def __init__(self, estimate: WaitEstimate, instances: Instances, max_queue: int, target_s: float) -> None:
        self.estimate, self.instances = estimate, instances
        self.queue, self.cost_model, self.budget_s = estimate.queue, estimate.cost_model, estimate.budget_s
        self.max_queue, self.target_s, self.now = max_queue, target_s, instances.now
        self.hopeless_s = min(HOPELESS_FACTOR * self.budget_s, instances.hang_s)
        self.drained_at = self.rejected_at = self.no_trial_until = -math.inf

    def rejection(self, lane: Lane, jobs: int, size: float, budget_s: float) -> Rejected | None:
        """Return why `jobs` of one request, `size` altogether, are not admitted now; None where they are."""
        free_s = self.instances.free_s()
        if unavailable := self.instances.unavailable(free_s):
            return unavailable
        if not self.queue:
            self.note_drained()
        idle = not free_s[0] and not self.queue
        if idle and jobs == 1:
            # The only reason when idle: a wrong estimate must not lock the server shut.
            return self._hopeless(size)
        full = len(lane.jobs) + jobs > self.max_queue
        if not full and self.estimate.worst_s(free_s, jobs, size) < min(budget_s, self.target_s or budget_s):
            return None  # the usual case: looking ahead costs a tenth of a request's overhead
        wait = self.estimate.of(free_s, lane, jobs, size)
        if full and not idle:
            return Rejected(QUEUE_FULL, wait.starts_in_s)
        if (run_s := self.cost_model.predict_s(size / jobs)) > self.budget_s:
            return self._too_long(run_s)
        if wait.done_in_s * self.cost_model.margin > budget_s:
            sentence = f"the answer would take {math.ceil(wait.done_in_s)} s, longer than your time limit"
            return Rejected(f"{sentence}; {RETRY_LATER}", wait.starts_in_s)
        if self._stands() and wait.starts_in_s > self._limit_s(jobs):
            self.rejected_at = self.now()
            return Rejected(f"the server is overloaded; {RETRY_LATER}", wait.starts_in_s)
        return None

    def _hopeless(self, size: float) -> Rejected | None:
        """Return why an idle server rejects a job of `size`: it would keep the model from others far beyond all deadlines.

        A wrong cost model corrects itself by jobs of sizes that it has measured: those are tried now and then.
        """
        run_s, is_measured = self.cost_model.predict_s(size), size <= self.cost_model.largest_size
        may_try = is_measured and self.now() >= self.no_trial_until
        if run_s <= self.hopeless_s or not self.cost_model.is_law or may_try:
            return None
        return self._too_long(run_s)

    def _too_long(self, run_s: float) -> Rejected:
        limit = f"this server's limit of {self.budget_s:g} s"
        return Rejected(
            f"one call with this input takes about {run_s:.0f} s, longer than {limit}; send a shorter input",
            run_s,
        )

    def _stands(self) -> bool:
        """Return whether the queue has not emptied for too long to be a burst."""
        return bool(self.target_s) and self.now() - self.drained_at > STANDING_TARGETS * self.target_s

    def _limit_s(self, jobs: int) -> float:
        """Return how long `jobs` of one request may wait in a standing queue."""
        like_it_s = ALLOWED_REQUESTS * jobs * self.estimate.usual_s
        return max(self.target_s, like_it_s, ALLOWED_BATCHES * self.estimate.full_s)

    def note_call(self, call_s: float) -> None:
        """Note that a call ended now which took `call_s`."""
        if call_s > self.hopeless_s:
            self.no_trial_until = self.now() + RETRIAL_FACTOR * call_s

    def note_drained(self) -> None:
        """Note that the queue is empty, so it was a burst; unless a rejection a short time ago is the reason."""
        excluded_s = STANDING_TARGETS * self.target_s + REJECTION_BATCHES * self.estimate.full_s
        if self.now() - self.rejected_at > excluded_s:
            self.drained_at = self.now()
