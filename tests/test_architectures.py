"""Every encoder of Transformers that can be made small: a batch never changes an answer.

The oracle is each model's own forward, one text at a time, of a few architectures at every commit and of all in the slow
tests; there it is also the plain pipeline of every task.
"""

import random
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests.support.small_models import (
    ARCHITECTURES,
    ENTAILMENT,
    batching,
    has,
    make_model,
    make_tokenizer,
    save,
)
from workers import tasks
from workers.settings import Settings
from workers.tasks.common.encoder import Encoder, scores

TEXTS = [
    "the dog",
    "it's over",
    "the old dog runs",
    "it isn't quickly over the river!",
    "42 cafés of it " * 6,
]


# One of each kind: positions that are absolute, counted without paddings, relative, rotary; local attention and none; one
# layer for all.
EACH_COMMIT = {"albert", "bert", "deberta", "fnet", "longformer", "modernbert", "roberta", "xlnet"}


def encoded(family: str) -> list[dict[str, list[int]]]:
    tokenizer = make_tokenizer(family)
    return [tokenizer(text, "the river" if family == "longformer" else None) for text in TEXTS]


def alone(model: Any, row: dict[str, list[int]]) -> torch.Tensor:
    """What the model itself gives for a text."""
    with torch.inference_mode():
        outputs = model(**{name: torch.tensor([values]) for name, values in row.items()})
    values = scores(outputs)[0]
    return values[: len(row["input_ids"])] if values.dim() > 1 else values[None]


@pytest.mark.parametrize(
    "family",
    [pytest.param(one, marks=[] if one in EACH_COMMIT else pytest.mark.slow) for one in ARCHITECTURES],
)
def test_batch_of_any_texts_gives_each_what_the_model_gives_it_alone(family: str) -> None:
    rows, draw = encoded(family), random.Random(0)
    tokenwise = "MaskedLM" if has(family, "MaskedLM") else "TokenClassification"
    for head in filter(partial(has, family), (tokenwise, "SequenceClassification")):
        model, per_text = make_model(family, head), head == "SequenceClassification"
        expected = [alone(model, row) for row in rows]
        ids, types = [row["input_ids"] for row in rows], [row.get("token_type_ids") for row in rows]
        encoder = Encoder(model, ids[:3], types[:3] if types[0] else None, per_text, longest=128)
        if per_text and family != "big_bird":  # it changes its attention at the first short text
            assert encoder.strategy.batching == batching(family), "docs/supported.md says so"
        for batch in [[n] for n in range(len(rows))] + [
            draw.choices(range(len(rows)), k=k) for k in (2, 3, 5, 8)
        ]:
            outputs = encoder.logits(
                [ids[n] for n in batch], None, [types[n] for n in batch] if types[0] else None
            )
            scale = float(torch.cat(expected).std())
            torch.testing.assert_close(
                outputs, torch.cat([expected[n] for n in batch]), atol=2e-3 * scale, rtol=0
            )


LABELS = {"id2label": ENTAILMENT, "label2id": {label: n for n, label in ENTAILMENT.items()}}
# Of each task: the model's head, its configuration, the inputs made of a text, the parameters.
TASKS: dict[str, tuple[str, dict[str, Any], Any, dict[str, Any]]] = {
    "fill-mask": ("MaskedLM", {}, lambda text, mask: f"{mask} {text}", {}),
    "text-classification": ("SequenceClassification", {"num_labels": 3}, lambda text, _: text, {}),
    "token-classification": ("TokenClassification", {"num_labels": 5}, lambda text, _: text, {}),
    "zero-shot-classification": (
        "SequenceClassification",
        LABELS,
        lambda text, _: text,
        {"candidate_labels": ["dog", "the river"]},
    ),
    "question-answering": (
        "QuestionAnswering",
        {},
        lambda text, _: {"question": "who runs?", "context": text},
        {"top_k": 3},
    ),
    "feature-extraction": ("Model", {}, lambda text, _: text, {}),
    "sentence-similarity": (
        "Model",
        {},
        lambda text, _: {"source_sentence": "the dog runs", "sentences": [text, "a river", text * 2]},
        {},
    ),
    "text-ranking": (
        "SequenceClassification",
        {"num_labels": 1},
        lambda text, _: {"query": "who runs?", "text": text},
        {},
    ),
}
NO_PIPELINE = {"question-answering", "sentence-similarity", "text-ranking"}


def same(found: Any, expected: Any) -> bool:
    """Return whether both are the same, numbers within 2e-3 of the largest."""
    if isinstance(expected, dict):
        return list(found) == list(expected) and all(same(found[key], expected[key]) for key in expected)
    if isinstance(expected, list):
        return len(found) == len(expected) and all(map(same, found, expected))
    if isinstance(expected, str | int):
        return found == expected
    found, expected = torch.as_tensor(found), torch.as_tensor(expected)
    return bool((found - expected).abs().max() <= 2e-3 * max(1.0, float(expected.abs().max())))


@pytest.mark.slow
@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("family", ARCHITECTURES)
def test_every_task_answers_as_its_plain_pipeline_alone_and_in_batches(
    family: str, name: str, tmp_path: Path
) -> None:
    head, config, make_input, parameters = TASKS[name]
    if not has(family, head):
        return
    folder = save(tmp_path, family, make_model(family, head, **config))
    settings = {"MODEL": folder, "TASK": name, "TORCH_THREADS": 1}
    task = tasks.make(Settings(**settings))
    mask = getattr(task, "mask", "")
    inputs = [make_input(text, mask) for text in TEXTS]
    model = task.load(0)
    contents = [task.check(one, parameters).content for one in inputs]
    if name in NO_PIPELINE:  # the model's own forward, text by text
        own = tasks.make(Settings(**settings, FAST=False)).load(0)
        expected = [own([content])[0] for content in contents]
    else:
        pipe = transformers.pipeline(name, model=folder, dtype=torch.float32, device="cpu")
        expected = [pipe(one, **parameters) for one in inputs]
    draw = random.Random(0)
    for batch in [[n] for n in range(len(inputs))] + [
        draw.choices(range(len(inputs)), k=k) for k in (2, 5, 8)
    ]:
        for n, answer in zip(batch, model([contents[n] for n in batch]), strict=True):
            assert same(answer, expected[n]), (str(model.description), inputs[n])
