"""Several devices behind one `predict`: a service that is widely copied, in our words and with its mistakes; and repaired.

A device here is a thread that calls `run(text)`. Let `run` sleep, and what you see is the service alone.
"""

import queue
import threading
import time
import uuid
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass


class Broken:
    """A queue for each device, dealt to in turn; one queue for all replies."""

    def __init__(self, devices, run):
        self.inputs = [queue.Queue() for _ in range(devices)]
        self.replies = queue.Queue()
        self.turn = 0
        for inbox in self.inputs:
            threading.Thread(target=self.work, args=(inbox, run), daemon=True).start()

    def work(self, inbox, run):
        while job := inbox.get():
            number, text = job
            self.replies.put((number, run(text)))

    def choose(self):
        self.turn += 1
        return self.turn % len(self.inputs)

    def predict(self, text, patience_s=None):
        number = uuid.uuid4()
        self.inputs[self.choose()].put((number, text))
        while True:
            found, answer = self.replies.get(timeout=patience_s)
            if found == number:
                return answer

    def stop(self):
        for inbox in self.inputs:
            inbox.put(None)


class TakesWhatComes(Broken):
    """Its older sister, without numbers."""

    def predict(self, text, patience_s=None):
        self.inputs[self.choose()].put((0, text))
        return self.replies.get(timeout=patience_s)[1]


class Repaired:
    """One queue for all devices; each text carries the place where its own caller waits."""

    def __init__(self, devices, run):
        self.jobs, self.devices = queue.Queue(), devices
        for _ in range(devices):
            threading.Thread(target=self.work, args=(run,), daemon=True).start()

    def work(self, run):
        while job := self.jobs.get():
            text, reply = job
            try:
                reply.set_result(run(text))
            except Exception as error:
                reply.set_exception(error)

    def predict(self, text, patience_s=None):
        reply = Future()
        self.jobs.put((text, reply))
        return reply.result(patience_s)

    def stop(self):
        for _ in range(self.devices):
            self.jobs.put(None)


# --- what breaks it ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fate:
    """What became of all that was asked."""

    right: int = 0
    wrong: int = 0  # somebody else's answer
    lost: int = 0  # no answer for as long as the patience lasted: whoever has none waits for ever

    def __add__(self, other):
        return Fate(self.right + other.right, self.wrong + other.wrong, self.lost + other.lost)


def total(fates):
    """All of them together."""
    return sum(fates, start=Fate())


def nap(text):
    """Stand in for a model: a text is (its name, the seconds that it takes)."""
    name, seconds = text
    time.sleep(seconds)
    return f"answer to {name}"


def call(service, caller, seconds, patience_s, late_s=0.0):
    """One caller asks a text after the other, until it has none left or gets no answer."""
    fate = Fate()
    time.sleep(late_s)
    for i, takes_s in enumerate(seconds):
        name = f"{caller}'s {i}"
        try:
            right = service.predict((name, takes_s), patience_s) == f"answer to {name}"
        except (queue.Empty, TimeoutError):
            return fate + Fate(lost=1)
        fate += Fate(right=right, wrong=not right)
    return fate


def trial(kind, seconds, *, devices=2, patience_s=0.5, late_s=0.0):
    """A new service and some callers at once, each with its list of seconds; the next one begins `late_s` later."""
    service = kind(devices, nap)
    with ThreadPoolExecutor(len(seconds)) as pool:
        fates = pool.map(
            lambda i: call(service, f"caller {i}", seconds[i], patience_s, i * late_s), range(len(seconds))
        )
        total = sum(fates, Fate())
    service.stop()
    return total


def trials(number, kind, draw, calls, **options):
    """`trial` again and again with two callers, ten side by side; `draw()` gives the seconds of a text."""
    lists = [[[draw() for _ in range(calls)] for _ in range(2)] for _ in range(number)]
    with ThreadPoolExecutor(10) as pool:
        return list(pool.map(lambda seconds: trial(kind, seconds, **options), lists))


def fails_or_naps(text):
    """A model that can't take one text."""
    if text[1] < 0:
        raise ValueError("a bad text")
    return nap(text)


def answered_after_a_bad_text(kind):
    """How many of 20 texts, one after the other, are answered after a bad one. The dead thread's traceback is not shown."""
    shows, threading.excepthook = threading.excepthook, lambda about: None
    devices = kind(2, fails_or_naps)
    call(devices, "somebody", [-1], 0.5) if kind is Broken else None
    fates = [call(devices, f"caller {i}", [0.001], 0.5) for i in range(20)]
    devices.stop()
    threading.excepthook = shows
    return sum(fate.right for fate in fates)


def crowded(service, instances, texts):
    """Seconds that so many texts for each instance take, of which there is always one that waits; then stop it."""
    with ThreadPoolExecutor(2 * instances) as callers:
        began = time.perf_counter()
        list(callers.map(service.predict, range(instances * texts)))
        took_s = time.perf_counter() - began
    service.stop()
    return took_s
