"""What the page draws: the last model calls, or the last steps of the token loop. Recorded only while a page polls."""

import time
from collections import deque
from itertools import count, islice
from typing import Any

from workers.generation.scheduler import Sequence, Step
from workers.generation.token_loop import TokenLoop
from workers.metrics import Metrics

FORGET_S = 5.0  # without a poll: then no page is open


class RecentBatches:
    """The last model calls."""

    def __init__(self, metrics: Metrics) -> None:
        self.metrics, self.polled_at, self.count = metrics, 0.0, 0
        self.batches: deque[dict[str, Any]] = deque(maxlen=48)

    def poll(self) -> list[dict[str, Any]]:
        """Return the last model calls since the first poll. Poll again within FORGET_S to miss none."""
        self.polled_at = time.monotonic()
        if not self.metrics.observer:
            self.batches.clear()
            self.metrics.observer = self.record
        return list(self.batches)

    def record(self, size: int, dispatched_because: str, model_s: float, waits_s: list[float]) -> None:
        """Record a model call; stop when no page polls any more."""
        if time.monotonic() - self.polled_at > FORGET_S:
            self.metrics.observer = None
            return
        self.count += 1
        self.batches.append(
            {
                "n": self.count,
                "size": size,
                "dispatched_because": dispatched_because,
                "model_s": round(model_s, 4),
                "wait_s": round(max(waits_s, default=0.0), 4),
            }
        )


class RecentSteps:
    """The last steps of the token loop: which sequence had how many tokens in which slot, and which have ended, and why.

    `steps`: {"n": its number, "s": seconds, "rows": [[slot, sequence, tokens, 1 of a prompt or 0 of decode], …]}
    `ended`: [sequence, reason, number of the last step before]
    """

    def __init__(self, loop: TokenLoop) -> None:
        self.loop, self.polled_at, self.count = loop, 0.0, 0
        self.steps: deque[dict[str, Any]] = deque(maxlen=512)
        self.ended: deque[tuple[int, str, int]] = deque(maxlen=512)
        self.numbers: dict[Sequence, int] = {}  # of sequences that have not ended
        self.number = count(1)

    def poll(self, after: int) -> dict[str, Any]:
        """Return what came after step `after`. Poll again within FORGET_S to miss nothing."""
        self.polled_at = time.monotonic()
        if not self.loop.observer:
            self.steps.clear()
            self.numbers.clear()
            self.loop.observer = self.record
        self.note_ends()
        scheduler = self.loop.scheduler
        first = max(0, len(self.steps) - max(0, self.count - after))
        return {
            "slots": self.loop.limits.slots,
            "capacity": self.loop.limits.capacity,
            "lengths": {sequence.slot: sequence.cached for sequence in scheduler.running},
            "waiting_tokens": self.loop.admission.waiting_tokens,
            "steps": list(islice(self.steps, first, None)),
            "ended": [one for one in self.ended if one[2] >= after],
        }

    def record(self, step: Step, step_s: float) -> None:
        """Record a step that has ended; stop when no page polls any more."""
        if time.monotonic() - self.polled_at > FORGET_S:
            self.loop.observer = None
            return
        self.count += 1
        rows = []
        for sequence, row in zip(step.sequences, step.rows):
            if sequence not in self.numbers:
                self.numbers[sequence] = next(self.number)
            is_prompt = not (row.choice and row.choice.generated)
            rows.append([row.slot, self.numbers[sequence], len(row.ids), int(is_prompt)])
        self.steps.append({"n": self.count, "s": round(step_s, 4), "rows": rows})
        self.note_ends()

    def note_ends(self) -> None:
        """Note which sequences have ended since the last time."""
        for sequence in [one for one in self.numbers if one.reason]:
            self.ended.append((self.numbers.pop(sequence), sequence.reason, self.count))
