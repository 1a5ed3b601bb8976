"""INSTANCES=0: as many instances in threads as answer most on this machine, measured at the start and not by a rule of thumb.

Every count gets an equal share of the cores for each instance. They answer the largest of the warm-up's batches, all at
once, each in a thread of its own. A larger count has to gain 5 %, as it makes a call that comes alone slower.
"""

import logging
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from workers import tasks
from workers.resources import usable_cores
from workers.settings import Settings

log = logging.getLogger("uvicorn.error")

TURNS, TURN_S = 3, 0.3
GAIN = 1.05


def measured(settings: Settings, task: tasks.Task) -> Settings:
    """Return the settings, with the INSTANCES that answer most if they say 0; 1 where threads can't share the model.

    A model that it loads for that is kept, for the instances to share. Raises what loading and the model raise.
    """
    if settings.INSTANCES:
        return settings
    counts = counts_for(max(1, usable_cores() // settings.WEB_CONCURRENCY))
    if settings.OFFLOAD != "thread" or settings.is_token_by_token or len(counts) == 1:
        return replace(settings, INSTANCES=1)
    choices = [replace(settings, INSTANCES=n) for n in counts]
    if not (model := tasks.load_to_share(task)):
        log.info("INSTANCES=0 counts as 1: threads can't share this model")
        return choices[0]
    if not (batches := tasks.batches_of(model, task, settings)):
        log.info("INSTANCES=0 counts as 1: the model has no example to measure with")
        return choices[0]
    batch = [query.content for query in max(batches, key=len)]
    rates = rates_per_s(lambda: model(batch), choices)
    chosen = choices[best(rates)]
    log.info(
        "INSTANCES=0 counts as %d: %s calls/s with batches of %d",
        chosen.INSTANCES,
        ", ".join(
            f"{one.INSTANCES} x {one.threads_per_instance} threads {rate:.1f}"
            for one, rate in zip(choices, rates)
        ),
        len(batch),
    )
    return chosen


def counts_for(cores: int) -> list[int]:
    """Return the counts to try: 1, 2, 4 and so on, and one per core."""
    return sorted({1 << n for n in range(cores.bit_length()) if 1 << n <= cores} | {cores})


def best(rates: list[float]) -> int:
    """Return the place of the rate to choose: of each that beats all before it by GAIN the last."""
    place = 0
    for i, rate in enumerate(rates):
        if rate > GAIN * rates[place]:
            place = i
    return place


def rates_per_s(call: Callable[[], Any], choices: list[Settings]) -> list[float]:
    """Return the calls per second of each choice: the best of TURNS, in which all take turns; what else runs only slows."""
    found = [0.0] * len(choices)
    for _ in range(TURNS):
        for i, one in enumerate(choices):
            found[i] = max(found[i], rate_per_s(call, one.INSTANCES, one.threads_per_instance))
    return found


def rate_per_s(call: Callable[[], Any], instances: int, threads: int) -> float:
    """Return the calls per second that so many threads make together, each with so many of torch's threads."""
    ready = threading.Barrier(instances)

    def calls(_: int) -> tuple[int, float, float]:
        if torch := sys.modules.get("torch"):
            torch.set_num_threads(threads)
        call()
        ready.wait()
        count, began = 0, time.monotonic()
        while not count or time.monotonic() - began < TURN_S:
            call()
            count += 1
        return count, began, time.monotonic()

    with ThreadPoolExecutor(instances) as pool:
        counts, begins, ends = zip(*pool.map(calls, range(instances)))
    return sum(counts) / (max(ends) - min(begins))
