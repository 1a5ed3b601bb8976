"""What is asked, and whether an answer belongs to the question: a fill-mask answer shows which sentence it is for."""

import json
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from workers import tasks
from workers.settings import Settings

CORPUS = Path(__file__).resolve().parents[2] / "models" / "minilm-mlm" / "cloze60.tsv"
MASK = "[MASK]"
KINDS = ("short", "mixed", "long")
LONG_SENTENCES = 20  # about 200 tokens
MIXED_LONG_SHARE = 0.1


def letters(text: str) -> str:
    """Only what tokenising and decoding keep: no case, no spaces, no punctuation."""
    return "".join(filter(str.isalnum, text.lower()))


@dataclass(frozen=True)
class Question:
    """One request to a task that is not fill-mask: inputs and parameters as JSON."""

    inputs: Any
    parameters: dict[str, Any]
    media_type = "application/json"

    @property
    def body(self) -> bytes:
        return json.dumps({"inputs": self.inputs, "parameters": self.parameters}).encode()

    def is_answered_by(self, body: bytes) -> bool:
        """Whether `body` is JSON and no error: more can't be known of any task."""
        try:
            answer = json.loads(body)
        except ValueError:
            return False
        return not (isinstance(answer, dict) and "error" in answer)


@dataclass(frozen=True)
class Text:
    """A sentence with one mask; `before` and `after` are the letters around it."""

    text: str
    before: str
    after: str
    media_type = "text/plain"

    @property
    def inputs(self) -> str:
        return self.text

    @property
    def parameters(self) -> dict[str, Any]:
        return {}

    @property
    def body(self) -> bytes:
        return self.text.encode()

    def is_answered_by(self, body: bytes) -> bool:
        """Whether `body` is the JSON of such an answer, see `is_answered_with`."""
        try:
            return self.is_answered_with(json.loads(body))
        except ValueError:
            return False

    def is_answered_with(self, candidates: Any) -> bool:
        """Whether these are five candidates for this very text, best first, with probabilities."""
        try:
            scores = [candidate["score"] for candidate in candidates]
            return (
                len(candidates) == 5
                and all(math.isfinite(score) and 0 <= score <= 1 for score in scores)
                and scores == sorted(scores, reverse=True)
                and all(
                    letters(c["sequence"]) == self.before + letters(c["token_str"]) + self.after
                    for c in candidates
                )
            )
        except (ValueError, TypeError, KeyError, AttributeError):
            return False


def make(text: str) -> Text:
    """The text and the letters around its mask."""
    before, _, after = text.partition(MASK)
    return Text(text, letters(before), letters(after))


@cache
def corpus(kind: str) -> tuple[Text, ...]:
    """Sixty texts that differ: `short` are sentences, `long` the same with others around them."""
    lines = [line.split("\t") for line in CORPUS.read_text().splitlines() if line]
    short = [masked for masked, _ in lines]
    if kind == "short":
        return tuple(map(make, short))
    filled = [masked.replace(MASK, words.split(",")[0]) for masked, words in lines]
    around = random.Random(0)
    return tuple(
        make(" ".join([*around.sample(filled, LONG_SENTENCES // 2), masked, *around.sample(filled, 9)]))
        for masked in short
    )


def stream(kind: str, rng: random.Random, example: dict[str, Any] | None = None) -> Iterator[Text | Question]:
    """Yield questions of a kind forever; `mixed` has a long one among ten. `example` is a body that the task takes, None for fill-mask.

    A task that takes one text gets the same sentences without their masks; any other its own example again and again.
    """
    if kind not in KINDS:
        raise ValueError(f"texts={kind} is not allowed: it must be one of {', '.join(KINDS)}")
    while True:
        is_long = kind == "long" or (kind == "mixed" and rng.random() < MIXED_LONG_SHARE)
        text = rng.choice(corpus("long" if is_long else "short"))
        if example is None:
            yield text
        else:
            inputs = example["inputs"]
            if isinstance(inputs, str):
                inputs = text.text if MASK in inputs else text.text.replace(MASK, "it")
            yield Question(inputs, example.get("parameters", {}))


@cache
def example_of(settings: Settings) -> dict[str, Any] | None:
    """Return a body that the task takes; None for fill-mask, whose answers tell more. May take seconds, once."""
    if settings.TASK == "fill-mask" and not settings.is_custom:
        return None
    task = tasks.make(settings)
    return sendable(task.describe().example, bool(task.media))


def sendable(example: dict[str, Any], is_media: bool) -> dict[str, Any]:
    """Return a body that says the example in JSON. Where a text is an image in base64 another text won't do: it is sent in a list."""
    return example | {"inputs": [example["inputs"]]} if is_media else example


def kinds_of(settings: Settings) -> tuple[str, ...]:
    """Return the kinds of text that the task can tell apart: those that take something else have their example alone."""
    example = example_of(settings)
    return KINDS if example is None or isinstance(example["inputs"], str) else KINDS[:1]
