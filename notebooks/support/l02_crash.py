"""Lesson 2: kill the model's process in the middle of a call, and see what becomes of everybody."""

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from lesson import Reply, ask_together, get

from loadtests.modes import Server


@dataclass
class Crash:
    """The replies to the texts that were sent at once, /health right after the kill, seconds until it was ready again."""

    replies: list[Reply]
    health: Reply
    back_s: float


def kill_in_a_call(server: Server, text: str, texts: int) -> Crash:
    """Send `texts` at once; kill the model's process while it computes the first."""
    *_, victim = sorted(server.processes()[1:], key=lambda process: process.memory_info().rss)
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(ask_together, server, [text] * texts)
        give_up = time.monotonic() + 10
        while get(server, "health").json["running"] == 0 and time.monotonic() < give_up:
            time.sleep(0.002)
        victim.kill()
        killed = time.monotonic()
        health = get(server, "health")
        replies = asked.result()
        server.wait_until_ready()
        return Crash(replies, health, time.monotonic() - killed)
