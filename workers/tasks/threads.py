"""How many threads torch computes with: one for each core that nobody else uses.

Torch splits an operation over its threads and waits for the last of them. Two threads, where another program holds one
of two cores, answer half of what one thread does: every operation waits for the thread that has no core. So look once a
second how much of the cores others use, and leave it to them. `python -m loadtests.bench.threads` shows what that buys.
"""

import contextlib
import math
import os
import time
from collections.abc import Callable, Collection
from pathlib import Path

WINDOW_S = 1.0
# A core that others use less than this is still worth a thread: measured, the second thread breaks even at 0.2 to 0.3.
SHARED = 0.25


def busy_s(stat: str, cores: Collection[int]) -> float:
    """CPU seconds that these cores have been busy, out of /proc/stat (see proc_stat(5)).

    Stolen time counts as busy: another virtual machine had the core.
    """
    ticks = 0
    for line in stat.splitlines():
        name, *times = line.split()
        if not name.startswith("cpu"):
            break
        if name[3:].isdigit() and int(name[3:]) in cores:
            user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, times[:8])
            ticks += user + nice + system + irq + softirq + steal
    return ticks / os.sysconf("SC_CLK_TCK")


def others_s() -> float:
    """CPU seconds that our cores have spent on other processes, from a fixed but unknown zero.

    Raises OSError where there is no /proc/stat: it is Linux's.
    """
    return busy_s(Path("/proc/stat").read_text(), os.sched_getaffinity(0)) - time.process_time()


class Threads:
    """Keeps torch at between 1 and `most` threads; `instances` models in this process share what cores are free.

    Make it and call it in the model's own thread: torch keeps the number for each calling thread. Does nothing with
    `most=1`, or where the system doesn't say how busy its cores are.
    """

    def __init__(
        self,
        most: int,
        instances: int = 1,
        others_s: Callable[[], float] = others_s,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.most, self.instances, self.others_s, self.clock = most, instances, others_s, clock
        self.threads = most
        self.due = math.inf
        if most > 1:
            with contextlib.suppress(OSError, ValueError):
                self.used_s, self.since = self.others_s(), self.clock()
                self.due = self.since + WINDOW_S

    def between_calls(self) -> None:
        """Look at the cores, once a second, and change torch's threads if others use more or less of them."""
        now = self.clock()
        if now < self.due:
            return
        self.due = now + WINDOW_S
        with contextlib.suppress(OSError):  # no file descriptor is left: no reason to fail the call
            self._follow_others(now)

    def _follow_others(self, now: float) -> None:
        used_s = self.others_s()
        free = len(os.sched_getaffinity(0)) - (used_s - self.used_s) / (now - self.since)
        self.used_s, self.since = used_s, now
        threads = min(self.most, max(1, math.floor(free / self.instances + SHARED)))
        if threads != self.threads:
            import torch

            torch.set_num_threads(threads)
            self.threads = threads
