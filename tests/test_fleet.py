"""The simulated fleet against queueing theory, against the real loop on its virtual clock, and where a storm begins."""

import asyncio
import math
import random
from dataclasses import replace

import pytest

from loadtests.load import generator
from loadtests.plan import fleet, fleet_report, planner, replicas
from loadtests.plan.fleet import Autoscaler, Fleet, Outcome, Retries, simulate
from loadtests.plan.planner import CostLaw
from tests.support.virtual_clock import now, on_virtual_clock, serving
from workers.loop import ModelLoop

TEN_MS = CostLaw(0.0, 0.01)
# Without admission: every request waits.
OPEN = Fleet(TEN_MS, 1, deadline_s=1e6, max_queue=10**6, target_s=0.0)
# Exponential service: the quantiles of it.
EXPONENTIAL = CostLaw(0.0, 0.01, {1: [-math.log(1 - (i + 0.5) / 500) for i in range(500)]})


@pytest.mark.parametrize("load", [0.5, 0.8])
def test_one_replica_is_an_md1_queue(load: float) -> None:
    found = simulate(OPEN, rate_per_s=load * 100, duration_s=1000).summary()
    assert found["mean_wait_ms"] == pytest.approx(10 * load / (2 * (1 - load)), rel=0.08)


def test_shared_queue_is_an_mmn_queue() -> None:
    """Erlang's C formula for 5 servers at 80 %."""
    n, load = 5, 0.8
    a = n * load
    waits = a**n / math.factorial(n) / (1 - load)
    erlang_c = waits / (sum(a**k / math.factorial(k) for k in range(n)) + waits)
    shared = replace(OPEN, cost=EXPONENTIAL, replicas=n, policy="shared queue")
    found = simulate(shared, rate_per_s=load * n * 100, duration_s=300).summary()
    assert found["mean_wait_ms"] == pytest.approx(erlang_c * 10 / (n * (1 - load)), rel=0.08)


def test_round_robin_is_a_shared_queue_where_all_take_the_same_time() -> None:
    """M/D/n: the n-th after me gets my server, whoever deals them out."""
    robin, shared = (
        simulate(replace(OPEN, replicas=8, policy=policy), rate_per_s=720, duration_s=30).summary()
        for policy in ("round robin", "shared queue")
    )
    assert robin["mean_wait_ms"] == pytest.approx(shared["mean_wait_ms"])


def test_two_choices_wait_as_mitzenmacher_and_vvedenskaya_say() -> None:
    """Time in the system: the sum of load^(2^i - 2) services; of one random choice it would be 1 / (1 - load)."""
    load, n = 0.9, 100
    theory = 10 * sum(load ** (2**i - 2) for i in range(1, 12))
    two = replace(OPEN, cost=EXPONENTIAL, replicas=n, policy="two choices")
    found = simulate(two, rate_per_s=load * n * 100, duration_s=8).summary()
    assert found["mean_wait_ms"] + 10 == pytest.approx(theory, rel=0.08)


@pytest.mark.parametrize("batch_size", [1, 32])
@pytest.mark.parametrize("times", [0.5, 0.8, 2.0])
def test_replica_does_as_the_real_loop(batch_size: int, times: float) -> None:
    law = CostLaw(0.01, 0.0005)
    rate = times * planner.predict_capacity(law, batch_size)
    options = {"batch_size": batch_size, "deadline_s": 1.0}
    real = planner.simulate(law, rate_per_s=rate, duration_s=15, **options)
    arrivals_s = real["due_s"].tolist()
    one = Fleet(law, 1, overhead_s=planner.OVERHEAD_S, failover=False, **options)
    found = simulate(one, arrivals_s=arrivals_s, duration_s=15).summary()
    expected = generator.summary(real, 1.0)
    assert found["goodput_per_s"] == pytest.approx(expected["goodput_per_s"], rel=0.05)
    assert found["p50_ms"] == pytest.approx(expected["p50_ms"], rel=0.1)
    assert found["refused"] == pytest.approx(expected["503"] + expected["504"], rel=0.1)


def test_replica_holds_a_batch_where_the_real_loop_does() -> None:
    """8 users who ask again 1 to 3 ms after their answer, of a call that takes 100 ms: the replica is asked when the loop was."""
    arrivals_s: list[float] = []
    waits_s: list[float] = []

    @on_virtual_clock
    async def closed_loops() -> None:
        rng = random.Random(0)

        async def model(queries: list[str]) -> list[str]:
            await asyncio.sleep(0.1)
            return queries

        async def user(loop: ModelLoop) -> None:
            while now() < 20:
                arrivals_s.append(now())
                waits_s.append((await loop.submit("a")).queue_s)
                await asyncio.sleep(rng.uniform(0.001, 0.003))

        async with serving(model, batch_size=32, budget_s=10.0) as loop:
            for n in (1, 8, 32):
                loop.cost_model.observe(n, 0.1)
            await asyncio.gather(*(user(loop) for _ in range(8)))

    closed_loops()
    one = Fleet(CostLaw(0.1, 0.0), 1, batch_size=32, deadline_s=10.0, failover=False)
    found = simulate(one, arrivals_s=sorted(arrivals_s), duration_s=20)
    assert len(found.waits_s) == len(waits_s) > 20 * 70, "79 a second are possible, 40 greedily"
    real_ms = 1000 * sum(waits_s) / len(waits_s)
    assert real_ms < 2
    # Who misses a batch here waits for a whole call, where in a closed loop all would have come later.
    assert found.summary()["mean_wait_ms"] < 10, "52 where nothing is held"


def test_death_costs_nobody_an_answer_where_another_replica_is_asked() -> None:
    five = Fleet(TEN_MS, 5, kills=((1.0, 2),), cold_start_s=2.0)
    saved, lost = (
        simulate(replace(five, failover=failover), rate_per_s=330, duration_s=5) for failover in (True, False)
    )
    assert (saved.failed, len(saved.took_s)) == (0, saved.offered)
    assert lost.failed > 0
    assert [n for _, n in saved.replicas][-3:] == [3, 4, 5]


def test_nobody_is_counted_twice_or_forgotten() -> None:
    busy = Fleet(TEN_MS, 3, kills=((1.0, 2),), retries=Retries(2, 0.05), refusal_s=0.0005)
    outcome = simulate(busy, rate_per_s=600, duration_s=4)
    assert len(outcome.took_s) + outcome.failed == outcome.offered


def test_retries_without_a_budget_take_the_answers_time_and_with_one_do_not() -> None:
    busy = Fleet(TEN_MS, 4, refusal_s=0.0005)
    good = {
        retries: simulate(replace(busy, retries=retries), rate_per_s=1000, duration_s=5).summary()[
            "goodput_per_s"
        ]
        for retries in (Retries(), Retries(50, 0.02), Retries(50, 0.02, 0.1))
    }
    none, storm, budget = good.values()
    assert storm < 0.8 * none
    assert budget > 0.9 * none


def test_replicas_follow_the_load_after_their_cold_start() -> None:
    grows = Fleet(TEN_MS, 1, cold_start_s=3.0, autoscaler=Autoscaler(headroom=1.2, every_s=1.0, idle_s=5.0))
    outcome = simulate(grows, rate_per_s=lambda s: 250 if 5 <= s < 15 else 50, duration_s=30)
    grown_at = next(at for at, n in outcome.replicas if n >= 3)
    assert 8 <= grown_at <= 10
    assert outcome.replicas[-1][1] == 1
    assert all(5 <= at < 15 for at in outcome.failed_s)


def test_large_fleet_needs_less_to_spare() -> None:
    small, large = (fleet.replicas_for(Fleet(TEN_MS, deadline_s=0.05), rate, 0.01) for rate in (90, 4500))
    assert small == 2
    assert large < 50, "busy for more than nine tenths"


def test_same_seed_gives_the_same_fate() -> None:
    once, again = (
        simulate(Fleet(TEN_MS, 5, "two choices"), rate_per_s=400, duration_s=3).summary() for _ in range(2)
    )
    assert once == again


def test_law_is_read_as_the_planner_prints_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert replicas.law("10+0.5n") == CostLaw(0.01, 0.0005)
    assert replicas.law("20") == CostLaw(0.02, 0.0)
    replicas.main(["--rate", "300", "--replica-ms", "10", "--deadline-s", "0.2", "--loss", "0.01"])
    assert "least connections" in capsys.readouterr().out


def test_advice_says_from_where_on_retries_cost_answers() -> None:
    said = fleet_report.storm_advice([1, 2, 3], {"no retries": [1, 1, 0.9], "some": [1, 0.8, 0.4]})
    assert "- some: 10 % of the goodput lost from 2× the capacity on, half of it from 3× on." in said


@pytest.mark.parametrize(
    "option", ["--rate=-5", "--rate=0", "--batch=0", "--loss=0", "--replica-ms=0", "--deadline-s=nan"]
)
def test_wrong_number_ends_with_a_sentence(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        replicas.main([option])
    assert f"argument {option.partition('=')[0]}: " in capsys.readouterr().err


def test_answer_after_its_deadline_is_none() -> None:
    # One call in ten takes five times as long, which is too long for an answer in time.
    uneven = CostLaw(0.0, 0.01, {1: [0.8] * 9 + [5.0]})
    found = simulate(replace(OPEN, cost=uneven, deadline_s=0.03), rate_per_s=1, duration_s=2000).summary()
    assert found["loss"] == pytest.approx(0.1, abs=0.02)
    with pytest.raises(ValueError, match="allow a longer deadline"):
        fleet.replicas_for(replace(OPEN, cost=uneven, deadline_s=0.03, policy="two choices"), 100, 0.001)


def test_percentiles_are_those_of_the_load_without_its_first_tenth() -> None:
    """A fleet that has just started answers at once: that says nothing of the load."""
    outcome = Outcome(duration_s=10.0)
    for came_s, took_s in ((0.1, 0.001), (0.2, 0.001), (5.0, 0.2), (6.0, 0.2)):
        outcome.came_s.append(came_s)
        outcome.took_s.append(took_s)
    assert outcome.summary()["p50_ms"] == pytest.approx(200)
