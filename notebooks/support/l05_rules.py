"""Lesson 5: the rules of rejection on a virtual clock, and what clients see of them."""

from typing import Any
from unittest import mock

import pandas as pd
from lesson import quick, simulate

from loadtests.load import generator
from loadtests.plan import planner
from workers.loop import ModelLoop

LIMIT_S = 2.0  # the clients' limit
MU, SECONDS = 50, quick(15, 60)  # capacity in texts per second; length of a run
LAW = planner.CostLaw(a_s=0.0, b_s=1 / MU)


class Blindfolded(ModelLoop):
    """The same loop, but its door lets everybody in."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.admission.rejection = lambda *asked: None  # type: ignore[method-assign]


def overload(rho: float, *, door: bool = True, **rules: Any) -> pd.DataFrame:
    """What clients see, in a simulation, when `rho` times the capacity comes; without a door it is the loop that rejects."""
    no_rule = {"max_queue": 10**9, "deadline_s": 1e6, "queue_target_s": 0, "overhead_s": 0}
    with mock.patch.object(planner, "ModelLoop", ModelLoop if door else Blindfolded):
        return simulate(LAW, rate_per_s=rho * MU, duration_s=SECONDS, **(no_rule | rules))


def goodput(df: pd.DataFrame) -> float:
    """Right answers within the clients' limit, per second."""
    return generator.summary(df, LIMIT_S)["goodput_per_s"]


def median_s(df: pd.DataFrame, outcome: str) -> float:
    """The median time to this reply, in the second half of the run."""
    late = df[(df.outcome == outcome) & (df.due_s > SECONDS / 2)]
    return late.latency_ms.median() / 1000
