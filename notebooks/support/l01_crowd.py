"""A crowd at a server: when each gets its answer, how many connections are not accepted yet, how long a stranger waits.

Outside: Linux holds the connections that a program has not accepted yet, and counts them in /proc/net/tcp.
"""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path

from loadtests.modes import Server


@dataclass(frozen=True)
class Crowd:
    """All times in ms. `outside` has pairs: when, and how many connections were not yet accepted."""

    answers_ms: list[float]
    outside: list[tuple[float, int]]
    open_404_ms: float
    new_404_ms: float

    @property
    def listed(self) -> str:
        """The times of the answers, for a sentence."""
        return ", ".join(f"{ms:.0f}" for ms in self.answers_ms)


def outside(port: int) -> int:
    """How many connections to `port` wait to be accepted."""
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        _, local, _, state, queues, *_ = line.split()
        if local.endswith(f":{port:04X}") and state == "0A":  # a listening socket
            return int(queues.split(":")[1], 16)
    return 0


def crowd_at(server: Server, text: str, people: int, *, inside: bool, after_s: float) -> Crowd:
    """`people` POST `text` at the same moment; `after_s` later two others GET a page that does not exist.

    The people's connections are new, or `inside`: opened, and accepted, before. Of the other two one has an open
    connection, one opens a new one.
    """
    port = int(server.url.rstrip("/").rsplit(":", 1)[1])

    def ask(connection: HTTPConnection, method: str, path: str, body: bytes | None, since: float) -> float:
        connection.request(method, path, body)
        connection.getresponse().read()
        return (time.perf_counter() - since) * 1000

    def watch() -> list[tuple[float, int]]:
        seen = []
        while not done.wait(0.003):
            seen.append(((time.perf_counter() - began) * 1000, outside(port)))
        return seen

    connections = [HTTPConnection("127.0.0.1", port, timeout=60) for _ in range(people + 2)]
    *crowd, opened, new = connections
    for connection in [opened, *crowd] if inside else [opened]:
        ask(connection, "GET", "/no-such-page", None, 0)
    done, began = threading.Event(), time.perf_counter()
    with ThreadPoolExecutor(people + 3) as pool:
        watched = pool.submit(watch)
        answers = [pool.submit(ask, one, "POST", "/", text.encode(), began) for one in crowd]
        time.sleep(after_s)
        strangers = [
            pool.submit(ask, one, "GET", "/no-such-page", None, time.perf_counter()) for one in (opened, new)
        ]
        answers_ms, strangers_ms = ([future.result() for future in asked] for asked in (answers, strangers))
        done.set()
    for connection in connections:
        connection.close()
    return Crowd(sorted(answers_ms), watched.result(), *strangers_ms)
