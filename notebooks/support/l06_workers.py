"""Lesson 6: what workers of each kind hold, how fast they are together, and how connections fall to them."""

import socket
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pandas as pd
import psutil
from lesson import SERVER_CORES, TEXT, Reply, ask, ask_together, load, quick, serve, serve_all, stop

from loadtests.bench import threads
from loadtests.load import generator
from loadtests.modes import MODES, Mode, Server


def each_kind(names: Iterable[str], users: int, settings: Mapping[str, Any]) -> dict[str, pd.DataFrame]:
    """Let the users ask one worker of each kind; "greedy" is uvicorn's with a loop that holds no batch."""
    servers = {}
    for name in names:
        if name == "greedy":
            servers[name] = serve("thread", wait=False, FIXED_DELAY_MS=0, **settings)
        else:
            mode = Mode(name, f"gunicorn -c workers/gunicorn/{name}.conf.py --workers 1")
            servers[name] = serve(mode, wait=False, **settings)
    for server in servers.values():
        server.wait_until_ready()
    options = {"users": users, "duration_s": quick(1.2, 4), "limit_s": 20}
    runs = {name: load(server, "closed", **options) for name, server in servers.items()}
    stop(*servers.values())
    return runs


def mean_batch(df: pd.DataFrame) -> float:
    """Texts in a call, on average over the calls."""
    return df.batch_size.count() / (1 / df.batch_size).sum()


def last_of_16(choices: Mapping[str, tuple[int, int]], settings: Mapping[str, Any]) -> dict[str, float]:
    """For each number of instances and batch size: seconds until the last of 16 has its answer, who ask in the same moment."""
    each = (settings | {"INSTANCES": k, "BATCH_SIZE": most} for k, most in choices.values())
    found = {}
    for name, server in zip(choices, serve_all(*each, cores=SERVER_CORES)):
        ask(server)
        replies = ask_together(server, [TEXT] * 16)
        assert {reply.status for reply in replies} == {200}
        found[name] = max(reply.ms for reply in replies) / 1000
    stop()
    return found


def by_workers(
    plan: Iterable[tuple[str, int, int]], users: int, more: Mapping[str, Any]
) -> tuple[dict[Any, dict[str, Any]], list[list[int]]]:
    """For each (kind, workers, batch size), on all cores, what `saturate` says; how connections fall to uvicorn's."""
    found: dict[Any, dict[str, Any]] = {}
    shares: list[list[int]] = []
    for kind, k, batch_size in plan:
        mode = Mode(f"{kind} × {k}", f"gunicorn -c workers/gunicorn/{kind}.conf.py --workers {k}")
        server = serve(mode, cores=None, **(more | {"BATCH_SIZE": batch_size}))
        found[kind, k] = saturate(server, users)
        if kind == "uvicorn" and k > 1 and not shares:
            shares = dealt(server, users)
        stop(server)
    for name in quick((), ("gthread-1x8", "instances-2")):
        server = serve(MODES[name], cores=None, BATCH_SIZE=32)
        found[name] = saturate(server, users)
        stop(server)
    return found, shares


def by_threads(
    scenes: Mapping[str, list[float]], hows: Iterable[str]
) -> dict[tuple[str, str], tuple[float, float]]:
    """For each scene and number of torch threads: texts per second, ms of processor time per text."""
    found = {}
    with threads.answering() as rate:
        (process,) = psutil.Process().children()[-1:]  # which calls the model

        def measure(how: str) -> tuple[float, float]:
            before_s, began = sum(process.cpu_times()[:2]), time.perf_counter()
            per_s = rate(how, 32, quick(0.3, 0.6))
            took_s = sum(process.cpu_times()[:2]) - before_s
            return per_s, took_s / (time.perf_counter() - began) / per_s * 1000

        for scene, neighbours in scenes.items():
            with threads.beside(neighbours):
                turns = [{how: measure(how) for how in hows} for _ in range(quick(1, 3))]
            for how in hows:
                per_s, ms = np.median([turn[how] for turn in turns], axis=0)
                found[scene, how] = float(per_s), float(ms)
    return found


def ask_slow(places: Iterable[str], settings: Mapping[str, Any]) -> tuple[dict[str, Reply], dict[str, bool]]:
    """Ask a server with a timeout of 2 s for each place of the model: the replies, and whether Gunicorn killed the worker."""
    mode = Mode("timeout-2", "gunicorn -c workers/gunicorn/uvicorn.conf.py --workers 1 --timeout 2")
    servers = dict(zip(places, serve_all(*(settings | {"OFFLOAD": one} for one in places), mode=mode)))
    with ThreadPoolExecutor() as pool:
        replies = dict(zip(servers, pool.map(lambda server: ask(server, patience_s=12), servers.values())))
    killed = {place: "WORKER TIMEOUT" in server.log() for place, server in servers.items()}
    stop()
    return replies, killed


def saturate(server: Server, users: int) -> dict[str, Any]:
    """Its memory, process by process, its texts per second with so many users, and the texts in a call."""
    # Several times: which worker a connection falls to is luck.
    runs = [
        load(server, "closed", users=users, duration_s=quick(0.7, 2.5), limit_s=20)
        for _ in range(quick(1, 2))
    ]
    sizes = [process.memory_full_info().pss / 1e6 for process in server.processes()]
    return {
        "MB": sum(sizes),
        "each": [f"{mb:.0f}" for mb in sizes if mb > 5],
        "per_s": float(np.mean([generator.throughput_per_s(df, quick(0.2, 0.5)) for df in runs])),
        "batch": float(np.mean([mean_batch(df) for df in runs])),
    }


def dealt(server: Server, connections: int, times: int = 6) -> list[list[int]]:
    """How so many connections that come at once fall to its workers, again and again."""
    port, found = int(server.url.split(":")[2][:-1]), []
    for _ in range(times):
        opened = [socket.create_connection(("127.0.0.1", port)) for _ in range(connections)]
        time.sleep(0.2)
        each = [
            sum(one.status == "ESTABLISHED" for one in process.net_connections("tcp"))
            for process in psutil.Process(server.process.pid).children()
        ]
        for connection in opened:
            connection.close()
        time.sleep(0.1)
        found.append(sorted(each))
    return found
