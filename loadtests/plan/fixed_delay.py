"""The fixed batching delay that other servers have, to compare with: a partial batch is held for so long, whether or not anybody comes.

    FIXED_DELAY_MS=10 BATCH_SIZE=32 uvicorn loadtests.plan.fixed_delay:app

0 is greedy batching: a free model takes what has queued.
"""

import math
import os
from dataclasses import dataclass
from typing import Any

from workers.loop import ModelLoop
from workers.scheduling.holding import Holding


class FixedHold(Holding):
    """Holds each partial batch for `delay_s` from the arrival of its first job."""

    def __init__(self, delay_s: float, *components: Any) -> None:
        super().__init__(*components)
        self.delay_s = delay_s

    def plan_hold(self) -> tuple[float, int]:
        batch_size = self.estimate.batch_size
        left_s = min(job.enqueued_at for job in self.queue) + self.delay_s - self.now()
        return (left_s, batch_size) if left_s > 0 and len(self.queue) < batch_size else (0.0, 0)

    def next_free_s(self) -> float:
        return math.inf


@dataclass(eq=False)
class FixedDelay(ModelLoop):
    """The model loop with that."""

    delay_s: float = 0.0

    def make_holding(self, *components: Any) -> FixedHold:
        return FixedHold(self.delay_s, *components)


def install(delay_s: float) -> None:
    """Let every loop of this process hold its batches so, also those that are there already."""
    Holding.delay_s = delay_s  # type: ignore[attr-defined]
    Holding.plan_hold = FixedHold.plan_hold  # type: ignore[assignment]
    Holding.next_free_s = FixedHold.next_free_s  # type: ignore[assignment]


def __getattr__(name: str) -> Any:
    """The server, only when it is asked for: the simulators need the class alone."""
    if name != "app":
        raise AttributeError(name)
    install(float(os.environ["FIXED_DELAY_MS"]) / 1000)
    from server import app

    return app
