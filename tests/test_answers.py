"""Answers never change with how they were computed. The oracle is the plain pipeline, one text at a time, in float32."""

import asyncio
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.small_models import ENTITIES, make_model, make_tokenizer, save
from workers import offload, tasks
from workers.errors import Unprocessable
from workers.isolation import make_instances
from workers.metrics import Metrics
from workers.settings import HERE, Settings
from workers.tasks.pipeline import load_pipeline
from workers.web.replies import rendered

MODEL = Settings().MODEL
CLOZE = [line.split("\t")[0] for line in (Path(MODEL) / "cloze60.tsv").read_text().splitlines()]
LONG = (
    "The old house by the river had a [MASK]. " + "It was said that nobody had lived in it for years. " * 20
)
ASKED: list[tuple[str, dict[str, Any]]] = [
    *[(text, {}) for text in CLOZE[:10]],
    (LONG, {}),
    ("The [MASK] sat on the [MASK].", {}),
    ("The [MASK] sat on the [MASK].", {"top_k": 2}),
    ("Snow is [MASK].", {"targets": ["white", "cold", "black"]}),
    ("Snow is [MASK].", {"top_k": 1, "targets": ["whitish-grey", "cold"]}),
    ("Zoë naïvely ordered a [MASK] at the café — “déjà vu”!", {"top_k": 9}),
    ("我 喜欢 [MASK] 。", {}),
    ("[MASK]", {}),
    ("  spaces   and\nnew lines around [MASK]  \n", {}),
]


@pytest.fixture(scope="module")
def expected(oracle: Any) -> list[Any]:
    return [oracle(text, **parameters) for text, parameters in ASKED]


def assert_same(found: Any, wanted: Any) -> None:
    """The same structure, tokens and texts; scores within 1e-4."""
    if isinstance(wanted, list):
        assert len(found) == len(wanted)
        for one, other in zip(found, wanted, strict=True):
            assert_same(one, other)
    else:
        assert found == {**wanted, "score": pytest.approx(wanted["score"], abs=1e-4)}
        assert list(found) == list(wanted)


@pytest.mark.parametrize(
    ("fast", "place"),
    [
        pytest.param(True, "inline", marks=pytest.mark.slow),
        (True, "thread"),
        pytest.param(True, "process", marks=pytest.mark.slow),
        (False, "thread"),
        pytest.param(False, "process", marks=pytest.mark.slow),
    ],
    ids=lambda value: {True: "fast", False: "stock"}.get(value, value),
)
def test_single_and_batched_answers_are_those_of_the_plain_pipeline(
    fast: bool, place: str, expected: list[Any]
) -> None:
    settings = Settings(OFFLOAD=place, FAST=fast, TORCH_THREADS=1)
    task = tasks.make(settings)
    asked = [task.check(*one).content for one in ASKED]

    async def everything() -> list[list[Any]]:
        (model,) = make_instances(settings, Metrics(), task)
        await model.start()
        singly = [(await model.run([one]))[0] for one in asked]
        batched = [answer for i in range(0, len(asked), 8) for answer in await model.run(asked[i : i + 8])]
        at_once = await model.run(asked)
        model.stop()
        return [singly, batched, at_once]

    for found in asyncio.run(everything()):
        assert_same(found, expected)


def test_numbers_that_a_pipeline_leaves_to_numpy_are_json(tmp_path: Path) -> None:
    where = save(tmp_path, "bert", make_model("bert", "TokenClassification", id2label=ENTITIES))
    task = tasks.make(Settings(MODEL=where, TASK="token-classification"))
    (answer,) = task.load(0)([task.check("the old dog runs", {}).content])
    for sent, found in zip(json.loads(rendered(answer)), answer, strict=True):
        assert sent["word"] == found["word"] and sent["score"] == pytest.approx(float(found["score"]))


def test_model_whose_tokenizer_cannot_pad_is_served_all_the_same(tmp_path: Path) -> None:
    where = save(tmp_path, "bert", make_model("bert", "SequenceClassification"))
    tokenizer = make_tokenizer("bert")
    tokenizer.pad_token = None
    tokenizer.save_pretrained(where)
    task = tasks.make(Settings(MODEL=where, TASK="text-classification"))
    short, long = (task.check(text, {}).content for text in ("a dog", "the old dog runs over the river"))
    model = task.load(0)
    singly = [model([short])[0], model([long])[0]]
    for one, other in zip(model([short, long]), singly, strict=True):
        assert one == [{**other[0], "score": pytest.approx(other[0]["score"])}]


def test_pickled_model_is_not_loaded(tmp_path: Path) -> None:
    model = make_model("bert", "MaskedLM")
    where = save(tmp_path, "bert", model)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(offload.CannotLoad, match="safetensors"):
        offload.attempt_load(partial(tasks.load_alone, Settings(MODEL=where)))


@pytest.mark.parametrize(
    ("text", "parameters", "problem"),
    [
        ("no mask at all", {}, r"has no \[MASK\]; put \[MASK\] where"),
        ("[MASK] " * 9, {}, r"has 9 \[MASK\]; send at most 8"),
        ("word " * 600 + "[MASK]", {}, "has 603 tokens; send at most 512"),
        (
            "a [MASK]",
            {"targets": ["\u200d", "\u0301"]},
            "the model knows none of the targets; send other words",
        ),
        ("a [MASK]", {"top_k": 40_000}, "the model knows 30522 tokens"),
    ],
)
def test_input_that_the_model_cannot_answer_is_rejected_with_a_sentence_that_says_what_to_send(
    text: str, parameters: dict[str, Any], problem: str
) -> None:
    with pytest.raises(Unprocessable, match=problem):
        tasks.make(Settings(MAX_TOP_K=50_000)).check(text, parameters)


def test_target_that_is_not_a_word_is_left_out_beside_one_that_is() -> None:
    assert tasks.make(Settings()).check("a [MASK]", {"targets": ["\u200d", "city"], "top_k": 5})


@pytest.mark.slow
def test_bundled_model_reaches_the_scores_of_its_card(oracle: Any) -> None:
    import runpy

    evaluate = runpy.run_path(str(HERE / "models" / "minilm-mlm" / "evaluate.py"))
    top1, top5 = evaluate["score"](oracle, Path(MODEL) / "cloze60.tsv")
    assert (round(100 * top1, 1), round(100 * top5, 1)) == (53.3, 81.7)


class Stopped(Exception):
    """Loading has come to where the weights would be read."""


def test_torch_gets_the_threads_that_the_settings_say(monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: Any) -> None:
        raise Stopped(torch.get_num_threads())

    monkeypatch.setattr("workers.tasks.common.packed.pick_dtype", stop)
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            with pytest.raises(Stopped, match=str(threads)):
                load_pipeline(Settings(TORCH_THREADS=threads))
    finally:
        torch.set_num_threads(before)


def test_models_are_loaded_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    meeting = threading.Barrier(2)

    def stop(*_: Any) -> None:
        with pytest.raises(threading.BrokenBarrierError):
            meeting.wait(0.5)
        raise Stopped

    def load() -> None:
        with pytest.raises(Stopped):
            load_pipeline(Settings(TORCH_THREADS=torch.get_num_threads()))

    monkeypatch.setattr("workers.tasks.common.packed.pick_dtype", stop)
    with ThreadPoolExecutor(2) as threads:  # Transformers' loader isn't thread-safe
        for loaded in [threads.submit(load) for _ in range(2)]:
            loaded.result()
