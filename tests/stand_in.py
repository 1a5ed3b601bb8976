"""A model that starts at once and does as it is told: `MODEL=tests.stand_in:FillMask uvicorn server:app`.

It has the answers' form and the real one's sentences, but not its 6 seconds of loading. A text takes it 0.3 ms a
word, during which it computes nothing: so many of its servers run side by side.
"""

import time
from typing import Any

from loadtests.bench_apps import answer

MASK, POISON = "[MASK]", "[POISON]"
WORD_S = 0.0003


class FillMask:
    """A text with a mask in, five candidates out."""

    example = f"a {MASK}"

    @staticmethod
    def check(inputs: Any, parameters: dict[str, Any]) -> None:
        if not isinstance(inputs, str) or MASK not in inputs:
            raise ValueError(f"the text has no {MASK}; put {MASK} where the missing word is")

    @staticmethod
    def size(inputs: str) -> int:
        return len(inputs.split())

    def __call__(self, inputs: list[str]) -> list[Any]:
        time.sleep(WORD_S * sum(map(self.size, inputs)))
        if any(POISON in text for text in inputs):
            raise IndexError("index out of range in self")
        return [answer(text) for text in inputs]
