"""When a job that came now would be answered, and how large a batch those who wait can afford."""

import math

from workers.jobs import JobQueue, Lane
from workers.scheduling.cost_model import CostModel

# A larger job counts as this many usual ones: one giant, even a refused one, must not change who else is let in.
OUTSIZED = 20
# A call that takes this many times its fixed cost already gives 19/20 of what batching can give at most.
PAYS = 20


class WaitEstimate:
    """Looks ahead over `queue` with `cost_model`. `plan` before each batch; what it works out serves all requests until the next."""

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
        """Note that somebody came with `jobs` of `size` altogether, admitted or not."""
        size = min(size, jobs * OUTSIZED * self.usual_size or size)
        lane.offered += size
        self.usual_size += (size / jobs - self.usual_size) * (0.05 if self.usual_size else 1)

    def plan(self, now: float, instances: int) -> None:
        """Choose the largest batch that its own jobs can afford.

        It may take half the budget: then a job that just missed the batch before is still in time. It may take more
        if enough work comes to fill it in the rest of the budget: size = rate * (budget - seconds(size)). But beyond
        an eighth of the budget it grows only as far as that pays, see PAYS.
        """
        if now < self.planned_at + 0.001:
            return  # what takes so little time can wait
        for lane in (self.queue.singles, self.queue.lists):
            lane.measure(now - self.planned_at, min(1.0, self.budget_s))
        self.planned_at, self.instances = now, instances
        a, b, budget_s = self.cost_model.a, self.cost_model.b, self.budget_s / self.cost_model.margin
        rate = (self.queue.singles.rate + self.queue.lists.rate) / instances
        if b:
            most = max((budget_s / 2 - a) / b, rate * (budget_s - a) / (1 + rate * b))
            self.affordable = min(most, max((budget_s / 8 - a) / b, (PAYS - 1) * a / b))
            usual_size = self.usual_size or 1
            self.affordable = max(1, self.affordable // usual_size) * usual_size
        else:  # a larger batch costs the same, as far as is known
            self.affordable = math.inf
        self.full_size = min(self.affordable, self.batch_size * self.usual_size)
        self.full_s = self.cost_model.predict_s(max(self.full_size, self.usual_size))
        self.usual_s = self.full_s * self.usual_size / self.full_size if self.full_size else self.full_s

    def __call__(self, free_s: list[float], lane: Lane, jobs: int, size: float) -> tuple[float, float]:
        """In how many seconds the model would start on the first of `jobs` that came now, and be done with the last.

        `free_s`: in how many seconds each instance of the model will be free, the first one first.
        """
        own = size / jobs
        wait_s, before = self._starts_in_s(free_s, lane, len(lane.jobs), lane.size, own)
        last_s = wait_s
        if jobs > 1:
            ahead = len(lane.jobs) + jobs - 1, lane.size + size - own
            last_s, before = self._starts_in_s(free_s, lane, *ahead, own)
        # Those who come until then make its batch longer.
        after = last_s * (self.queue.singles.rate + self.queue.lists.rate)
        if len(lane.jobs) + jobs < self.batch_size:
            wait_s += self.hold_s  # but a hold ends in time for every deadline, so `last_s` is without it
        return wait_s, last_s + self.cost_model.predict_s(max(own, min(before + own + after, self.full_size)))

    def _starts_in_s(
        self, free_s: list[float], lane: Lane, ahead: float, size: float, own: float
    ) -> tuple[float, float]:
        """In how many seconds a job's batch would start, and what is in that batch before it, in size.

        `ahead` jobs of `size` altogether are before it in its `lane`; its `own` size is not among them.
        """
        other = self.queue.lists if lane is self.queue.singles else self.queue.singles
        if other.jobs or other.rate:
            # Jobs of the other lane go in between, those there and those still to come: at most one for each of ours.
            share = min(0.5, other.rate * self.full_s / (self.full_size or 1) / self.instances)
            others = min(ahead + 1, (len(other.jobs) + share * ahead) / (1 - share))
            ahead += others
            size += others * (other.size / len(other.jobs) if other.jobs else self.usual_size)
        batches = int(max(ahead // self.batch_size, math.ceil((size + own) / self.affordable - 1e-9) - 1))
        if batches < 1:
            return free_s[0], size
        full = max(ahead / self.batch_size, size / self.affordable, batches)
        batch_s = self.cost_model.predict_s(size / full)
        return free_s[batches % len(free_s)] + batches // len(free_s) * batch_s, size - batches * size / full
