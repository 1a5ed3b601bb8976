"""A crowd of a few users who ask one thing again and again, and what /health takes meanwhile."""

import asyncio
import json
import statistics
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import torch
from lesson import CLIENT_CORES, apart, serve, stop

from loadtests.load.raw_client import Crowd
from notebooks.support import l07_language


def seconds(call, times=9):
    """The median of some calls."""
    took = []
    for _ in range(times):
        began = time.perf_counter()
        call()
        took.append(time.perf_counter() - began)
    return statistics.median(took)


def under_load(server, body, cores, *, users=4, duration_s=3.0, limit_s=1.0):
    """Answers a second and the median wait for /health in ms, from `limit_s` on; the clients are on `cores` only."""
    crowd = Crowd(server.url, [body], limit_s, "application/json")

    def load():
        return asyncio.create_task(crowd.insist(users, 0.02))

    apart(lambda: asyncio.run(crowd.run(duration_s, load)), cores)
    return (crowd.right + crowd.other) / crowd.seconds, statistics.median(crowd.health_s) * 1000


def rounds_of(net: torch.nn.Module, text: str, share: float) -> int:
    """How many rounds of cleaning make Python this share of a call with this text."""
    with torch.inference_mode():
        torch_s = seconds(lambda: net(l07_language.numbers(text)[None]), 49)
    round_s = seconds(lambda: l07_language.numbers(text, 40)) / 40
    return max(1, round(share / (1 - share) * torch_s / round_s))


def copies_in_threads(
    share: float, numbers: Iterable[int], turn_s: float, turns: int = 5
) -> dict[int, float]:
    """Answers per second of each number of instances in threads, on all cores, where Python is this share of a call.

    They take turns, so that a slow moment of the machine meets all of them: a figure for each turn.
    """
    torch.set_num_threads(1)
    text = "The train leaves in the morning, and we will be there. " * 16
    net = l07_language.train(l07_language.Net())
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "language.pt"
        torch.save(net.state_dict(), weights)
        body = json.dumps({"inputs": text, "rounds": rounds_of(net, text, share)})
        own = {
            "MODEL": "notebooks.support.l07_language:Language",
            "LANGUAGE_WEIGHTS": weights,
            "BATCH_SIZE": 1,
        }
        servers = {n: serve(cores=None, INSTANCES=n, **own) for n in numbers}
        found = [
            {n: under_load(server, body, CLIENT_CORES, duration_s=turn_s)[0] for n, server in servers.items()}
            for _ in range(turns)
        ]
        stop(*servers.values())
    return {n: [turn[n] for turn in found] for n in servers}
