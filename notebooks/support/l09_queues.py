"""One queue or several: a model that sleeps, clients that come at given times, and what theory says they wait.

MODEL=notebooks.support.l09_queues:Nap serves the model.
"""

import asyncio
import math
import os
import random
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor

from loadtests.load.raw_client import connect, http

A_S, B_S = (float(os.environ.get(name, "0")) for name in ("NAP_A_S", "NAP_B_S"))


class Nap:
    """Sleeps NAP_A_S + NAP_B_S for each text + the seconds that the texts name. Computes nothing, so it shares a core."""

    example = 0.0

    def __call__(self, inputs):
        time.sleep(A_S + B_S * len(inputs) + sum(map(float, inputs)))
        return inputs


# --- traffic ----------------------------------------------------------------------------------------------------------


def strangers(rate_per_s, duration_s, seed=0):
    """When people come who know nothing of each other: a Poisson process."""
    rng, at_s, times = random.Random(seed), 0.0, []
    while (at_s := at_s + rng.expovariate(rate_per_s)) < duration_s:
        times.append(at_s)
    return times


def alike(mean_s, number):
    """Texts that all take the same time."""
    return [mean_s] * number


def uneven(mean_s, number, times=10, share=0.1, seed=1):
    """Texts of which one in ten takes ten times as long as the others; the same mean. Not the seed of `strangers`: then a
    text would be long just where the gap before it is short."""
    rng, short_s = random.Random(seed), mean_s / (1 + share * (times - 1))
    return [short_s * (times if rng.random() < share else 1) for _ in range(number)]


def waits_s(arrivals_s, seconds, devices, policy, seed=0):
    """Simulate: how long each text waits before a device begins with it. A queue is first come, first served."""
    rng = random.Random(seed)
    free_at, unfinished = [0.0] * devices, [deque() for _ in range(devices)]
    waits = []
    for i, (came_s, takes_s) in enumerate(zip(arrivals_s, seconds, strict=True)):
        if policy == "one shared queue":  # whoever is free first takes it
            device = free_at.index(min(free_at))
        elif policy == "round robin":
            device = i % devices
        elif policy == "least loaded":
            for ends in unfinished:
                while ends and ends[0] <= came_s:
                    ends.popleft()
            device = min(range(devices), key=lambda one: len(unfinished[one]))
        else:
            device = rng.randrange(devices)
        begins_s = max(came_s, free_at[device])
        free_at[device] = begins_s + takes_s
        unfinished[device].append(free_at[device])
        waits.append(begins_s - came_s)
    return waits


# --- clients of real servers ------------------------------------------------------------------------------------------


class Fleet:
    """Clients of one or several servers of Nap, and a balancer in front of these."""

    def __init__(self, urls, policy="round robin"):
        self.urls, self.policy = urls, policy
        self.idle = {url: [] for url in urls}
        self.inside = dict.fromkeys(urls, 0)
        self.asked, self.took_s, self.failed = 0, {}, 0

    def choose(self):
        if self.policy == "least loaded":
            return min(self.urls, key=lambda url: self.inside[url])
        return self.urls[self.asked % len(self.urls)]

    def pop_idle(self, url):
        """An open connection that waits for work; the server closes those that have waited for some seconds."""
        while self.idle[url]:
            if not (connection := self.idle[url].pop()).transport.is_closing():
                return connection
        return None

    async def ask(self, number, takes_s, due_at):
        """Send one text; note when its answer is there."""
        url = self.choose()
        self.asked += 1
        self.inside[url] += 1
        connection = self.pop_idle(url) or await connect(url)

        def then(status):
            self.took_s[number] = time.perf_counter() - due_at
            self.failed += status != 200
            self.inside[url] -= 1
            self.idle[url].append(connection)

        connection.ask(http(url, f'{{"inputs": {takes_s:.6f}}}', media_type="application/json"), then)


async def come(fleets, arrivals_s, seconds, patience_s):
    """Ask all fleets at the same times for the same texts."""
    began = time.perf_counter()
    under_way = set()
    for number, (at_s, takes_s) in enumerate(zip(arrivals_s, seconds, strict=True)):
        if (pause_s := began + at_s - time.perf_counter()) > 0:
            await asyncio.sleep(pause_s)
        for fleet in fleets:
            task = asyncio.create_task(fleet.ask(number, takes_s, began + at_s))
            under_way.add(task)
            task.add_done_callback(under_way.discard)
    until = time.perf_counter() + patience_s
    while any(len(fleet.took_s) < len(seconds) for fleet in fleets):
        if time.perf_counter() > until:
            raise TimeoutError("a server did not answer everything")
        await asyncio.sleep(0.01)


def replay(fleets, arrivals_s, seconds, patience_s=20.0):
    """The seconds from when each text was due to its answer, for each fleet. Raises where one answers with an error."""
    with ThreadPoolExecutor(1) as pool:  # in this thread Jupyter's own event loop is running
        pool.submit(asyncio.run, come(fleets, arrivals_s, seconds, patience_s)).result()
    if any(fleet.failed for fleet in fleets):
        raise RuntimeError("a server answered with an error")
    return [[fleet.took_s[number] for number in range(len(seconds))] for fleet in fleets]


# --- several instances on one device ----------------------------------------------------------------------------------


class Lane:
    """Stands in for a device: it does one thing at a time, and knows how long it was busy."""

    def __init__(self):
        import threading

        self.lock, self.busy_s = threading.Lock(), 0.0

    def run(self, seconds):
        with self.lock:
            began = time.perf_counter()
            time.sleep(seconds)
            self.busy_s += time.perf_counter() - began


def names_beside(ax, waits, policies):
    """Write beside the marks what they are: each at the right of a row's last mark, where none is hidden."""

    def rightmost(place, kind):
        row = next(row for row in waits if (row["texts"], row["policy"]) == (kind, policies[place]))
        return max(value for value in row.values() if isinstance(value, float) and not math.isnan(value))

    for place, kind, above, label, color in (
        (3, "alike", 0.2, "texts alike", "#0072B2"),
        (3, "uneven", -0.2, "texts uneven", "#E69F00"),
        (1, "alike", 0.2, "formula: bar", "black"),
        (2, "alike", 0.2, "simulated: hollow", "#777777"),
    ):
        ax.plot([rightmost(place, kind)], [place + above], label=label, color=color, alpha=0)
