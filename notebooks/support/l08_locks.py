"""A thread holds a lock for a share of the time; meanwhile processes are started. Which of them can take it?

    $ python -m notebooks.support.l08_locks fork 0.3 200

Prints how many were started while it was held, and how many could not take it: they would wait for ever.
"""

import json
import multiprocessing
import random
import subprocess
import sys
import threading
import time
from pathlib import Path

LOCK = threading.Lock()
PERIOD_S = 0.05
PATIENCE_S = 0.5  # the thread that would let go of it isn't in the child: nothing will change
ALIVE = 30  # at once, at most


def hold(share, found):
    """Hold the lock for about this share of each period; note the share of the time that it was, after each period."""
    began, held_s = time.perf_counter(), 0.0
    while True:
        with LOCK:
            taken = time.perf_counter()
            time.sleep(share * PERIOD_S)
            held_s += time.perf_counter() - taken
        time.sleep((1 - share) * PERIOD_S)
        found["share"] = held_s / (time.perf_counter() - began)


def child():
    """Take the lock, as every `queue.put` and every counter does with its own. Exit with 1 where that fails."""
    sys.exit(0 if LOCK.acquire(timeout=PATIENCE_S) else 1)


def stuck(method, share, number):
    """`start_many` in a Python of its own: what it found."""
    command = [sys.executable, "-m", "notebooks.support.l08_locks", method, str(share), str(number)]
    root = Path(__file__).resolve().parents[2]
    found = subprocess.run(command, check=True, capture_output=True, text=True, timeout=100, cwd=root)
    return json.loads(found.stdout)


def start_many(method, share, number):
    """How many of `number` processes were started while the lock was held, how many can't take it, how long it was held."""
    context = multiprocessing.get_context(method)
    found: dict[str, float] = {}
    threading.Thread(target=hold, args=(share, found), daemon=True).start()
    alive, codes, held = [], [], 0
    for _ in range(number):
        time.sleep(random.uniform(0, PERIOD_S))
        held += LOCK.locked()
        process = context.Process(target=child, daemon=True)
        process.start()
        alive.append(process)
        while len(alive) >= ALIVE:
            codes.append(end(alive.pop(0)))
    codes += map(end, alive)
    while "share" not in found:  # until the first period has passed
        time.sleep(PERIOD_S)
    return {"held": held, "stuck": codes.count(1), "started": len(codes), "share": found["share"]}


def end(process):
    """Its exit code; bounded."""
    process.join(60)
    process.kill()
    return process.exitcode


if __name__ == "__main__":
    print(json.dumps(start_many(sys.argv[1], float(sys.argv[2]), int(sys.argv[3]))))
