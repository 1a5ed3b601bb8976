"""Where inference runs: what OFFLOAD and INSTANCES ask for. Each place is imported only when it is asked for.

`thread` and `inline` are in `workers/offload.py`; here are a process of the model's own, which may crash or hang, the
quarantine of inputs that crash it, and Gunicorn's "dirty" pool.
"""

import os
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from workers import tasks
from workers.metrics import Metrics
from workers.offload import Inline, Offload, Thread
from workers.settings import Settings

if TYPE_CHECKING:
    from workers.isolation.quarantine import Quarantine


def make_instances(settings: Settings, metrics: Metrics, task: tasks.Task) -> list[Offload]:
    """Return the `INSTANCES` places where `OFFLOAD` says that inference runs."""
    instances = range(settings.INSTANCES)
    if settings.OFFLOAD == "dirty":
        from workers.isolation.dirty import Dirty  # only there is Gunicorn needed

        return [Dirty(settings.HANG_S) for _ in instances]
    if settings.OFFLOAD == "process":
        from workers.isolation.process import Process

        # A process with cores of its own shares them with no other instance.
        alone = replace(settings, INSTANCES=1)
        return [
            Process(
                partial(tasks.load_alone, alone if share else settings, i), settings.HANG_S, metrics, share
            )
            for i, share in zip(instances, core_shares(settings))
        ]
    kind = Inline if settings.OFFLOAD == "inline" else Thread
    beside = settings.INSTANCES - 1
    return [kind(partial(tasks.load, task, settings, i, beside=beside)) for i in instances]


def make_quarantine(settings: Settings, metrics: Metrics) -> "Quarantine | None":
    """Return the quarantine of inputs that crash the model's process; None where the model has none: a thread can't die."""
    if settings.OFFLOAD not in ("process", "dirty"):
        return None
    from workers.isolation.quarantine import Quarantine

    return Quarantine(metrics)


def core_shares(settings: Settings) -> list[set[int] | None]:
    """Return the cores of each model process, so that their threads don't chase each other; None: wherever there is room.

    None, too, where their threads are more than the cores, or another worker would pin its own to the same ones.
    """
    n, threads = settings.INSTANCES, settings.threads_per_instance
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if n == 1 or settings.WEB_CONCURRENCY > 1 or n * threads > len(cores):
        return [None] * n
    return [set(cores[i * len(cores) // n : (i + 1) * len(cores) // n]) for i in range(n)]
