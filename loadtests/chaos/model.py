"""MODEL=loadtests.chaos.model:Model: its answers belong to their texts, and it does what a text or the time's mood says.

A text's first word is what it does: "poison" raises, "kills" ends the process, "dawdles" takes long, "bad" fails the check.
CHAOS_MOODS is a folder; while there is a file "slow" or "raises" in it, every call is or does. With CHAOS_BUNDLED=1 each call runs
the bundled model, too: its time, its memory, its threads.
"""

import os
import signal
import time
from collections.abc import Callable
from typing import Any

CALL_S, TEXT_S, SLOW_S, DAWDLES_S = 0.004, 0.001, 0.3, 0.2


def answer(text: str) -> dict[str, Any]:
    """What only this text is answered with."""
    return {"said": text[::-1], "letters": len(text)}


def load_bundled() -> Callable[[list[str]], Any]:
    """Load the bundled model; return a call of it with texts."""
    from workers import tasks
    from workers.settings import Settings

    task = tasks.make(Settings())
    model = tasks.load(task, Settings())
    return lambda inputs: model([task.check(f"{text[:1000]} [MASK]", {}).content for text in inputs])


class Model:
    """Any text but a bad one in, the text backwards out."""

    example = "good example"

    def __init__(self) -> None:
        self.bundled = load_bundled() if os.environ.get("CHAOS_BUNDLED") else None

    @staticmethod
    def check(inputs: Any, parameters: dict[str, Any]) -> None:
        if not isinstance(inputs, str) or inputs.startswith("bad"):
            raise ValueError("the text is bad; send a better one")

    def __call__(self, inputs: list[str]) -> list[Any]:
        moods = os.environ.get("CHAOS_MOODS", "")
        words = [text.partition(" ")[0] for text in inputs]
        if self.bundled:
            self.bundled(inputs)
        seconds = CALL_S + TEXT_S * len(inputs) + DAWDLES_S * words.count("dawdles")
        time.sleep(seconds + SLOW_S * os.path.exists(f"{moods}/slow"))
        if "kills" in words:
            os.kill(os.getpid(), signal.SIGSEGV)
        if "poison" in words or os.path.exists(f"{moods}/raises"):
            raise IndexError("index out of range in self")
        return [answer(text) for text in inputs]
