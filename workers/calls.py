"""The calls of the model in progress: when each copy will be free, and which may never be."""

from typing import NamedTuple

from workers.speed import Speed

# A call that takes so many times what was predicted, and so many seconds at least, may never return.
OVERDUE, OVERDUE_S = 5, 1.0


class Call(NamedTuple):
    """One call of the model in progress."""

    started_at: float
    size: float
    ends_at: float  # as predicted
    overdue_at: float


class Calls:
    """One for each copy that is at work, the oldest first."""

    def __init__(self, speed: Speed, hang_s: float) -> None:
        self.speed, self.hang_s = speed, hang_s
        self.calls: list[Call] = []

    def __len__(self) -> int:
        return len(self.calls)

    def start(self, now: float, size: float) -> Call:
        """Note a call of `size` that starts now; `end` it."""
        predicted_s = self.speed.predict_s(size)
        # Nothing measured yet: it may as well build its kernels.
        patience_s = max(OVERDUE_S, OVERDUE * predicted_s) if predicted_s else self.hang_s
        call = Call(now, size, now + predicted_s, now + patience_s)
        self.calls.append(call)
        return call

    def end(self, call: Call) -> None:
        self.calls.remove(call)

    def longest_s(self, now: float) -> float:
        """How long the oldest has been running, 0 when there is none."""
        return now - self.calls[0].started_at if self.calls else 0.0

    def free_s(self, now: float, copies: int) -> list[float]:
        """In how many seconds each of the `copies` will be free, the first one first, but for those that may never be.

        A call that takes longer than predicted is expected to take as much longer again.
        """
        idle = [0.0] * (copies - len(self.calls))
        return idle + sorted(abs(call.ends_at - now) for call in self.calls if now < call.overdue_at)
