"""Lesson 1: how long a call takes, and how much memory a server, the libraries and a backward pass take."""

import asyncio
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import torch
from lesson import TEXT, ask_together, serve_all, stop

IMPORTS = "import torch, transformers.pipelines, psutil; print(psutil.Process().memory_full_info().pss / 1e6)"


def median_s(call: Callable[[], Any], times: int = 15) -> float:
    """The median duration of some calls, in seconds: the middle one is typical."""
    took = []
    for _ in range(times):
        began = time.perf_counter()
        call()
        took.append(time.perf_counter() - began)
    return sorted(took)[times // 2]


async def words_for_each(
    serve_one_batch: Callable[[Any, Any], Awaitable[None]], pipe: Any, clients: int
) -> list[int]:
    """How many words each of the clients gets from the function; 0 where no answer comes."""
    queue: asyncio.Queue[Any] = asyncio.Queue()
    replies: list[asyncio.Queue[Any]] = [asyncio.Queue() for _ in range(clients)]
    for reply in replies:
        queue.put_nowait((TEXT, reply))
    await serve_one_batch(queue, pipe)
    found = [reply.get_nowait() if reply.qsize() else [] for reply in replies]
    return [len(answer) if isinstance(answer, list) else 1 for answer in found]


def memory_mb(instances: Sequence[int], **settings: Any) -> list[float]:
    """The memory of a server with each of these numbers of instances, in MB, after some calls."""
    servers = serve_all(*({**settings, "INSTANCES": n} for n in instances))
    for n, server in zip(instances, servers):
        ask_together(server, [TEXT] * 4 * n)
    found = [server.memory_mb() for server in servers]
    stop(*servers)
    return found


def libraries_mb() -> float:
    """The memory of a process that imports the libraries and has no model, in MB."""
    argv = [sys.executable, "-c", IMPORTS]
    return float(subprocess.run(argv, capture_output=True, text=True, check=True, timeout=60).stdout)


def kept_mb(model: torch.nn.Module, batch: Any) -> float:
    """What torch keeps of a call for a backward pass, in MB, without the model's own weights."""
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(**batch)
    own = {weights.untyped_storage().data_ptr() for weights in model.parameters()}
    return sum(size for pointer, size in kept.items() if pointer not in own) / 1e6
