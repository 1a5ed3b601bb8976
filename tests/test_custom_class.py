"""MODEL=module:Class: a class of one's own is served like any other model, and told in one sentence what is wrong with it."""

import csv
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from loadtests.modes import MODES, ROOT, start
from models.iris import FEATURES, Iris
from tests.support.client import post_json
from workers import tasks
from workers.errors import Malformed, Unprocessable
from workers.settings import Settings
from workers.web.replies import rendered

FLOWER = dict(zip(FEATURES, (5.1, 3.5, 1.4, 0.2)))


@pytest.fixture(scope="module")
def flowers() -> list[dict[str, Any]]:
    with (ROOT / "models" / "iris" / "iris.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("offload", ["thread", "process"])
def test_a_small_network_trained_at_start_is_served(offload: str, flowers: list[dict[str, Any]]) -> None:
    mode = {"MODEL": "models.iris:Iris", "BATCH_SIZE": "64", "OFFLOAD": offload}
    rows = [{name: float(flower[name]) for name in FEATURES} for flower in flowers]
    with start(MODES["thread"], mode) as server:
        assert post_json(server, {"inputs": FLOWER}).json["species"] == "setosa"
        some = post_json(server, {"inputs": rows[::3]}).json
        right = [a["species"] == f["species"] for a, f in zip(some, flowers[::3], strict=True)]
        assert sum(right) >= 48
        assert [a["species"] for a in some] == [
            a["species"] for a in Iris()([[*r.values()] for r in rows[::3]])
        ]
        reply = post_json(server, {"inputs": [FLOWER, {"petal_length": 1}]})
        assert reply.status == 422 and reply.error.startswith("input 1: send the four lengths sepal_length, ")


def own(monkeypatch: pytest.MonkeyPatch, **members: Any) -> tasks.Task:
    """The task of a class with these members."""
    module = ModuleType("somebodys_model")
    module.Own = type("Own", (), members)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "somebodys_model", module)
    return tasks.make(Settings(MODEL="somebodys_model:Own"))


def echo(self: Any, inputs: list[Any]) -> list[Any]:
    return inputs


def test_any_json_goes_in_where_the_class_checks_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    task = own(monkeypatch, __call__=echo)
    for content in ("a text", 3, {"a": [1, None]}, [[1.5]]):
        assert task.check(content, {}) == (content, 1)
    with pytest.raises(Malformed, match='"top_k" is not a known field'):
        task.check("a text", {"top_k": 3})


def test_its_check_refuses_with_its_own_sentence_and_prepares_what_it_gets(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def check(self: Any, inputs: Any, parameters: dict[str, Any]) -> Any:
        if inputs < 0:
            raise ValueError("send a number of at least 0")
        return inputs * parameters.get("scale", 1)

    task = own(monkeypatch, __call__=echo, check=check, size=lambda self, inputs: inputs + 1)
    assert task.check(3, {"scale": 2}) == (6, 7)
    with pytest.raises(Unprocessable, match=r"^send a number of at least 0$"):
        task.check(-1, {})


def test_a_size_that_is_none_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for size in (-1, 10**308):
        task = own(monkeypatch, __call__=echo, size=lambda self, inputs, its=size: its)
        with pytest.raises(TypeError, match="it must be from 0 to"):
            task.check("a", {})


def test_a_class_that_checks_by_its_state_is_made_once_where_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    task = own(
        monkeypatch,
        __init__=lambda self: made.append(self),
        __call__=echo,
        check=lambda self, *asked: asked[0],
    )
    model = task.load(0)
    task.check("a", {})
    assert model(["a"]) == ["a"] and len(made) == 1


def test_numbers_and_arrays_of_numpy_and_torch_are_json() -> None:
    answer = {"a": np.float32(0.5), "b": np.arange(3), "c": torch.ones(2, 1), "d": torch.tensor(2)}
    assert json.loads(rendered(answer)) == {"a": 0.5, "b": [0, 1, 2], "c": [[1.0], [1.0]], "d": 2}


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        ("no_such_module:Own", "No module named 'no_such_module'"),
        ("models.iris:Rose", "there is no class Rose in models.iris"),
        ("models.iris:FEATURES", "there is no class FEATURES in models.iris"),
        ("pathlib:Path", r"pathlib:Path has no __call__\(self, inputs\)"),
    ],
)
def test_a_class_that_is_not_there_is_named(model: str, sentence: str) -> None:
    with pytest.raises(ImportError, match=sentence):
        tasks.make(Settings(MODEL=model))


@pytest.mark.parametrize("gives", [{"a": 1}, "a", b"a", {"a"}, None, np.float32(1)])
def test_what_is_no_list_of_answers_is_never_taken_for_one(
    monkeypatch: pytest.MonkeyPatch, gives: Any
) -> None:
    model = own(monkeypatch, __call__=lambda self, inputs: gives).load(0)
    with pytest.raises(TypeError, match=f"__call__ gives {type(gives).__name__}; it must give a list"):
        model(["a text"])


async def waits(self: Any, *asked: Any) -> Any:
    return asked


async def waits_and_yields(self: Any, *asked: Any) -> Any:
    yield asked


@pytest.mark.parametrize("method", [waits, waits_and_yields])
@pytest.mark.parametrize("name", ["__call__", "check", "size"])
def test_an_async_method_is_told_at_the_start(
    monkeypatch: pytest.MonkeyPatch, name: str, method: Any
) -> None:
    with pytest.raises(ImportError, match=f"somebodys_model:Own: {name} is async; make it a plain method"):
        own(monkeypatch, **{"__call__": echo} | {name: method})


BROKEN = """
class Raises:
    def __init__(self): raise RuntimeError("the weights are not there")
    def __call__(self, inputs): return inputs
class Forgets:
    def __call__(self, inputs): return inputs[1:]
class Generates:
    def __call__(self, inputs): yield from inputs
class Nan:
    def __call__(self, inputs): return [float("nan")] * len(inputs)
"""


@pytest.fixture
def broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_models.py").write_text(BROKEN)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


@pytest.mark.parametrize("offload", ["thread", "process"])
def test_a_class_that_cannot_be_made_ends_the_start_with_its_sentence(broken: None, offload: str) -> None:
    settings = {"MODEL": "broken_models:Raises", "OFFLOAD": offload}
    with start(MODES["thread"], settings, wait=False) as server:
        assert server.process.wait(60) == 3
        assert (
            "cannot load MODEL=broken_models:Raises: RuntimeError: the weights are not there" in server.log()
        )


@pytest.mark.parametrize("offload", ["thread", "process"])
def test_what_a_class_gets_wrong_is_a_500_and_a_sentence_in_the_log(broken: None, offload: str) -> None:
    sentences = {"Forgets": "the model gave 0 answers to 1 queries", "Nan": "Out of range float values"}
    for name, sentence in sentences.items():
        with start(MODES["thread"], {"MODEL": f"broken_models:{name}", "OFFLOAD": offload}) as server:
            reply = post_json(server, {"inputs": "a"})
            assert reply.status == 500 and reply.error
            assert sentence in server.log()
    with start(MODES["thread"], {"MODEL": "broken_models:Generates", "OFFLOAD": offload}) as server:
        assert post_json(server, {"inputs": ["a", "b"]}).json == ["a", "b"]
