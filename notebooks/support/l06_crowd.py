"""Lesson 6: a thousand clients at one server, and what the server does for them."""

import asyncio
import math
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import uvloop
from lesson import CLIENT_CORES, TEXT, counters, quick, serve, stop, table, tell

from loadtests.load.raw_client import Crowd
from loadtests.modes import Mode, Server

WARM_S = quick(1.0, 2.0)


def waiting_thread_mb(count: int = 200) -> float:
    """What this process gains in memory for each thread that only waits, in MB."""
    process, enough = psutil.Process(), threading.Event()
    before = process.memory_info().rss
    for _ in range(count):
        threading.Thread(target=enough.wait).start()
    after = process.memory_info().rss
    enough.set()
    return (after - before) / count / 1e6


def crowd_at(server: Server, clients: int, seconds: float) -> tuple[Any, int]:
    """Many clients who ask again and again, all from the clients' core; the first WARM_S seconds don't count.

    Return what they saw, and how many were connected when counting began.
    """

    def work() -> Any:
        os.sched_setaffinity(0, CLIENT_CORES)  # of this thread only
        crowd = Crowd(server.url, [TEXT], limit_s=WARM_S)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(crowd.run(seconds + WARM_S, lambda: asyncio.create_task(crowd.insist(clients, 1.0))))
        return crowd

    with ThreadPoolExecutor(1) as pool:
        working = pool.submit(work)
        time.sleep(WARM_S)
        there = sum(
            one.status == "ESTABLISHED"
            for process in server.processes()
            for one in process.net_connections("tcp")
        )
        return working.result(), there - 1  # one asks for /health


def wakings(server: Server) -> int:
    """How often its threads have gone to sleep or lost their core, all together."""
    tasks = [path for one in server.processes() for path in Path(f"/proc/{one.pid}/task").glob("*/status")]
    lines = [line for path in tasks for line in path.read_text().splitlines() if "ctxt_switches" in line]
    return sum(int(line.split()[1]) for line in lines)


def measure(mode: Mode, clients: int, **settings: Any) -> dict[str, Any]:
    """Start a server in this mode, let the crowd at it; a row of what was seen."""
    began = time.perf_counter()
    server = serve(mode, **settings)
    start_s, small_mb = time.perf_counter() - began, server.memory_mb()
    before, before_switches, before_s = counters(server), wakings(server), server.cpu_s()
    crowd, there = crowd_at(server, clients, quick(1.5, 4))
    switches, used_s, after = wakings(server) - before_switches, server.cpu_s() - before_s, counters(server)

    def counted(name: str) -> float:
        return after[name] - before[name]

    row = {
        "who waits": mode.name,
        "clients connected when counting began": there,
        "ready after, s": f"{start_s:.1f}",
        "texts in a batch, mean": f"{counted('model_batch_size_sum') / counted('model_call_seconds_count'):.0f}",
        "answers/s": (crowd.right + crowd.other) / crowd.seconds,
        "switches of threads for an answer": switches / counted("model_queue_wait_seconds_count"),
        "of a core in use, %": 100 * used_s / (crowd.seconds + crowd.limit_s),
        "/health, median ms": float(np.median(crowd.health_s)) * 1000 if crowd.health_s else math.inf,
        "MB more than before the crowd": server.memory_mb() - small_mb,
        "threads": max(process.num_threads() for process in server.processes()),
    }
    stop(server)
    return row


def show(rows: list[dict[str, Any]], clients: int, most_per_s: float) -> None:
    """The rows as the columns of a table, and for each that stays far below what the model can do, why."""
    names, *lines = zip(*(row.values() for row in rows))
    table(
        " | ".join(["who waits", *names]),
        *((what, *map(digits, line)) for what, line in zip(list(rows[0])[1:], lines)),
    )
    for row in rows:
        reached, missing = (
            row["answers/s"] / most_per_s,
            clients - row["clients connected when counting began"],
        )
        absent = f"{missing} of {clients} clients were not connected yet, so this run says little: repeat it on a quieter machine."
        late = "All clients were there, but their requests came too late for full batches: see the texts in a batch."
        if reached < 0.85:
            why = absent if missing > 0.1 * clients else late
            tell(f"**{row['who waits']}:** {reached:.0%} of what the model can do. {why}")


def digits(value: Any) -> Any:
    """A number, with a few digits."""
    if not isinstance(value, float):
        return value
    return f"{value:.3g}" if value < 100 else f"{value:,.0f}"


def speed_verdict(rows: list[dict[str, Any]], clients: int) -> str:
    """What the two runs, with threads and with an event loop, say of the threads' speed."""
    with_threads, with_loop = (row["answers/s"] for row in rows)
    if min(row["clients connected when counting began"] for row in rows) < 0.9 * clients:
        return "untested for speed: not all of the clients were there"
    if with_threads < 0.8 * with_loop:
        return "holds for speed: they hold each other up"
    return "fails for speed, too: they wait. But an event loop needs none of them"
