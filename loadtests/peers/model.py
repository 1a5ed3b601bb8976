"""The model behind every peer, as `load()(texts)`: one answer for each text, in order. What it is, PEER_MODEL says.

A folder: the stock fill-mask pipeline in PEER_DTYPE, on one thread. `instant`: an answer at once. `tricks`: an
answer after a while, but a text may ask for an error, a hang or the end of its process.
"""

import json
import os
import signal
import time
from collections.abc import Callable
from typing import Any

ANSWER = [
    {"score": 0.5 / (i + 1), "token": i, "token_str": word, "sequence": f"paris is the {word} of france."}
    for i, word in enumerate(("thing", "one", "man", "day", "way"))
]
TRICK_S = 0.2  # a call, whatever its size
Predict = Callable[[list[str]], list[Any]]


def load() -> Predict:
    """What the peer calls with a list of texts."""
    kind = os.environ["PEER_MODEL"]
    return {"instant": instant, "tricks": tricks}.get(kind) or stock(kind)


def stock(folder: str) -> Predict:
    """The pipeline as its page has it. Of one text alone it returns the bare answer: wrapped here."""
    import torch
    from transformers import pipeline

    torch.set_num_threads(1)
    dtype = os.environ.get("PEER_DTYPE", "float32")
    pipe: Any = pipeline("fill-mask", model=folder, dtype=dtype, device="cpu", top_k=5)

    def predict(texts: list[str]) -> list[Any]:
        answers = pipe(texts, batch_size=len(texts))
        return [answers] if len(texts) == 1 else list(answers)

    return predict


def instant(texts: list[str]) -> list[Any]:
    return [ANSWER] * len(texts)


def tricks(texts: list[str]) -> list[Any]:
    """Notes the texts in the file PEER_CALLS. As a pipeline does, it raises for all when one is bad."""
    if calls := os.environ.get("PEER_CALLS"):
        with open(calls, "a") as file:
            file.write(json.dumps(texts) + "\n")
    time.sleep(TRICK_S)
    if any("KILL" in text for text in texts):
        os.kill(os.getpid(), signal.SIGKILL)
    if any("HANG" in text for text in texts):
        time.sleep(3600)
    if any("BAD" in text for text in texts):
        raise ValueError("a bad text")
    return instant(texts)


class Tricks:
    """MODEL=loadtests.peers.model:Tricks is the same for this project's server."""

    def __call__(self, inputs: list[str]) -> list[Any]:
        return tricks(inputs)
