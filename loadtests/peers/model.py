"""The model behind every peer, as `load()(texts)`: one answer for each text, in order. What it is, PEER_MODEL says.

A folder: the stock fill-mask pipeline in PEER_DTYPE, on one thread. `instant`: an answer at once. `flat`: after 100 ms,
however many texts. `gpu-like`: after 10 ms and 1 ms per text. `tricks`: an answer after a while, but a text may ask for an
error, a hang or the end of its process.
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
TEXT = "Paris is the [MASK] of France."
TRICK_S = 0.2  # a call, whatever its size
Predict = Callable[[list[str]], list[Any]]


def load() -> Predict:
    """What the peer calls with a list of texts."""
    kind = os.environ["PEER_MODEL"]
    made = {"instant": instant, "flat": flat, "gpu-like": gpu_like, "tricks": tricks}
    return made.get(kind) or stock(kind)


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


def flat(texts: list[str]) -> list[Any]:
    """A call costs the same for 1 text as for 32."""
    time.sleep(0.1)
    return instant(texts)


def gpu_like(texts: list[str]) -> list[Any]:
    """A call has a fixed cost, and each text a small one."""
    time.sleep(0.01 + 0.001 * len(texts))
    return instant(texts)


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


class Flat:
    """The same as `flat`; with the example this project's server learns at its start what a batch costs."""

    example = TEXT

    def __call__(self, inputs: list[str]) -> list[Any]:
        return flat(inputs)


class GpuLike:
    """The same as `gpu-like`."""

    example = TEXT

    def __call__(self, inputs: list[str]) -> list[Any]:
        return gpu_like(inputs)
