"""The promises of the model loop, on a virtual clock with a model that is a formula: exact, no sleeps, no flakes."""

import asyncio
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loadtests.plan.fixed_delay import FixedDelay
from tests.support.virtual_clock import (
    FakeModel,
    now,
    on_virtual_clock,
    outcomes,
    serving,
    submit_all,
    waits_for,
)
from workers.errors import Late, ModelDied, ModelFailed, Rejected
from workers.jobs import Answer
from workers.loop import ModelLoop
from workers.metrics import Metrics

# --- batching ---------------------------------------------------------------------------------------------------------


@on_virtual_clock
async def test_each_query_gets_its_own_answer() -> None:
    async with serving(FakeModel(), batch_size=4) as loop:
        assert await outcomes(submit_all(loop, *range(10))) == [f"answer to {i}" for i in range(10)]


@on_virtual_clock
async def test_without_batching_the_model_gets_one_query_at_a_time_in_order() -> None:
    model = FakeModel()
    async with serving(model) as loop:
        await outcomes(submit_all(loop, "a", "b", "c"))
    assert model.calls == [["a"], ["b"], ["c"]]


@on_virtual_clock
async def test_first_of_a_quiet_queue_runs_at_once_and_what_queued_meanwhile_is_the_next_batch() -> None:
    model = FakeModel()
    async with serving(model, batch_size=4) as loop:
        first = submit_all(loop, "a")
        await asyncio.sleep(0.5)
        rest = submit_all(loop, "b", "c", "d")
        answers = await asyncio.gather(*first, *rest)
    assert model.calls == [["a"], ["b", "c", "d"]]
    assert model.started == [0, 1]  # no idling: the second call starts when the first ends
    assert [answer.dispatched_because for answer in answers] == ["empty"] * 4
    assert [answer.queue_s for answer in answers] == [0, 0.5, 0.5, 0.5]
    assert [answer.model_s for answer in answers] == [1, 3, 3, 3]


@on_virtual_clock
async def test_batch_never_exceeds_its_size_and_closes_when_full() -> None:
    model = FakeModel()
    async with serving(model, batch_size=3) as loop:
        answers = await asyncio.gather(*submit_all(loop, *range(7)))
    assert [len(call) for call in model.calls] == [3, 3, 1]
    assert [answer.dispatched_because for answer in answers] == ["full"] * 6 + ["empty"]


@on_virtual_clock
async def test_two_instances_share_one_queue_and_the_free_one_takes_the_next_job() -> None:
    slow, quick = FakeModel(b=10), FakeModel(b=1)
    async with serving(slow, quick) as loop:
        await outcomes(submit_all(loop, *range(8)))
    assert (len(slow.calls), len(quick.calls)) == (1, 7)


@on_virtual_clock
async def test_model_that_blocks_the_event_loop_lets_answers_out_between_its_calls() -> None:
    events: list[str] = []

    async def blocks(queries: list[str]) -> list[str]:
        events.append(f"call {queries[0]}")
        return queries

    async def client(loop: ModelLoop, query: str) -> None:
        await loop.submit(query)
        events.append(f"answer {query}")

    async with serving(blocks) as loop:
        await asyncio.gather(*(client(loop, query) for query in "abcd"))
    assert events.index("answer a") < events.index("call d")


# --- admission --------------------------------------------------------------------------------------------------------


@on_virtual_clock
async def test_full_queue_rejects_without_calling_the_model() -> None:
    model = FakeModel()
    async with serving(model, max_queue=2) as loop:
        running = submit_all(loop, "running")
        await asyncio.sleep(0.5)
        waiting = submit_all(loop, "a", "b")
        await asyncio.sleep(0)
        with pytest.raises(Rejected, match="full"):
            await loop.submit("c")
        assert await outcomes(running + waiting) == ["answer to running", "answer to a", "answer to b"]
    assert ["c"] not in model.calls


@on_virtual_clock
async def test_job_that_would_be_too_late_is_rejected_with_the_time_when_the_work_ahead_is_done() -> None:
    async with serving(FakeModel()) as loop:
        await loop.submit("teaches the loop that a call takes 1 s")
        tasks = submit_all(loop, *range(10))
        await asyncio.sleep(0.5)
        with pytest.raises(Rejected) as refused:
            await loop.submit("no chance", budget_s=5)
        assert refused.value.retry_after_s == 10  # 9.5 s of work ahead
        await outcomes(tasks)


@on_virtual_clock
async def test_wrong_estimate_cannot_lock_an_idle_server_shut() -> None:
    model = FakeModel(b=100)
    async with serving(model, budget_s=2) as loop:
        assert await outcomes(submit_all(loop, "slow once")) == [Late]
        model.b = 0.1
        await asyncio.sleep(200)
        assert await outcomes(submit_all(loop, "next")) == ["answer to next"]


@on_virtual_clock
async def test_hopeless_job_on_an_idle_server_is_rejected_and_keeps_nobody_out() -> None:
    """One client sends a job of 300 s each second, the deadline is 10 s: others used to find the model taken."""
    async with serving(FakeModel(b=0.01), budget_s=10, hang_s=60) as loop:
        for size in (1, 8, 32):
            loop.cost_model.observe(size, size * 0.1)
        ends = []
        for i in range(100):
            with pytest.raises(Rejected, match="longer than this server's limit of 10 s"):
                await loop.submit("giant", size=3000)
            ends += await outcomes(submit_all(loop, i))
            await asyncio.sleep(1)
        assert ends == [f"answer to {i}" for i in range(100)]


@on_virtual_clock
async def test_wrong_law_corrects_itself_by_sizes_that_it_has_measured() -> None:
    async with serving(FakeModel(b=0.1), budget_s=10, hang_s=60) as loop:
        for size in (1, 8, 32):
            loop.cost_model.observe(size, 100)  # as measured while the machine slept
        assert await outcomes(submit_all(loop, "a")) == ["answer to a"], "tried"
        for _ in range(6):
            await loop.submit("b")
        assert loop.cost_model.predict_s(1) < 10


@on_virtual_clock
async def test_job_that_did_take_far_too_long_is_not_tried_again_soon() -> None:
    async with serving(FakeModel(b=30), budget_s=10, hang_s=600) as loop:
        for size in (1, 8, 32):
            loop.cost_model.observe(size, 30)
        assert await outcomes(submit_all(loop, "a")) == [Late]
        await asyncio.sleep(100)
        assert await outcomes(submit_all(loop, "b")) == [Rejected]
        await asyncio.sleep(20 * 30)
        assert await outcomes(submit_all(loop, "c")) == [Late], "tried again, once in 20 times its length"


@on_virtual_clock
async def test_retry_after_is_at_least_a_second() -> None:
    assert Rejected("any reason").retry_after_s == 1


@on_virtual_clock
async def test_before_the_model_is_loaded_jobs_are_rejected() -> None:
    async with serving() as loop:
        with pytest.raises(Rejected, match="loading"):
            await loop.submit("a")


@on_virtual_clock
async def test_at_ten_times_its_rate_the_server_keeps_its_full_rate_and_nobody_waits_beyond_the_budget() -> (
    None
):
    model = FakeModel()  # one a second
    began, latencies, statuses = 20, [], []

    async def client(loop: ModelLoop, i: int) -> None:
        await asyncio.sleep(i / 10)
        sent = now()
        try:
            await loop.submit(i, budget_s=5)
            statuses.append((sent, 200))
        except Rejected:
            statuses.append((sent, 503))
        except Late:
            statuses.append((sent, 504))
        latencies.append(now() - sent)

    async with serving(model) as loop:
        await asyncio.gather(*(client(loop, i) for i in range(1200)))
    served = [sent for sent, status in statuses if status == 200 and began <= sent < 120]
    assert len(served) >= 99
    assert max(latencies) <= 5 + 1e-6
    # admitted before anything was measured
    assert all(sent <= 1 for sent, status in statuses if status == 504)


@on_virtual_clock
async def test_work_ahead_is_shared_among_the_instances() -> None:
    async with serving(*[FakeModel()] * 4) as loop:
        loop.cost_model.observe(1, 1)
        tasks = submit_all(loop, *range(12))
        await asyncio.sleep(0.5)
        with pytest.raises(Rejected) as refused:
            await loop.submit("no chance", budget_s=3)
        assert (
            refused.value.retry_after_s == 3
        )  # 2.5 s: four instances, each with one running and two to come
        tasks += submit_all(loop, "in time", budget_s=4)
        assert set(await outcomes(tasks)) == {f"answer to {i}" for i in [*range(12), "in time"]}


@on_virtual_clock
async def test_overdue_call_is_not_waited_for_and_when_it_returns_all_is_well() -> None:
    model = FakeModel(b=0.1)
    async with serving(model, budget_s=10, hang_s=60) as loop:
        await loop.submit("teaches the loop that a call takes 0.1 s")
        model.b = 30
        ends = []
        for i in range(60):
            ends.append(submit_all(loop, i)[0])
            await asyncio.sleep(0.5)
        ended = await outcomes(ends)
        assert ended.count(Late) <= 3 and ended.count(Rejected) == 60 - ended.count(Late)
        assert loop.instances.unready() == ""  # that is for the hang
        model.b = 0.1
        await asyncio.sleep(1)
        assert await outcomes(submit_all(loop, "next")) == ["answer to next"]


@on_virtual_clock
async def test_while_one_instance_hangs_the_others_are_counted_with() -> None:
    async with serving(FakeModel(b=1000), FakeModel(b=0.1), budget_s=10) as loop:
        loop.cost_model.observe(1, 0.1)
        hanging, _ = submit_all(loop, "hangs", "b")
        await asyncio.sleep(5)
        assert await outcomes(submit_all(loop, *range(20))) == [f"answer to {i}" for i in range(20)]
        assert await outcomes([hanging]) == [Late]


@on_virtual_clock
async def test_early_no_is_the_one_that_submit_gives_and_the_same_for_a_second() -> None:
    async with serving(FakeModel(b=0.3), budget_s=3) as loop:
        assert loop.rejection() is None
        loop.cost_model.observe(1, 0.3)
        tasks = submit_all(loop, *range(9))
        await asyncio.sleep(0.05)
        seen = set()
        for _ in range(100):
            await asyncio.sleep(0.005)
            if refused := loop.rejection():
                seen.add((str(refused), refused.retry_after_s))
                with pytest.raises(Rejected, match=str(refused)):
                    await loop.submit("too many")
        assert 1 <= len(seen) <= 2
        assert loop.rejection(budget_s=0.01) and not loop.instances.unready()
        await outcomes(tasks)
        assert loop.rejection() is None
        loop.stop_admitting()
        assert str(loop.rejection()) == loop.instances.unready() == "the server is shutting down; retry"


# --- lists ------------------------------------------------------------------------------------------------------------


@on_virtual_clock
async def test_queries_of_a_list_are_answered_in_order_and_share_batches_with_everybody() -> None:
    model = FakeModel()
    async with serving(model, batch_size=4) as loop:
        first = submit_all(loop, "first")
        await asyncio.sleep(0.5)
        many = asyncio.create_task(loop.submit_all(["a", "b", "c"], [1, 1, 1]))
        await asyncio.sleep(0)
        await outcomes(first + submit_all(loop, "single"))
        assert [answer.value for answer in await many] == ["answer to a", "answer to b", "answer to c"]
    assert len(model.calls) == 2 and set(model.calls[1]) == {"a", "b", "c", "single"}


@on_virtual_clock
async def test_list_is_admitted_whole_or_not_at_all() -> None:
    model = FakeModel()
    async with serving(model, max_queue=4) as loop:
        loop.cost_model.observe(1, 1)
        tasks = submit_all(loop, "running", "waits")
        await asyncio.sleep(0.5)
        # too many; 0.5 s of others' work and 4 of its own
        for queries, budget_s in (("abcde", 100), ("abc", 4)):
            with pytest.raises(Rejected):
                await loop.submit_all(queries, [1] * len(queries), budget_s=budget_s)
        assert loop.depth == 1
        assert len(await loop.submit_all("abc", [1, 1, 1], budget_s=7)) == 3
        await outcomes(tasks)


@on_virtual_clock
async def test_first_failure_ends_the_list_says_which_and_frees_the_other_places() -> None:
    model, poison = FakeModel(), ValueError("no mask")
    async with serving(model) as loop:
        with pytest.raises(ModelFailed, match="no mask") as failed:
            await loop.submit_all(["a", poison, "b", "c"], [1] * 4)
        assert failed.value.index == 1 and failed.value.__cause__ is poison
        assert loop.depth == loop.running == 0
    assert model.calls == [["a"], [poison]]


@on_virtual_clock
async def test_client_that_leaves_takes_its_whole_list_along() -> None:
    model, metrics = FakeModel(), Metrics()
    async with serving(model, metrics=metrics) as loop:
        many = asyncio.create_task(loop.submit_all("abc", [1] * 3))
        await asyncio.sleep(1.5)
        many.cancel()
        await asyncio.sleep(0)
        assert loop.depth == loop.running == 0 and not loop.live
    assert model.calls == [["a"], ["b"]]
    assert b"model_abandoned_total 2.0" in metrics.text()  # "a" has its answer


@on_virtual_clock
async def test_once_a_list_has_failed_the_rest_of_its_batch_is_not_run_again() -> None:
    model, poison = FakeModel(), ValueError("no mask")
    async with serving(model, batch_size=4) as loop:
        with pytest.raises(ModelFailed, match="no mask"):
            await loop.submit_all(["a", poison, "b", "c"], [1] * 4)
        await loop.submit("next")
    assert model.calls == [["a", poison, "b", "c"], ["a"], [poison], ["next"]]


@on_virtual_clock
async def test_list_whose_client_leaves_while_its_batch_fails_is_not_run_again() -> None:
    model, poison = FakeModel(), ValueError("no mask")
    async with serving(model, batch_size=3) as loop:
        many = asyncio.create_task(loop.submit_all(["a", poison, "b"], [1] * 3))
        await asyncio.sleep(2)
        many.cancel()
        await asyncio.sleep(2)
    assert model.calls == [["a", poison, "b"]]


# --- deadlines and the dead -------------------------------------------------------------------------------------------


@on_virtual_clock
async def test_late_answer_is_not_given() -> None:
    async with serving(FakeModel(b=3)) as loop:
        began = now()
        with pytest.raises(Late):
            await loop.submit("a", budget_s=2)
        assert now() - began == pytest.approx(2)


@on_virtual_clock
async def test_client_may_shorten_its_budget_but_not_lengthen_it() -> None:
    async with serving(FakeModel(b=30), budget_s=10) as loop:
        began = now()
        with pytest.raises(Late):
            await loop.submit("a", budget_s=60)
        assert now() - began == pytest.approx(10)


@on_virtual_clock
async def test_job_that_cannot_be_in_time_fails_before_the_model_runs_and_the_others_run_without_it() -> None:
    model = FakeModel(b=1)
    async with serving(model, batch_size=3) as loop:
        hurried = submit_all(loop, "first")
        await asyncio.sleep(0)
        # Admitted while nothing was measured yet: 2 s of work for it alone, 1 s of which is the call ahead.
        hurried += submit_all(loop, "hurried", budget_s=2.5)
        patient = submit_all(loop, "b", "c")
        answers = await outcomes(hurried + patient)
    assert answers == ["answer to first", Late, "answer to b", "answer to c"]
    assert model.calls == [["first"], ["b", "c"]]


def test_whose_deadline_passes_while_the_model_blocks_the_event_loop_is_not_run() -> None:
    calls, time_s = [], 0.0

    async def blocks(queries: list[str]) -> list[str]:
        nonlocal time_s
        calls.append(queries)
        time_s += 3
        return queries

    async def everything() -> None:
        loop = ModelLoop(budget_s=2, now=lambda: time_s)
        consumer = asyncio.create_task(loop.consume(blocks))
        tasks = submit_all(loop, "a", "b", "c")
        await asyncio.sleep(0)
        assert await outcomes(tasks) == ["a", Late, Late]
        consumer.cancel()

    asyncio.run(everything())
    assert calls == [["a"]]


@on_virtual_clock
async def test_client_that_leaves_frees_its_place_and_the_model_never_sees_its_query() -> None:
    model, metrics = FakeModel(), Metrics()
    async with serving(model, max_queue=1, metrics=metrics) as loop:
        running = submit_all(loop, "running")
        await asyncio.sleep(0.5)
        (leaver,) = submit_all(loop, "leaver")
        await asyncio.sleep(0)
        assert loop.depth == 1
        leaver.cancel()
        await asyncio.sleep(0)
        assert loop.depth == 0 and b"model_abandoned_total 1.0" in metrics.text()
        assert await outcomes(running + submit_all(loop, "next")) == ["answer to running", "answer to next"]
    assert model.calls == [["running"], ["next"]]


# --- what the model throws --------------------------------------------------------------------------------------------


@on_virtual_clock
async def test_one_bad_query_fails_alone_and_its_neighbours_get_answers() -> None:
    model, poison = FakeModel(), ValueError("no mask")
    async with serving(model, batch_size=4) as loop:
        assert await outcomes(submit_all(loop, "a", poison, "b")) == [
            "answer to a",
            ModelFailed,
            "answer to b",
        ]
    assert model.calls == [["a", poison, "b"], ["a"], [poison], ["b"]]  # singly, once


@on_virtual_clock
async def test_cause_of_a_failure_is_kept_for_the_log_and_its_time_teaches_nothing() -> None:
    model, poison = FakeModel(b=50), ValueError("no mask")
    async with serving(model) as loop:
        loop.cost_model.observe(1, 1)
        (task,) = submit_all(loop, poison)
        with pytest.raises(ModelFailed, match="no mask") as failed:
            await task
        assert failed.value.__cause__ is poison
        assert loop.cost_model.predict_s(1) == 1 and loop.cost_model.margin == 1.1


@pytest.mark.parametrize(
    "error", [StopIteration(), MemoryError(), SystemExit(1), KeyError("x"), RecursionError()], ids=repr
)
@on_virtual_clock
async def test_whatever_the_model_throws_its_caller_gets_an_error_and_the_next_is_served(
    error: BaseException,
) -> None:
    async def run(queries: list[Any]) -> list[Any]:
        if "bad" in queries:
            raise error
        return queries

    async with serving(run) as loop:
        assert await outcomes(submit_all(loop, "bad", "good")) == [ModelFailed, "good"]


@on_virtual_clock
async def test_wrong_number_of_answers_is_an_error_and_not_a_mix_up() -> None:
    async def loses_one_of_a_batch(queries: list[Any]) -> list[Any]:
        return queries[1:] if len(queries) > 1 else queries

    async with serving(loses_one_of_a_batch, batch_size=3) as loop:
        # found out, then run singly
        assert await outcomes(submit_all(loop, "a", "b", "c")) == ["a", "b", "c"]


@on_virtual_clock
async def test_queries_of_no_size_do_not_end_the_loop() -> None:
    async with serving(FakeModel()) as loop:
        assert await outcomes(submit_all(loop, "", "", size=0)) == ["answer to ", "answer to "]
        assert await outcomes(submit_all(loop, "a", size=5)) == ["answer to a"]


@on_virtual_clock
async def test_queries_that_killed_the_models_process_are_not_run_again() -> None:
    model = FakeModel()
    async with serving(model, batch_size=3) as loop:
        answers = await outcomes(
            submit_all(loop, "a", ModelDied("exit code -9"), "b") + submit_all(loop, "next")
        )
    assert answers == [ModelDied, ModelDied, ModelDied, "answer to next"]
    assert len(model.calls) == 2


@on_virtual_clock
async def test_call_that_hangs_is_reported_and_new_jobs_are_rejected() -> None:
    async with serving(FakeModel(b=500), hang_s=60, budget_s=10) as loop:
        assert await outcomes(submit_all(loop, "a")) == [Late]
        assert loop.instances.stuck_s == 0
        await asyncio.sleep(60)
        assert loop.instances.stuck_s == pytest.approx(70)
        with pytest.raises(Rejected, match="not returned"):
            await loop.submit("b")


@on_virtual_clock
async def test_instance_that_loads_again_does_not_count_as_a_call() -> None:
    loaded, model = asyncio.Event(), FakeModel()
    loaded.set()
    loop = ModelLoop(hang_s=60, budget_s=1000)
    consumer = asyncio.create_task(loop.consume(model, waits_for(loaded)))
    await asyncio.sleep(1)
    loaded.clear()  # it dies while nobody asks anything of it
    task = submit_all(loop, "a")
    await asyncio.sleep(100)
    assert loop.instances.stuck_s == 0 and not loop.running and loop.depth == 1
    loaded.set()
    answer = await task[0]
    assert (answer.queue_s, answer.model_s) == (100, 1)
    assert loop.cost_model.predict_s(1) == pytest.approx(1)
    consumer.cancel()


@on_virtual_clock
async def test_while_the_only_instance_loads_jobs_that_cannot_wait_are_rejected_with_the_time() -> None:
    loaded, model = asyncio.Event(), FakeModel()
    loaded.set()
    loop = ModelLoop(budget_s=1000)
    loop.instances.load_s = 6
    consumer = asyncio.create_task(loop.consume(model, waits_for(loaded)))
    await asyncio.sleep(1)
    loaded.clear()
    tasks = submit_all(loop, "hurried", budget_s=5) + submit_all(loop, "patient", budget_s=20)
    await asyncio.sleep(1.5)
    assert loop.instances.unready() == "the model is still loading"
    with pytest.raises(Rejected, match="loading") as refused:
        await loop.submit("a newcomer")
    assert refused.value.retry_after_s == 5  # 4.5 s are left
    (hurried, _) = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    with pytest.raises(Rejected, match="loading"):
        await hurried.pop()
    assert now() == 2.5
    await asyncio.sleep(4.5)
    loaded.set()
    assert await outcomes(tasks) == [Rejected, "answer to patient"]
    assert loop.instances.unready() == ""
    consumer.cancel()


@on_virtual_clock
async def test_instance_that_died_idle_takes_no_job_from_the_others() -> None:
    loaded, dead, other = asyncio.Event(), FakeModel(), FakeModel()
    loaded.set()
    loop = ModelLoop(budget_s=1000)
    consumers = [asyncio.create_task(loop.consume(dead, waits_for(loaded)))]
    await asyncio.sleep(1)
    consumers += [asyncio.create_task(loop.consume(other))]
    await asyncio.sleep(1)
    loaded.clear()
    answer = await loop.submit("a")
    assert answer.queue_s == 0 and other.calls == [["a"]] and not dead.calls
    for consumer in consumers:
        consumer.cancel()


@on_virtual_clock
async def test_while_an_instance_loads_again_the_others_do_the_work() -> None:
    loaded = asyncio.Event()
    loaded.set()

    async def dies(queries: list[Any]) -> list[Any]:
        loaded.clear()
        raise ModelDied("it was killed")

    async with serving(FakeModel(), budget_s=10) as loop:
        mortal = asyncio.create_task(loop.consume(dies, waits_for(loaded)))
        await asyncio.sleep(0)
        done = await outcomes(submit_all(loop, *range(5)))
        assert done == ["answer to 0", ModelDied, "answer to 2", "answer to 3", "answer to 4"]
        mortal.cancel()


@on_virtual_clock
async def test_while_another_instance_is_left_no_job_is_rejected_because_one_loads_again() -> None:
    loaded = asyncio.Event()
    loaded.set()

    async def dies(queries: list[Any]) -> list[Any]:
        await asyncio.sleep(1)
        loaded.clear()
        raise ModelDied("it was killed")

    async with serving(FakeModel(b=3)) as loop:
        loop.instances.load_s = 60
        mortal = asyncio.create_task(loop.consume(dies, waits_for(loaded)))
        await asyncio.sleep(0)
        tasks = submit_all(loop, "a", "b", "waits", budget_s=10)
        assert await outcomes(tasks) == ["answer to a", ModelDied, "answer to waits"]
        mortal.cancel()


@on_virtual_clock
async def test_call_that_nobody_waits_for_any_more_still_has_to_end() -> None:
    async with serving(FakeModel(b=3)) as loop:
        loop.cost_model.observe(1, 3)
        assert await outcomes(submit_all(loop, "a", budget_s=0.5)) == [Late]
        with pytest.raises(Rejected):
            await loop.submit("b", budget_s=1)
        await asyncio.sleep(3)
        assert await outcomes(submit_all(loop, "c", budget_s=1)) == [Late], "idle: it is tried"


@on_virtual_clock
async def test_call_slower_than_foreseen_is_expected_to_take_as_much_longer_again() -> None:
    async with serving(FakeModel(b=4)) as loop:
        loop.cost_model.observe(1, 3)
        tasks = submit_all(loop, "a")
        await asyncio.sleep(3.5)
        assert loop.instances.free_s() == [pytest.approx(0.5)]
        with pytest.raises(Rejected):
            await loop.submit("b", budget_s=3.7)
        assert await outcomes(tasks + submit_all(loop, "c", budget_s=4)) == ["answer to a", Late]


@on_virtual_clock
async def test_first_call_of_all_may_take_its_time() -> None:
    async with serving(FakeModel(b=20), hang_s=60) as loop:
        tasks = submit_all(loop, "a")
        await asyncio.sleep(15)
        assert await outcomes(tasks + submit_all(loop, "b")) == ["answer to a", "answer to b"]


@on_virtual_clock
async def test_request_rejected_before_its_body_counts_as_offered_load() -> None:
    async with serving(FakeModel(b=1), budget_s=5) as loop:
        loop.cost_model.observe(1, 1)
        tasks = submit_all(loop, "a", "b", "c")
        await asyncio.sleep(0.5)
        before = loop.queue.singles.offered
        assert all(loop.rejection(3) for _ in range(10))
        offered = loop.queue.singles.offered - before
        assert offered == pytest.approx(10)
        await outcomes(tasks)


@on_virtual_clock
async def test_giant_does_not_make_everybody_look_like_one() -> None:
    async with serving(FakeModel()) as loop:
        loop.cost_model.observe(1, 1)
        await outcomes(submit_all(loop, "a"))
        with pytest.raises(Rejected):
            await asyncio.gather(loop.submit("b"), loop.submit("a giant", size=1e6))
        assert loop.estimate.usual_size < 3


@on_virtual_clock
async def test_batch_is_no_larger_than_its_own_jobs_can_afford() -> None:
    """Half the budget: who has just missed it is still in time after the next."""
    model = FakeModel(b=1)
    async with serving(model, batch_size=32, budget_s=20, target_s=0) as loop:
        for n in (1, 8, 32):
            loop.cost_model.observe(n, n)
        await outcomes(submit_all(loop, "plans"))
        answers = await outcomes(submit_all(loop, *range(16)))
    assert {len(call) for call in model.calls} <= set(range(1, 11)), "half of 20 s is 10 at 1 s each"
    assert answers.count(Late) == 0 and max(map(len, model.calls)) > 1


@on_virtual_clock
async def test_late_job_whose_client_has_just_left_is_not_run() -> None:
    loop = ModelLoop(batch_size=2)
    loop.instances.loaded = 1
    leaver, other = submit_all(loop, "leaver", "other")
    await asyncio.sleep(0)
    loop.cost_model.observe(1, 30)
    leaver.cancel()
    batch, _ = await loop.take_batch()
    assert [job.query for job in batch] == ["other"]
    await asyncio.gather(leaver, other, return_exceptions=True)


@on_virtual_clock
async def test_late_jobs_that_are_run_all_the_same_are_no_more_than_a_batch() -> None:
    loop = ModelLoop(batch_size=2, budget_s=10)
    loop.instances.loaded = 1
    tasks = submit_all(loop, "a", "b", "c")
    await asyncio.sleep(0)
    loop.cost_model.observe(1, 30)
    batch, _ = await loop.take_batch()
    assert [job.query for job in batch] == ["a", "b"]
    for job in batch:
        job.future.set_result(Answer("late", 0, 0, 2, "full"))
    assert await outcomes(tasks) == ["late", "late", Late]


@on_virtual_clock
async def test_job_of_a_failed_batch_is_run_alone_though_late_when_nobody_waits() -> None:
    model, poison = FakeModel(b=4), ValueError("no mask")
    async with serving(model, batch_size=2, budget_s=10) as loop:
        loop.cost_model.observe(1, 4)
        await asyncio.gather(*submit_all(loop, poison, "b"), return_exceptions=True)
    assert model.calls == [[poison, "b"], [poison]], (
        "at 8 s no single call of 4 s is in time, but the queue is empty"
    )


@on_virtual_clock
async def test_first_burst_of_all_is_admitted_whole() -> None:
    async with serving(FakeModel(b=0.1), budget_s=100, target_s=0.5) as loop:
        for n in (1, 8, 32):
            loop.cost_model.observe(n, n * 0.1)
        loop.estimate.plan(now(), 1)
        await asyncio.sleep(5)
        assert await outcomes(submit_all(loop, *range(100))) == [f"answer to {i}" for i in range(100)]


# --- stopping ---------------------------------------------------------------------------------------------------------


@on_virtual_clock
async def test_stopping_rejects_new_jobs_and_finishes_what_was_admitted() -> None:
    async with serving(FakeModel()) as loop:
        tasks = submit_all(loop, "a", "b", "c")
        await asyncio.sleep(0.5)
        draining = asyncio.create_task(loop.drain(grace_s=10))
        await asyncio.sleep(0)
        with pytest.raises(Rejected, match="shutting down"):
            await loop.submit("d")
        await draining
        assert await outcomes(tasks) == ["answer to a", "answer to b", "answer to c"]
        assert now() == pytest.approx(3)


@on_virtual_clock
async def test_after_the_grace_time_the_queued_and_the_running_are_rejected_not_left_hanging() -> None:
    async with serving(FakeModel(b=8)) as loop:
        tasks = submit_all(loop, "a", "b", "c")
        await asyncio.sleep(0)
        await loop.drain(grace_s=10)
        assert await outcomes(tasks) == ["answer to a", Rejected, Rejected]
        assert now() == pytest.approx(10)


# --- whatever happens -------------------------------------------------------------------------------------------------

arrivals = st.lists(
    st.tuples(
        st.floats(0, 20),  # when it comes
        st.sampled_from([0.5, 2.0, 8.0, 100.0]),  # its budget
        st.sampled_from(["good"] * 6 + ["fails", "kills", "stops"]),
        st.none() | st.floats(0, 10),  # after how long its client leaves
        st.integers(1, 50),  # its size
        st.sampled_from([1] * 4 + [2, 5]),  # how many such queries it has
    ),
    max_size=40,
)


@settings(max_examples=200, deadline=None)
@given(
    arrivals=arrivals,
    batch_size=st.integers(1, 5),
    delay_s=st.none() | st.sampled_from([0.3, 2.0]),  # None: as served; else every partial batch is held
    max_queue=st.integers(1, 12),
    instances=st.integers(1, 3),
    a=st.sampled_from([0.0, 0.2, 3.0]),
    b=st.sampled_from([0.01, 0.4]),
)
def test_every_job_ends_exactly_once_in_time_with_its_own_answer(
    arrivals: list[Any],
    batch_size: int,
    delay_s: float | None,
    max_queue: int,
    instances: int,
    a: float,
    b: float,
) -> None:
    left: set[int] = set()
    in_vain: list[int] = []  # ran for somebody who had left
    order: list[int] = []
    ends: dict[int, Any] = {}

    async def run(queries: list[tuple[int, str]]) -> list[int]:
        assert 1 <= len(queries) <= batch_size
        in_vain.extend(left & {i for i, _ in queries})
        if not retried(queries):
            order.extend(i for i, _ in queries if arrivals[i][5] == 1)
        await asyncio.sleep(a + b * len(queries))
        kinds = {kind for _, kind in queries}
        if "kills" in kinds:
            raise ModelDied("exit code -9")
        if "stops" in kinds:
            raise SystemExit
        if "fails" in kinds:
            raise ValueError
        return [i for i, _ in queries]

    def retried(queries: list[tuple[int, str]]) -> bool:
        return any(i in order for i, _ in queries)

    async def client(
        loop: ModelLoop, i: int, at: float, budget_s: float, kind: str, leaves_after: float | None
    ) -> None:
        await asyncio.sleep(at)
        sent = now()
        _, _, _, _, size, n = arrivals[i]
        task: asyncio.Task[Any]
        if n == 1:
            task = asyncio.create_task(loop.submit((i, kind), size=size, budget_s=budget_s))
        else:  # only its last query may be a bad one
            queries = [(i, "good")] * (n - 1) + [(i, kind)]
            task = asyncio.create_task(loop.submit_all(queries, [size] * n, budget_s=budget_s))
        if leaves_after is not None:
            await asyncio.wait([task], timeout=leaves_after)
            task.cancel()
        (end,) = await asyncio.gather(task, return_exceptions=True)
        if isinstance(end, asyncio.CancelledError):
            left.add(i)
        assert i not in ends
        ends[i] = end
        assert now() - sent <= budget_s + 1e-5  # the virtual clock counts whole microseconds
        if isinstance(end, list):
            assert [answer.value for answer in end] == [i] * n and kind == "good"
        elif isinstance(end, Answer):
            assert end.value == i and kind == "good"
            assert end.queue_s + end.model_s <= now() - sent + 1e-6
        elif isinstance(end, ModelDied):
            pass  # a neighbour may have been the culprit
        elif isinstance(end, ModelFailed):
            assert kind != "good"
        else:
            assert isinstance(end, Late | Rejected | asyncio.CancelledError)

    async def everything() -> None:
        options = {"batch_size": batch_size, "max_queue": max_queue}
        if delay_s is not None:
            options |= {"loop": FixedDelay, "delay_s": delay_s}
        async with serving(*[run] * instances, **options) as loop:
            await asyncio.gather(*(client(loop, i, *arrival[:4]) for i, arrival in enumerate(arrivals)))
            await loop.drain(grace_s=100)
            assert (
                not loop.live and not loop.queue and loop.queue.size == 0 and loop.depth == 0 == loop.running
            )

    on_virtual_clock(everything)()
    assert len(ends) == len(arrivals) and not in_vain
    assert [arrivals[i][0] for i in order] == sorted(arrivals[i][0] for i in order), "not first in, first out"
