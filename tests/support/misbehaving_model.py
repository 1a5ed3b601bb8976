"""A model with its moods: `MODEL=tests.support.misbehaving_model:Model`, to see what a server makes of them.

HANGS       where it hangs: "import", "load", "warm-up"
PLAN        a file: each load takes its next word, "fail", "die", or "wait" until the file is gone; then loads succeed
An input    is done as it says, or answered with the input and the process that did it
"""

import asyncio
import os
import signal
import time
from pathlib import Path
from typing import Any


class Rude(Exception):
    """An error that can't be sent, nor shown."""

    def __init__(self) -> None:
        self.args = (lambda: None,)

    def __repr__(self) -> str:
        raise RuntimeError

    __str__ = __repr__


class Model:
    """Answers each input with it and its own process, or does what it says."""

    example, description = "warm-up", "moody"

    def __init__(self) -> None:
        self.calls = 0
        if os.environ.get("HANGS") == "load":
            hang()
        if plan := os.environ.get("PLAN"):
            follow(Path(plan))

    def __call__(self, inputs: list[Any]) -> list[Any]:
        self.calls += 1
        return [self.answer(one) for one in inputs]

    def answer(self, one: Any) -> Any:
        match one:
            case "warm-up" if os.environ.get("HANGS") == "warm-up":
                hang()
            case "hang":
                hang()
            case "stop":
                raise StopIteration
            case "exit":
                raise SystemExit(3)
            case "cancel":
                raise asyncio.CancelledError
            case "rude":
                raise Rude
            case "die":
                os.kill(os.getpid(), signal.SIGKILL)
            case "leave":
                os._exit(7)
            case "close":
                os.closerange(3, 100)
                hang()
            case "print":
                os.write(1, b"\n" * 10_000)
            case "function":
                return lambda: None
            case "huge":
                return "a" * 10**8
            case "calls":
                return self.calls
            case "cores":
                return sorted(os.sched_getaffinity(0))
            case "fork":
                return os.fork() or hang()
        return [one, os.getpid()]


class Fails(Model):
    """It fails on its own example."""

    def answer(self, one: Any) -> Any:
        raise ValueError("no weights for that")


class Forgets(Model):
    """It forgets an answer."""

    def __call__(self, inputs: list[Any]) -> list[Any]:
        return inputs[1:]


class Secretive(Model):
    """Its answers don't leave its process."""

    def answer(self, one: Any) -> Any:
        return lambda: None


def hang() -> None:
    """Print that it does, for whoever waits for it; then never return."""
    print("hanging", flush=True)
    time.sleep(3600)


def follow(plan: Path) -> None:
    """Do what its next word says."""
    now, *later = plan.read_text().split() if plan.exists() else [""]
    if now == "wait":
        while plan.exists():
            time.sleep(0.01)
        return
    if later:
        plan.write_text(" ".join(later))
    if now == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if now == "fail":
        raise OSError("no such model\nsecond line")


if os.environ.get("HANGS") == "import":
    hang()
