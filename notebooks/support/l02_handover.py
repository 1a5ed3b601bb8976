"""Lesson 2: what it takes to hand texts to somebody else and back: to a thread, and through a socket to a process."""

import asyncio
import queue
import socket
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import numpy as np

from workers import offload, tasks
from workers.isolation.process import Process, packed, unpacked
from workers.metrics import Metrics
from workers.settings import Settings

PARROT = """
import socket, sys
s = socket.socket(fileno=int(sys.argv[1]))
while data := s.recv(65536): s.sendall(data)
"""


async def median_ms(call: Callable[[], Awaitable[Any]], times: int) -> float:
    took = []
    for _ in range(times):
        began = time.perf_counter()
        await call()
        took.append(time.perf_counter() - began)
    return float(np.median(took)) * 1000


async def by_thread(texts: list[str], times: int) -> float:
    """Median ms to a thread that only sends back what it gets."""
    there: queue.SimpleQueue[Any] = queue.SimpleQueue()
    loop = asyncio.get_running_loop()

    def send_back() -> None:
        for future, sent in iter(there.get, None):
            loop.call_soon_threadsafe(future.set_result, sent)

    async def call() -> None:
        future = loop.create_future()
        there.put((future, texts))
        await future

    threading.Thread(target=send_back, daemon=True).start()
    found = await median_ms(call, times)
    there.put(None)
    return found


async def by_socket(texts: list[str], times: int) -> float:
    """Median ms to a process that only sends back what it gets, packed and unpacked on this side."""
    ours, theirs = socket.socketpair()
    command = [sys.executable, "-c", PARROT, str(theirs.fileno())]
    child = await asyncio.create_subprocess_exec(*command, pass_fds=[theirs.fileno()])
    theirs.close()
    reader, writer = await asyncio.open_connection(sock=ours)

    async def call() -> None:
        writer.write(packed(texts))
        await unpacked(reader)

    found = await median_ms(call, times)
    writer.close()
    await writer.wait_closed()
    await child.wait()
    return found


def places() -> dict[str, offload.Inline | offload.Thread | Process]:
    """This server's three places, each for a model that returns at once."""
    load_model = partial(tasks.load_alone, Settings(MODEL="loadtests.bench.apps:Instant"))
    return {
        "inline": offload.Inline(load_model),
        "thread": offload.Thread(load_model),
        "process": Process(load_model, 60.0, Metrics()),
    }
