"""Every encoder of Transformers that can be made small: a batch never changes an answer.

The quick tests ask each model's own forward, one text at a time. The slow ones ask the plain pipeline of every task.
"""

import random
from typing import Any

import pytest
import torch
import transformers

from tests.support.small_models import ARCHITECTURES, class_name, make_model, make_tokenizer
from workers.tasks.common.encoder import Encoder, scores

HEADS = ("Model", "MaskedLM", "SequenceClassification", "TokenClassification", "QuestionAnswering")
TEXTS = [
    "the dog",
    "it's over",
    "the old dog runs",
    "it isn't quickly over the river!",
    "42 cafés of it " * 6,
]


def has(family: str, head: str) -> bool:
    """Return whether Transformers has this model, for texts alone."""
    name, _ = ARCHITECTURES[family]
    if (family, head) == ("perceiver", "Model"):
        return False  # takes no input_ids
    return hasattr(transformers, class_name(name, head))


def encoded(family: str) -> list[dict[str, list[int]]]:
    tokenizer = make_tokenizer(family)
    return [tokenizer(text, "the river" if family == "longformer" else None) for text in TEXTS]


def alone(model: Any, row: dict[str, list[int]]) -> torch.Tensor:
    """What the model itself gives for a text."""
    with torch.inference_mode():
        outputs = model(**{name: torch.tensor([values]) for name, values in row.items()})
    values = outputs.last_hidden_state[0] if "last_hidden_state" in outputs else scores(outputs)[0]
    return values[: len(row["input_ids"])] if values.dim() > 1 else values[None]


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_batch_of_any_texts_gives_each_what_the_model_gives_it_alone(family: str) -> None:
    rows, draw = encoded(family), random.Random(0)
    for head in HEADS:
        if not has(family, head):
            continue
        model, per_text = make_model(family, head), head == "SequenceClassification"
        expected = [alone(model, row) for row in rows]
        ids, types = [row["input_ids"] for row in rows], [row.get("token_type_ids") for row in rows]
        encoder = Encoder(model, ids[:3], types[:3] if types[0] else None, per_text, longest=128)
        run = encoder if head == "Model" else encoder.logits
        for batch in [[n] for n in range(len(rows))] + [
            draw.choices(range(len(rows)), k=k) for k in (2, 3, 5, 8)
        ]:
            outputs = run([ids[n] for n in batch], None, [types[n] for n in batch] if types[0] else None)
            scale = float(torch.cat(expected).std())
            torch.testing.assert_close(
                outputs, torch.cat([expected[n] for n in batch]), atol=2e-3 * scale, rtol=0
            )
