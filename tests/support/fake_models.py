"""Models that start at once and do as they are told: `MODEL=tests.support.fake_models:FillMask uvicorn server:app`.

FillMask has the answers' form and the real one's sentences, but not its 6 seconds of loading. A text takes it 0.3 ms a
word, during which it computes nothing: so many of its servers run side by side. "until:path" in it waits for a file.
"""

import math
import os
import re
import time
from pathlib import Path
from typing import Any

from loadtests.bench.apps import answer
from loadtests.plan import fixed_delay
from workers.tasks.calls import CallContext

MASK, POISON = "[MASK]", "[POISON]"
WORD_S = 0.0003
if "FIXED_DELAY_MS" in os.environ:  # so that a test decides which requests share a batch
    fixed_delay.install(float(os.environ["FIXED_DELAY_MS"]) / 1000)
BROKEN = "BROKEN"  # names the file whose presence keeps Obedient from loading


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
        for path in re.findall(r"until:(\S+)", " ".join(inputs)):
            wait_for(path)
        if any(POISON in text for text in inputs):
            raise IndexError("index out of range in self")
        return [answer(text) for text in inputs]


class SlowToLoad(FillMask):
    """It loads once the file is there that GATE names."""

    def __init__(self) -> None:
        print("loading", flush=True)
        wait_for(os.environ["GATE"])


class Obedient:
    """Answers with its input; {"until": path} waits for a file, {"nan": 1} answers with no JSON, {"bug": 1} raises."""

    example = "a text"

    def __init__(self) -> None:
        if os.path.exists(os.environ.get(BROKEN, "")):
            raise OSError("Too many open files")

    @staticmethod
    def check(inputs: Any, parameters: dict[str, Any]) -> None:
        if isinstance(inputs, dict) and "bug" in inputs:
            raise RuntimeError("a bug of the check")

    def __call__(self, inputs: list[Any]) -> list[Any]:
        return [obey(told) for told in inputs]


def obey(told: Any) -> Any:
    if isinstance(told, dict) and "until" in told:
        wait_for(told["until"])
    return math.nan if isinstance(told, dict) and "nan" in told else told


def wait_for(path: str) -> None:
    """Say so, then wait until the file is there."""
    print("waiting", flush=True)
    while not Path(path).exists():
        time.sleep(0.01)


class Reports:
    """Reports as its progress what is in the file that the input names, until that is 1."""

    example = ""

    def __call__(self, inputs: list[str], contexts: list[CallContext]) -> list[str]:
        for path, context in zip(inputs, contexts):
            while path and context.fraction != 1:
                context.progress(float(Path(path).read_text() or 0))
                time.sleep(0.01)
        return inputs
