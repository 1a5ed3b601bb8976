"""The folder, PROMETHEUS_MULTIPROC_DIR, in which the workers of one server keep their metrics: files of each worker."""

import contextlib
import os
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.mmap_dict import MmapedDict
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead

FOLDER = "PROMETHEUS_MULTIPROC_DIR"
KINDS = ("counter", "histogram", "gauge_liveall", "gauge_livemax", "gauge_livesum")  # the files of a worker
FILE_BYTES = 65_536  # as prometheus_client makes them


def reserve(folder: str) -> bool:
    """Return whether there is space for this process's files: on a full disk a write to mapped memory would kill it (SIGBUS)."""
    files = [f"{folder}/{kind}_{os.getpid()}.db" for kind in KINDS]
    try:
        for file in files:
            allocate(file, FILE_BYTES)
    except OSError:
        for file in files:
            with contextlib.suppress(OSError):
                os.remove(file)
        return False
    return True


def allocate(file: str, n_bytes: int) -> None:
    """Let the file have at least so many bytes on the disk. Raises OSError where that is full; on macOS nothing is done."""
    if hasattr(os, "posix_fallocate"):
        with open(file, "ab") as space:
            os.posix_fallocate(space.fileno(), 0, max(n_bytes, os.path.getsize(file)))


def text(folder: str) -> bytes:
    """Return the sum over all workers in Prometheus text format."""
    everybody = CollectorRegistry()
    MultiProcessCollector(everybody, folder)  # type: ignore[no-untyped-call]
    with locked(folder, "LOCK_SH"):
        return generate_latest(everybody)


def mark_ended(pid: int, folder: str) -> None:
    """Forget the gauges of a worker that has ended, and move its counts into one file for all that have.

    Else each restart would leave 131 KB that every scrape reads. Where that can't be done the file stays.
    """
    mark_process_dead(pid, folder)  # type: ignore[no-untyped-call]
    with contextlib.suppress(OSError, RuntimeError), locked(folder, "LOCK_EX"):
        for kind in ("counter", "histogram"):
            file, ended = f"{folder}/{kind}_{pid}.db", f"{folder}/{kind}_ended.db"
            allocate(ended, os.path.getsize(file))
            total = MmapedDict(ended)  # type: ignore[no-untyped-call]
            for key, value, *_ in MmapedDict.read_all_values_from_file(file):  # type: ignore[no-untyped-call]
                total.write_value(key, total.read_value(key)[0] + value, 0)  # type: ignore[no-untyped-call]
            total.close()  # type: ignore[no-untyped-call]
            os.remove(file)


@contextlib.contextmanager
def locked(folder: str, how: str) -> Iterator[None]:
    """Hold the folder's lock: LOCK_SH to read all files, LOCK_EX to move counts between them."""
    import fcntl  # not on Windows

    lock = os.open(f"{folder}/counts.lock", os.O_CREAT | os.O_RDONLY, 0o666)
    try:
        fcntl.flock(lock, getattr(fcntl, how))
        yield
    finally:
        os.close(lock)
