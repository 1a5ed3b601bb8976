"""What became of a load test, second by second: offered load, goodput, percentiles, and what the server said of itself.

Locust's tables count; this is what its page, its last lines and its exit code are made of. Workers send theirs to the master.
"""

import csv
import math
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loadtests.load.rows import Row

WINDOW_S = 3  # percentiles of a second are those of so many up to it: one alone has too few requests
KEPT_S = 600  # what the page draws
LATE_GENERATOR_MS = 50.0  # p99 of how late requests were sent, above which the numbers are the generator's
FIELDS = ("offered", "good", "rejected", "late", "failed", "wrong", "left")
FAULTS = ("failed", "wrong")  # no objective excuses them
COLUMNS = ("second", *FIELDS, "p50_ms", "p99_ms", "queue_ms", "model_ms", "batch_size")


@dataclass
class Second:
    """The requests of one second: offered when they were due, all else when it happened."""

    counts: Counter[str] = field(default_factory=Counter)
    # correct answers, late ones too, by milliseconds
    answers_ms: Counter[int] = field(default_factory=Counter)
    lateness_ms: Counter[int] = field(default_factory=Counter)  # of the generator
    # replies that said so; queue ms, model ms, batch size
    server: list[float] = field(default_factory=lambda: [0.0] * 4)

    def add(self, other: "Second") -> None:
        """Add another's requests."""
        self.counts.update(other.counts)
        self.answers_ms.update(other.answers_ms)
        self.lateness_ms.update(other.lateness_ms)
        self.server = [a + b for a, b in zip(self.server, other.server, strict=True)]

    def means(self) -> list[float | Any]:
        """Return queue ms, model ms and batch size of a request on average, None where no reply said so."""
        n, *sums = self.server
        return [total / n if n else None for total in sums]


class Goodput:
    """The seconds of one test, by the wall clock, so that those of several machines fit together."""

    def __init__(self) -> None:
        self.began_s = time.time()
        self.ended_s = self.began_s  # when the last request was due
        self.retry_after_s: Counter[int] = Counter()
        self.seconds: dict[int, Second] = {}

    def _at(self, when_s: float) -> Second:
        return self.seconds.setdefault(int(when_s), Second())

    def count(self, row: Row, kind: str) -> None:
        """Count one request that has just ended; health checks are not the model's."""
        if row.kind != "model":
            return
        now_s = time.time()
        due_s = now_s - row.latency_ms / 1000
        self.ended_s = max(self.ended_s, due_s)
        second = self._at(now_s)
        second.counts[kind or "good"] += 1
        if row.attempt == 0:
            due = self._at(due_s)
            due.counts["offered"] += 1
            due.lateness_ms[round((row.sent_s - row.due_s) * 1000)] += 1
        if row.outcome == "200":
            second.answers_ms[round(row.latency_ms)] += 1
        if row.queue_ms == row.queue_ms:
            said = (1.0, row.queue_ms, row.model_ms, row.batch_size)
            second.server = [a + b for a, b in zip(second.server, said, strict=True)]
        if row.retry_after_s == row.retry_after_s:
            self.retry_after_s[round(row.retry_after_s)] += 1

    # --- between workers and master -----------------------------------------------------------------------------------

    def take(self) -> dict[str, Any]:
        """Return what was counted since the last time, for a message, and forget it."""
        seconds = [
            [at, *(dict(c) for c in (one.counts, one.answers_ms, one.lateness_ms)), one.server]
            for at, one in self.seconds.items()
        ]
        message = {"ended_s": self.ended_s, "retry_after_s": dict(self.retry_after_s), "seconds": seconds}
        self.seconds, self.retry_after_s = {}, Counter()
        return message

    def merge(self, message: dict[str, Any]) -> None:
        """Add what a worker took."""
        self.ended_s = max(self.ended_s, message["ended_s"])
        self.retry_after_s.update(message["retry_after_s"])
        for at, counts, answers_ms, lateness_ms, server in message["seconds"]:
            self._at(at).add(Second(Counter(counts), Counter(answers_ms), Counter(lateness_ms), server))

    # --- what it comes to ---------------------------------------------------------------------------------------------

    def series(self) -> list[list[float | None]]:
        """Return COLUMNS for each second of late, the first one 0."""
        if not self.seconds:
            return []
        first, last = min(self.seconds), max(self.seconds)
        rows = []
        for at in range(max(first, last - KEPT_S), last + 1):
            second, window = self.seconds.get(at, Second()), Second()
            for i in range(at - WINDOW_S + 1, at + 1):
                window.add(self.seconds.get(i, Second()))
            percentiles = [percentile(window.answers_ms, share) for share in (0.5, 0.99)]
            counts = [float(second.counts[name]) for name in FIELDS]
            rows.append([float(at - first), *counts, *percentiles, *window.means()])
        return rows

    def total(self) -> Second:
        """Return all seconds in one."""
        total = Second()
        for second in self.seconds.values():
            total.add(second)
        return total

    def per_s(self, limit_s: float) -> tuple[float, float]:
        """Return offered load and goodput while the load lasted.

        Both count from `limit_s` on (or from half of the time): in overload a queue that was empty at first is not a speed.
        """
        duration_s = max(self.ended_s - self.began_s, 1e-3)
        since_s = self.began_s + min(limit_s, duration_s / 2)
        whole = range(math.ceil(since_s), math.floor(self.ended_s))
        counts = [self.seconds[at].counts for at in whole if at in self.seconds]
        if len(whole) < 2:
            counts = [self.total().counts]
        seconds = len(whole) if len(whole) >= 2 else duration_s
        return sum(one["offered"] for one in counts) / seconds, sum(one["good"] for one in counts) / seconds

    def sentences(self, limit_s: float) -> list[str]:
        """Return what came of the test, in words."""
        total, (offered_per_s, good_per_s) = self.total(), self.per_s(limit_s)
        n, p = total.counts, [percentile(total.answers_ms, share) for share in (0.5, 0.95, 0.99)]
        lines = [
            f"Goodput {good_per_s:.1f} correct answers/s within {limit_s:g} s, of {offered_per_s:.1f} requests/s offered "
            f"(counted from {limit_s:g} s on).",
            "Of all: "
            + ", ".join(
                f"{n[name]} {'in time' if name == 'good' else name}" for name in FIELDS[1:] if n[name]
            )
            + ".",
        ]
        if p[0] is not None:
            lines.append(
                "Correct answers took p50 {:.0f} ms, p95 {:.0f} ms, p99 {:.0f} ms, late ones counted.".format(
                    *p
                )
            )
        if total.server[0]:
            means = "{:.1f} ms in the queue, {:.1f} ms in the model, batches of {:.1f}".format(*total.means())
            lines.append(f"On the server, on average (Server-Timing): {means}.")
        if self.retry_after_s:
            shortest, longest = min(self.retry_after_s), max(self.retry_after_s)
            lines.append(f"Rejections said Retry-After {shortest} to {longest} s.")
        if (late_ms := percentile(total.lateness_ms, 0.99) or 0.0) > LATE_GENERATOR_MS:
            lines.append(
                f"The load generator itself was late by {late_ms:.0f} ms (p99): give it a core of its own, or a lower rate."
            )
        return lines

    def verdict(self, limit_s: float, slo_p99_ms: float, slo_goodput: str) -> list[str]:
        """Return what is wrong with the test's end, a sentence each: objectives that were missed, faults, nothing at all."""
        total, (_, good_per_s) = self.total(), self.per_s(limit_s)
        n, p99_ms = total.counts, percentile(total.answers_ms, 0.99)
        if not sum(n.values()):
            return ["no request was sent"]
        missed = []
        if p99_ms is None:
            missed.append("no request got a correct answer")
        if faults := ", ".join(f"{n[name]} {name}" for name in FAULTS if n[name]):
            missed.append(f"{faults}: these are faults, whatever the load")
        if slo_p99_ms and (p99_ms is None or p99_ms > slo_p99_ms):
            missed.append(f"objective missed: p99 {p99_ms or math.inf:g} ms, above {slo_p99_ms:g} ms")
        if slo_goodput.endswith("%"):
            share = 100 * n["good"] / max(1, n["offered"])
            if share < float(slo_goodput[:-1]):
                missed.append(f"objective missed: {share:.1f} % correct and in time, below {slo_goodput}")
        elif slo_goodput and good_per_s < float(slo_goodput):
            missed.append(f"objective missed: goodput {good_per_s:.1f}/s, below {slo_goodput}/s")
        return missed

    def write(self, file: Path) -> None:
        """Write the seconds as CSV."""
        with file.open("w", newline="") as out:
            write_rows(out, self.series())


def write_rows(out: Any, series: Iterable[list[float | None]]) -> None:
    writer = csv.writer(out)
    writer.writerow(COLUMNS)
    writer.writerows(series)


def percentile(histogram: Counter[int], share: float) -> float | Any:
    """Return the value that this share is not above; None for nothing."""
    left = math.ceil(sum(histogram.values()) * share)
    for value in sorted(histogram):
        left -= histogram[value]
        if left <= 0:
            return float(value)
    return None
