"""On the path of a server under test: the wall clock jumps by as many seconds as the file CHAOS_CLOCK says."""

import os
import time

real = time.time


def jumping() -> float:
    try:
        with open(os.environ["CHAOS_CLOCK"]) as file:
            return real() + float(file.read() or 0)
    except (KeyError, OSError, ValueError):
        return real()


time.time = jumping
