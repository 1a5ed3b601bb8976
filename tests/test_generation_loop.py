"""The token loop and its scheduler, on a virtual clock, with a model that is a formula."""

import asyncio
import random
import threading
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models

from tests.support.fake_steps import (
    LAW,
    NAN,
    POISON,
    FakeSteps,
    expected,
    generating,
    options,
    prompt,
    read,
)
from tests.support.virtual_clock import now, on_virtual_clock
from workers.errors import Late, ModelDied, ModelFailed, Rejected, Unanswered
from workers.generation.scheduler import Scheduler, Sequence
from workers.generation.slots import OWNER
from workers.generation.step_cost import StepCost, Work
from workers.generation.steps import Options, Token
from workers.generation.stream import MOST_UNREAD, whole_of_each
from workers.generation.text import Asked, TextStream


@on_virtual_clock
async def test_sequences_share_steps_and_each_gets_its_own_tokens() -> None:
    model = FakeSteps()
    async with generating(model) as loop:
        streams = [loop.submit(prompt(answer, 10), options()) for answer in (3, 5, 9)]
        answers = await asyncio.gather(*map(read, streams))
    assert answers == [(expected(3), "stop"), (expected(5), "stop"), (expected(9), "stop")]
    assert len(model.steps) == 9  # the longest answer's, not the sum


@on_virtual_clock
async def test_sequence_joins_and_leaves_between_two_steps() -> None:
    model = FakeSteps(slots=2)
    async with generating(model) as loop:
        long = asyncio.create_task(read(loop.submit(prompt(40, 10), options())))
        await asyncio.sleep(0.5)
        assert await read(loop.submit(prompt(4, 10), options())) == (expected(4), "stop")
        assert not long.done()
        assert await long == (expected(40), "stop")


@on_virtual_clock
async def test_max_tokens_ends_a_sequence_with_length() -> None:
    async with generating(FakeSteps()) as loop:
        assert await read(loop.submit(prompt(40, 10), options(7))) == (expected(40, 7), "length")


@on_virtual_clock
async def test_piece_comes_as_soon_as_its_step_ends() -> None:
    async with generating(FakeSteps()) as loop:
        times = []
        async for _ in loop.submit(prompt(5, 10), options()):
            times.append(now())
    gaps = [b - a for a, b in pairwise(times)]
    assert gaps == pytest.approx([LAW[0] + LAW[2]] * 4, rel=0.01)


@pytest.mark.parametrize("streams", [1, 8, 30])
@pytest.mark.parametrize("law", [LAW, (0.005, 0.0008, 0.0005, 0.000002), (0.1, 0.0005, 0.002, 0.0)])
@on_virtual_clock
async def test_long_prompts_stall_nobody_for_more_than_three_plain_steps(
    streams: int, law: tuple[float, ...]
) -> None:
    async with generating(FakeSteps(slots=streams + 4, law=law)) as loop:
        times: list[float] = []

        async def reader() -> None:
            async for _ in loop.submit(prompt(900, 10), options()):
                times.append(now())

        others = [
            asyncio.create_task(read(loop.submit(prompt(900, 10), options()))) for _ in range(streams - 1)
        ]
        reading = asyncio.create_task(reader())
        while len(times) < 100:
            await asyncio.sleep(0.1)
        plain_s, began = times[-1] - times[-2], now()
        long = [loop.submit(prompt(1, 1000), options()) for _ in range(4)]
        for stream in long:
            await anext(stream)
        gaps = [b - a for a, b in pairwise(times) if b > began]
        assert len(gaps) > 4 and max(gaps) <= 3 * plain_s
        for task in (*others, reading):
            task.cancel()


@on_virtual_clock
async def test_prefill_first_makes_every_reader_wait_for_a_long_prompt() -> None:
    async with generating(FakeSteps(), prefill_first=True) as loop:
        times: list[float] = []

        async def reader() -> None:
            async for _ in loop.submit(prompt(100, 10), options()):
                times.append(now())

        reading = asyncio.create_task(reader())
        await asyncio.sleep(0.5)
        await read(loop.submit(prompt(3, 1000), options()))
        reading.cancel()
    gaps = [b - a for a, b in pairwise(times)]
    assert max(gaps) > 1000 * LAW[1]


@on_virtual_clock
async def test_step_tokens_bound_a_step_with_its_decode_rows() -> None:
    model = FakeSteps(slots=8)
    async with generating(model, step_tokens=32) as loop:
        await asyncio.gather(*(read(loop.submit(prompt(20, 100), options())) for _ in range(8)))
    assert max(sum(len(row.ids) for row in rows) for rows in model.steps) == 32


@on_virtual_clock
async def test_prompts_are_read_in_the_order_of_their_arrival() -> None:
    model = FakeSteps(slots=8)
    async with generating(model) as loop:
        streams = [loop.submit(prompt(30, length), options()) for length in (900, 20, 600, 10)]
        firsts: list[int] = []

        async def first(index: int) -> None:
            await anext(streams[index])
            firsts.append(index)

        await asyncio.gather(*map(first, range(4)))
    assert firsts == [0, 1, 2, 3]


@on_virtual_clock
async def test_cancelled_sequence_frees_its_slot_within_a_step_and_its_tokens_count_as_wasted() -> None:
    model = FakeSteps(slots=1)
    async with generating(model) as loop:
        stream = loop.submit(prompt(1000, 10), options())
        await anext(stream)
        await asyncio.sleep(0.005)  # amid a step
        left_at = now()
        stream.close()
        await anext(loop.submit(prompt(3, 10), options()))
        assert now() - left_at < LAW[0] * 2 + LAW[1] * 10 + 0.01
        assert loop.counts.wasted._value.get() == 1
        assert loop.counts.sequences.labels("cancelled")._value.get() == 1


@on_virtual_clock
async def test_waiting_sequence_that_is_closed_is_never_run() -> None:
    model = FakeSteps(slots=1)
    async with generating(model) as loop:
        running = asyncio.create_task(read(loop.submit(prompt(20, 10), options())))
        await asyncio.sleep(0.01)
        loop.submit(prompt(5, 77), options()).close()
        await running
    assert not any(len(row.ids) == 77 for rows in model.steps for row in rows)


@on_virtual_clock
async def test_row_without_probabilities_fails_alone() -> None:
    async with generating(FakeSteps()) as loop:
        good, bad = loop.submit(prompt(9, 10), options()), loop.submit(prompt(9, 10, NAN), options())
        answers = await asyncio.gather(read(good), read(bad), return_exceptions=True)
    assert answers[0] == (expected(9), "stop")
    assert isinstance(answers[1], ModelFailed)


@on_virtual_clock
async def test_step_that_raises_is_run_row_by_row_and_only_the_culprit_fails() -> None:
    model = FakeSteps()
    async with generating(model) as loop:
        tasks = [asyncio.create_task(read(loop.submit(prompt(9, 10), options()))) for _ in range(2)]
        await asyncio.sleep(0.06)
        tasks.insert(1, asyncio.create_task(read(loop.submit(prompt(9, 10, POISON), options()))))
        answers = await asyncio.gather(*tasks, return_exceptions=True)
        assert await read(loop.submit(prompt(3, 10), options())) == (expected(3), "stop")
    assert [answers[0], answers[2]] == [(expected(9), "stop")] * 2
    assert isinstance(answers[1], ModelFailed)


@on_virtual_clock
async def test_model_that_dies_fails_its_sequences_and_those_that_wait_are_answered() -> None:
    model = FakeSteps(slots=1)
    async with generating(model) as loop:
        running = asyncio.create_task(read(loop.submit(prompt(50, 10), options())))
        await asyncio.sleep(0.1)
        waiting = asyncio.create_task(read(loop.submit(prompt(5, 10), options())))
        await asyncio.sleep(0)
        model.error = ModelDied("the model process ended")
        with pytest.raises(ModelDied):
            await running
        model.cache.clear()
        assert await waiting == (expected(5), "stop")


@pytest.mark.parametrize("at", ["idle", "running"])
@on_virtual_clock
async def test_nothing_goes_on_in_the_slots_of_a_model_that_was_replaced(at: str) -> None:
    model, process = FakeSteps(), [1]

    async def ready() -> int:
        return process[0]

    async with generating(model, ready=ready) as loop:
        first = prompt(20, 500)
        tokens, _ = await read(loop.submit(first, options()))
        running = loop.submit(prompt(90, 10), options()) if at == "running" else None
        if running:
            await anext(running)
        process[0] = 2
        model.cache.clear()
        model.steps.clear()
        if running:
            with pytest.raises(ModelDied, match="replaced"):
                await read(running)
        assert (await read(loop.submit(first + tokens[:-1] + [7], options())))[1] == "stop"
        assert model.steps[-1][0].start > 0 == loop.scheduler.reused


@on_virtual_clock
async def test_rows_that_run_one_by_one_end_with_the_model_that_has_their_slots() -> None:
    model, process = FakeSteps(), [1]

    async def ready() -> int:
        process[0] += model.error is None and len(model.steps) == 3
        return process[0]

    async with generating(model, ready=ready) as loop:
        streams = [loop.submit(prompt(9, 10), options()) for _ in range(2)]
        for stream in streams:
            await anext(stream)
        model.error = RuntimeError("both together")
        model.steps = model.steps[:0]
        ends = await asyncio.gather(*map(read, streams), return_exceptions=True)
    assert ModelDied in map(type, ends)


class Unreadable(TextStream):
    """Raises at its third token."""

    def push(self, token: int) -> str:
        if token == 1002:
            raise RuntimeError("Invalid prefix encountered")
        return "a"


@on_virtual_clock
async def test_text_that_cannot_be_decoded_fails_alone() -> None:
    tokenizer = Tokenizer(models.BPE())
    async with generating(FakeSteps()) as loop:
        asked = [Asked(prompt(9, 10), options()), Asked(prompt(9, 10), options(), Unreadable(tokenizer, []))]
        streams = loop.submit_each(asked)
        good, bad = await asyncio.gather(*map(read, streams), return_exceptions=True)
        assert good == (expected(9), "stop")
        assert isinstance(bad, ModelFailed) and "Invalid prefix" in str(bad)
        assert len(loop.scheduler.slots) == 4


@on_virtual_clock
async def test_slot_that_the_model_cleared_after_its_sequence_left_is_not_reused() -> None:
    model = FakeSteps(slots=1)
    async with generating(model) as loop:
        asked = prompt(90, 20)
        stream = loop.submit(asked, options())
        await anext(stream)
        await asyncio.sleep(0.005)  # amid a step
        model.cache[0][5] = NAN
        stream.close()
        await anext(loop.submit([*asked, 1000, 7], options()))
        assert loop.scheduler.reused == 0


@on_virtual_clock
async def test_one_long_stall_does_not_lock_the_server_shut() -> None:
    """60 wait while one step takes 12 s: all of them are later than predicted."""
    model = FakeSteps(slots=64)
    async with generating(model, budget_s=10.0) as loop:
        running = loop.submit(prompt(200, 10), options())
        await anext(running)
        others = [asyncio.create_task(read(loop.submit(prompt(5, 20), options()))) for _ in range(60)]
        await asyncio.sleep(0)
        model.cost.law[0], usual_s = 12.0, model.cost.law[0]
        await asyncio.sleep(0.1)
        model.cost.law[0] = usual_s
        await asyncio.gather(read(running), *others, return_exceptions=True)
        assert loop.admission.slack_s <= 5.0
        loop.cost_model.law = list(LAW)
        await asyncio.sleep(3600)
        assert loop.rejection() is None
        busy = loop.submit(prompt(200, 10), options())
        await anext(busy)
        assert await read(loop.submit(prompt(5, 20), options())) == (expected(5), "stop")


@on_virtual_clock
async def test_idle_server_that_thinks_itself_too_slow_finds_out_that_it_is_not() -> None:
    async with generating(FakeSteps(), budget_s=1.0) as loop:
        loop.cost_model.law = [100 * term for term in LAW]
        for n in range(10, 310):  # none begins as another one: its tokens would be in the slot already
            assert (await read(loop.submit([2] + [n] * 99, options())))[1] == "stop"
        assert loop.cost_model.predict_s(Work(100)) < 1.0


@pytest.mark.parametrize("law", [(0.02, 0.05, 0.001, 0.0), (5.0, 0.0015, 0.001, 0.0)])
@on_virtual_clock
async def test_prompts_that_are_hopeless_take_a_twentieth_of_an_idle_servers_time(
    law: tuple[float, ...],
) -> None:
    """One client asks again and again for what takes 51 or 10 s, where 1 s is the limit."""
    model = FakeSteps(law=law)
    async with generating(model, budget_s=1.0) as loop:
        rejected = late = 0
        while now() < 600:
            try:
                await read(loop.submit(prompt(20, 1000), options()))
            except Rejected:
                rejected += 1
                await asyncio.sleep(0.1)
            except Late:
                late += 1
        assert late >= 2 and rejected > 300
        assert loop.counts.model._value.get() < 600 / 15


@on_virtual_clock
async def test_next_turn_starts_where_the_last_one_ended() -> None:
    model = FakeSteps()
    async with generating(model) as loop:
        first = prompt(20, 500)
        tokens, _ = await read(loop.submit(first, options()))
        model.steps.clear()
        second = first + tokens[:-1] + [7, 7, 7]
        assert (await read(loop.submit(second, options())))[1] == "stop"
        assert model.steps[0][0].start == len(first) + len(tokens) - 1
        assert loop.scheduler.reused == len(first) + len(tokens) - 1


@on_virtual_clock
async def test_nobody_starts_in_what_another_owner_left() -> None:
    model = FakeSteps()
    async with generating(model) as loop:
        OWNER.set("a")
        await read(loop.submit(prompt(20, 500), options()))
        model.steps.clear()
        OWNER.set("b")
        await read(loop.submit(prompt(20, 500), options()))
        assert model.steps[0][0].start == 0


@on_virtual_clock
async def test_rejection_names_when_to_retry_and_admits_then() -> None:
    async with generating(FakeSteps(slots=1), budget_s=2.0) as loop:
        running = asyncio.create_task(read(loop.submit(prompt(1000, 10), options(200))))  # 4 s
        await asyncio.sleep(0.1)
        with pytest.raises(Rejected) as rejected:
            loop.submit(prompt(5, 10), options())
        assert 1 <= rejected.value.retry_after_s <= 4
        assert loop.rejection() is not None
        await asyncio.sleep(rejected.value.retry_after_s)
        assert await read(loop.submit(prompt(5, 10), options())) == (expected(5), "stop")
        await running


@on_virtual_clock
async def test_queue_is_bounded_by_tokens() -> None:
    async with generating(FakeSteps(slots=1), most_waiting=1000) as loop:
        loop.submit(prompt(50, 10), options())
        await asyncio.sleep(0.03)
        loop.submit(prompt(5, 900), options())
        with pytest.raises(Rejected, match="full"):
            loop.submit(prompt(5, 200), options())
        loop.submit(prompt(5, 90), options())


@on_virtual_clock
async def test_list_is_admitted_whole_or_not_at_all() -> None:
    async with generating(FakeSteps(slots=1), most_waiting=1000) as loop:
        loop.submit(prompt(50, 10), options())
        await asyncio.sleep(0.03)
        loop.submit(prompt(5, 300), options())
        with pytest.raises(Rejected, match="full"):
            loop.submit_each([Asked(prompt(5, 300), options()) for _ in range(3)])
        assert (loop.depth, loop.admission.waiting_tokens) == (1, 300)
        streams = loop.submit_each([Asked(prompt(5, 300), options()) for _ in range(2)])
        assert (loop.depth, loop.admission.waiting_tokens) == (3, 900)
        pieces = await whole_of_each(streams)
        assert [[token.id for token in piece.tokens] for piece in pieces] == [expected(5)] * 2


@on_virtual_clock
async def test_first_token_of_a_lists_last_prompt_is_what_it_is_admitted_by() -> None:
    async with generating(FakeSteps(slots=8), budget_s=2.0) as loop:
        running = loop.submit(prompt(50, 10), options())
        await anext(running)
        several = [Asked(prompt(5, 200), options())] * 6  # about 0.5 s each
        with pytest.raises(Rejected, match="the first token would take"):
            loop.submit_each(several)
        assert loop.depth == 0
        assert len(await whole_of_each(loop.submit_each(several[:2]))) == 2


@on_virtual_clock
async def test_what_there_is_to_say_of_a_sequence_counts_its_tokens_and_why_it_ended() -> None:
    async with generating(FakeSteps()) as loop:
        stream, left = loop.submit(prompt(7, 20), options()), loop.submit(prompt(90, 30), options())
        await read(stream)
        left.close()
        answers = [one.answer() for one in (stream, left)]
    told = [one.generated for one in answers if one.generated]
    assert [(one.prompt_tokens, one.tokens, one.reason) for one in told] == [
        (20, 7, "stop"),
        (30, 7, "cancelled"),
    ]
    assert 0 < told[0].first_token_s < answers[0].queue_s + answers[0].model_s
    metrics = loop.metrics.text().decode()
    assert "model_generation_seconds_count 1.0" in metrics
    assert f"model_kv_cache_capacity_tokens {4 * 4096}.0" in metrics
    assert 'model_step_seconds_total{part="model"} 0.2' in metrics


@on_virtual_clock
async def test_first_token_that_comes_too_late_is_late_at_its_deadline_even_amid_a_long_step() -> None:
    model = FakeSteps()
    async with generating(model, budget_s=1.0) as loop:
        model.cost.law[0] = 50.0
        began = now()
        with pytest.raises(Late, match="no token within 1 s"):
            await anext(loop.submit(prompt(5, 10), options(), budget_s=0.99987))
        assert now() - began == pytest.approx(1.0, abs=0.001)


@on_virtual_clock
async def test_slow_reader_pauses_and_others_never_notice() -> None:
    model = FakeSteps()
    async with generating(model) as loop:
        slow, quick = loop.submit(prompt(500, 10), options()), loop.submit(prompt(400, 10), options())
        assert (await read(quick))[0] == expected(400)
        assert len(slow.unread) == MOST_UNREAD
        assert (await read(slow))[0] == expected(500)


@on_virtual_clock
async def test_stopping_rejects_waiting_sequences_and_lets_running_ones_finish() -> None:
    async with generating(FakeSteps(slots=1)) as loop:
        running, waiting = loop.submit(prompt(20, 10), options()), loop.submit(prompt(20, 10), options())
        await anext(running)
        draining = asyncio.create_task(loop.drain(100))
        with pytest.raises(Rejected, match="shutting down"):
            await anext(waiting)
        with pytest.raises(Rejected, match="shutting down"):
            loop.submit(prompt(5, 10), options())
        assert (await read(running))[1] == "stop"
        await draining


@on_virtual_clock
async def test_stopping_ends_what_is_longer_than_the_grace_time_with_an_error() -> None:
    async with generating(FakeSteps()) as loop:
        stream = loop.submit(prompt(100_000, 10), options(4000))
        await anext(stream)
        began = now()
        await loop.drain(2.0)
        assert now() - began == pytest.approx(2.0)
        with pytest.raises(Rejected, match="stopped before"):
            await read(stream)


@on_virtual_clock
async def test_stuck_step_is_seen_by_the_watchdog() -> None:
    model = FakeSteps()
    async with generating(model, hang_s=10.0) as loop:
        model.cost.law[0] = 1000.0
        stream = loop.submit(prompt(5, 10), options())
        await asyncio.sleep(11)
        assert loop.instances.stuck_s > 10
        assert "not returned" in loop.instances.unready()
        stream.close()


def test_cost_law_is_found_from_a_few_steps_and_follows_a_change() -> None:
    true, cost = StepCost(*LAW), StepCost()
    works = [Work(0, n, n * c) for n in (1, 4, 16) for c in (8, 256)] + [Work(n, 0, 0) for n in (8, 64, 256)]
    cost.warm_up([(work, true.predict_s(work)) for work in works])
    probes = [Work(64, 8, 2000), Work(0, 32, 8000), Work(200, 0, 0)]
    for probe in probes:
        assert cost.predict_s(probe) == pytest.approx(true.predict_s(probe), rel=0.1)
    for _ in range(100):
        for work in works:
            cost.observe(work, 2 * true.predict_s(work))
    for probe in probes:
        assert cost.predict_s(probe) == pytest.approx(2 * true.predict_s(probe), rel=0.2)
    before = cost.predict_s(probes[0])
    cost.observe(probes[0], 100 * before)
    assert cost.predict_s(probes[0]) < 1.1 * before


ARRIVALS = st.lists(
    st.tuples(
        st.floats(0, 2),  # when it comes after the one before
        st.integers(1, 60),  # length of the answer
        st.integers(1, 300),  # and of the prompt
        st.sampled_from([1, 5, 40, 1000]),  # max_tokens
        st.one_of(st.none(), st.floats(0, 3)),  # when its client leaves
        st.sampled_from([(), (), (), (POISON,), (NAN,)]),
    ),
    min_size=1,
    max_size=25,
)


@settings(max_examples=60, deadline=None)
@given(ARRIVALS, st.integers(1, 6), st.sampled_from([0, 16, 64]), st.booleans())
def test_every_sequence_ends_once_and_no_slot_is_lost(
    arrivals: list[Any], slots: int, step_tokens: int, prefill_first: bool
) -> None:
    @on_virtual_clock
    async def run() -> None:
        model = FakeSteps(slots=slots)
        async with generating(
            model, step_tokens=step_tokens, prefill_first=prefill_first, budget_s=5.0
        ) as loop:
            ends: list[str] = []

            async def client(answer: int, length: int, most: int, leaves: float | None, more: Any) -> None:
                try:
                    async with asyncio.timeout(leaves):
                        async with loop.submit(prompt(answer, length, *more), options(most)) as stream:
                            tokens, reason = await read(stream)
                except TimeoutError:
                    ends.append("left")
                except Unanswered as exc:
                    ends.append(type(exc).__name__)
                    assert more or not isinstance(exc, ModelFailed)
                else:
                    ends.append(reason)
                    assert tokens == expected(answer, most) and not more
                    assert reason == ("stop" if answer <= most else "length")

            clients = []
            for after, *rest in arrivals:
                await asyncio.sleep(after)
                clients.append(asyncio.create_task(client(*rest)))
            await asyncio.gather(*clients)
            await asyncio.sleep(1)
            assert len(ends) == len(arrivals)
            assert not loop.streams and not loop.scheduler.running and not loop.scheduler.waiting
            assert len(loop.scheduler.slots) == slots and loop.admission.waiting_tokens == 0
            counted = sum(
                sample.value
                for metric in loop.counts.sequences.collect()
                for sample in metric.samples
                if sample.name.endswith("_total")
            )
            assert counted == len(arrivals) - ends.count("Rejected")
            if step_tokens:
                allowed = max(step_tokens, slots + 8)
                assert all(sum(len(row.ids) for row in rows) <= allowed for rows in model.steps)

    run()


@pytest.mark.parametrize("load", [0.5, 1, 2, 5, 10])
def test_admitted_sequences_get_their_first_token_in_time_at_any_load(load: float) -> None:
    """Poisson arrivals of mixed prompts and answers, whose length nobody knows, offered at a multiple of the capacity."""

    @on_virtual_clock
    async def run() -> None:
        chance = random.Random(int(load * 10))
        async with generating(FakeSteps(slots=16), budget_s=2.0) as loop:
            counts = {"in time": 0, "Late": 0, "Rejected": 0}

            async def client() -> None:
                answer, length = chance.randint(5, 100), chance.choice([10, 20, 50, 100, 400])
                arrived = now()
                try:
                    async with loop.submit(prompt(answer, length), options(128)) as stream:
                        await anext(stream)
                        counts["in time" if now() - arrived <= 2.0 else "Late"] += 1
                        await read(stream)
                except Unanswered as exc:
                    counts[type(exc).__name__] += 1

            # A sequence costs 100 tokens of prompt and 53 sixteenths of a full step of decoding.
            capacity = 1 / (116 * LAW[1] + 53 * (LAW[0] / 16 + LAW[2]))
            clients = []
            while now() < 80 / load + 30:
                await asyncio.sleep(chance.expovariate(load * capacity))
                clients.append(asyncio.create_task(client()))
            await asyncio.gather(*clients)
            admitted = counts["in time"] + counts["Late"]
            assert counts["Late"] <= 0.02 * admitted, counts
            # And it does not keep its promise by rejecting everybody: most of the capacity is used.
            offered = min(1, 1 / load) * len(clients)
            assert counts["in time"] >= 0.75 * offered, (counts, len(clients))

    run()


def test_flood_of_long_prompts_keeps_a_short_one_waiting_for_no_more_than_what_came_before_it() -> None:
    cost = StepCost(*LAW)
    scheduler = Scheduler(32, cost)
    for _ in range(10):
        scheduler.add(Sequence([2] * 400, Options(50)))
    short = Sequence([2] * 10, Options(50))
    scheduler.add(short)
    for _ in range(10):
        scheduler.add(Sequence([2] * 400, Options(50)))
    read_before = 0
    for _ in range(1000):
        step = scheduler.plan()
        assert step
        if short in step.sequences:
            break
        read_before += sum(len(row.ids) for row in step.rows if not (row.choice and row.choice.generated))
        for sequence, _, reason in scheduler.advance(
            step, [Token(5, 0.0) if row.choice else None for row in step.rows]
        ):
            if reason:
                scheduler.end(sequence, reason)
    assert read_before <= 10 * 400


class Allowing:
    """A grammar that allows every token, and knows in which thread it was asked."""

    def __init__(self) -> None:
        self.threads: list[int] = []

    def mask(self) -> bytes:
        self.threads.append(threading.get_ident())
        return b"\xff"

    def accept(self, token: int) -> bool:
        return True


def test_masks_of_grammars_are_made_outside_of_the_event_loop() -> None:
    async def run(model: FakeSteps, allowing: Any) -> None:
        async with generating(model) as loop:
            (stream,) = loop.submit_each([Asked(prompt(5, 3), options(), grammar=allowing)])
            assert await read(stream) == (expected(5), "stop")

    allowing, model = Allowing(), FakeSteps(law=(0.0, 0.0, 0.0, 0.0))
    asyncio.run(asyncio.wait_for(run(model, allowing), 60))
    masks = [row.choice.mask for rows in model.steps for row in rows if row.choice]
    assert masks == [b"\xff"] * 5 and len(allowing.threads) == 5
    assert threading.get_ident() not in allowing.threads
