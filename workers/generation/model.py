"""The model's half of a step: a forward pass over its rows, then a token for each that gets one."""

import logging
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from workers import resources
from workers.generation.llama import Llama, UnsupportedModel
from workers.generation.memory import settle
from workers.generation.sampling import choose
from workers.generation.steps import Choice, Limits, Options, Outcome, Row
from workers.generation.stock import StockForward

# How far another way's logits may be from the stock way's, in their standard deviations.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.25, torch.float16: 0.05}

# Of what the KV cache may take where nobody says how much: of the memory that this container may use, where the weights are
# too, and of what the weights leave free on a GPU; the rest is for a step's own tensors.
HOST_SHARE, GPU_SHARE = 1 / 8, 0.8

log = logging.getLogger("uvicorn.error")

Read = Callable[[], Any]  # loads the model of Transformers


class Forward(Protocol):
    """A forward pass on a cache of slots."""

    def __call__(self, rows: Sequence[Row]) -> Tensor:
        """Return the logits behind the last token of each row with a choice, in order."""

    def clear(self, slot: int) -> None:
        """Forget what a slot holds."""


class TokenModel:
    """A loaded language model: a step's rows in, what each of them gives out. None in: its limits out."""

    def __init__(self, forward: Forward, limits: Limits, description: str) -> None:
        self.forward, self.limits, self.description = forward, limits, description

    @torch.inference_mode()  # type: ignore[untyped-decorator]
    def __call__(self, contents: list[list[Row] | None]) -> list[Any]:
        return [self.limits if rows is None else self.step(rows) for rows in contents]

    def step(self, rows: list[Row]) -> list[Outcome]:
        """Return the outcome of each row. Raises whatever the model raises."""
        choices = [row.choice for row in rows if row.choice]
        tokens = iter(choose(self.forward(rows), choices))
        outcomes = [next(tokens) if row.choice else None for row in rows]
        for row, outcome in zip(rows, outcomes):
            if isinstance(outcome, str):
                self.forward.clear(row.slot)
        return outcomes


def bytes_per_token(config: Any, itemsize: int) -> int:
    """Return how much of the KV cache a token takes, in all layers."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * int(config.num_hidden_layers) * int(heads) * int(size) * itemsize


def limits_of(model: Any, capacity: int, cache_bytes: int, most_slots: int) -> Limits:
    """Return how many slots of this capacity fit into so much memory. Raises ValueError where not even one does."""
    each = capacity * bytes_per_token(model.config.get_text_config(), model.dtype.itemsize)
    if cache_bytes < each:
        raise ValueError(
            f"a KV cache of {cache_bytes / 1e6:.0f} MB has no room for one sequence of {capacity} tokens "
            f"({each / 1e6:.0f} MB); raise KV_CACHE_MB or lower CONTEXT_TOKENS"
        )
    return Limits(min(most_slots, cache_bytes // each), capacity)


def room(device: torch.device) -> int:
    """Return how many bytes the KV cache may take on the device of a loaded model."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free * GPU_SHARE)
    return int(resources.limit_bytes() * HOST_SHARE)


@torch.inference_mode()  # type: ignore[untyped-decorator]
def probe(forward: Forward, limits: Limits, vocabulary: int) -> Tensor:
    """Return the logits of a few steps with everything in them: prompts, chunks, single tokens, different lengths."""
    last = Choice(Options(), 0)

    def ids(start: int, n: int) -> list[int]:
        return [(7 * i * i + 31 * i + 5) % vocabulary for i in range(start, start + n)]

    far = min(limits.capacity - 4, 40)
    steps = [
        [Row(0, 0, ids(0, far), last)],
        [Row(0, far, ids(far, 1), last), Row(limits.slots - 1, 0, ids(3, far // 2))],
        [Row(limits.slots - 1, far // 2, ids(50, far // 4), last), Row(0, far + 1, ids(9, 1), last)],
        [Row(0, far + 2, ids(4, 1), last), Row(limits.slots - 1, far // 2 + far // 4, ids(8, 1), last)],
    ]
    if limits.slots == 1:
        steps = [[row for row in rows if row.start >= far or not row.start][:1] for rows in steps]
    return torch.cat([forward(rows).float() for rows in steps])


def make(read: Read, limits: Limits, pack: Callable[[Any], None] | None = None) -> TokenModel:
    """Return the model that `read` reads, on the fastest way that gives its own forward pass's logits.

    `pack` makes its Linears faster, in place; without it only its own forward pass is tried.
    """
    model, small = read(), Limits(min(3, limits.slots), min(64, limits.capacity))
    stock = StockForward(model, limits)
    if not pack:
        return TokenModel(stock, limits, "stock forward pass")
    expected, problems = probe(StockForward(model, small), small, model.config.vocab_size), []
    for way in (by_hand, packed_stock):
        try:
            forward = way(model, limits, pack)
            difference = float((probe(forward, small, model.config.vocab_size) - expected).abs().max())
            if difference <= TOLERANCE[model.dtype] * float(expected.std()):
                return TokenModel(forward, limits, way.__doc__ or "")
            problems.append(f"{way.__doc__}: off by {difference:.2g}")
            model = read()  # the way has changed it
        except UnsupportedModel:
            continue
        except Exception as exc:  # its own forward pass may serve it all the same
            problems.append(f"{way.__doc__}: {exc!r}")
            model = read()
    log.warning(
        "%s is served by its stock forward pass; tried: %s", type(model).__name__, "; ".join(problems)
    )
    return TokenModel(StockForward(model, limits), limits, "stock forward pass")


def by_hand(model: Any, limits: Limits, pack: Callable[[Any], None]) -> Forward:
    """forward pass by hand, Linears packed"""
    return Llama(model, limits)


def packed_stock(model: Any, limits: Limits, pack: Callable[[Any], None]) -> Forward:
    """stock forward pass, Linears packed"""
    pack(model)
    return StockForward(model, limits)


def load(
    read: Read, capacity: int, cache_bytes: int, most_slots: int, pack: Callable[[Any], None] | None
) -> TokenModel:
    """Return the model that `read` reads, with as many slots as there is room for; its description says what it became.

    `cache_bytes` is how much the KV cache may take; 0: what its device has room for.
    """
    model = read()
    limits = limits_of(model, capacity, cache_bytes or room(model.device), most_slots)
    size_mb = sum(weights.numel() * weights.element_size() for weights in model.parameters()) / 1e6
    what = f"{type(model).__name__}: {size_mb:.0f} MB, {model.dtype}, {model.device}"
    tokens = limits.slots * limits.capacity
    cache_mb = tokens * bytes_per_token(model.config.get_text_config(), model.dtype.itemsize) / 1e6
    first = [model]
    del model
    made = make(lambda: first.pop() if first else read(), limits, pack)
    settle()
    made.description = (
        f"{what}, {made.description}, KV cache of {cache_mb:.0f} MB: {tokens} tokens, "
        f"{limits.slots} slots of {limits.capacity}"
    )
    return made
