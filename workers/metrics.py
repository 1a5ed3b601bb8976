"""What is counted, in Prometheus' terms. Rates, means and utilisation follow from these by PromQL.

Under Gunicorn, where PROMETHEUS_MULTIPROC_DIR is set, every worker shows the sum over all of them.
"""

import functools
import logging
import os
from collections.abc import Callable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest, values

from .loop import Observer
from .metrics_folder import FOLDER, reserve, text

log = logging.getLogger("uvicorn.error")

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


class Metrics(Observer):
    """The counters of one model loop, in a registry of their own, so that two loops can't mix their counts."""

    def __init__(self) -> None:
        if (folder := os.environ.get(FOLDER)) and not reserve(folder):
            log.warning(
                "%s has no space left: the metrics of this worker are not added to those of the others",
                folder,
            )
            del os.environ[FOLDER]
            values.ValueClass = values.MutexValue
        self.registry = registry = CollectorRegistry()
        self.gauges: list[tuple[Gauge, Callable[[], float]]] = []
        # Called with the arguments of `batch`: the web UI shows each model call.
        self.observer: Callable[[int, str, float, list[float]], None] | None = None
        self.requests = Counter(
            "model_requests", "Requests to the model by HTTP status", ["status"], registry=registry
        )
        self.queue_wait = Histogram(
            "model_queue_wait_seconds",
            "Time from admission to the model call",
            buckets=SECONDS,
            registry=registry,
        )
        self.call = Histogram(
            "model_call_seconds", "Duration of a model call", buckets=SECONDS, registry=registry
        )
        self.batch_size = Histogram(
            "model_batch_size", "Inputs in a model call", buckets=SIZES, registry=registry
        )
        self.batches = Counter(
            "model_batches", "Model calls by why the batch was dispatched", ["reason"], registry=registry
        )
        self.hold = Histogram(
            "model_hold_seconds",
            "How long a partial batch was held for clients that were just answered",
            buckets=SECONDS,
            registry=registry,
        )
        self.joined = Counter(
            "model_hold_joined", "Jobs that joined a batch while it was held", registry=registry
        )
        # A look-up of labels is half the cost of a count.
        self.requests_with = functools.cache(self.requests.labels)
        for status in (200, 500, 503, 504):
            self.requests_with(status)  # from zero on: PromQL takes no rate of what is not there yet
        self.batches_because = functools.cache(self.batches.labels)
        self.dropped = Counter(
            "model_abandoned", "Jobs dropped because their clients had left", registry=registry
        )
        self.restarts = Counter("model_process_restarts", "Model processes replaced", registry=registry)
        self.quarantined = Counter(
            "model_quarantined", "Inputs rejected because they crashed the model process", registry=registry
        )

    def watch(self, name: str, what: str, read: Callable[[], float], mode: Any = "livesum") -> None:
        """Read a gauge from this function at every `sample`; `mode`: what it is of several workers."""
        gauge = Gauge(name, what, registry=self.registry, multiprocess_mode=mode)
        self.gauges.append((gauge, read))

    def sample(self) -> None:
        """Set the gauges. Each worker does it again and again: another one's scrape can't ask it."""
        for gauge, read in self.gauges:
            gauge.set(read())

    def batch(self, size: int, dispatched_because: str, model_s: float, waits_s: list[float]) -> None:
        """Count one model call."""
        self.batches_because(dispatched_because).inc()
        self.batch_size.observe(size)
        self.call.observe(model_s)
        for wait_s in waits_s:
            self.queue_wait.observe(wait_s)
        if self.observer:
            self.observer(size, dispatched_because, model_s, waits_s)

    def held(self, seconds: float, joined: int) -> None:
        """Count one hold of a partial batch, which ended with `joined` more jobs."""
        self.hold.observe(seconds)
        self.joined.inc(max(0, joined))

    def abandoned(self) -> None:
        """Count a job whose client left before the answer."""
        self.dropped.inc()

    def text(self) -> bytes:
        """Return all of it in Prometheus text format; with several workers this reads files, so call it in a thread."""
        self.sample()
        folder = os.environ.get(FOLDER)
        return text(folder) if folder else generate_latest(self.registry)
