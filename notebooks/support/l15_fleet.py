"""Lesson 15: what the fleet simulator does not have: stale views, fan-out and hedging, storms and signals over time."""

import math
import random

import numpy as np

from loadtests.plan.fleet import Autoscaler, Fleet, Retries, simulate
from loadtests.plan.planner import CostLaw

# Nine texts in ten are short, one takes nine times as long: 20 ms on average.
UNEVEN = CostLaw(0.0, 0.02, {1: [0.556] * 9 + [5.0]})
EVEN = CostLaw(0.0, 0.02)
# One call in a hundred takes about ten times as long, whatever the text: a server that collects garbage, or a noisy neighbour.
HICCUPS = CostLaw(
    0.0, 0.02, {1: [0.8 + 0.2 * i / 989 for i in range(990)] + [8 + 0.6 * i for i in range(10)]}
)


def stale_p99_ms(
    policy: str, age_s: float, *, servers: int = 20, load: float = 0.8, seconds: float = 60.0
) -> float:
    """The p99 time to the answer, in ms, where the balancers see each server's queue as it was up to `age_s` ago.

    policy: "least connections" takes the one that looks shortest, "two choices" the shorter-looking of two at random.
    """
    rng, free_s, seen = random.Random(1), [0.0] * servers, [0.0] * servers
    now, looked, took = 0.0, -age_s, []
    while (now := now + rng.expovariate(load * servers / 0.02)) < seconds:
        if now - looked >= age_s:
            looked, seen = now, [max(0.0, free - now) for free in free_s]
        if policy == "two choices":
            one, other = rng.sample(range(servers), 2)
            at = one if seen[one] <= seen[other] else other
        else:
            least = min(seen)
            at = rng.choice([i for i, work in enumerate(seen) if work == least])
        call_s = UNEVEN.draw_s(1, rng)
        free_s[at] = max(free_s[at], now) + call_s
        took.append(free_s[at] - now)
    return float(np.quantile(took, 0.99)) * 1000


def answer_times_ms(load: float = 0.5, servers: int = 20) -> np.ndarray:
    """Times to the answer, in ms, of a fleet with hiccups behind least connections."""
    fleet = Fleet(HICCUPS, servers, deadline_s=30.0, target_s=0.0)
    outcome = simulate(fleet, rate_per_s=load * servers / 0.02, duration_s=60)
    return np.array(outcome.took_s) * 1000


def fan_out(times_ms: np.ndarray, parts: int, pages: int = 20_000) -> np.ndarray:
    """How long a page takes that asks for so many parts at once and needs the last of them."""
    return np.random.default_rng(0).choice(times_ms, (pages, parts)).max(1)


def hedged(times_ms: np.ndarray, after_ms: float, requests: int = 200_000) -> tuple[np.ndarray, float]:
    """Times of requests that are sent once more, elsewhere, when `after_ms` have passed; and how much load that adds."""
    first, second = np.random.default_rng(1).choice(times_ms, (2, requests))
    late = first > after_ms
    return np.where(late, np.minimum(first, after_ms + second), first), float(late.mean())


def storm(retries: Retries, *, load: float = 0.85, seconds: float = 40.0) -> np.ndarray:
    """Answers per second, second by second, as a share of the capacity: for 3 s from second 10 on four times the load comes.

    A rejection costs a replica 2 ms: parsing, logging, TLS. `Retries.pause_s` is the clients' mean pause.
    """
    fleet = Fleet(EVEN, 4, deadline_s=1.0, refusal_s=0.002, retries=retries, failover=False)
    rate = load * 4 * fleet.capacity_per_s
    outcome = simulate(
        fleet, rate_per_s=lambda at_s: rate * (4 if 10 <= at_s < 13 else 1), duration_s=seconds
    )
    done = np.array(outcome.came_s) + np.array(outcome.took_s)
    return np.histogram(done, np.arange(seconds + 1))[0] / (4 * fleet.capacity_per_s)


def signals(load: float, *, servers: int = 4) -> dict[str, float]:
    """What a dashboard shows at this load: share of time busy, requests inside per replica, mean wait in ms, rejections."""
    fleet = Fleet(EVEN, servers, deadline_s=1.0)
    rate, seconds = load * servers / 0.02, 60
    outcome = simulate(fleet, rate_per_s=rate, duration_s=seconds)
    answered_per_s = len(outcome.took_s) / seconds
    return {
        "busy": answered_per_s * 0.02 / servers,
        "inside, per replica": answered_per_s * float(np.mean(outcome.took_s)) / servers,
        "wait, ms": float(np.mean(outcome.waits_s)) * 1000,
        "rejected": outcome.failed / outcome.offered,
    }


def rejected_in_a_rush(headroom: float, *, cold_start_s: float, over_s: float) -> float:
    """The share that is rejected while a load of 40 requests/s doubles within `over_s`; a replica does 10."""
    scaler = Autoscaler(headroom, every_s=5.0)
    fleet = Fleet(CostLaw(0.0, 0.1), 6, cold_start_s=cold_start_s, autoscaler=scaler)

    def rate(at_s: float) -> float:
        return 40 * (1 + min(1.0, max(0.0, (at_s - 200) / over_s)))

    outcome = simulate(fleet, rate_per_s=rate, duration_s=200 + over_s + 100)
    return len([at_s for at_s in outcome.failed_s if at_s >= 200]) / outcome.offered


def least_headroom(cold_start_s: float, over_s: float, bearable: float = 0.001) -> float:
    """The smallest headroom with which no more than `bearable` of the requests are rejected."""
    headrooms = [1.05 + 0.05 * i for i in range(50)]
    enough = (
        h for h in headrooms if rejected_in_a_rush(h, cold_start_s=cold_start_s, over_s=over_s) <= bearable
    )
    return next(enough, math.inf)
