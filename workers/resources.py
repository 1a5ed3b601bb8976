"""How much memory the instances of the model take, and whether they all fit. Linux tells; elsewhere nothing is said."""

import contextlib
import math
import os
from collections.abc import Iterable
from pathlib import Path


def usable_cores() -> int:
    """Cores that this process may use: those that it is bound to, or fewer where its container has a CPU quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):  # "max": no quota
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        cores = min(cores, max(1, math.ceil(int(quota) / int(period))))
    return cores


def resident_bytes(pids: Iterable[int]) -> int:
    """Memory of these processes together, 0 where it can't be known."""
    pages = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            pages += int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def limit_bytes() -> int:
    """Memory that this machine or container has."""
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    with contextlib.suppress(OSError, ValueError):  # "max": no limit
        limits.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return min(limits)


def warning(workers: int, worker_bytes: int, limit: int) -> str:
    """What to say when `workers` that each take `worker_bytes` don't fit; empty when they do."""
    needed = workers * worker_bytes
    if needed <= limit:
        return ""
    return (
        f"{workers} workers need {needed / 1e9:.1f} GB with their instances of the model, but there are {limit / 1e9:.1f} GB: "
        "use fewer workers or INSTANCES"
    )
