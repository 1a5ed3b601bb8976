"""MODEL=module:Class: a class of one's own is served like any other model, and told in one sentence what is wrong with it."""

import base64
import csv
import io
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx2
import numpy as np
import PIL.Image
import pydantic
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


@pytest.mark.parametrize("offload", ["thread", pytest.param("process", marks=pytest.mark.slow)])
def test_small_network_trained_at_start_is_served(offload: str, flowers: list[dict[str, Any]]) -> None:
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


def picture(width: int, height: int) -> bytes:
    """A black PNG."""
    file = io.BytesIO()
    PIL.Image.new("RGB", (width, height)).save(file, "PNG")
    return file.getvalue()


def echo(self: Any, inputs: list[Any]) -> list[Any]:
    return inputs


def test_any_json_goes_in_where_the_class_checks_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    task = own(monkeypatch, __call__=echo)
    for content in ("a text", 3, {"a": [1, None]}, [[1.5]]):
        assert task.check(content, {}) == (content, 1)
    with pytest.raises(Malformed, match='"top_k" is not a known field'):
        task.check("a text", {"top_k": 3})


def test_its_check_rejects_with_its_own_sentence_and_prepares_what_it_gets(
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


def test_size_that_is_none_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for size in (-1, 10**308):
        task = own(monkeypatch, __call__=echo, size=lambda self, inputs, its=size: its)
        with pytest.raises(TypeError, match="it must be from 0 to"):
            task.check("a", {})


def test_class_that_checks_by_its_state_is_made_once_where_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
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
def test_class_that_is_not_there_is_named(model: str, sentence: str) -> None:
    with pytest.raises(ImportError, match=sentence):
        tasks.make(Settings(MODEL=model))


@pytest.mark.parametrize("gives", [{"a": 1}, "a", b"a", {"a"}, None, np.float32(1)])
def test_result_that_is_not_a_list_of_answers_is_never_taken_for_one(
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
def test_async_method_is_reported_at_the_start(
    monkeypatch: pytest.MonkeyPatch, name: str, method: Any
) -> None:
    with pytest.raises(ImportError, match=f"somebodys_model:Own: {name} is async; make it a plain method"):
        own(monkeypatch, **{"__call__": echo} | {name: method})


def test_list_shaped_example_is_rejected_at_the_start_unless_the_class_says_that_one_input_is_a_list(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(ValueError, match="set input_rank = 2 in the class if one input is such a list"):
        own(monkeypatch, __call__=echo, example=[[1.0], [2.0]])
    vector = own(monkeypatch, __call__=echo, example=[1.0, 2.0], input_rank=1)
    assert vector.is_one([1.0, 2.0]) and not vector.is_one([[1.0, 2.0], [3.0, 4.0]])
    matrix = own(monkeypatch, __call__=echo, example=[[1.0]], input_rank=2)
    assert matrix.is_one([[1.0]]) and not matrix.is_one([[[1.0]]])


class Flower(pydantic.BaseModel):
    petal_length: float = pydantic.Field(gt=0)


class Options(pydantic.BaseModel, extra="forbid"):
    unit: str = "cm"


def test_pydantic_models_in_the_annotations_of_check_are_validated_and_an_error_names_the_field(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def check(self: Any, inputs: Flower, parameters: Options) -> Any:
        return inputs if parameters.unit == "cm" else Flower(petal_length=inputs.petal_length * 2.54)

    task = own(monkeypatch, __call__=echo, check=check)
    assert task.check({"petal_length": 1}, {"unit": "in"}).content == Flower(petal_length=2.54)
    for inputs, parameters, sentence in [
        ({"petal_length": -1}, {}, '"petal_length": Input should be greater than 0'),
        ({}, {}, '"petal_length": Field required'),
        ("a rose", {}, "Input should be a valid dictionary or instance of Flower"),
        ({"petal_length": 1}, {"colour": "red"}, '"colour": Extra inputs are not permitted'),
    ]:
        with pytest.raises(Unprocessable) as error:
            task.check(inputs, parameters)
        assert str(error.value) == sentence


def test_input_of_another_form_than_check_expects_is_the_clients_fault_and_not_quoted_in_the_log(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    task = own(monkeypatch, __call__=echo, check=lambda self, inputs, parameters: inputs["row"]["width"] + 1)
    for inputs, sentence in [
        ({"row": {}}, '"width" is missing or not known'),
        ("my secret", "the input does not have the form that the model takes"),
        ({"row": {"width": "my secret"}}, "the input does not have the form that the model takes"),
        ({"row": ["my secret"]}, "the input does not have the form that the model takes"),
    ]:
        with pytest.raises(Unprocessable, match=sentence):
            task.check(inputs, {})
    assert "check raised TypeError at " in caplog.text and "secret" not in caplog.text


def test_class_with_media_gets_bytes_of_the_body_and_of_base64(monkeypatch: pytest.MonkeyPatch) -> None:
    task = own(monkeypatch, __call__=echo, media=("image/",), example=b"abc")
    assert task.media == ("image/",)
    for inputs in (b"abc", "YWJj", "data:image/png;base64,YWJj"):
        assert task.check(inputs, {}).content == b"abc"
    for inputs in ("no base64", "ä", "data:image/png;base64,YWJj東京"):
        with pytest.raises(Malformed, match="must be base64"):
            task.check(inputs, {})
    assert task.describe().example == {"inputs": "YWJj"}


def test_bytes_images_and_pydantic_models_are_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    image = PIL.Image.new("RGB", (2, 2), "red")
    model = own(monkeypatch, __call__=echo).load(0)
    answers = model([b"abc", image, {"mask": image}, Flower(petal_length=1.5), [image], [0.5]])
    assert (answers[0].body, answers[0].media_type) == (b"abc", "application/octet-stream")
    assert answers[1].media_type == "image/png"
    assert PIL.Image.open(io.BytesIO(answers[1].body)).getpixel((0, 0)) == (255, 0, 0)
    png = answers[1].tolist()
    expected = [{"mask": png}, {"petal_length": 1.5}, [png], [0.5]]
    assert json.loads(rendered(answers[2:])) == expected
    model = own(monkeypatch, __call__=echo, media_type="image/jpeg").load(0)
    assert model([image])[0].body[:3] == b"\xff\xd8\xff"


def test_answer_of_bytes_is_the_body_with_its_content_type_and_base64_in_a_list(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "painter.py").write_text(PAINTER)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    settings = {"MODEL": "painter:Painter", "MODEL_ARGS": '{"colour": [0, 0, 255]}'}
    with start(MODES["thread"], settings) as server:
        reply = httpx2.post(server.url, content=picture(3, 2), headers={"Content-Type": "image/png"})
        assert (reply.status_code, reply.headers["Content-Type"]) == (200, "image/png")
        image = PIL.Image.open(io.BytesIO(reply.content))
        assert image.size == (3, 2) and image.getpixel((0, 0)) == (0, 0, 255)
        code = base64.b64encode(picture(3, 2)).decode()
        assert post_json(server, {"inputs": [code]}).json == [base64.b64encode(reply.content).decode()]
        assert httpx2.post(server.url, content=b"x", headers={"Content-Type": "audio/wav"}).status_code == 415


@pytest.mark.parametrize("offload", ["thread", "process"])
@pytest.mark.parametrize("name", ["Closes", "Leaves"])
def test_class_is_closed_once_when_the_server_stops(
    offload: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "closing.py").write_text(CLOSING)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("DIARY", str(tmp_path / "diary"))
    with start(MODES["thread"], {"MODEL": f"closing:{name}", "OFFLOAD": offload}) as server:
        assert post_json(server, {"inputs": "a"}).json == "a"
        server.process.terminate()
        assert server.process.wait(30) in (0, -15)
    assert (tmp_path / "diary").read_text() == "closed in the thread of its calls\n"


@pytest.mark.parametrize("offload", ["thread", "process"])
def test_class_that_never_ends_closing_is_waited_for_no_longer_than_the_grace_time(
    offload: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "closing.py").write_text(CLOSING)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    settings = {"MODEL": "closing:Hangs", "OFFLOAD": offload, "GRACE_S": "2"}
    with start(MODES["thread"], settings) as server:
        server.process.terminate()
        assert server.process.wait(30) in (0, -15), "it ends by itself, before the alarm at GRACE_S"


PAINTER = """
import io
from PIL import Image
class Painter:
    media = ("image/",)
    def __init__(self, colour): self.colour = tuple(colour)
    def check(self, inputs, parameters): return Image.open(io.BytesIO(inputs))
    def __call__(self, inputs): return [Image.new("RGB", image.size, self.colour) for image in inputs]
"""

CLOSING = """
import os, threading, time
def write():
    name = threading.current_thread().name
    with open(os.environ["DIARY"], "a") as diary: diary.write(f"closed in the thread of {Base.calls[name]}\\n")
class Base:
    example = "a"
    calls = {}
    def __call__(self, inputs):
        self.calls[threading.current_thread().name] = "its calls"
        return inputs
class Closes(Base):
    def close(self): write()
class Leaves(Base):
    def __enter__(self): return self
    def __exit__(self, *error): write()
class Hangs(Base):
    def close(self): time.sleep(600)
"""

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
def test_class_that_cannot_be_made_ends_the_start_with_its_sentence(broken: None, offload: str) -> None:
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
