"""The planner's arithmetic against theory, and its simulation against queueing theory and the real loop's promises."""

import numpy as np
import pandas as pd
import pytest

from loadtests.load import generator
from loadtests.modes import MODES
from loadtests.plan import planner
from loadtests.plan.planner import CostLaw, Overhead, Setting
from workers import tasks
from workers.settings import Settings

LAW = CostLaw(a_s=0.004, b_s=0.001)


def measured(a_s: float, b_s: float, noise: float = 0.0) -> pd.DataFrame:
    """Calls that follow a law, with relative noise."""
    rng = np.random.default_rng(0)
    n = np.repeat([1, 2, 4, 8, 16, 32], 50)
    return pd.DataFrame({"texts": n, "seconds": (a_s + b_s * n) * (1 + noise * rng.standard_normal(len(n)))})


@pytest.mark.parametrize(("a_s", "b_s"), [(0.004, 0.001), (0.0, 0.003), (0.02, 0.0)])
def test_fit_recovers_a_known_law(a_s: float, b_s: float) -> None:
    law = planner.fit(measured(a_s, b_s))
    assert (law.a_s, law.b_s) == (pytest.approx(a_s, abs=1e-9), pytest.approx(b_s, abs=1e-9))
    noisy = planner.fit(measured(a_s, b_s, noise=0.05))
    assert noisy.seconds(8) == pytest.approx(a_s + 8 * b_s, rel=0.03)
    assert noisy.spread == pytest.approx(0.05, rel=0.4)


def test_law_is_that_of_the_mean_call_as_the_throughput_is() -> None:
    calls = measured(0.004, 0.001)
    calls.loc[::10, "seconds"] *= 11  # one text in ten is long
    law = planner.fit(calls)
    assert law.seconds(32) == pytest.approx(2 * 0.036)
    assert law.spread == pytest.approx(1.5, rel=0.05)
    alike = planner.fit(calls[calls["texts"] == 1])
    assert (alike.seconds(1), alike.spread) == (pytest.approx(0.01), pytest.approx(1.5, rel=0.05))


@pytest.mark.parametrize("load", [0.3, 0.7])
def test_one_by_one_the_wait_is_that_of_an_md1_queue(load: float) -> None:
    service_s = 0.005
    found = [
        planner.simulate(
            CostLaw(0.0, service_s),
            max_queue=10**6,
            deadline_s=1e6,
            rate_per_s=load / service_s,
            duration_s=60,
            seed=seed,
            overhead_s=0.0,
        )["queue_ms"].mean()
        for seed in range(3)
    ]
    # Pollaczek and Khinchine's formula, constant service
    theory_ms = 1000 * load * service_s / (2 * (1 - load))
    assert np.mean(found) == pytest.approx(theory_ms, rel=0.05)


@pytest.mark.parametrize(("batch_size", "instances"), [(1, 1), (8, 1), (32, 1), (8, 2)])
def test_in_overload_goodput_is_the_predicted_capacity(batch_size: int, instances: int) -> None:
    capacity = planner.predict_capacity(LAW, batch_size, instances, overhead_s=0.0005)
    df = planner.simulate(
        LAW,
        batch_size=batch_size,
        instances=instances,
        rate_per_s=3 * capacity,
        deadline_s=1.0,
        duration_s=5,
        overhead_s=0.0005,
    )
    assert generator.summary(df, limit_s=1.0)["goodput_per_s"] == pytest.approx(capacity, rel=0.03)
    assert set(df["outcome"]) <= {"200", "503", "504"}


def test_lone_request_wakes_the_server_and_a_rejection_has_its_cost() -> None:
    law, still = CostLaw(0.0, 0.01), {"overhead_s": 0.0, "deadline_s": 1.0, "duration_s": 10.0}
    quiet = planner.simulate(law, arrivals_s=[1.0, 2.0, 2.001], waking_s=0.005, **still)
    assert quiet["latency_ms"].tolist() == pytest.approx([15, 15, 29])
    free, dear = (
        generator.summary(planner.simulate(law, rate_per_s=1000, refusal_s=price_s, **still), 1.0)[
            "goodput_per_s"
        ]
        for price_s in (0.0, 0.0003)
    )
    # The core's seconds: 0.01 for each of x answers, 0.0003 for each of the 1000 - x refusals.
    assert free == pytest.approx(100, rel=0.03) and dear == pytest.approx((1 - 0.3) / 0.0097, rel=0.05)


def test_same_seed_gives_the_same_traffic() -> None:
    once, again = (planner.simulate(LAW, rate_per_s=100, duration_s=5, seed=7) for _ in range(2))
    pd.testing.assert_frame_equal(once, again)


@pytest.mark.slow
def test_request_of_gthread_costs_something_besides_the_model() -> None:
    found = planner.measure_overhead(duration_s=0.5, mode=MODES["gthread-1x8"])
    assert 0 < found.overhead_s < 1 and found.waking_s >= 0 and 0 < found.refusal_s < 1


def test_requests_come_when_they_are_said_to() -> None:
    df = planner.simulate(
        CostLaw(a_s=0.004, b_s=0.0), arrivals_s=[0.5, 0.501, 2.0], duration_s=3.0, overhead_s=0.0
    )
    assert df["due_s"].tolist() == [0.5, 0.501, 2.0]
    assert df["queue_ms"].tolist() == pytest.approx([0, 3, 0])


def test_rows_are_those_of_a_load_test() -> None:
    columns = "due_s sent_s latency_ms outcome kind queue_ms model_ms batch_size retry_after_s attempt"
    assert list(planner.simulate(LAW, rate_per_s=10, duration_s=1).columns) == columns.split()


def test_says_whether_batching_pays() -> None:
    assert "does not pay" in planner.verdict(CostLaw(0.0, 0.01), 0.0)
    assert "Batching pays: 4.44 times" in planner.verdict(LAW, 0.0)
    assert "5.00 times at most" in planner.verdict(LAW, 0.0)


def test_recommends_the_first_setting_that_keeps_the_latency() -> None:
    choices = [Setting(LAW, Overhead(0.0), batch_size) for batch_size in (1, 4, 32)]
    assert planner.recommend(choices, 100, 100, 2.0) is choices[0]
    assert planner.recommend(choices, 400, 100, 2.0) is choices[1]
    assert planner.recommend(choices, 750, 1000, 2.0) is choices[2]
    assert planner.recommend(choices, 5_000, 100, 2.0) is None


def test_as_many_texts_of_each_size_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planner, "load_model", lambda settings: (len, lambda text, _: tasks.Query(text)))
    df = planner.measure(Settings(), kinds=["short", "mixed"], sizes=(1, 4, 8), budget_s=0.0)
    assert (df.groupby(["kind", "texts"])["texts"].sum() == 8).all()
