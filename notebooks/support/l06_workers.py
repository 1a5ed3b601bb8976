"""Lesson 6: what several workers hold, how fast they are together, and how connections fall to them."""

import socket
import time
from typing import Any

import numpy as np
import psutil
from lesson import load, quick

from loadtests.load import generator
from loadtests.modes import Server


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
        "batch": float(np.mean([df.batch_size.count() / (1 / df.batch_size).sum() for df in runs])),
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
