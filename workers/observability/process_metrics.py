"""What this server takes of its machine: memory, processor time, files; how late its event loop is; the GPUs.

Linux tells of processes, NVML of GPUs (`pip install nvidia-ml-py`); where they don't, those metrics are missing.
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
    """Adds to `metrics` what a worker and its model processes, `children()`, take. Let it `sleep` again and again."""

    def __init__(self, metrics: Metrics, children: Callable[[], list[int]]) -> None:
        self.children, self.registry = children, metrics.registry
        self.look_at = 0.0  # when to look next
        self.cpu_s: dict[int, float] = {}  # of each process, the last time
        self.lag = Histogram(
            "model_event_loop_lag_seconds",
            "How much later than asked the event loop woke up",
            buckets=SECONDS,
            registry=self.registry,
        )
        # The newest worker's: so that a change is a restart, however many there are.
        started = self.gauge("process_start_time_seconds", "When it was started", "livemax")
        started.set(time.time())
        self.looks: list[Callable[[], None]] = []
        if os.path.isdir("/proc/self/fd"):
            self.memory = self.gauge(
                "process_resident_memory_bytes", "Memory of it and its model processes", "liveall"
            )
            self.cpu = Counter(
                "process_cpu_seconds",
                "Processor time of it and its model processes",
                registry=self.registry,
            )
            self.files = self.gauge("process_open_fds", "Open files and connections", "liveall")
            import resource  # which Windows has not

            most = self.gauge("process_max_fds", "How many it may open", "liveall")
            most.set(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
            self.looks.append(self.poll_processes)
        if devices := gpus():
            self.devices = devices
            self.gpu_busy = self.gauge(
                "gpu_busy_ratio", "How much of the last moment the GPU computed", "livemax", ["device"]
            )
            self.gpu_memory = self.gauge("gpu_memory_used_bytes", "Memory in use", "livemax", ["device"])
            self.gpu_most = self.gauge("gpu_memory_bytes", "Memory that it has", "livemax", ["device"])
            self.looks.append(self.poll_gpus)

    def gauge(self, name: str, what: str, mode: Any, labels: tuple[str, ...] | list[str] = ()) -> Gauge:
        return Gauge(name, what, labels, registry=self.registry, multiprocess_mode=mode)

    async def sleep(self, seconds: float) -> None:
        """Sleep, and note how much longer it took; once a second look at all the rest."""
        began = time.monotonic()
        if began >= self.look_at:
            self.look_at = began + POLL_S
            for look in self.looks:
                look()
            began = time.monotonic()
        await asyncio.sleep(seconds)
        self.lag.observe(max(0.0, time.monotonic() - began - seconds))

    def poll_processes(self) -> None:
        pids = [os.getpid(), *self.children()]
        self.memory.set(memory.resident_bytes(pids))
        with contextlib.suppress(OSError):  # to look takes one more, and all may be open
            self.files.set(len(os.listdir("/proc/self/fd")))
        cpu_s = {pid: cpu_seconds(pid) for pid in pids}
        self.cpu.inc(sum(max(0.0, used - self.cpu_s.get(pid, 0.0)) for pid, used in cpu_s.items()))
        self.cpu_s = cpu_s

    def poll_gpus(self) -> None:
        import pynvml  # type: ignore[import-untyped]

        for device, handle in enumerate(self.devices):
            with contextlib.suppress(pynvml.NVMLError):  # some can't tell all of it
                used = pynvml.nvmlDeviceGetMemoryInfo(handle)
                self.gpu_memory.labels(device).set(used.used)
                self.gpu_most.labels(device).set(used.total)
                busy = pynvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100
                self.gpu_busy.labels(device).set(busy)


def cpu_seconds(pid: int) -> float:
    """Processor time that a process has used, 0 where it can't be known."""
    with contextlib.suppress(OSError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return 0.0


def gpus() -> list[Any]:
    """NVML's handles of this machine's GPUs, in its order; none without its package or its driver."""
    try:
        nvml = importlib.import_module("pynvml")
        nvml.nvmlInit()
        return [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]
    except Exception:  # no package, no driver, no permission
        return []
