"""Process metrics: memory, CPU time and open files of the server, the lag of its event loop, the GPUs.

Processes are known on Linux only, GPUs by NVML (`pip install nvidia-ml-py`); elsewhere those metrics are missing.
"""

import asyncio
import contextlib
import importlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from prometheus_client import Counter, Gauge, Histogram

from workers import resources as memory
from workers.metrics import SECONDS, Metrics

POLL_S = 1.0


class ProcessMetrics:
    """Adds to `metrics` what a worker and its model processes, `children()`, take. Call its `sleep` in a loop."""

    def __init__(self, metrics: Metrics, children: Callable[[], list[int]]) -> None:
        self.children, self.registry = children, metrics.registry
        self.next_poll_at = 0.0
        self.cpu_s: dict[int, float] = {}  # of each process, at the last poll
        self.lag = Histogram(
            "model_event_loop_lag_seconds",
            "How much later than asked the event loop wakes up",
            buckets=SECONDS,
            registry=self.registry,
        )
        # The newest worker's: so that a change is a restart, however many there are.
        started = self.gauge("process_start_time_seconds", "When the process started", "livemax")
        started.set(time.time())
        self.polls: list[Callable[[], None]] = []
        if os.path.isdir("/proc/self/fd"):
            self.memory = self.gauge(
                "process_resident_memory_bytes", "Memory of the server and its model processes", "liveall"
            )
            self.cpu = Counter(
                "process_cpu_seconds",
                "CPU time of the server and its model processes",
                registry=self.registry,
            )
            self.files = self.gauge("process_open_fds", "Open files and connections", "liveall")
            import resource  # not on Windows

            most = self.gauge(
                "process_max_fds", "Most files and connections that the server may open", "liveall"
            )
            most.set(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
            self.polls.append(self.poll_processes)
        if devices := gpus():
            self.devices = devices
            self.gpu_busy = self.gauge(
                "gpu_busy_ratio", "Share of the last moment that the GPU computed", "livemax", ["device"]
            )
            self.gpu_memory = self.gauge(
                "gpu_memory_used_bytes", "Memory in use on the GPU", "livemax", ["device"]
            )
            self.gpu_most = self.gauge("gpu_memory_bytes", "Memory of the GPU", "livemax", ["device"])
            self.polls.append(self.poll_gpus)

    def gauge(self, name: str, what: str, mode: Any, labels: tuple[str, ...] | list[str] = ()) -> Gauge:
        return Gauge(name, what, labels, registry=self.registry, multiprocess_mode=mode)

    async def sleep(self, seconds: float) -> None:
        """Sleep, and note how much longer it took; once per second poll the rest."""
        began = time.monotonic()
        if began >= self.next_poll_at:
            self.next_poll_at = began + POLL_S
            for poll in self.polls:
                poll()
            began = time.monotonic()
        await asyncio.sleep(seconds)
        self.lag.observe(max(0.0, time.monotonic() - began - seconds))

    def poll_processes(self) -> None:
        pids = [os.getpid(), *self.children()]
        self.memory.set(memory.resident_bytes(pids))
        with contextlib.suppress(OSError):  # to list them takes one more, and all may be open
            self.files.set(len(os.listdir("/proc/self/fd")))
        cpu_s = {pid: cpu_seconds(pid) for pid in pids}
        self.cpu.inc(sum(max(0.0, used - self.cpu_s.get(pid, 0.0)) for pid, used in cpu_s.items()))
        self.cpu_s = cpu_s

    def poll_gpus(self) -> None:
        import pynvml  # type: ignore[import-untyped]

        for device, handle in enumerate(self.devices):
            with contextlib.suppress(pynvml.NVMLError):  # some GPUs don't know all of it
                used = pynvml.nvmlDeviceGetMemoryInfo(handle)
                self.gpu_memory.labels(device).set(used.used)
                self.gpu_most.labels(device).set(used.total)
                busy = pynvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100
                self.gpu_busy.labels(device).set(busy)


def cpu_seconds(pid: int) -> float:
    """Return the CPU time that a process has used, 0 where it is not known."""
    with contextlib.suppress(OSError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return 0.0


def gpus() -> list[Any]:
    """Return NVML's handles of this machine's GPUs, in its order; none without its package or its driver."""
    try:
        nvml = importlib.import_module("pynvml")
        nvml.nvmlInit()
        return [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]
    except Exception:  # no package, no driver, no permission
        return []
