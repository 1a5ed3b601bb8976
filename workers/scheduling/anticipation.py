"""Whether to hold a partial batch for a moment, because clients that were just answered often ask again at once.

Greedy batching wastes up to half of the capacity: the first one back starts a call alone, the others wait for all of it.
Anticipatory scheduling (Iyer and Druschel, SOSP 2001, doi.org/10.1145/502034.502046) waits, and learns how long.
"""

import math
from bisect import bisect_left
from collections import deque

TIMES_S = tuple(0.00025 * 2 ** (i / 2) for i in range(25))  # 0.25 ms to 1 s
REMEMBERED_CALLS = 20  # older ones count less and less
MIN_GAIN = 0.075  # as a share of two calls' time: less is noise, and lengthens the tail
ENOUGH = 0.98  # of those expected back: the last one may never come


class Release:
    """A batch that was answered at `at`, with it all that the clients of `jobs` had asked."""

    def __init__(self, at: float, jobs: int, call_s: float) -> None:
        self.at, self.jobs, self.observed_until = at, jobs, at + call_s
        self.missing = self.uncounted = jobs  # `missing` are not back: the oldest release's come first
        self.came = [0] * (len(TIMES_S) + 1)  # how many jobs arrived, by TIMES_S, but no more than `jobs`


class Anticipation:
    """Learns how many jobs arrive within a time of a batch's answers, as a share of that batch's jobs."""

    def __init__(self) -> None:
        self.recent: deque[Release] = deque()  # still observed, the oldest first
        self.came, self.jobs = [0.0] * (len(TIMES_S) + 1), 0.0  # sums; recent releases weigh more

    def arrived(self, now: float, jobs: int) -> None:
        """Note that `jobs` were admitted at once."""
        unclaimed = jobs
        for release in self.recent:
            counted, back = min(jobs, release.uncounted), min(unclaimed, release.missing)
            release.uncounted -= counted
            release.came[bisect_left(TIMES_S, now - release.at)] += counted
            release.missing -= back
            unclaimed -= back

    def answered(self, now: float, jobs: int, call_s: float) -> None:
        """Note that a call of `call_s` was answered, with it all that the clients of `jobs` had asked."""
        while self.recent and self.recent[0].observed_until <= now:
            release, keep = self.recent.popleft(), 1 - 1 / REMEMBERED_CALLS
            self.jobs = keep * self.jobs + release.jobs
            self.came = [keep * old + new for old, new in zip(self.came, release.came, strict=True)]
        if jobs:
            self.recent.append(Release(now, jobs, call_s))

    def hold(
        self, now: float, queued: int, room: int, a: float, b: float, free_s: float
    ) -> tuple[float, int]:
        """Return how long to hold the `queued` jobs, and how many queued jobs end the hold; (0, 0) to run them now.

        A call with n jobs takes `a + b * n` seconds; `room` more fit in; another instance will be free in `free_s`, inf if
        there is none. Jobs that arrive after the call has started wait for the next call. A hold of t saves them that
        wait, and costs the jobs that wait already t; with one instance all clients, since all calls to come start later.
        """
        if not self.jobs or not self.recent or free_s <= 0:
            return 0.0, 0
        last, single = self.recent[-1], free_s == math.inf
        elapsed_s, back, size = now - last.at, last.jobs - last.missing, max(last.jobs, queued)
        missing = sum(release.missing for release in self.recent)
        delayed = 2 * size - back if single else queued
        best_gain, best_s, joined = MIN_GAIN * size * (2 * a + b * size) if single else 0.0, 0.0, 0.0
        expected = before = 0.0  # jobs since the answers: until a time, and until now
        for time_s, came in zip(TIMES_S, self.came, strict=False):
            expected += came / self.jobs * last.jobs
            if (hold_s := time_s - elapsed_s) <= 0:
                before = expected
                continue
            saved_s = a + hold_s if single else min(a, free_s) - hold_s
            if hold_s > a or saved_s <= 0:
                break
            joining = min(expected - (back if single else before), room, missing)
            if (gain := joining * saved_s - delayed * hold_s) > best_gain:
                best_gain, best_s, joined = gain, hold_s, joining
        return (best_s, math.ceil(queued + ENOUGH * joined)) if best_s else (0.0, 0)
