"""Lesson 7: what replies, batches and instances of a model cost: single requests, and a few users who ask again and again."""

import asyncio
import json
import statistics
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from lesson import CLIENT_CORES, Reply, apart, ask, counters, quick, serve, stop
from torch.nn.utils.rnn import pad_sequence

from loadtests.load.raw_client import Crowd
from loadtests.modes import Server
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


def post(server: Server, inputs: Any, path: str = "", **parameters: Any) -> Reply:
    """POST some JSON; with a path it is OpenAI's form."""
    body = json.dumps({"input" if path else "inputs": inputs, **parameters})
    return ask(server, body, path=path, Content_Type="application/json")


def server_ms(reply: Reply) -> tuple[float, float]:
    """What the server says of its own time, ms: in the queue, in the model."""
    entries = dict(entry.strip().split(";dur=") for entry in reply.headers["server-timing"].split(",")[:2])
    return float(entries["queue"]), float(entries["model"])


def of_length(tokens: int) -> str:
    """A text of so many tokens, the two at its ends included."""
    return "the " * (tokens - 3) + "end"


def reply_of(server: Server, tokens: int) -> list[float]:
    """Bytes; the model's ms; the ms that are neither queue nor model; the ms in which a client reads the JSON."""
    found = []
    for _ in range(quick(2, 9)):
        reply = post(server, of_length(tokens))
        began = time.perf_counter()
        numbers = reply.json
        read_ms = (time.perf_counter() - began) * 1000
        assert len(numbers[0]) == tokens
        queue_ms, model_ms = server_ms(reply)
        found.append((len(reply.body), model_ms, reply.ms - queue_ms - model_ms, read_ms))
    return [sorted(column)[len(column) // 2] for column in zip(*found)]


def ms_a_call(server: Server, texts: Sequence[str], n: int) -> float:
    """The median over some rounds of the model's ms for a list of n of the texts."""
    found = []
    for _ in range(quick(2, 9)):
        calls = [server_ms(post(server, texts[i : i + n]))[1] for i in range(0, len(texts), n)]
        found.append(sum(calls) / len(calls))
    return sorted(found)[len(found) // 2]


def batch_law(server: Server, texts: Sequence[str]) -> dict[str, float]:
    """The law's a and b in ms, from calls of 1 and 8 texts; the gain of 32 that it predicts, and the measured one."""
    ms_a_call(server, texts, 32)  # warms up
    one, eight, full = (ms_a_call(server, texts, n) for n in (1, 8, 32))
    b = max((eight - one) / 7, 1e-6)
    a = one - b
    return {"a": a, "b": b, "predicted": 32 * one / (a + 32 * b), "measured": 32 * one / full}


@torch.inference_mode()
def prices_in(
    net: torch.nn.Module, product: torch.nn.Linear, texts: Sequence[str], n: int
) -> tuple[float, float]:
    """Seconds of the net for a letter, and of the product for a token, with n texts in a call."""
    letters = [l07_language.numbers(text) for text in texts]
    batches = [pad_sequence(letters[i : i + n], batch_first=True) for i in range(0, len(letters), n)]
    letter_s = seconds(lambda: [net(batch) for batch in batches]) / sum(map(len, letters))
    tokens = torch.rand(11 * n, product.in_features)
    return letter_s, seconds(lambda: product(tokens), 99) / len(tokens)


def of_calls(server: Server, text: str, rounds: int) -> tuple[float, float, float]:
    """With four users: answers per second, ms for /health, and ms of a call of the model."""
    body = json.dumps({"inputs": text, "rounds": rounds})
    before = counters(server)
    per_s, health_ms = under_load(server, body, CLIENT_CORES, duration_s=quick(1.6, 5))
    after = counters(server)
    names = ("model_call_seconds_sum", "model_call_seconds_count")
    calls_s, calls = (after[name] - before[name] for name in names)
    return per_s, health_ms, 1000 * calls_s / calls
