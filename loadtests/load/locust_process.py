"""The process that Locust runs in: importing it patches the standard library, so it gets one of its own.

Reads one job a line from standard input (JSON: scenario, url, out, users, options), runs it in a fork, writes its rows
to the CSV file `out` and prints one line when it is done. So Locust is imported once, and every run starts clean.
"""

import argparse
import csv
import gc
import json
import os
import sys
import traceback
from typing import Any

from locust.env import Environment

from loadtests import locustfile
from loadtests.load import texts
from loadtests.load.rows import Row
from workers.settings import Settings


def main() -> None:
    """Run jobs until standard input ends."""
    texts.example_of(Settings.read())  # not on a job's time
    for line in sys.stdin:
        job = json.loads(line)
        if (child := os.fork()) == 0:
            code = 1
            try:
                play(**job)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def play(scenario: str, url: str, out: str, users: int, options: dict[str, Any]) -> None:
    """Run one scenario to its end, drained, and write its rows."""
    defaults = {name: one.default for name, one in locustfile.OPTIONS.items()} | locustfile.UNLISTED
    if unknown := options.keys() - defaults.keys():
        raise TypeError(f"{sorted(unknown)} are not options; choose from {sorted(defaults)}")
    namespace = argparse.Namespace(**defaults | options)
    classes: list[Any] = [locustfile.SCENARIOS[scenario]]
    if "health_per_s" in options:
        classes.append(locustfile.HealthChecks)
    environment: Any = Environment(
        user_classes=classes, host=url.rstrip("/"), parsed_options=namespace, events=locustfile.events
    )
    environment.rows, environment.numbers, environment.stopping = [], {}, False
    environment.example, environment.mask = texts.example_of(Settings.read()), texts.MASK
    gc.freeze()
    gc.disable()  # a pause of the generator would be counted as the server's
    runner = environment.create_local_runner()
    count = users + len(classes) - 1
    runner.start(count, spawn_rate=count)
    runner.spawning_greenlet.join()
    for greenlet in list(runner.user_greenlets):
        greenlet.join()
    with open(out, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(Row._fields)
        writer.writerows(environment.rows)


if __name__ == "__main__":
    main()
