"""A crowd of a few users who ask one thing again and again, and what /health takes meanwhile."""

import asyncio
import statistics
import time

from lesson import apart

from loadtests.load.raw_client import Crowd


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
