"""Lesson 5: what an overloaded server does: pictures of arrivals, the cost of a rejection, strangers in the kernel's queue."""

import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import psutil
from lesson import BLUE, GREY, ORANGE, RED, TEXT, Reply, ask_together, get, guessed, load, name_lines, quick
from matplotlib.axes import Axes

from loadtests.load import generator
from loadtests.modes import Server

from .l05_rules import LIMIT_S

STEP_S = quick(0.5, 1.0)
PATIENCE_S, STRANGER_S = quick(2.5, 4.0), quick(2, 6)  # when strangers leave, and for how long they come


def steps(ax: Axes, times_s: pd.Series, edges: np.ndarray, label: str, color: str) -> None:
    """How many a second, from edge to edge."""
    per_s = np.histogram(times_s, edges)[0] / STEP_S
    thin = 1 if color == GREY else 2
    ax.step(edges, [*per_s, per_s[-1]], color=color, label=label, where="post", linewidth=thin)


def draw_arrivals(runs: Mapping[str, pd.DataFrame], mu: float, seconds: float, guess: float) -> None:
    """The patient and the careful server: what came of the texts, by their time of arrival."""
    _, (patient, careful) = plt.subplots(2, 1, sharex=True, figsize=(6.4, 5.4))
    edges = np.arange(0, seconds + STEP_S, STEP_S)
    for ax, df in ((patient, runs["patient"]), (careful, runs["careful"])):
        in_time = generator.good(df, LIMIT_S)
        steps(ax, df.due_s, edges, "come", GREY)
        steps(ax, df.due_s[in_time], edges, "in time", BLUE)
        if ax is patient:
            steps(ax, df.due_s[~in_time], edges, "too late, or gone", RED)
        else:
            steps(ax, df.due_s[df.outcome == "503"], edges, "rejected at once", ORANGE)
        ax.set(ylabel="texts/s", ylim=(0, None))
    patient.axvline(LIMIT_S / (2 - 1), color="black", linestyle=":")
    patient.text(LIMIT_S + 0.3, mu, "predicted: the good time ends here", va="center", fontsize=11)
    guessed(patient, seconds, guess)
    patient.set_title("Patient: first everybody, then nobody")
    careful.set_title("Careful: half of them, all the time")
    careful.set_xlabel("time of arrival, s")
    for ax in (patient, careful):
        name_lines(ax)
    plt.show()


def draw_retries(storms: Mapping[int, pd.DataFrame]) -> None:
    """Requests per second of clients that honour Retry-After (1) and of those that don't (0)."""
    edges = np.arange(0, max(df.sent_s.max() for df in storms.values()) + STEP_S, STEP_S)
    _, ax = plt.subplots()
    steps(ax, storms[1].sent_s, edges, "waits as told", BLUE)
    steps(ax, storms[0].sent_s, edges, "after 50 ms", ORANGE)
    steps(ax, storms[0][storms[0].attempt == 0].sent_s, edges, "new clients only", GREY)
    ax.set(title="Rejected clients ask again", xlabel="time, s", ylabel="requests per second", ylim=(0, None))
    name_lines(ax)
    plt.show()


def rejections_at(server: Server, rate_per_s: float, duration_s: float) -> tuple[float, float, float]:
    """Rejections per second, the share of a core that they take, and how often the event loop wakes up for each."""
    event_loop = psutil.Process(server.process.pid)  # whose first thread is the loop's
    before_s, before = server.cpu_s(), event_loop.num_ctx_switches().voluntary
    df = load(server, "open", rate_per_s=rate_per_s, duration_s=duration_s, timeout_s=0.5)
    rejected, wakings = int((df.outcome == "503").sum()), event_loop.num_ctx_switches().voluntary - before
    return rejected / duration_s, (server.cpu_s() - before_s) / duration_s, wakings / rejected


def in_the_kernel(server: Server) -> int:
    """How many connections wait there to be accepted; Linux tells it of every listening socket."""
    port = f":{int(server.url.rstrip('/').split(':')[2]):04X}"
    sockets = [row.split() for row in Path("/proc/net/tcp").read_text().splitlines()]
    return sum(int(row[4].split(":")[1], 16) for row in sockets if row[1].endswith(port) and row[3] == "0A")


@dataclass
class Met:
    """What strangers met: their replies; the wait of each check of /health; how many waited in the kernel at most."""

    replies: list[Reply]
    health_s: list[float]
    waiting: int

    def share(self, status: int) -> float:
        """What share of the strangers got this status; 0 for those that left."""
        return float(np.mean([reply.status == status for reply in self.replies]))

    @property
    def in_time(self) -> float:
        """The share of the answers that came within the limit."""
        return float(np.mean([one.ms < 1000 * LIMIT_S for one in self.replies if one.status == 200]))


def strangers(server: Server, rate_per_s: float) -> Met:
    """Let strangers come, each with a connection of its own, and somebody ask for /health ten times per second."""

    def check(i: int) -> tuple[float, int]:
        time.sleep(i / 10)
        waiting = in_the_kernel(server)
        return get(server, "health", PATIENCE_S).ms / 1000, waiting

    with ThreadPoolExecutor(10 * STRANGER_S) as pool:
        probes = [pool.submit(check, i) for i in range(10 * STRANGER_S)]
        texts = [TEXT] * int(rate_per_s * STRANGER_S)
        replies = ask_together(server, texts, PATIENCE_S, 1 / rate_per_s)
        waits_s, waiting = zip(*(probe.result() for probe in probes))
    return Met(replies, list(waits_s), max(waiting))
