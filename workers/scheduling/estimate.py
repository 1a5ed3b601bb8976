"""When a job that came now would be answered, and how large a batch the jobs in the queue can afford."""

import math
from typing import NamedTuple

from ..jobs import JobQueue, Lane
from .cost_model import CostModel

# A larger job counts as this many usual ones: one giant, even a rejected one, must not change which others are admitted.
OUTSIZED = 20
# How much of the usual size is the last job's.
USUAL_SHARE = 0.05
# A call that takes this many times its fixed cost already gives 19/20 of what batching can give at most.
PAYS = 20
# A batch may always take this part of the time limit, if it is not larger than pays; and this part even if it is.
LIMIT_PART, ANY_SIZE_PART = 1 / 2, 1 / 8


class Estimate(NamedTuple):
    """In how many seconds the model starts on a request's first job, and is done with its last."""

    starts_in_s: float
    done_in_s: float


class WaitEstimate:
    """Looks ahead over `queue` with `cost_model`. `plan` before each batch: all requests until the next one use that plan."""

    def __init__(self, queue: JobQueue, cost_model: CostModel, batch_size: int, budget_s: float) -> None:
        self.queue, self.cost_model = queue, cost_model
        self.batch_size, self.budget_s = batch_size, budget_s
        self.planned_at = -math.inf
        self.instances = 1
        self.usual_size = 0.0  # of a job
        self.affordable = math.inf  # the largest batch that its own jobs can afford, in size
        self.full_size = 0.0  # of the largest batch that will be taken
        self.full_s = 0.0  # how long it takes
        self.usual_s = 0.0  # how much of that is one job's
        self.hold_s = 0.0  # for how long the last partial batch was to be held

    def offer(self, lane: Lane, jobs: int, size: float) -> None:
        """Note that a request came with `jobs` of `size` altogether, admitted or not."""
        size = min(size, jobs * OUTSIZED * self.usual_size or size)
        lane.offered += size
        self.usual_size += (size / jobs - self.usual_size) * (USUAL_SHARE if self.usual_size else 1)

    def plan(self, now: float, instances: int) -> None:
        """Choose the largest batch that its own jobs can afford.

        It may take half the limit: then a job that just missed the batch before is still in time. It may take more
        if enough work comes to fill it in the rest of the limit: size = rate * (limit - seconds(size)). But beyond
        an eighth of the limit it grows only as far as that pays, see PAYS.
        """
        if now <= self.planned_at:
            return
        for lane in (self.queue.singles, self.queue.lists):
            lane.measure(now - self.planned_at, self.budget_s)
        self.planned_at, self.instances = now, instances
        a, b, limit_s = self.cost_model.a, self.cost_model.b, self.budget_s / self.cost_model.margin
        rate = (self.queue.singles.rate + self.queue.lists.rate) / instances
        if b:
            filled_in_time = rate * (limit_s - a) / (1 + rate * b)
            most = max((LIMIT_PART * limit_s - a) / b, filled_in_time)
            pays = max((ANY_SIZE_PART * limit_s - a) / b, (PAYS - 1) * a / b)
            usual_size = self.usual_size or 1
            self.affordable = max(1, min(most, pays) // usual_size) * usual_size
        else:  # a larger batch costs the same, as far as is known
            self.affordable = math.inf
        self.full_size = min(self.affordable, self.batch_size * self.usual_size)
        self.full_s = self.cost_model.predict_s(max(self.full_size, self.usual_size))
        self.usual_s = self.full_s * self.usual_size / self.full_size if self.full_size else self.full_s

    def worst_s(self, free_s: list[float], jobs: int, size: float) -> float:
        """Return when a request is answered at the latest: as if every job ran alone, after a full batch."""
        ahead_s = self.cost_model.a * (len(self.queue) + jobs) + self.cost_model.b * (self.queue.size + size)
        return (free_s[-1] + self.full_s + ahead_s) * self.cost_model.margin

    def of(self, free_s: list[float], lane: Lane, jobs: int, size: float) -> Estimate:
        """Return when a request of `jobs`, `size` altogether, would be answered if it came now to the end of `lane`.

        `free_s`: in how many seconds each instance of the model will be free, the first one first.
        """
        job_size = size / jobs
        starts_in_s, size_before = self._place(free_s, lane, len(lane.jobs), lane.size, job_size)
        last_in_s = starts_in_s
        if jobs > 1:
            ahead, size_ahead = len(lane.jobs) + jobs - 1, lane.size + size - job_size
            last_in_s, size_before = self._place(free_s, lane, ahead, size_ahead, job_size)
        if len(lane.jobs) + jobs < self.batch_size:
            starts_in_s += self.hold_s  # but a hold ends in time for every deadline, so the end is without it
        # Jobs that come before the last batch starts make it longer.
        arriving = last_in_s * (self.queue.singles.rate + self.queue.lists.rate)
        batch_size = min(size_before + job_size + arriving, self.full_size)
        return Estimate(starts_in_s, last_in_s + self.cost_model.predict_s(max(job_size, batch_size)))

    def _place(
        self, free_s: list[float], lane: Lane, ahead: float, size: float, job_size: float
    ) -> tuple[float, float]:
        """Return in how many seconds the batch of a job starts that has `ahead` jobs of `size` before it in its `lane`.

        And the size of what is before it in that batch.
        """
        between, between_size = self._between(lane, ahead)
        ahead, size = ahead + between, size + between_size
        # How many batches come before its own: as many as are full by the number of jobs, or by their size.
        by_number = ahead // self.batch_size
        by_size = math.ceil((size + job_size) / self.affordable) - 1
        if (batches := int(max(by_number, by_size))) < 1:
            return free_s[0], size
        # The jobs ahead fill more batches than that: the last, not full, is the job's own.
        mean_size = size / max(ahead / self.batch_size, size / self.affordable, batches)
        # The instances take turns. After a full turn each of them is one batch later.
        turns, instance = divmod(batches, len(free_s))
        starts_in_s = free_s[instance] + turns * self.cost_model.predict_s(mean_size)
        return starts_in_s, size - batches * mean_size

    def _between(self, lane: Lane, ahead: float) -> tuple[float, float]:
        """Return how many jobs of the other lane go in between `ahead` jobs and the next one of `lane`, and their size.

        Those are the jobs that are there, and those that come until then. The lanes take turns: at most one for each of ours.
        """
        other = self.queue.lists if lane is self.queue.singles else self.queue.singles
        if not (other.jobs or other.rate):
            return 0, 0.0
        # The part of the model's time, and so of the jobs that run until then, that the other lane's arrivals take:
        # jobs = waiting + part * (ahead + jobs).
        part = min(0.5, other.rate * self.full_s / (self.full_size or 1) / self.instances)
        jobs = min(ahead + 1, (len(other.jobs) + part * ahead) / (1 - part))
        return jobs, jobs * (other.size / len(other.jobs) if other.jobs else self.usual_size)
