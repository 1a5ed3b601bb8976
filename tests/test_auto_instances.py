"""INSTANCES=0 takes the count that answers most, and keeps one model for all of them."""

import logging
import sys
import threading
import time
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest

from workers import tasks
from workers.isolation import auto
from workers.settings import Settings

CORES = 4
AUTO = Settings(MODEL="somebodys:Model", INSTANCES=0, BATCH_SIZE=8)


class Beside:
    """Calls that run beside each other: more instances answer more."""

    example, shareable = 1, True
    made = closed = 0

    def __init__(self) -> None:
        type(self).made += 1

    def __call__(self, inputs: list[Any]) -> list[Any]:
        time.sleep(0.02)
        return inputs

    def close(self) -> None:
        type(self).closed += 1


class InTurn(Beside):
    """Calls that wait for each other, as in pure Python: more instances answer no more."""

    lock = threading.Lock()

    def __call__(self, inputs: list[Any]) -> list[Any]:
        with self.lock:
            return super().__call__(inputs)


class Alone(Beside):
    """Says nothing of threads."""

    shareable = False


@pytest.fixture(autouse=True)
def four_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto, "usable_cores", lambda: CORES)
    monkeypatch.setattr("workers.settings.usable_cores", lambda: CORES)
    monkeypatch.setattr(auto, "TURN_S", 0.05)


def task_of(kind: type, monkeypatch: pytest.MonkeyPatch) -> tasks.Task:
    monkeypatch.setattr(kind, "made", 0)
    monkeypatch.setattr(kind, "closed", 0)
    module = ModuleType("somebodys")
    module.Model = kind  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "somebodys", module)
    return tasks.make(AUTO)


@pytest.mark.parametrize(("kind", "expected"), [(Beside, CORES), (InTurn, 1)])
def test_more_instances_are_taken_only_where_they_answer_more(
    kind: type[Beside], expected: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    task = task_of(kind, monkeypatch)
    settings = auto.measured(AUTO, task)
    assert settings == replace(AUTO, INSTANCES=expected)
    assert settings.threads_per_instance == CORES // expected
    assert f"INSTANCES=0 counts as {expected}" in caplog.text
    models = [tasks.load(task, settings, i, beside=expected - 1) for i in range(expected)]
    assert kind.made == 1
    for model in models:
        assert kind.closed == 0
        model.close()
    assert kind.closed == 1


def test_model_that_threads_cannot_share_has_one_instance_which_loads_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    task = task_of(Alone, monkeypatch)
    settings = auto.measured(AUTO, task)
    assert settings.INSTANCES == 1
    assert "threads can't share this model" in caplog.text
    assert (Alone.made, Alone.closed) == (1, 1)
    tasks.load(task, settings)
    assert (Alone.made, Alone.closed) == (2, 1)


def test_model_without_an_example_has_one_instance(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Silent:
        shareable = True

        def __call__(self, inputs: list[Any]) -> list[Any]:
            return inputs

    caplog.set_level(logging.INFO)
    module = ModuleType("somebodys")
    module.Model = Silent  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "somebodys", module)
    task = tasks.make(AUTO)
    settings = auto.measured(AUTO, task)
    assert settings.INSTANCES == 1
    assert "no example to measure with" in caplog.text
    assert tasks.load(task, settings)([1, 2]) == [1, 2]


@pytest.mark.parametrize(
    "more",
    [{"OFFLOAD": "process"}, {"OFFLOAD": "inline"}, {"WEB_CONCURRENCY": CORES}, {"TASK": "text-generation"}],
)
def test_only_one_instance_is_possible_so_nothing_is_loaded_to_measure(
    more: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = task_of(Beside, monkeypatch)
    model = {"MODEL": AUTO.MODEL} if "TASK" not in more else {"MODEL": "a-hub/id"}
    assert auto.measured(replace(AUTO, **model, **more), task).INSTANCES == 1
    assert Beside.made == 0


def test_counts_are_powers_of_two_and_one_per_core() -> None:
    assert [auto.counts_for(cores) for cores in (1, 2, 3, 6, 8)] == [
        [1], [1, 2], [1, 2, 3], [1, 2, 4, 6], [1, 2, 4, 8],
    ]  # fmt: skip


def test_more_have_to_gain_a_twentieth() -> None:
    assert auto.best([100, 104, 103]) == 0
    assert auto.best([100, 110, 114, 130]) == 3
    assert auto.best([100, 90, 106]) == 2
