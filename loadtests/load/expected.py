"""What the plain pipeline answers to every text of the load tests, and whether another's answer agrees with it."""

import json
import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from loadtests.load import texts

# dtype: how far a probability may be off, and how many of the five words must be the pipeline's: wide enough for rounding,
# far too narrow for another text's answer.
TOLERANCE = {"float32": (1e-3, 4), "bfloat16": (0.06, 3)}
LEAST_COSINE = 0.999


@dataclass(frozen=True)
class Expected:
    """Answers by text: five (token, probability), or a vector; and the dtype that they are compared for."""

    answers: dict[str, Any]
    dtype: str

    @staticmethod
    @cache
    def read(name: str) -> "Expected":
        """From FILE, or from FILE:DTYPE."""
        file, _, dtype = name.partition(":")
        return Expected(json.loads(Path(file).read_text()), dtype or "float32")

    def agrees(self, text: str, answer: Any) -> bool:
        """Whether it is the pipeline's answer to this text, within the tolerance."""
        expected = self.answers[text]
        try:
            return (
                self._is_near(expected, answer)
                if isinstance(expected[0], list)
                else is_parallel(expected, answer)
            )
        except (TypeError, LookupError, ValueError):
            return False

    def _is_near(self, expected: list[tuple[int, float]], answer: list[dict[str, Any]]) -> bool:
        tolerance, least = TOLERANCE[self.dtype]
        found = {candidate["token"]: candidate["score"] for candidate in answer}
        common = [(score, found[token]) for token, score in expected if token in found]
        return len(answer) == 5 and len(common) >= least and all(abs(a - b) <= tolerance for a, b in common)


def is_parallel(expected: list[float], answer: list[float]) -> bool:
    """Whether two vectors point the same way."""
    dot = sum(a * b for a, b in zip(expected, answer, strict=True))
    return dot >= LEAST_COSINE * math.hypot(*expected) * math.hypot(*answer)


def all_texts() -> list[str]:
    """What the kinds short, mixed and long are made of."""
    return [text.text for kind in ("short", "long") for text in texts.corpus(kind)]


def fill_mask(folder: Path) -> dict[str, Any]:
    """The pipeline's answers, each text alone, in float32."""
    from transformers import pipeline

    pipe: Any = pipeline("fill-mask", model=str(folder), dtype="float32", device="cpu", top_k=5)
    return {text: [(c["token"], c["score"]) for c in pipe(text)] for text in all_texts()}


def embeddings(folder: str) -> dict[str, Any]:
    """The vectors of sentence-transformers."""
    from sentence_transformers import SentenceTransformer

    asked = all_texts()
    return dict(zip(asked, SentenceTransformer(folder, device="cpu").encode(asked).tolist()))


def write(file: Path, answers: dict[str, Any]) -> None:
    """Keep them for `Expected.read`."""
    file.write_text(json.dumps(answers))
