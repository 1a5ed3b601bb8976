"""The instances of the model: how many are loaded, when each will be free, and which may never be."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple

from ..errors import LOADING, STOPPING, Rejected

Ready = Callable[[], Awaitable[Any]]

# A call that takes longer than both, so many times what was predicted and so many seconds, may never return.
OVERDUE_FACTOR, OVERDUE_S = 5, 1.0


def stuck(seconds: float) -> str:
    """Return the sentence for a call that has been running for so long."""
    return f"the model has not returned for {seconds:.0f} s"


class Call(NamedTuple):
    """An instance at work."""

    started_at: float
    size: Any
    ends_at: float  # as predicted
    overdue_at: float


class Instances:
    """`predict_s` tells how long a call of a size takes, `now` the time.

    `on_lost` is called a turn of the event loop after an instance began to wait until it is ready.
    """

    def __init__(
        self,
        predict_s: Callable[[Any], float],
        hang_s: float,
        now: Callable[[], float],
        on_lost: Callable[[], None],
    ) -> None:
        self.predict_s, self.hang_s, self.now, self.on_lost = predict_s, hang_s, now, on_lost
        self.loaded, self.closing = 0, False
        self.load_s = 0.0  # how long the model took to load, the last time
        self.lost_at = 0.0  # when an instance last began to wait until it is ready
        self.calls: list[Call] = []  # the oldest first

    async def until(self, ready: Ready | None) -> Any:
        """Wait until the instance that asks is `ready`; return what that returns. Until then it does not count as loaded.

        As a rule it is ready, and this returns in the same turn of the event loop: before `on_lost`, which then finds it loaded.
        """
        if not ready:
            return None
        self.loaded -= 1
        self.lost_at = self.now()
        asyncio.get_running_loop().call_soon(self.on_lost)
        try:
            return await ready()
        finally:
            self.loaded += 1

    def start(self, size: Any) -> Call:
        """Note a call of `size` that starts now; `end` it."""
        now, predicted_s = self.now(), self.predict_s(size)
        # Until a call was measured nothing is predicted, and the first one builds kernels: it may take long.
        patience_s = max(OVERDUE_S, OVERDUE_FACTOR * predicted_s) if predicted_s else self.hang_s
        call = Call(now, size, now + predicted_s, now + patience_s)
        self.calls.append(call)
        return call

    def end(self, call: Call) -> None:
        self.calls.remove(call)

    @property
    def longest_s(self) -> float:
        """How long the oldest call has been running, 0 if there is none."""
        return self.now() - self.calls[0].started_at if self.calls else 0.0

    @property
    def stuck_s(self) -> float:
        """The same when it is beyond `hang_s`, else 0."""
        return longest_s if (longest_s := self.longest_s) > self.hang_s else 0.0

    def unready(self) -> str:
        """Return why no request at all can be answered; empty while an instance is loaded, none is stuck, and it is not closing.

        It does not follow load: a load balancer would take every replica out at once.
        """
        if self.closing or not self.loaded:
            return STOPPING if self.closing else LOADING
        return stuck(self.stuck_s) if self.stuck_s else ""

    def free_s(self) -> list[float]:
        """In how many seconds each instance will be free, the first one first, but for those that may never be.

        A call that takes longer than predicted is expected to take as much longer again.
        """
        now, idle = self.now(), [0.0] * (self.loaded - len(self.calls))
        return idle + sorted(abs(call.ends_at - now) for call in self.calls if now < call.overdue_at)

    def unavailable(self, free_s: list[float]) -> Rejected | None:
        """Why nothing can be run; None where one of the instances, which will be free in `free_s`, can."""
        if self.closing:
            return Rejected(STOPPING)
        if not self.loaded:
            return Rejected(LOADING, self.lost_at + self.load_s - self.now())
        return None if free_s else Rejected(stuck(self.longest_s), self.longest_s)
