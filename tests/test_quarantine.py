"""A query that ends the model's process three times is refused, its neighbours never: on the virtual clock."""

import asyncio
from typing import Any

import pytest

from tests.support.virtual_clock import FakeModel, now, on_virtual_clock, outcomes, serving, submit_all
from workers.errors import ModelDied, ModelFailed, Quarantined
from workers.isolation import quarantine
from workers.isolation.quarantine import FORGET_S, Quarantine
from workers.metrics import Metrics


class Mortal(FakeModel):
    """Its process dies of "killer", or of anything `while_dying`, when the call would have ended."""

    while_dying = False

    async def __call__(self, queries: list[Any]) -> list[Any]:
        answers = await super().__call__(queries)
        if self.while_dying or "killer" in queries:
            raise ModelDied("exit code -11")
        return answers


def refused(ward: Quarantine) -> float:
    value = ward.metrics.registry.get_sample_value("model_quarantined_total")
    assert value is not None
    return value


async def asked(loop: Any, *queries: str) -> list[Any]:
    return await outcomes(submit_all(loop, *queries))


@on_virtual_clock
async def test_query_that_was_in_each_of_three_processes_that_died_is_rejected_and_forgotten_in_time() -> (
    None
):
    ward, model = Quarantine(Metrics(), now), Mortal()
    async with serving(ward.around(model)) as loop:
        assert await asked(loop, "killer", "killer", "killer", "killer", "a") == [
            *[ModelDied] * 3,
            Quarantined,  # it had been admitted before
            "answer to a",
        ]
        assert model.calls == [["killer"]] * 3 + [["a"]]
        ward.check("a")
        with pytest.raises(
            Quarantined, match="each of the 3 times that it had this input; change it, or ask"
        ):
            ward.check("killer")
        assert refused(ward) == 2
        await asyncio.sleep(FORGET_S)
        ward.check("killer")


@on_virtual_clock
async def test_input_beside_a_fatal_one_neither_fails_twice_nor_is_quarantined() -> None:
    ward, model = Quarantine(Metrics(), now), Mortal()
    async with serving(ward.around(model), batch_size=3) as loop:
        assert await asked(loop, "a", "killer", "b") == [ModelDied] * 3
        for ends in (ModelDied, ModelDied, Quarantined, Quarantined):  # all ask again, at once
            assert await asked(loop, "a", "killer", "b") == ["answer to a", ends, "answer to b"]
        assert refused(ward) == 2
        model.calls.clear()
        assert await asked(loop, "a", "b", "c") == ["answer to a", "answer to b", "answer to c"]
        assert model.calls == [["a", "b", "c"]], "acquitted, they share batches again"


@on_virtual_clock
async def test_answer_acquits_whom_somebody_else_had_killed_and_a_failure_does_not() -> None:
    ward, model = Quarantine(Metrics(), now), Mortal()
    async with serving(ward.around(model)) as loop:
        for _ in range(5):
            model.while_dying = True
            assert await asked(loop, "a", "a") == [ModelDied] * 2
            model.while_dying = False
            assert await asked(loop, "a") == ["answer to a"]
        assert not ward.suspects
        model.while_dying = True
        assert await asked(loop, "a", "a") == [ModelDied] * 2

    async def raises(queries: list[Any]) -> list[Any]:
        raise ModelFailed("a poison text")

    with pytest.raises(ModelFailed):
        await ward.around(raises)(["a"])
    assert ward.deaths("a") == 2


@on_virtual_clock
async def test_quarantine_keeps_a_bounded_number_and_no_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quarantine, "MAX_SUSPECTS", 3)
    ward = Quarantine(Metrics(), now)
    for text in "abcdbbe":
        ward.note_death([text, text])
        await asyncio.sleep(1)
    assert [ward.deaths(text) for text in "abcde"] == [0, 3, 0, 1, 1]
    assert [len(key) for key in ward.suspects] == [16] * 3
    await asyncio.sleep(FORGET_S)
    ward.note_death(["f"])
    assert len(ward.suspects) == 1
