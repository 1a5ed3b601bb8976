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
import transformers
from workers.model import CannotAnswer, InputCheck, Model, Query, load_pipeline

from workers import offload
from workers.contract import Answered
from workers.metrics import Metrics
from workers.settings import HERE, Settings

MODEL = Settings().MODEL
CLOZE = [line.split("\t")[0] for line in (Path(MODEL) / "cloze60.tsv").read_text().splitlines()]
LONG = (
    "The old house by the river had a [MASK]. " + "It was said that nobody had lived in it for years. " * 20
)
QUERIES = [
    *[Query(text) for text in CLOZE[:20]],
    Query(LONG),
    Query("The [MASK] sat on the [MASK]."),
    Query("The [MASK] sat on the [MASK].", top_k=2),
    Query("Snow is [MASK].", targets=("white", "cold", "black")),
    Query("Snow is [MASK].", top_k=1, targets=("whitish-grey", "cold")),
    Query("Zoë naïvely ordered a [MASK] at the café — “déjà vu”!", top_k=9),
    Query("我 喜欢 [MASK] 。"),
    Query("[MASK]"),
    Query("  spaces   and\nnew lines around [MASK]  \n"),
]


@pytest.fixture(scope="module")
def expected() -> list[Any]:
    pipe = transformers.pipeline("fill-mask", model=MODEL, dtype=torch.float32)
    return [pipe(query.text, top_k=query.top_k, targets=list(query.targets) or None) for query in QUERIES]


def assert_same(found: Any, wanted: Any) -> None:
    """The same structure, tokens and texts; scores within 1e-4."""
    if isinstance(wanted, list):
        assert len(found) == len(wanted)
        for one, other in zip(found, wanted, strict=True):
            assert_same(one, other)
    else:
        assert found == {**wanted, "score": pytest.approx(wanted["score"], abs=1e-4)}
        assert list(found) == list(wanted)


@pytest.mark.parametrize("place", ["inline", "thread", "process"])
@pytest.mark.parametrize("fast", [True, False], ids=["fast", "stock"])
def test_single_and_batched_answers_are_those_of_the_plain_pipeline(
    place: str, fast: bool, expected: list[Any]
) -> None:
    async def everything() -> list[list[Any]]:
        (model,) = offload.make(Settings(OFFLOAD=place, FAST=fast), Metrics())
        await model.start()
        singly = [(await model.run([query]))[0] for query in QUERIES]
        batched = [
            answer for i in range(0, len(QUERIES), 8) for answer in await model.run(QUERIES[i : i + 8])
        ]
        at_once = await model.run(QUERIES)
        model.stop()
        return [singly, batched, at_once]

    for found in asyncio.run(everything()):
        assert_same(found, expected)


def test_another_task_is_answered_as_its_pipeline_answers(tmp_path: Path) -> None:
    config = transformers.AutoConfig.from_pretrained(MODEL, num_hidden_layers=1, num_labels=3)
    torch.manual_seed(0)
    transformers.BertForSequenceClassification(config).save_pretrained(tmp_path)
    transformers.AutoTokenizer.from_pretrained(MODEL).save_pretrained(tmp_path)
    settings = Settings(MODEL=str(tmp_path), TASK="text-classification", BATCH_SIZE=4)
    pipe = transformers.pipeline("text-classification", model=str(tmp_path), dtype=torch.float32)
    texts = ["good", "a bad one", "so so " * 30]
    model = Model(settings)
    wanted = [pipe(text) for text in texts]
    assert isinstance(wanted[0], list)
    for answers in (model([Query(text) for text in texts]), [model([Query(text)])[0] for text in texts]):
        for answer, want in zip(answers, wanted, strict=True):
            assert answer == [{**want[0], "score": pytest.approx(want[0]["score"], abs=1e-4)}]
    assert len(InputCheck(settings)(Query("no mask needed")).ids) == 5  # and its two special tokens


def test_numbers_that_a_pipeline_leaves_to_numpy_are_json(tmp_path: Path) -> None:
    config = transformers.AutoConfig.from_pretrained(MODEL, num_hidden_layers=1)
    transformers.BertForTokenClassification(config).save_pretrained(tmp_path)
    transformers.AutoTokenizer.from_pretrained(MODEL).save_pretrained(tmp_path)
    (answer,) = Model(Settings(MODEL=str(tmp_path), TASK="token-classification"))([Query("a text")])
    for sent, found in zip(json.loads(Answered(answer).body), answer, strict=True):
        assert sent["word"] == found["word"] and sent["score"] == pytest.approx(found["score"])


def test_a_model_that_cannot_batch_serves_one_at_a_time(tmp_path: Path) -> None:
    config = transformers.AutoConfig.from_pretrained(MODEL, num_hidden_layers=1)
    transformers.BertForSequenceClassification(config).save_pretrained(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    (answer,) = Model(Settings(MODEL=str(tmp_path), TASK="text-classification"))([Query("a text")])
    assert answer[0]["label"]


def test_a_pickled_model_is_not_loaded(tmp_path: Path) -> None:
    config = transformers.AutoConfig.from_pretrained(MODEL, num_hidden_layers=1)
    model = transformers.BertForMaskedLM(config)
    config.save_pretrained(tmp_path)
    transformers.AutoTokenizer.from_pretrained(MODEL).save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(offload.CannotLoad, match="safetensors"):
        offload.attempt_load(partial(Model, Settings(MODEL=str(tmp_path))))


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("no mask at all", r"has no \[MASK\]; put \[MASK\] where"),
        ("[MASK] " * 9, r"has 9 \[MASK\]; send at most 8"),
        ("word " * 600 + "[MASK]", "has 603 tokens; send at most 512"),
    ],
)
def test_what_the_model_cannot_answer_is_refused_with_a_sentence_that_says_what_to_send(
    text: str, problem: str
) -> None:
    with pytest.raises(CannotAnswer, match=problem):
        InputCheck(Settings())(Query(text))


@pytest.mark.parametrize(
    ("query", "problem"),
    [
        (Query("a [MASK]", targets=("\u200d", "\u0301")), "no words to this model; send others"),
        (Query("a [MASK]", top_k=40_000), "the model knows 30522 tokens"),
    ],
)
def test_what_would_fail_a_whole_batch_is_refused_before_it(query: Query, problem: str) -> None:
    with pytest.raises(CannotAnswer, match=problem):
        InputCheck(Settings())(query)
    assert InputCheck(Settings())(query._replace(targets=("\u200d", "city"), top_k=5))


def test_the_embedded_model_reaches_the_scores_of_its_card() -> None:
    import runpy

    evaluate = runpy.run_path(str(HERE / "models" / "minilm-mlm" / "evaluate.py"))
    pipe = transformers.pipeline("fill-mask", model=MODEL, dtype=torch.float32)
    top1, top5 = evaluate["score"](pipe, Path(MODEL) / "cloze60.tsv")
    assert (round(100 * top1, 1), round(100 * top5, 1)) == (53.3, 81.7)


class Stopped(Exception):
    """Loading has come to where the weights would be read."""


def test_torch_gets_the_threads_that_the_settings_say(monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: Any) -> None:
        raise Stopped(torch.get_num_threads())

    monkeypatch.setattr("workers.fill_mask.pick_dtype", stop)
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

    monkeypatch.setattr("workers.fill_mask.pick_dtype", stop)
    with ThreadPoolExecutor(2) as threads:  # Transformers' loader isn't thread-safe
        for loaded in [threads.submit(load) for _ in range(2)]:
            loaded.result()
