"""What one core can do at most: operations of a matrix product that stays in the caches, and bytes of weights read once."""

import contextlib
import time
from collections.abc import Callable
from functools import partial

import torch

from workers.tasks.common.packed import PackedLinear


def most_per_s(call: Callable[[], object], amount: float, seconds: float) -> float:
    """Return `amount` over the shortest of the calls that fit into so many seconds."""
    best, end = 0.0, time.perf_counter() + seconds
    while time.perf_counter() < end:
        began = time.perf_counter()
        call()
        best = max(best, amount / (time.perf_counter() - began))
    return best


@torch.inference_mode()
def speeds(seconds: float, mb: int = 92) -> dict[str, float]:
    """Operations per second in float32 and bfloat16 ("float32", "bfloat16"), and "bytes" per second of `mb` MB of weights."""
    found, rows, width, wide = {}, 512, 384, 1536
    for dtype in (torch.float32, torch.bfloat16):
        layer, x = torch.nn.Linear(width, wide).to(dtype), torch.randn(rows, width).to(dtype)
        with contextlib.suppress(RuntimeError):  # a processor without AVX-512 can't pack bfloat16
            layer = PackedLinear(layer)
        name = str(dtype).removeprefix("torch.")
        found[name] = most_per_s(partial(layer, x), 2 * rows * width * wide, seconds)
    weights, one = torch.randn(mb * 250_000 // 768, 768), torch.randn(768)
    found["bytes"] = most_per_s(lambda: weights @ one, weights.numel() * 4, seconds)
    return found
