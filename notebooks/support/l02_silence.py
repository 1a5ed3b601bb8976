"""Lesson 2: a metronome in a thread beside the main thread's work."""

import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np


def silences_ms(work: Callable[[], Any]) -> tuple[float, float]:
    """The typical (median) and the longest gap between two ticks of a 1 ms metronome while `work()` runs."""
    ticks, done = [time.perf_counter()], threading.Event()

    def metronome() -> None:
        while not done.is_set():
            time.sleep(0.001)
            ticks.append(time.perf_counter())

    thread = threading.Thread(target=metronome)
    thread.start()
    work()
    done.set()
    thread.join()
    gaps = np.diff(ticks) * 1000
    return float(np.median(gaps)), float(gaps.max())
