"""What command lines share: numbers that are checked before the work begins, and one line at Ctrl-C."""

import logging
import math
import os
import signal
import sys
import threading
from argparse import ArgumentTypeError
from collections.abc import Callable
from typing import Any


def above(least: float, kind: type = float) -> Callable[[str], Any]:
    """Return a check: a number above `least`."""

    def check(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            raise ArgumentTypeError(f"{text!r} is not a {'whole ' * (kind is int)}number") from None
        if not least < value < math.inf:
            raise ArgumentTypeError(f"{text} is not above {least:g}")
        return value

    return check


def at_least_0(text: str) -> float:
    """Check a number that may be 0."""
    return 0.0 if text in ("0", "0.0") else float(above(0.0)(text))


def share(text: str) -> float:
    """Check a number from 0 to 1."""
    if (value := at_least_0(text)) > 1:
        raise ArgumentTypeError(f"{text} is not a share; use 0 to 1")
    return value


def run(main: Callable[[], int | None]) -> None:
    """Run a program to its exit code. Ctrl-C and SIGTERM end it with one line; its context managers leave no server behind."""
    interrupted = False

    def interrupt(*_: Any) -> None:
        nonlocal interrupted
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # once is enough: what was started is being ended
        interrupted = True
        raise KeyboardInterrupt

    def raise_again(ignored: Any) -> None:
        # Python drops an exception that is raised in a callback, such as logging's at a fork.
        if ignored.exc_type is KeyboardInterrupt:
            signal.signal(signal.SIGINT, interrupt)
            threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
        else:
            sys.__unraisablehook__(ignored)

    sys.unraisablehook = raise_again
    signal.signal(signal.SIGINT, interrupt)
    signal.signal(signal.SIGTERM, interrupt)
    try:
        code = main()
    except BaseException:
        if not interrupted:
            raise
        logging.disable()  # asyncio's complaints of tasks that ended with it
        print("\nInterrupted.", file=sys.stderr)
        code = 130
    sys.exit(code)
