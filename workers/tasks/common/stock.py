"""A stock pipeline of Transformers as a model: inputs prepared in threads, run together where that is exact and gains.

(`generation/stock.py` is something else: a stock language model, token by token.)

    prepare(content)    in a check's thread while the model computes, or in the model's process: pixels, features
    forward together    inputs whose tensors have the same shapes: padding would change answers
    postprocess each

A probe at load decides: equal to the plain pipeline alone to four decimals, and a batch faster than its inputs one by one.
Otherwise `max_batch` is 1, and BATCH_SIZE counts as 1.
"""

import base64
import copy
import io
import itertools
import logging
import threading
import time
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from workers.resources import usable_cores
from workers.tasks.common.media import read_image
from workers.tasks.common.text import Content, describe

log = logging.getLogger("uvicorn.error")

GAIN = 0.95  # what a batch must take of the time of its inputs one by one


@dataclass(frozen=True, slots=True)
class Prepared:
    """An input as the model takes it, one item per window, and the parameters of what follows."""

    items: list[Any]
    forward: dict[str, Any]
    post: dict[str, Any]
    group: str  # only inputs of the same group run together
    length: int = 0  # of a sound: its samples


class Stock:
    """A loaded pipeline: one answer per input, as the pipeline gives for that alone."""

    def __init__(self, task: Any, pipe: Any) -> None:
        self.pipe = pipe
        info = describe(pipe.model, task.settings, "the stock pipeline, one by one")
        self.description = info._replace(max_batch=1)

    def __call__(self, contents: list[Content]) -> list[Any]:
        return [in_json(self.plain(content)) for content in contents]

    def plain(self, content: Content) -> Any:
        """Return what the pipeline itself says."""
        return self.pipe(self.opened(content.inputs), **content.parameters)

    def opened(self, inputs: Any) -> Any:
        """As pipelines take it: an image as Pillow's."""
        if isinstance(inputs, dict):
            return {name: self.opened(value) for name, value in inputs.items()}
        return read_image(inputs) if isinstance(inputs, bytes) else inputs


class Batched(Stock):
    """A loaded pipeline of images or sounds."""

    def __init__(self, task: Any, pipe: Any, probe: Sequence[Content]) -> None:
        super().__init__(task, pipe)
        self.is_chunked = is_chunk_pipeline(pipe)
        # `generate` keeps state in the model.
        self.shareable = not (pipe._pipeline_calls_generate and pipe.model.can_generate())
        self.front = copy.copy(pipe)
        if pipe.tokenizer is not None:
            self.front.tokenizer = Locked(pipe.tokenizer)
        self.threads = ThreadPoolExecutor(min(4, usable_cores()), "prepare")
        self.max_batch, why = task.settings.BATCH_SIZE, ""
        if self.max_batch > 1 and (why := self.why_not(probe)):
            self.max_batch = 1
        how = f"up to {self.max_batch} inputs of one shape together" if self.max_batch > 1 else "one by one"
        strategy = f"{how}: {why}" if why else how
        self.description = self.description._replace(strategy=strategy, max_batch=self.max_batch)

    def __call__(self, contents: list[Content]) -> list[Any]:
        outputs = self.forward(prepared := self.all_prepared(contents))
        return [in_json(self.answer(*pair)) for pair in zip(prepared, outputs, strict=True)]

    def close(self) -> None:
        self.threads.shutdown(wait=False)

    def prepare(self, content: Content) -> Prepared:
        """Return the input as the model takes it. Several threads may call it at once. Raises whatever the pipeline raises."""
        # Or each request logs it.
        known = {"ignore_warning": True} if "chunk_length_s" in content.parameters else {}
        parameters = self.front._sanitize_parameters(**content.parameters, **known)
        own = (self.front._preprocess_params, self.front._forward_params, self.front._postprocess_params)
        before, forward, post = ({**first, **then} for first, then in zip(own, parameters))
        inputs = self.opened(content.inputs)
        items = self.front.preprocess(inputs, **before)
        items = list(items) if self.is_chunked else [items]
        length = len(inputs) if hasattr(inputs, "dtype") else 0
        return Prepared(items, forward, post, repr((before, forward)), length)

    def all_prepared(self, contents: Sequence[Content]) -> list[Prepared]:
        """Return them prepared; those that are not yet, as in a model process, are prepared in threads."""
        left = [content for content in contents if not isinstance(content.inputs, Prepared)]
        done = iter(self.threads.map(self.prepare, left) if len(left) > 1 else map(self.prepare, left))
        return [
            content.inputs if isinstance(content.inputs, Prepared) else next(done) for content in contents
        ]

    def forward(self, prepared: Sequence[Prepared]) -> list[list[Any]]:
        """Return the model's outputs per input and window; those of the same shapes run together."""
        places = [(i, j) for i, one in enumerate(prepared) for j in range(len(one.items))]
        groups: dict[Hashable, list[tuple[int, int]]] = {}
        for i, j in places:
            groups.setdefault(group_of(prepared[i], prepared[i].items[j], (i, j)), []).append((i, j))
        outputs: dict[tuple[int, int], Any] = {}
        for group in groups.values():
            for start in range(0, len(group), self.max_batch):
                some = group[start : start + self.max_batch]
                items = [prepared[i].items[j] for i, j in some]
                result = self.pipe.forward(together(items), **prepared[some[0][0]].forward)
                outputs |= zip(some, apart(result, items))
        return [[outputs[i, j] for j in range(len(one.items))] for i, one in enumerate(prepared)]

    def answer(self, prepared: Prepared, outputs: list[Any]) -> Any:
        """Return what the pipeline makes of the model's outputs for one input."""
        return self.pipe.postprocess(outputs if self.is_chunked else outputs[0], **prepared.post)

    def why_not(self, probe: Sequence[Content]) -> str:
        """Return why inputs are not run together; empty where that is exact and gains."""
        try:
            alone = [self.plain(content) for content in probe]
            prepared = self.all_prepared(probe)
            many = list(itertools.islice(itertools.cycle(prepared), min(self.max_batch, 32)))
            outputs = self.forward(many)
            answers = [self.answer(*pair) for pair in zip(many, outputs, strict=True)]
        except Exception as exc:
            return f"a batch fails with {type(exc).__name__}"
        if not all(same(one, alone[i % len(probe)]) for i, one in enumerate(answers)):
            return "a batch changes answers"
        same_shapes = [prepared[0]] * len(many)
        batch_s = quickest_s(lambda: self.forward(same_shapes))
        singly_s = quickest_s(lambda: self.forward(same_shapes[:1])) * len(many)
        log.info("a batch of %d takes %.0f %% of its inputs one by one", len(many), 100 * batch_s / singly_s)
        return "" if batch_s < GAIN * singly_s else "a batch takes as long as its inputs one by one"


class Locked:
    """A tokenizer for several threads: two at once in one raise "Already borrowed"."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.lock = tokenizer, threading.Lock()

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        with self.lock:
            return self.tokenizer(*arguments, **named)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)


def is_chunk_pipeline(pipe: Any) -> bool:
    """Whether it cuts an input into windows."""
    from transformers.pipelines.base import ChunkPipeline

    return isinstance(pipe, ChunkPipeline)


def group_of(prepared: Prepared, item: Any, place: tuple[int, int]) -> Hashable:
    """Return what inputs must have in common to run together: parameters, and the shapes of all tensors."""
    shapes: list[Any] = [prepared.group]
    for name, value in sorted(item.items()):
        if hasattr(value, "dtype"):
            # Whisper's sounds of over 30 s, and its timestamps: `generate` gives them in other forms.
            if value.shape[:1] != (1,) or (name == "input_features" and value.shape[-1] > 3000):
                return place
            shapes.append((name, tuple(value.shape), value.dtype))
        elif name == "stride":
            shapes.append(tuple(value))
    return place if prepared.forward.get("return_timestamps") else tuple(shapes)


def together(items: Sequence[Any]) -> Any:
    """Return one input of the model for several of the same shapes. Always another object: `forward` changes it."""
    import torch

    joined = copy.copy(items[0])
    for name, value in items[0].items():
        if hasattr(value, "dtype") and len(items) > 1:
            joined[name] = torch.cat([item[name] for item in items])
    return joined


def apart(outputs: Any, items: Sequence[Any]) -> list[Any]:
    """Return the outputs of each of several inputs, as the model gives them for one alone."""
    if len(items) == 1:
        return [outputs]
    rows = [row(outputs, i, len(items)) for i in range(len(items))]
    for one, item in zip(rows, items):
        if "target_size" in item and not hasattr(item["target_size"], "dtype"):
            one["target_size"] = item["target_size"]  # of depth estimation, a tuple that passes through
    return rows


def row(value: Any, i: int, n: int) -> Any:
    """Return the i-th of n rows of all tensors in the value."""
    if hasattr(value, "items"):
        part = copy.copy(value)
        for name, member in value.items():
            part[name] = row(member, i, n)
        return part
    if isinstance(value, list | tuple):
        return type(value)(row(member, i, n) for member in value)
    return value[i : i + 1] if hasattr(value, "dtype") and value.shape[:1] == (n,) else value


def same(one: Any, other: Any) -> bool:
    """Whether two answers are equal to four decimals; images, which are rounded, to one step."""
    import numpy as np

    if isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[name], other[name]) for name in other)
    if isinstance(other, list | tuple):
        return len(one) == len(other) and all(same(*pair) for pair in zip(one, other))
    if isinstance(other, str | bool | None):
        return bool(one == other)
    is_image = hasattr(other, "getbands")
    first, second = (np.asarray(value, dtype=np.float64) for value in (one, other))
    close = first.shape == second.shape and np.allclose(
        first, second, rtol=1e-4, atol=1.5 if is_image else 1e-4
    )
    return bool(close)


def quickest_s(call: Callable[[], Any]) -> float:
    """Return the shortest of three calls: others on the same cores can only make one longer."""
    times_s = []
    for _ in range(3):
        began = time.perf_counter()
        call()
        times_s.append(time.perf_counter() - began)
    return min(times_s)


def in_json(answer: Any) -> Any:
    """Return it with images, such as masks, as Hugging Face's hosted pipelines give them: a PNG in base64."""
    if isinstance(answer, dict):
        return {name: in_json(value) for name, value in answer.items()}
    if isinstance(answer, list):
        # A vector's thousands of numbers need no look each.
        return answer if answer and isinstance(answer[0], float) else [in_json(value) for value in answer]
    if not callable(save := getattr(answer, "save", None)):
        return answer
    file = io.BytesIO()
    save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()
