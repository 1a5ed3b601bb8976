"""Who is admitted, on a virtual clock: in time, near the target, at the full rate, whatever the cost law and the load."""

import ast
import asyncio
import contextlib
import math
import random
import re
from collections import deque
from importlib import import_module
from pathlib import Path
from statistics import quantiles
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loadtests.plan.planner import VirtualClock
from workers import scheduling
from workers.errors import Late, Rejected
from workers.jobs import Answer, Job, JobQueue
from workers.loop import ModelLoop
from workers.scheduling.admission import Admission
from workers.scheduling.cost_model import CostModel
from workers.scheduling.estimate import WaitEstimate
from workers.scheduling.instances import Instances
from workers.scheduling.warm_up import warm_up


class End(NamedTuple):
    """What came of a request of `jobs` queries that came at `at`, and when; `wait_s` of the last of them."""

    at: float
    ended: float
    jobs: int
    outcome: Any
    wait_s: float


class Law(NamedTuple):
    """A model that takes a + b * size seconds, for jobs whose sizes are drawn from these."""

    a: float
    b: float
    sizes: tuple[int, ...] = (1,)

    def seconds(self, size: float) -> float:
        return self.a + self.b * size

    @property
    def mean(self) -> float:
        return sum(self.sizes) / len(self.sizes)

    def rate(self, batch_size: int) -> float:
        """Answers a second, with full batches."""
        return batch_size / self.seconds(batch_size * self.mean)


def simulate(
    law: Law, arrivals: list[tuple[float, list[int]]], instances: int = 1, **options: Any
) -> list[End]:
    """Run the real loop; each arrival is a time and the sizes of a request's queries."""
    ends: list[End] = []

    async def run(sizes: list[int]) -> list[int]:
        await asyncio.sleep(law.seconds(sum(sizes)))
        return sizes

    async def request(loop: ModelLoop, at: float, sizes: list[int]) -> None:
        try:
            if len(sizes) == 1:
                answers = [await loop.submit(sizes[0], size=sizes[0])]
            else:
                answers = await loop.submit_all(sizes, sizes)
            outcome: Any = Answer
            wait_s = max(answer.queue_s for answer in answers)
        except (Rejected, Late) as error:
            outcome, wait_s = type(error), math.nan
        ends.append(End(at, loop.now(), len(sizes), outcome, wait_s))

    async def everything() -> None:
        loop = ModelLoop(**options)  # type: ignore[arg-type]
        size = int(law.mean)
        batches = [[(size, size)] * n for n in {1, loop.batch_size // 2 + 1, loop.batch_size}]
        await warm_up(loop.cost_model, run, batches, loop.now)
        consumers = [asyncio.create_task(loop.consume(run)) for _ in range(instances)]
        began, requests = loop.now(), []
        for at, sizes in arrivals:
            await asyncio.sleep(began + at - loop.now())
            requests.append(asyncio.create_task(request(loop, loop.now(), sizes)))
        await asyncio.gather(*requests)
        for consumer in consumers:
            consumer.cancel()
        await asyncio.gather(*consumers, return_exceptions=True)
        ends[:] = [end._replace(at=end.at - began, ended=end.ended - began) for end in ends]

    with asyncio.Runner(loop_factory=VirtualClock) as runner:
        runner.run(everything())
    return ends


def poisson(
    law: Law, rate: float, until: float, jobs: int = 1, seed: int = 0
) -> list[tuple[float, list[int]]]:
    """Requests that know nothing of each other, of `jobs` queries each."""
    rng, at, arrivals = random.Random(seed), 0.0, []
    while (at := at + rng.expovariate(rate)) < until:
        arrivals.append((at, [rng.choice(law.sizes) for _ in range(jobs)]))
    return arrivals


def answered(ends: list[End], start: float, until: float) -> float:
    """Answers a second in this time."""
    return sum(e.jobs for e in ends if e.outcome is Answer and start <= e.ended < until) / (until - start)


def late(ends: list[End]) -> float:
    """The share of the admitted that were told later that they were too late."""
    return sum(e.outcome is Late for e in ends) / sum(e.outcome is not Rejected for e in ends)


def p99(ends: list[End]) -> float:
    return quantiles([e.wait_s for e in ends if e.outcome is Answer], n=100)[98]


def slow(load: float) -> Any:
    """Return a load that only the slow tests try."""
    return pytest.param(load, marks=pytest.mark.slow)


# --- batches that don't make the admitted late ------------------------------------------------------------------------


def fixed(law: Law, n: int, budget_s: float, arrivals: list[tuple[float, list[int]]], until: float) -> float:
    """Answers a second of the oracle: batches of `n` at most, admission that knows the law, and nothing else.

    A newcomer is admitted if it would be in time though every batch until its own were full.
    """
    full_s, waiting, free_at, right, i = law.seconds(n * law.mean), deque[tuple[float, int]](), 0.0, 0, 0
    while i < len(arrivals) or waiting:
        now = free_at if waiting else max(free_at, arrivals[i][0])
        while i < len(arrivals) and arrivals[i][0] <= now:
            at, (size,) = arrivals[i]
            i += 1
            idle = not waiting and free_at <= at
            if idle or max(0, free_at - at) + (len(waiting) // n + 1) * full_s <= budget_s:
                waiting.append((at, size))
        batch = [waiting.popleft() for _ in range(min(n, len(waiting)))]
        seconds = law.seconds(sum(size for _, size in batch))
        batch = [(at, size) for at, size in batch if now + seconds <= at + budget_s]
        free_at = now + (law.seconds(sum(size for _, size in batch)) if batch else 0.0)
        right += len(batch) if free_at < until else 0
    return right / until


@pytest.mark.parametrize("load", [slow(0.5), 0.8, slow(1), slow(2), 5, slow(10)])
@pytest.mark.parametrize(
    ("law", "batch_size", "budget_s"),
    [
        (Law(0.05, 0.3), 32, 10),
        (Law(0.2, 0.1), 32, 2),
        (Law(0.2, 0.1), 32, 1),
        (Law(0.2, 0.1), 32, 4),
        (Law(0.004, 0.001), 32, 1),
        (Law(0.004, 0.001), 32, 0.1),
        (Law(0.05, 0.01), 8, 1),
        (Law(0.1, 0.02), 64, 0.5),
        (Law(0.02, 0.001, (4, 8, 16, 64)), 32, 1),
    ],
    ids=str,
)
def test_with_batches_the_rate_is_nearly_that_of_the_best_fixed_size_and_the_admitted_are_in_time(
    law: Law, batch_size: int, budget_s: float, load: float
) -> None:
    rate = load * law.rate(batch_size)
    until = max(1500 / rate, 20 * budget_s, 10)
    until = min(until, 6000 / rate)
    arrivals = poisson(law, rate, until)
    ends = simulate(law, arrivals, batch_size=batch_size, budget_s=budget_s, target_s=0)
    sizes = sorted(
        {n for n in (1, 2, 3, 4, 5, 6, 8, 10, 12, 14, 16, 20, 24, 28, 32, 48, 64) if n <= batch_size}
    )
    best = max(fixed(law, n, budget_s, arrivals, until) for n in sizes)
    assert answered(ends, 0, until) >= 0.9 * best
    assert late(ends) <= 0.02


# --- no standing queue ------------------------------------------------------------------------------------------------

LAWS = [  # the law, the batch size, instances
    (Law(0, 0.007), 1, 1),
    (Law(0, 0.007), 1, 2),
    (Law(0, 0.1), 1, 1),
    (Law(0.02, 0.002), 8, 1),
    (Law(0.1, 0.05), 8, 1),
    (Law(0.004, 0.001), 32, 1),
    (Law(0.002, 0.0002, (4, 8, 16, 64)), 8, 2),
]


@pytest.mark.parametrize("load", [slow(1.2), 3, slow(10)])
@pytest.mark.parametrize(("law", "batch_size", "instances"), LAWS, ids=str)
def test_under_lasting_overload_the_wait_stays_near_the_target_at_the_full_and_steady_rate(
    law: Law, batch_size: int, instances: int, load: float
) -> None:
    target_s, capacity = 0.5, instances * law.rate(batch_size)
    until = min(60, max(7, 20_000 / (load * capacity)))
    ends = simulate(
        law, poisson(law, load * capacity, until), instances, batch_size=batch_size, target_s=target_s
    )
    lasting = [end for end in ends if end.at >= 4]
    full_s = law.seconds(batch_size * law.mean)
    assert p99(lasting) <= max(2 * target_s, full_s) * 1.01
    if load > 2:  # the queue stands from the start: nobody waits a batch longer than the target says
        assert p99(lasting) <= max(target_s, 1.5 * full_s, 6 * full_s / batch_size) * 1.05
    assert answered(ends, 4, until) >= 0.97 * capacity
    steady = [answered(ends, second, second + 1) for second in range(4, int(until))]
    assert min(steady) >= 0.8 * capacity - 2  # one job more or less in a second
    assert not late(ends)


@pytest.mark.parametrize(("law", "batch_size", "instances"), [LAWS[0], LAWS[3], LAWS[5]], ids=str)
def test_burst_on_an_idle_server_is_admitted_whole_also_after_others(
    law: Law, batch_size: int, instances: int
) -> None:
    times = [0.0] * 200 + [30.0] * 200
    ends = simulate(law, [(at, [1]) for at in times], instances, batch_size=batch_size)
    assert {end.outcome for end in ends} == {Answer}


@pytest.mark.parametrize(("law", "batch_size", "instances"), LAWS, ids=str)
def test_below_capacity_hardly_any_request_is_rejected(law: Law, batch_size: int, instances: int) -> None:
    rate = 0.8 * instances * law.rate(batch_size)
    ends = simulate(law, poisson(law, rate, 5000 / rate), instances, batch_size=batch_size)
    assert sum(end.outcome is Answer for end in ends) >= 0.99 * len(ends)


def test_without_a_target_the_queue_may_stand_as_long_as_the_deadline_allows() -> None:
    law = Law(0, 0.05)
    ends = simulate(law, poisson(law, 40, 60), budget_s=5, target_s=0)
    assert p99([end for end in ends if end.at > 10]) > 4


# --- lists ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("load_of_lists", [0.8, 5])
@pytest.mark.parametrize(
    ("law", "batch_size", "instances"),
    [(Law(0.004, 0.001), 32, 1), (Law(0, 0.007), 1, 1), (Law(0.004, 0.001), 32, 2)],
    ids=str,
)
def test_beside_a_stream_of_lists_a_single_request_waits_for_a_few_calls_and_the_lists_are_in_time(
    law: Law, batch_size: int, instances: int, load_of_lists: float
) -> None:
    capacity = instances * law.rate(batch_size)
    singles = poisson(law, 0.05 * capacity, 60, seed=1)
    lists = poisson(law, load_of_lists * capacity / 64, 60, jobs=64, seed=2)
    ends = simulate(law, sorted(singles + lists), instances, batch_size=batch_size, budget_s=4)
    alone, together = [[end for end in ends if (end.jobs > 1) is many] for many in (False, True)]
    # Its share: what runs, one call that it shares with a list or lets pass, and its own turn in it.
    assert p99(alone) <= 3 * law.seconds(batch_size)
    assert all(end.outcome is Answer for end in alone)
    assert late(together) <= 0.02
    assert answered(ends, 5, 60) >= (0.97 if load_of_lists > 1 else 0.75) * capacity


def test_singles_beyond_the_rate_leave_half_of_the_model_to_the_lists() -> None:
    law = Law(0, 0.007)
    singles = poisson(law, 3 * law.rate(1), 60, seed=1)
    lists = poisson(law, 3 * law.rate(1) / 64, 60, jobs=64, seed=2)
    ends = simulate(law, sorted(singles + lists))
    assert answered([end for end in ends if end.jobs > 1], 5, 60) == pytest.approx(law.rate(1) / 2, rel=0.1)
    assert late(ends) <= 0.02


# --- the cost law -----------------------------------------------------------------------------------------------------

seconds = st.floats(1e-4, 1.0)


@settings(max_examples=200, deadline=None)
@given(
    a=seconds | st.just(0.0),
    b=seconds,
    sizes=st.sampled_from([(1, 4, 8), (1, 16, 32), (5, 20, 80), (1, 256, 512)]),
    seed=st.integers(0, 1000),
)
def test_one_call_twenty_times_too_slow_moves_what_is_predicted_by_less_than_a_tenth(
    a: float, b: float, sizes: tuple[int, ...], seed: int
) -> None:
    law, cost_model, rng = Law(a, b), CostModel(), random.Random(seed)
    for size in sizes * 2 + tuple(rng.randint(1, max(sizes)) for _ in range(rng.randrange(20))):
        cost_model.observe(size, law.seconds(size))
    before = [cost_model.margin * cost_model.predict_s(size) for size in sizes]
    assert before == pytest.approx([1.1 * law.seconds(size) for size in sizes])
    outlier = rng.randint(1, max(sizes))
    cost_model.observe(outlier, 20 * law.seconds(outlier))
    assert [cost_model.margin * cost_model.predict_s(size) for size in sizes] == pytest.approx(
        before, rel=0.1
    )


@pytest.mark.parametrize("factor", [3, 1 / 3, 20, 1 / 20])
def test_model_that_has_become_slower_or_faster_for_good_is_followed_within_four_calls(
    factor: float,
) -> None:
    law, cost_model = Law(0.004, 0.001), CostModel()
    for size in (1, 8, 32) * 3:
        cost_model.observe(size, law.seconds(size))
    for size in (1, 10, 3, 32):
        cost_model.observe(size, factor * law.seconds(size))
    for size in (1, 8, 32, 100):
        assert cost_model.predict_s(size) == pytest.approx(factor * law.seconds(size), rel=0.05)


def test_calls_too_short_for_the_clock_do_not_keep_longer_ones_from_being_learnt() -> None:
    cost_model = CostModel()
    for seconds in (0,) * 10 + (0.1,) * 20:
        cost_model.observe(1, seconds)
    assert cost_model.predict_s(1) == pytest.approx(0.1, rel=0.05)


def test_day_of_single_texts_does_not_forget_how_long_a_batch_takes() -> None:
    law, cost_model = Law(0.004, 0.001), CostModel()
    for size in (1, 8, 32) + (1,) * 10_000:
        cost_model.observe(size, law.seconds(size))
    assert cost_model.predict_s(32) == pytest.approx(law.seconds(32))


def test_noise_is_answered_by_a_margin() -> None:
    law, cost_model, rng = Law(0.004, 0.001), CostModel(), random.Random(0)
    for _ in range(500):
        size = rng.randint(1, 32)
        cost_model.observe(size, law.seconds(size) * rng.lognormvariate(-0.125, 0.5))
    assert cost_model.predict_s(16) == pytest.approx(law.seconds(16), rel=0.35)
    assert 1.3 < cost_model.margin < 1.7


def test_server_that_warmed_up_on_a_busy_machine_admits_what_it_can_do() -> None:
    async def everything() -> None:
        slow = iter([1, 20, 1, 1, 1, 15, 1, 1, 30, 1, 1, 1])  # of three batches, four times

        async def run(sizes: list[int]) -> list[int]:
            await asyncio.sleep(next(slow, 1) * (0.004 + 0.001 * len(sizes)))
            return sizes

        loop = ModelLoop(batch_size=32)
        await warm_up(loop.cost_model, run, [[(1, 1)] * n for n in (1, 8, 32)], loop.now)
        for n in (1, 8, 32):
            assert loop.cost_model.predict_s(n) == pytest.approx(0.004 + 0.001 * n)
        consumer = asyncio.create_task(loop.consume(run))
        await asyncio.sleep(0)
        await asyncio.gather(*(loop.submit(1) for _ in range(200)))
        consumer.cancel()

    with asyncio.Runner(loop_factory=VirtualClock) as runner:
        runner.run(everything())


# --- the constants ----------------------------------------------------------------------------------------------------


def test_queue_that_is_empty_because_of_rejections_is_not_taken_for_a_burst() -> None:
    """Twenty full batches long; of a slow model the targets alone are too short to tell."""
    now_s = 0.0
    cost_model = CostModel()
    instances = Instances(cost_model.predict_s, math.inf, lambda: now_s, lambda: None)
    admission = Admission(WaitEstimate(JobQueue(), cost_model, 8, 10.0), instances, 256, 0.5)
    admission.rejected_at, admission.estimate.full_s = 0.0, 1.0
    now_s = 1.0 + 19
    admission.note_drained()
    assert admission.drained_at == -math.inf
    now_s = 1.0 + 21
    admission.note_drained()
    assert admission.drained_at == 22.0


def test_arrivals_are_shared_by_the_instances_when_the_batch_is_planned() -> None:
    def affordable(instances: int) -> float:
        estimate = WaitEstimate(queue := JobQueue(), model := CostModel(), 64, 11.0)
        model.a, model.b = 1.0, 0.1
        for second in range(100):
            estimate.plan(float(second), instances)
            for _ in range(20):
                estimate.offer(queue.singles, 1, 1)
        estimate.plan(100.0, instances)
        return estimate.affordable

    assert affordable(1) == pytest.approx(60, abs=1)
    assert affordable(2) == pytest.approx(45, abs=1)


def test_other_lane_takes_no_more_than_every_second_turn() -> None:
    estimate = WaitEstimate(queue := JobQueue(), model := CostModel(), 7, 10.0)
    model.a, model.b, estimate.usual_size = 1.0, 0.0, 1.0
    queue.lists.rate = 1e6
    estimate.full_s = estimate.full_size = 1.0
    with contextlib.closing(asyncio.new_event_loop()) as event_loop:
        for _ in range(3):
            queue.put(Job(None, 1, 0.0, 10.0, queue.singles, event_loop.create_future()))
    assert estimate.of([0.0], queue.singles, 1, 1).starts_in_s == 0.0, (
        "three before it and three of the other lane: it is the seventh, and in the first batch"
    )


def test_three_outliers_change_nothing_and_the_fourth_says_that_the_speed_has_changed() -> None:
    model = CostModel()
    for size in (1, 8, 32):
        model.observe(size, 1.0)
    for _ in range(3):
        model.observe(8, 10.0)
    assert model.predict_s(8) < 1.5
    model.observe(8, 10.0)
    assert model.predict_s(8) > 8


def test_batches_grow_again_when_a_call_is_found_to_cost_the_same_for_any_size() -> None:
    """A cap that came from a slope must not outlive the slope: 32 jobs of one flat call are one batch."""
    cost_model = CostModel()
    estimate = WaitEstimate(JobQueue(), cost_model, 32, 10.0)
    cost_model.a, cost_model.b = 0.1, 0.5
    estimate.plan(1.0, 1)
    assert estimate.affordable < 32
    cost_model.b = 0.0
    estimate.plan(2.0, 1)
    assert estimate.affordable == math.inf


def test_table_of_the_scheduler_has_every_number_as_it_is() -> None:
    numbers = {}
    for file in Path(scheduling.__path__[0]).glob("[a-z]*.py"):
        module = import_module(f"{scheduling.__name__}.{file.stem}")
        for node in ast.parse(file.read_text()).body:
            for name in ast.walk(node) if isinstance(node, ast.Assign) else ():
                if isinstance(name, ast.Name) and isinstance(
                    value := getattr(module, name.id, None), int | float
                ):
                    numbers[name.id] = str(value)
    assert dict(re.findall(r"^    ([A-Z_]+) = (\S+)", scheduling.__doc__ or "", re.MULTILINE)) == numbers
