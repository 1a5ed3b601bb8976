"""No worker leaves before its successor has loaded the model: at SIGHUP, after `max_requests`, with one worker fewer.

Gunicorn itself ends the old worker as soon as the new one has been started. With one worker nothing would be served for as
long as the model loads. And it counts rejected requests: under overload a small `max_requests` would never let a worker work.
So the master reads from the workers' metrics which have loaded, and how much each has answered.
"""

import contextlib
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prometheus_client.mmap_dict import MmapedDict


class Succession:
    """Stands in for `manage_workers` of Gunicorn's arbiter, which calls it every second."""

    def __init__(self, server: Any) -> None:
        self.server, self.manage = server, server.manage_workers
        self.told: set[int] = set()  # the workers that were told to leave
        self.graceful_timeout = server.cfg.graceful_timeout

    def __call__(self) -> None:
        """Let workers leave, and others come, as needed."""
        server = self.server
        server.cfg.set("graceful_timeout", self.graceful_timeout)
        workers = sorted(server.WORKERS.items(), key=lambda item: item[1].age)
        surplus = len(workers) - server.num_workers
        if surplus > 0:
            if all(is_loaded(pid) for pid, _ in workers[surplus:]):
                self.let_leave([pid for pid, _ in workers[:surplus]])
            else:
                # At SIGHUP the arbiter waits so long for the old workers to end, and hears no signal meanwhile.
                server.cfg.set("graceful_timeout", 0)
            return
        self.told.clear()
        for pid, worker in workers:
            if 0 < server.cfg.max_requests <= worker.max_requests <= answered(pid):
                server.log.info("Worker %d has answered max_requests; another one takes over", pid)
                server.spawn_worker()
                return
        self.manage()

    def let_leave(self, pids: list[int]) -> None:
        """Tell these workers, once, to answer what they have admitted and to end."""
        for pid in set(pids) - self.told:
            # It may still answer the requests on its connections: see `is_relieved` in process_manager.py.
            with contextlib.suppress(OSError):
                Path(os.environ["PROMETHEUS_MULTIPROC_DIR"], f"relieved-{pid}").touch()
            self.server.kill_worker(pid, signal.SIGTERM)
            self.told.add(pid)


def is_loaded(pid: int) -> bool:
    """Return whether this worker has loaded its model."""
    return any(
        value > 0 for name, _, value in values("gauge_livesum", pid) if name == "model_instances_loaded"
    )


def answered(pid: int) -> float:
    """Return how many requests this worker has answered, without those that it rejected."""
    return sum(
        value
        for name, labels, value in values("counter", pid)
        if name == "model_requests_total" and labels["status"] != "503"
    )


def values(kind: str, pid: int) -> Iterator[tuple[str, dict[str, str], float]]:
    """Give the name, the labels and the value of each of a worker's metrics of this kind; nothing where there are none yet."""
    file = f"{os.environ['PROMETHEUS_MULTIPROC_DIR']}/{kind}_{pid}.db"
    try:
        for key, value, *_ in MmapedDict.read_all_values_from_file(file):  # type: ignore[no-untyped-call]
            _, name, labels, _ = json.loads(key)
            yield name, labels, value
    except (OSError, RuntimeError, ValueError):
        return  # it has not begun, or is just ending
