"""A simulator of many replicas behind a load balancer: policies, deaths, retries, an autoscaler. replicas.py is its command.

Each replica is a model of one ModelLoop: its queue, its batches, its no. It is checked against the loop itself on the
planner's virtual clock, and lean enough for 1,000 replicas and a million requests per second.
"""

import heapq
import math
import random
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any

import numpy as np

from loadtests.plan.planner import CostLaw, poisson
from workers.scheduling.admission import ALLOWED_REQUESTS, REJECTION_BATCHES, STANDING_TARGETS
from workers.scheduling.anticipation import Anticipation

POLICIES = ("round robin", "two choices", "least connections", "shared queue")
# More is never advised: a slice of seconds can't show what builds up over an hour.
MOST_BUSY = 0.95
# More than so many times what the load needs do not help either.
MOST_SPARE = 30
MARGIN = 1.1  # of CostModel, where the model's times are steady


@dataclass(frozen=True)
class Retries:
    """What clients do when they are refused: they ask up to `most` times more, each time about `pause_s` later.

    `budget`: how many retries all clients together may make for each request.
    """

    most: int = 0
    pause_s: float = 1.0
    budget: float = math.inf


@dataclass(frozen=True)
class Autoscaler:
    """Every `every_s` it wants `headroom` times the replicas that the load of that time needs.

    They come after the fleet's cold start; one leaves when it was not needed for `idle_s`.
    """

    headroom: float = 1.3
    every_s: float = 5.0
    idle_s: float = 300.0


@dataclass(frozen=True)
class Fleet:
    """`replicas` of one model behind a balancer; `cost` is the law of one of them."""

    cost: CostLaw
    replicas: int = 2
    policy: str = "least connections"
    batch_size: int = 1
    overhead_s: float = 0.0
    refusal_s: float = 0.0
    max_queue: int = 256
    deadline_s: float = 1.0
    target_s: float = 0.5
    cold_start_s: float = 10.0
    # The balancer asks another replica once when one has died or rejects it, while fewer than a fifth are rejected.
    failover: bool = True
    kills: tuple[tuple[float, int], ...] = ()  # when, and how many at once
    retries: Retries = field(default_factory=Retries)
    autoscaler: Autoscaler | None = None

    @property
    def capacity_per_s(self) -> float:
        """Of one replica."""
        return self.batch_size / self.call_s(self.batch_size)

    def call_s(self, n: int) -> float:
        """What a call with n texts takes a replica, HTTP included."""
        return self.cost.seconds(n) + self.overhead_s * n


@dataclass
class Outcome:
    """What became of all requests: when each answered one had come first, and how long it took from then on."""

    duration_s: float
    came_s: array = field(default_factory=lambda: array("d"))  # type: ignore[type-arg]
    took_s: array = field(default_factory=lambda: array("d"))  # type: ignore[type-arg]
    waits_s: array = field(default_factory=lambda: array("d"))  # type: ignore[type-arg]
    offered: int = 0  # by clients, for the first time
    attempts: int = 0  # at replicas
    failed: int = 0  # requests that ended with a no
    lost: int = 0  # died with their replica, and nobody asked again
    failed_s: array = field(default_factory=lambda: array("d"))  # type: ignore[type-arg]
    replicas: list[tuple[float, int]] = field(default_factory=list)  # how many were ready, from when on

    def summary(self) -> dict[str, float]:
        """Rates while the load lasted, from a tenth of it on, and percentiles."""
        came, took = np.array(self.came_s), np.array(self.took_s)
        done = came + took
        from_s = self.duration_s / 10
        in_time = ((done >= from_s) & (done < self.duration_s)).sum()
        late = came >= from_s
        p50, p99 = np.quantile(took[late], [0.5, 0.99]) if late.any() else (math.nan, math.nan)
        return {
            "offered_per_s": self.offered / self.duration_s,
            "goodput_per_s": float(in_time) / (self.duration_s - from_s),
            "answered": len(took) / max(1, self.offered),
            "loss": 1 - len(took) / max(1, self.offered),
            "p50_ms": float(p50) * 1e3,
            "p99_ms": float(p99) * 1e3,
            "mean_wait_ms": float(np.mean(self.waits_s)) * 1e3 if self.waits_s else math.nan,
            "refused": float(self.failed),
            "attempts_per_s": self.attempts / self.duration_s,
        }


class Queue:
    """Who waits at a replica, or at all of them."""

    __slots__ = ("anticipation", "drained_at", "instances", "jobs", "refused_at", "slow")

    def __init__(self) -> None:
        # when it first came, attempts, when it came here
        self.jobs: deque[tuple[float, int, float]] = deque()
        self.instances = 0
        self.drained_at = self.refused_at = -math.inf
        self.slow = 1.0  # how much longer calls take than the law says
        self.anticipation: Anticipation | None = None  # where batches may be held


class Replica:
    """One model loop: at work until `free_at` on `batch`, or it holds one until `held_until` or until `enough` jobs wait."""

    __slots__ = ("batch", "enough", "free_at", "held_until", "load", "owed_s", "place", "queue")

    def __init__(self, queue: Queue) -> None:
        self.queue, self.batch, self.free_at, self.owed_s = queue, [], 0.0, 0.0  # type: ignore[var-annotated]
        self.held_until, self.enough = -math.inf, 0
        self.load = 0  # admitted and not yet answered
        self.place = 0  # in its list of the balancer
        queue.instances += 1


class Balancer:
    """Replicas in lists by how much they have to do, so that the least busy is found at once among a thousand."""

    def __init__(self, policy: str, rng: random.Random) -> None:
        self.policy, self.rng = policy, rng
        self.by_load: list[list[Replica]] = [[]]
        self.all: dict[Replica, None] = {}
        self.order: list[Replica] = []
        self.least = self.turn = 0

    def add(self, replica: Replica) -> None:
        self.all[replica] = None
        self.order.append(replica)
        self._put(replica)

    def remove(self, replica: Replica) -> None:
        del self.all[replica]
        self.order.remove(replica)
        self._take(replica)

    def _put(self, replica: Replica) -> None:
        while len(self.by_load) <= replica.load:
            self.by_load.append([])
        row = self.by_load[replica.load]
        replica.place = len(row)
        row.append(replica)
        self.least = min(self.least, replica.load)

    def _take(self, replica: Replica) -> None:
        row = self.by_load[replica.load]
        last = row.pop()
        if last is not replica:
            row[replica.place] = last
            last.place = replica.place

    def change(self, replica: Replica, by: int) -> None:
        """It has so many more to do."""
        self._take(replica)
        replica.load += by
        self._put(replica)

    def pick(self) -> Replica:
        """Whom the policy asks next."""
        if self.policy == "round robin":
            self.turn = (self.turn + 1) % len(self.order)
            return self.order[self.turn]
        if self.policy == "two choices":
            one, other = (self.order[int(self.rng.random() * len(self.order))] for _ in range(2))
            return one if one.load <= other.load else other
        while not self.by_load[self.least]:
            self.least += 1
        row = self.by_load[self.least]
        return row[int(self.rng.random() * len(row))]


class Simulation:
    """One run; see `simulate`."""

    def __init__(self, fleet: Fleet, duration_s: float, seed: int) -> None:
        self.fleet, self.rng, self.now = fleet, random.Random(seed), 0.0
        self.outcome = Outcome(duration_s)
        self.balancer = Balancer(fleet.policy, self.rng)
        self.events: list[tuple[float, int, Callable[..., None], Any]] = []
        self.number = count()
        self.shared = Queue() if fleet.policy == "shared queue" else None
        self.tokens = 0.0
        self.refused_share = 0.0  # of late
        self.starting = 0
        self.came_since = 0
        self.last_needed: deque[tuple[float, int]] = deque()
        n = fleet.batch_size
        while n > 1 and fleet.call_s(n) * MARGIN > fleet.deadline_s / 2:
            n -= 1  # the loop takes no batch that its own jobs can't afford
        self.most, self.full_s = n, fleet.call_s(n)
        self.calls_s = [0.0, *(fleet.call_s(n) for n in range(1, self.most + 1))]
        target_s = max(fleet.target_s, ALLOWED_REQUESTS * self.full_s / n)
        self.limit_s = min(target_s + self.full_s, max(2 * target_s, self.full_s))
        self.patience_s = STANDING_TARGETS * fleet.target_s + REJECTION_BATCHES * self.full_s
        for _ in range(fleet.replicas):
            self.join(None)
        for at_s, how_many in fleet.kills:
            self.at(at_s, self.kill, how_many)
        if fleet.autoscaler:
            self.at(fleet.autoscaler.every_s, self.scale, fleet.autoscaler)

    def at(self, when: float, what: Callable[..., None], whom: Any) -> None:
        heapq.heappush(self.events, (when, next(self.number), what, whom))

    def run(self, arrivals_s: Iterable[float]) -> Outcome:
        """Let requests come at these times, then see all of them through."""
        events, outcome = self.events, self.outcome
        for came_s in arrivals_s:
            while events and events[0][0] <= came_s:
                self.now, _, what, whom = heapq.heappop(events)
                what(whom)
            self.now = came_s
            outcome.offered += 1
            self.came_since += 1
            self.tokens = min(self.tokens + self.fleet.retries.budget, 100.0)
            self.ask(came_s, 0)
        until_s = outcome.duration_s + 60
        while events and events[0][0] <= until_s:
            self.now, _, what, whom = heapq.heappop(events)
            if what != self.scale:
                what(whom)
        return outcome

    # --- requests -----------------------------------------------------------------------------------------------------

    def ask(self, first_s: float, attempt: int) -> None:
        """A client asks the balancer."""
        admitted = bool(self.balancer.all) and (
            self.offer(first_s, attempt)
            or (self.fleet.failover and self.refused_share < 0.2 and self.offer(first_s, attempt))
        )
        self.refused_share += ((not admitted) - self.refused_share) * 0.01
        if not admitted:
            self.reject(first_s, attempt)

    def offer(self, first_s: float, attempt: int) -> bool:
        """Ask one replica; return whether it takes it."""
        self.outcome.attempts += 1
        replica = self.balancer.pick()
        queue, now, idle = replica.queue, self.now, not replica.batch
        if not idle or queue.jobs:
            ahead = len(queue.jobs) // (self.most * queue.instances)
            wait_s = max(0.0, replica.free_at - now) * (queue is not self.shared)
            wait_s += ahead * self.full_s * queue.slow
            in_it = min(len(queue.jobs) + 1 - ahead * self.most, self.most) if queue is not self.shared else 1
            done_s = wait_s + self.calls_s[max(1, in_it)] * queue.slow
            stands = now - queue.drained_at > STANDING_TARGETS * self.fleet.target_s > 0
            if (
                len(queue.jobs) >= self.fleet.max_queue * queue.instances
                or done_s * MARGIN > self.fleet.deadline_s
                or (stands and wait_s > self.limit_s)
            ):
                if stands and wait_s > self.limit_s:
                    queue.refused_at = now
                replica.owed_s += self.fleet.refusal_s
                return False
        queue.jobs.append((first_s, attempt, now))
        if queue.anticipation:
            queue.anticipation.arrived(now, 1)
        if queue is not self.shared:
            self.balancer.change(replica, 1)
        if idle:
            self.take(replica)
        return True

    def reject(self, first_s: float, attempt: int) -> None:
        """The client gets no answer, and asks again if it does that."""
        retries = self.fleet.retries
        if attempt < retries.most and (retries.budget == math.inf or self.tokens >= 1):
            self.tokens -= retries.budget < math.inf
            pause_s = retries.pause_s * (0.5 + self.rng.random())
            self.at(self.now + pause_s, self.again, (first_s, attempt + 1))
        else:
            self.outcome.failed += 1
            self.outcome.failed_s.append(first_s)

    def again(self, request: tuple[float, int]) -> None:
        self.ask(*request)

    def take(self, replica: Replica) -> None:
        """Start on the next batch, if there is one and it does not pay to hold it."""
        queue, now = replica.queue, self.now
        jobs = queue.jobs
        if jobs and not replica.batch and self.holds(replica):
            return
        batch: list[tuple[float, int, float]] = []
        latest_s = self.fleet.deadline_s - self.calls_s[min(len(jobs), self.most)]
        while jobs and len(batch) < self.most:
            job = jobs.popleft()
            if now - job[2] > latest_s + 1e-9 and (jobs or batch):  # too late, and others wait
                if queue is not self.shared and replica in self.balancer.all:
                    self.balancer.change(replica, -1)
                self.reject(job[0], self.fleet.retries.most)
            else:
                batch.append(job)
                self.outcome.waits_s.append(now - job[2])
        if not jobs and now - queue.refused_at > self.patience_s:
            queue.drained_at = now
        replica.batch = batch
        if batch:
            n = len(batch)
            if queue is self.shared and replica in self.balancer.all:
                self.balancer.change(replica, n)  # who waits is nobody's yet
            law_s = self.calls_s[n]
            if self.fleet.cost.ratios:
                law_s = self.fleet.cost.draw_s(n, self.rng) + self.fleet.overhead_s * n
            took_s = law_s + replica.owed_s
            queue.slow += (took_s / self.calls_s[n] - queue.slow) * 0.1
            replica.owed_s, replica.free_at = 0.0, now + took_s
            self.at(replica.free_at, self.finish, (replica, batch))

    def holds(self, replica: Replica) -> bool:
        """Return whether the replica holds what has queued, as the loop does (`workers/scheduling/holding.py`)."""
        queue, now = replica.queue, self.now
        queued = len(queue.jobs)
        if not queue.anticipation or queued >= self.most:
            replica.held_until = -math.inf
            return False
        if replica.held_until == -math.inf:
            a, b = self.fleet.cost.a_s, self.fleet.cost.b_s + self.fleet.overhead_s
            hold_s, replica.enough = queue.anticipation.hold(now, queued, self.most - queued, a, b, math.inf)
            latest = queue.jobs[0][2] + self.fleet.deadline_s - self.calls_s[queued] * MARGIN
            replica.held_until = min(now + hold_s, latest)
            if replica.held_until > now:
                self.at(replica.held_until, self.end_hold, replica)
        if queued < replica.enough and now < replica.held_until:
            return True
        replica.held_until = -math.inf
        return False

    def end_hold(self, replica: Replica) -> None:
        """Its hold is over, unless it has ended before and another one has begun."""
        if replica.held_until == self.now and not replica.batch:
            self.take(replica)

    def finish(self, call: tuple[Replica, Any]) -> None:
        """Its batch is done."""
        replica, batch = call
        if replica.batch is not batch:
            return  # it has died
        replica.batch = []
        if replica.queue.anticipation:
            replica.queue.anticipation.answered(self.now, len(batch), self.calls_s[len(batch)])
        for first_s, _, came_s in batch:
            if self.now > came_s + self.fleet.deadline_s + 1e-9:
                self.reject(first_s, self.fleet.retries.most)  # a 504: nobody asks again
                continue
            self.outcome.came_s.append(first_s)
            self.outcome.took_s.append(self.now - first_s)
        if replica in self.balancer.all:
            self.balancer.change(replica, -len(batch))
        self.take(replica)

    # --- replicas -----------------------------------------------------------------------------------------------------

    def join(self, _: None) -> None:
        """A replica is ready."""
        replica = Replica(self.shared or Queue())
        if self.most > 1 and not self.shared:
            replica.queue.anticipation = Anticipation()
        self.balancer.add(replica)
        self.outcome.replicas.append((self.now, len(self.balancer.all)))

    def start(self) -> None:
        self.starting += 1
        self.at(self.now + self.fleet.cold_start_s, self.started, None)

    def started(self, _: None) -> None:
        self.starting -= 1
        self.join(None)

    def leave(self, replica: Replica) -> list[tuple[float, int, float]]:
        """The balancer asks it no more; return who waits in its own queue."""
        self.balancer.remove(replica)
        self.outcome.replicas.append((self.now, len(self.balancer.all)))
        replica.queue.instances -= 1
        return [] if replica.queue is self.shared else list(replica.queue.jobs)

    def kill(self, how_many: int) -> None:
        """So many die, and others start in their place. Who was with them is asked again elsewhere."""
        for replica in self.rng.sample(self.balancer.order, min(how_many, len(self.balancer.order))):
            orphans = self.leave(replica) + replica.batch
            replica.batch = []
            replica.queue = Queue()
            self.start()
            for first_s, attempt, _ in orphans:
                if self.fleet.failover and self.balancer.all and self.offer(first_s, attempt):
                    continue
                self.outcome.lost += not self.fleet.failover
                self.reject(first_s, attempt)

    def scale(self, scaler: Autoscaler) -> None:
        """As many as the load of late needs, with headroom; fewer only when they were not needed for long."""
        wanted = max(
            1, math.ceil(self.came_since / scaler.every_s * scaler.headroom / self.fleet.capacity_per_s)
        )
        self.came_since = 0
        self.last_needed.append((self.now, wanted))
        while self.last_needed[0][0] < self.now - scaler.idle_s:
            self.last_needed.popleft()
        have = len(self.balancer.all) + self.starting
        for _ in range(wanted - have):
            self.start()
        if have > (most := max(n for _, n in self.last_needed)) and len(self.balancer.all) > most:
            idlest = self.balancer.order[-1]
            self.leave(idlest)  # it finishes what it has
        self.at(self.now + scaler.every_s, self.scale, scaler)


def simulate(
    fleet: Fleet,
    *,
    rate_per_s: float | Callable[[float], float] = 0.0,
    duration_s: float = 10.0,
    arrivals_s: Iterable[float] | None = None,
    seed: int = 0,
) -> Outcome:
    """Requests come by a Poisson process of this rate, which may change with time, or at `arrivals_s` where given."""
    rng = random.Random(seed + 1)
    if arrivals_s is None:
        if callable(rate_per_s):
            most = max(rate_per_s(duration_s * i / 1000) for i in range(1000)) * 1.05
            arrivals_s = thinned(rng, rate_per_s, most, duration_s)
        elif rate_per_s > 1e4:  # as many at once are ten times as cheap
            drawn = np.random.default_rng(seed).exponential(1 / rate_per_s, int(rate_per_s * duration_s))
            arrivals_s = np.cumsum(drawn).tolist()
        else:
            arrivals_s = poisson(rng, rate_per_s, duration_s)
    return Simulation(fleet, duration_s, seed).run(arrivals_s)


def thinned(
    rng: random.Random, rate_per_s: Callable[[float], float], most: float, duration_s: float
) -> Iterator[float]:
    """Arrivals whose rate changes with time."""
    for due_s in poisson(rng, most, duration_s):
        if rng.random() * most < rate_per_s(due_s):
            yield due_s


# --- planning ---------------------------------------------------------------------------------------------------------


def keeps(fleet: Fleet, rate_per_s: float, loss: float) -> bool:
    """Whether no more than a share `loss` of the requests gets no answer within the deadline."""
    requests = max(2e4, 30 / max(loss, 1e-4), min(20 * fleet.deadline_s * rate_per_s, 5e5))
    duration_s = max(requests / rate_per_s, 2 * fleet.deadline_s)
    return simulate(fleet, rate_per_s=rate_per_s, duration_s=duration_s).summary()["loss"] <= loss


def replicas_for(fleet: Fleet, rate_per_s: float, loss: float) -> int:
    """The fewest replicas that keep `loss`: more are tried until they do, then fewer.

    Raises ValueError where no number of replicas does: calls are too long for the deadline.
    """
    too_few = math.ceil(rate_per_s / fleet.capacity_per_s / MOST_BUSY) - 1
    enough, step = too_few + 1, 1
    while not keeps(replace(fleet, replicas=enough), rate_per_s, loss):
        too_few, enough, step = enough, enough + step, 2 * step
        if enough * fleet.capacity_per_s > MOST_SPARE * (rate_per_s + fleet.capacity_per_s):
            raise ValueError(f"no number of replicas keeps a loss of {loss:g}: allow a longer deadline")
    while enough - too_few > max(1, enough // 200):
        middle = (too_few + enough) // 2
        if keeps(replace(fleet, replicas=middle), rate_per_s, loss):
            enough = middle
        else:
            too_few = middle
    return enough
