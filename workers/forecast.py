"""When a job that came now would be answered, and how large a batch those who wait can afford."""

import math

from workers.jobs import JobQueue, Lane
from workers.speed import Speed

MARGIN = 1.1  # predictions are taken this much longer: an admitted job that ends late has cost model time for nothing


class Forecast:
    """Looks ahead over `queue` at `speed`. `plan` before each batch; what it works out serves all requests until the next."""

    def __init__(self, queue: JobQueue, speed: Speed, batch_size: int, budget_s: float) -> None:
        self.queue, self.speed = queue, speed
        self.batch_size, self.budget_s = batch_size, budget_s / MARGIN
        self.planned_at = -math.inf
        self.copies = 1
        self.usual_size = 0.0  # of a job
        self.affordable = math.inf  # the largest batch that its own jobs can afford, in size
        self.full = 1  # jobs in the largest batch that will be taken
        self.full_s = 0.0  # how long it takes

    def offer(self, lane: Lane, jobs: int, size: float) -> None:
        """Note that somebody came with `jobs` of `size` altogether, admitted or not."""
        lane.offered += size
        self.usual_size += (size / jobs - self.usual_size) * (0.05 if self.usual_size else 1)

    def plan(self, now: float, copies: int) -> None:
        """Choose the largest batch that its own jobs can afford.

        It may take half the budget: whoever just missed the one before is in time all the same. It may take more when so
        much is offered that it fills in the time that is left: size = rate * (budget - seconds(size)).
        """
        for lane in (self.queue.singles, self.queue.lists):
            lane.measure(now - self.planned_at)
        self.planned_at, self.copies = now, copies
        a, b, budget_s = self.speed.a, self.speed.b, self.budget_s
        rate = (self.queue.singles.rate + self.queue.lists.rate) / copies
        self.affordable = (
            max((budget_s / 2 - a) / b, rate * (budget_s - a) / (1 + rate * b)) if b else math.inf
        )
        self.full = int(max(1, min(self.batch_size, self.affordable / (self.usual_size or 1))))
        self.full_s = self.speed.predict_s(self.full * self.usual_size)

    def __call__(self, free_s: list[float], lane: Lane, jobs: int, size: float) -> tuple[float, float]:
        """In how many seconds the model would start on the first of `jobs` that came now, and be done with the last.

        `free_s`: in how many seconds each copy of the model will be free, the first one first.
        """
        wait_s, before = self._starts_in_s(free_s, lane, len(lane.jobs), lane.size)
        last_s, mean = wait_s, size / jobs
        if jobs > 1:
            last_s, before = self._starts_in_s(
                free_s, lane, len(lane.jobs) + jobs - 1, lane.size + size - mean
            )
        # Those who come until then make its batch longer.
        after = last_s * (self.queue.singles.rate + self.queue.lists.rate) / (self.usual_size or 1)
        with_it = min(self.full - 1, before + after) * self.usual_size
        return wait_s, last_s + self.speed.predict_s(mean + with_it)

    def _starts_in_s(self, free_s: list[float], lane: Lane, ahead: int, size: float) -> tuple[float, float]:
        """When the batch starts that takes the job with `ahead` of `size` before it in `lane`; how many it takes before it."""
        other = self.queue.lists if lane is self.queue.singles else self.queue.singles
        if others := len(other.jobs) or other.rate:
            # What is, and comes meanwhile, in the other lane goes in between, but never more than one for one.
            share = min(0.5, other.rate * self.full_s / (self.full * self.usual_size or 1) / self.copies)
            others = min(ahead + 1, (len(other.jobs) + share * ahead) / (1 - share))
            size += others * (other.size / len(other.jobs) if other.jobs else self.usual_size)
        before = ahead + others
        batches = int(before // self.full)
        if not batches:
            return free_s[0], before
        batch_s = self.speed.predict_s(size * self.full / before)
        return free_s[batches % len(free_s)] + batches // len(free_s) * batch_s, before % self.full
