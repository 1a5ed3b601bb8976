"""When the loop holds a batch for clients that were just answered, and when it doesn't, on a virtual clock."""

import asyncio
import itertools
import random
from collections.abc import Sequence
from typing import Any

import pytest

from tests.support.virtual_clock import now, on_virtual_clock, outcomes, serving, submit_all
from workers.errors import Late
from workers.jobs import Answer
from workers.loop import ModelLoop
from workers.metrics import Metrics


class Flat:
    """Takes 100 ms, whatever the batch."""

    def __init__(self, a: float = 0.1) -> None:
        self.a = a
        self.sizes: list[int] = []

    async def __call__(self, queries: list[Any]) -> list[Any]:
        self.sizes.append(len(queries))
        await asyncio.sleep(self.a)
        return queries


def warm(loop: ModelLoop, a: float = 0.1) -> None:
    for n in (1, 8, 32):
        loop.cost_model.observe(n, a)


async def users(loop: ModelLoop, n: int, until_s: float, rng: random.Random, **options: Any) -> list[Answer]:
    """Closed loops of `n` users, who ask again 1 to 3 ms after their answer."""
    answers: list[Answer] = []

    async def user() -> None:
        while now() < until_s:
            answers.append(await loop.submit("a", **options))
            await asyncio.sleep(rng.uniform(0.001, 0.003))

    await asyncio.gather(*(user() for _ in range(n)))
    return answers


@pytest.mark.parametrize("instances", [1, 2, 4])
@on_virtual_clock
async def test_returning_users_share_calls_instead_of_splitting_them(instances: int) -> None:
    """Greedy batching answers 158, 188 and 225 a second of 310: sizes 1, 31, 1, 31."""
    async with serving(*[Flat() for _ in range(instances)], batch_size=32) as loop:
        warm(loop)
        answers = await users(loop, 32, 5.0, random.Random(0))
        assert len(answers) / 5 > 285
        reasons = [answer.dispatched_because for answer in answers]
        assert reasons.count("returned") + reasons.count("full") > len(answers) * 0.8


@pytest.mark.parametrize("instances", [1, 2, 4])
@on_virtual_clock
async def test_strangers_are_hardly_ever_held(instances: int) -> None:
    rng = random.Random(0)
    async with serving(*[Flat() for _ in range(instances)], batch_size=32) as loop:
        warm(loop)
        tasks: list[asyncio.Task[Answer]] = []
        while now() < 20:
            await asyncio.sleep(rng.expovariate(20))
            tasks += submit_all(loop, "a")
        answers = await asyncio.gather(*tasks)
    waited_s = [answer.queue_s for answer in answers]
    assert sum(waited_s) / len(waited_s) < 0.06, "half a call, and a tenth of one"
    if instances == 1:
        assert [a.dispatched_because for a in answers].count("waited") < len(answers) * 0.1


async def learn(loop: ModelLoop, n: int, back_s: float) -> None:
    """Teach the loop that `n` users come back `back_s` after their answers."""
    warm(loop)
    for _ in range(10):
        await asyncio.gather(*submit_all(loop, *range(n)))
        await asyncio.sleep(back_s)


async def just_answered(loop: ModelLoop, n: int, back_s: float) -> None:
    """The same, and they were answered 1 ms ago."""
    await learn(loop, n, back_s)
    await asyncio.gather(*submit_all(loop, *range(n)))
    await asyncio.sleep(0.001)


async def held(loop: ModelLoop, n: int = 4) -> list[asyncio.Task[Answer]]:
    """Of `n` users, who come back 2 ms after their answers, let one come back: it is held."""
    await just_answered(loop, n, back_s=0.002)
    task = submit_all(loop, "held")
    await asyncio.sleep(0.0001)
    assert loop.depth == 1 and not loop.running, "the model is free, and the job is held"
    return task


@on_virtual_clock
async def test_hold_ends_when_all_expected_jobs_came() -> None:
    metrics = Metrics()
    async with serving(Flat(), batch_size=32, metrics=metrics) as loop:
        task = await held(loop)
        answers = await asyncio.gather(*task, *submit_all(loop, 1, 2, 3))
        assert {(a.batch_size, a.dispatched_because) for a in answers} == {(4, "returned")}
        assert answers[0].queue_s < 0.001
    assert b"model_hold_joined_total 3.0" in metrics.text()
    assert b"model_hold_seconds_count 1.0" in metrics.text()


@on_virtual_clock
async def test_hold_ends_when_the_expected_jobs_do_not_come() -> None:
    async with serving(Flat(), batch_size=32) as loop:
        (task,) = await held(loop)
        answer = await task
        assert answer.dispatched_because == "waited" and answer.batch_size == 1
        assert answer.queue_s < 0.01, "they come within 2 ms, or not at all"


@on_virtual_clock
async def test_hold_ends_at_once_when_the_batch_is_full() -> None:
    async with serving(Flat(), batch_size=4) as loop:
        task = await held(loop)
        answers = await asyncio.gather(*task, *submit_all(loop, 1, 2, 3))
        assert {a.dispatched_because for a in answers} == {"full"}


@on_virtual_clock
async def test_hold_ends_at_once_when_its_only_job_leaves() -> None:
    metrics = Metrics()
    async with serving(Flat(), batch_size=32, metrics=metrics) as loop:
        (task,) = await held(loop)
        task.cancel()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert b"model_hold_seconds_count 1.0" in metrics.text()
        assert await outcomes(submit_all(loop, "next")) == ["next"]


@on_virtual_clock
async def test_hold_ends_at_once_when_the_server_stops() -> None:
    async with serving(Flat(), batch_size=32) as loop:
        (task,) = await held(loop)
        stopped_at = now()
        await loop.drain(grace_s=10)
        assert (await task).dispatched_because == "draining"
        assert now() == pytest.approx(stopped_at + 0.1)


@on_virtual_clock
async def test_nothing_is_held_while_the_server_stops() -> None:
    async with serving(Flat(), batch_size=32) as loop:
        await held(loop)
        loop.stop_admitting()
        assert loop.holding.plan_hold() == (0.0, 0)


@on_virtual_clock
async def test_hold_ends_in_time_for_the_tightest_deadline() -> None:
    """They are known to come back within 80 ms; the job that comes during the hold has 115 ms left, and a call takes 100."""
    async with serving(Flat(), batch_size=32) as loop:
        await just_answered(loop, 8, back_s=0.02)
        first = submit_all(loop, "first")
        await asyncio.sleep(0.001)
        assert loop.depth == 1 and not loop.running
        answers = await asyncio.gather(*first, *submit_all(loop, "tight", budget_s=0.115))
        assert [a.dispatched_because for a in answers] == ["waited"] * 2
        assert answers[1].queue_s + answers[1].model_s <= 0.115


@on_virtual_clock
async def test_idle_instance_runs_what_another_one_holds() -> None:
    async with serving(Flat(), Flat(), batch_size=32) as loop:
        warm(loop)
        rng = random.Random(1)
        answers = await users(loop, 2, 3.0, rng)
        assert max(a.queue_s for a in answers) < 0.002, "two users, two instances: nobody waits for anybody"


class AsLongAsAsked(Flat):
    """Takes 100 ms, or as many seconds as a query says."""

    async def __call__(self, queries: list[Any]) -> list[Any]:
        await asyncio.sleep(max((q for q in queries if isinstance(q, float)), default=self.a))
        return queries


@on_virtual_clock
async def test_hold_ends_at_once_when_another_instance_is_free() -> None:
    """Users come back 20 ms after their answers. The other instance, expected after 79 ms of the hold, is free after 11."""
    async with serving(AsLongAsAsked(), AsLongAsAsked(), batch_size=32) as loop:
        await learn(loop, 4, back_s=0.02)
        served = submit_all(loop, *range(4))
        await asyncio.sleep(0.08)
        other = submit_all(loop, 0.032)
        await asyncio.gather(*served)
        await asyncio.sleep(0.001)
        (task,) = submit_all(loop, "held")
        await asyncio.sleep(0.001)
        assert loop.depth == 1 and loop.running == 1, "an instance is free, and the job is held"
        answer = await task
        assert answer.queue_s == pytest.approx(0.011), "it would be held for 8 ms more"
        assert answer.dispatched_because == "waited"
        await asyncio.gather(*other)


@on_virtual_clock
async def test_where_all_instances_run_full_batches_the_rest_wait_for_nobody_elses_place() -> None:
    """64 users, two instances that are free 6 ms after one another: who misses a batch finds the next one full as well."""
    async with serving(Flat(), Flat(), batch_size=32) as loop:
        warm(loop)
        await users(loop, 64, 3.0, random.Random(0))
        answers = await users(loop, 64, now() + 10.0, random.Random(0))
        waited = [answer for answer in answers if answer.queue_s > 0.05]
        assert len(answers) / 10 > 610, (
            "627 are possible, 589 where a place in the next batch is taken for granted"
        )
        assert len(waited) < len(answers) * 0.02


@pytest.mark.parametrize(("size", "free_s"), [(20, 0.1), (30, 0.2)])
def test_full_instance_counts_as_free_a_call_later_since_its_own_clients_come_back_first(
    size: int, free_s: float
) -> None:
    loop = ModelLoop(batch_size=32, now=lambda: 0.0)
    warm(loop)
    loop.estimate.usual_size = 1.0
    loop.instances.loaded = 2
    loop.instances.start(size)
    assert loop.holding and loop.holding.next_free_s() == pytest.approx(free_s)


@pytest.mark.parametrize("a", [0.1, 0.01])
@on_virtual_clock
async def test_no_admitted_request_is_late_by_a_hold(a: float) -> None:
    """Users who come back after up to 30 ms, with deadlines of one to three calls."""
    rng = random.Random(0)
    results: list[Any] = []
    async with serving(Flat(a), batch_size=32) as loop:
        warm(loop, a)

        async def user() -> None:
            while now() < 5.0:
                results.extend(await outcomes(submit_all(loop, "a", budget_s=a * rng.uniform(1.2, 3.0))))
                await asyncio.sleep(rng.uniform(0.001, 0.03))

        await asyncio.gather(*(user() for _ in range(8)))
        assert loop.holding.anticipation.jobs
    assert Late not in results and results.count("a") > len(results) / 2


@on_virtual_clock
async def test_hold_is_known_to_the_wait_estimate() -> None:
    async with serving(Flat(), batch_size=32) as loop:
        await held(loop)
        wait = loop.estimate.of(loop.instances.free_s(), loop.queue.singles, 1, 1)
        assert 0.0 < wait.starts_in_s < 0.01
        assert wait.done_in_s == pytest.approx(0.1), "a hold yields to a deadline: it never makes a job late"


@on_virtual_clock
async def test_whole_lists_are_not_held_between_their_batches() -> None:
    """A list of 40 takes two batches of 32; its client comes back after the second."""
    async with serving(model := Flat(), batch_size=32) as loop:
        warm(loop)
        for _ in range(20):
            answers: Sequence[Answer] = await loop.submit_all(range(40), [1] * 40)
            assert max(a.queue_s for a in answers) == pytest.approx(0.1)
            await asyncio.sleep(0.002)
    assert model.sizes == [32, 8] * 20


@on_virtual_clock
async def test_learning_follows_a_change_of_load() -> None:
    """Users come beside nobody, leave, and are forgotten: within ten calls the loop is right again."""
    rng = random.Random(0)
    async with serving(Flat(), batch_size=32) as loop:
        warm(loop)
        await users(loop, 16, 3.0, rng)
        alone = []
        for _ in range(40):  # a stranger, long after everybody left
            await asyncio.sleep(0.5)
            alone.append((await loop.submit("a")).queue_s)
        assert max(alone) < 0.01 and sum(s > 0 for s in alone) <= 10
        began = now()
        answers = await users(loop, 16, began + 2.0, rng)
        assert len(answers) / 2 > 140, "157 are possible, 79 where nothing is held"


@on_virtual_clock
async def test_hold_that_the_deadline_leaves_no_time_for_is_not_counted_on_a_clock_that_moves() -> None:
    """Users come back within 80 ms; the one that comes now has as long as a call takes, and its margin."""
    moments, metrics = itertools.count(), Metrics()

    def counted() -> str:
        return metrics.text().decode().split("model_hold_seconds_count ")[1].split()[0]

    async with serving(
        Flat(), batch_size=32, metrics=metrics, now=lambda: now() + 1e-7 * next(moments)
    ) as loop:
        await just_answered(loop, 8, back_s=0.02)
        assert loop.holding.plan_hold()[0] > 0
        before = counted()
        answer = await loop.submit("tight", budget_s=0.1 * loop.cost_model.margin)
        assert (answer.dispatched_because, counted()) == ("empty", before)


@on_virtual_clock
async def test_batch_that_is_not_held_is_not_counted_as_held_on_a_clock_that_moves() -> None:
    moments, metrics = itertools.count(), Metrics()
    async with serving(
        Flat(), batch_size=32, metrics=metrics, now=lambda: now() + 1e-6 * next(moments)
    ) as loop:
        answer = await loop.submit("a")
    assert answer.dispatched_because == "empty"
    assert "model_hold_seconds_count 0.0" in metrics.text().decode()
