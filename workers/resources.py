"""What this machine has: memory, cores, a free port, a temporary folder. Sizes are known on Linux only; elsewhere they are 0."""

import contextlib
import math
import os
import shutil
import socket
import tempfile
from collections.abc import Iterable
from pathlib import Path

HELD: list[int] = []  # descriptors of this process's locks, open until it ends


def free_port() -> int:
    """Return a port of the loopback interface that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


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


def temporary_folder(prefix: str, uid: int = -1, gid: int = -1) -> str:
    """Return a new temporary folder of this user, or of another one; remove those that a killed process has left behind.

    A folder's lock is held as long as this process or a fork of it lives.
    """
    import fcntl  # not on Windows

    owner = os.geteuid() if uid < 0 else uid
    for left in Path(tempfile.gettempdir()).glob(f"{prefix}-*/lock"):
        with contextlib.suppress(OSError):  # another's, or in use
            lock = os.open(left, os.O_RDONLY | os.O_NOFOLLOW)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if left.parent.lstat().st_uid == owner:
                    shutil.rmtree(left.parent, ignore_errors=True)
            finally:
                os.close(lock)
    folder = tempfile.mkdtemp(prefix=f"{prefix}-")
    HELD.append(os.open(f"{folder}/new", os.O_CREAT | os.O_RDONLY, 0o600))
    fcntl.flock(HELD[-1], fcntl.LOCK_EX)
    os.rename(f"{folder}/new", f"{folder}/lock")  # seen only when it is locked
    os.chown(folder, uid, gid)
    return folder
