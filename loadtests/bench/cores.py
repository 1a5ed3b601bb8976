"""What more cores would give one model, simulated from what two give: `python -m loadtests.bench.cores`.

    $ python -m loadtests.bench.cores              # the table of docs/tuning.md
    $ python -m loadtests.bench.cores --measure    # what it starts from: about a minute on two idle cores

Three limits, and a machine never does better than the lowest of them:

    threads of one instance    1 / ((1 - p) + p / n): Amdahl, "Validity of the single processor approach", AFIPS 1967
    instances in one process   1 / g calls at once, g the share of a call that holds the interpreter lock: the bottleneck
                               law of Denning and Buzen, "The operational analysis of queueing network models", 1978
    all of them                memory bandwidth / bytes that a call reads: the roofline of Williams, Waterman and Patterson,
                               "Roofline: an insightful visual performance model", Communications of the ACM 52(4), 2009

Left out: caches that several cores share, clock rates that fall when all compute, NUMA nodes, the event loop, clients.
"""

import argparse
import statistics
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from loadtests import arguments

CORES = (4, 8, 16, 32, 64)
HEAD = [
    "inputs per call",
    "cores",
    "1 instance",
    "instances of 4 threads",
    "of 1 thread",
    "of 1 thread, in processes",
]
WEIGHTS_BYTES = 91e6  # of the bundled model in float32: each call reads them once
CORE_BYTES_S = 10e9  # from memory, measured on one core: loadtests/results/generation.md
SOCKET_BYTES_S = 307e9  # eight channels of DDR5-4800, a Xeon of 2023


class Measured(NamedTuple):
    """Inputs/s of bare calls of one batch size, on two cores."""

    one: float  # one instance, one thread
    two_threads: float  # one instance, two threads
    two_instances: float  # two instances that share weights, one thread each
    python: float  # share of a call outside torch's operators, by its profiler

    @property
    def parallel(self) -> float:
        """The share of a call that threads divide among them, Amdahl's p."""
        return 2 * (1 - self.one / self.two_threads)

    @property
    def locked(self) -> float:
        """The share of a call that no other instance's may run beside: no more than what threads leave undivided."""
        return min(self.python, 1 - self.parallel)


# python -m loadtests.bench.cores --measure, Intel Xeon with AMX, 2 cores, 2026-12-01
MEASURED = {
    1: Measured(87, 153, 144, 0.20),
    32: Measured(448, 800, 896, 0.08),
}


def rate(cores: int, instances: int, batch: int, processes: bool = False) -> float:
    """Return inputs/s of so many instances that have the cores divided among them; in one process unless `processes`."""
    law = MEASURED[batch]
    call_s = batch / law.one
    limits = [
        instances / (call_s * (1 - law.parallel + law.parallel * instances / cores)),
        min(cores * CORE_BYTES_S, SOCKET_BYTES_S) / WEIGHTS_BYTES,
    ]
    if not processes:
        limits.append(1 / (call_s * law.locked))
    return batch * min(limits)


def table() -> str:
    """Return the simulated rates as a table in Markdown: multiples of one core's."""
    rows = [HEAD, ["---"] * len(HEAD)]
    for batch, law in MEASURED.items():
        for n in CORES:
            ways = (
                rate(n, 1, batch),
                rate(n, n // 4, batch),
                rate(n, n, batch),
                rate(n, n, batch, processes=True),
            )
            rows.append([str(batch), str(n), *(f"{found / law.one:.1f}" for found in ways)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def per_s(call: Callable[[], Any], threads: int, callers: int, duration_s: float) -> float:
    """Return calls per second of so many Python threads, each with torch's threads."""
    import torch

    counts, until = [0] * callers, time.perf_counter() + duration_s

    def again(n: int) -> None:
        torch.set_num_threads(threads)
        while time.perf_counter() < until:
            call()
            counts[n] += 1

    running = [threading.Thread(target=again, args=(n,)) for n in range(callers)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    return sum(counts) / duration_s


def python_share(call: Callable[[], Any], calls: int = 30) -> float:
    """Return the share of a call outside torch's operators, which work without the interpreter lock."""
    import torch

    torch.set_num_threads(1)
    began = time.perf_counter()
    for _ in range(calls):
        call()
    whole_s = time.perf_counter() - began
    with torch.profiler.profile() as profile:
        for _ in range(calls):
            call()
    in_operators_s = sum(one.self_cpu_time_total for one in profile.key_averages()) / 1e6
    return max(0.0, 1 - in_operators_s / whole_s)


def measure(rounds: int = 5, duration_s: float = 1.0) -> dict[int, Measured]:
    """Return what this machine does, the three ways in turn; medians."""
    from loadtests.bench.overhead import texts
    from workers import tasks
    from workers.settings import Settings

    found = {}
    for batch in MEASURED:
        task = tasks.make(settings := Settings(BATCH_SIZE=32, TORCH_THREADS=1))
        queries = [task.check(text, {}).content for text in texts(batch)]
        call = partial(tasks.load(task, settings), queries)
        ways = {"one": (1, 1), "two_threads": (2, 1), "two_instances": (1, 2)}
        rates: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(rounds):
            for way, how in ways.items():
                rates[way].append(batch * per_s(call, *how, duration_s))
        medians = {way: statistics.median(seen) for way, seen in rates.items()}
        found[batch] = Measured(**medians, python=python_share(call))
    return found


def main() -> None:
    """Print the table, or what it starts from."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--measure", action="store_true", help="measure this machine's two cores instead")
    if parser.parse_args().measure:
        for batch, found in measure().items():
            print(f"    {batch}: Measured({', '.join(f'{value:.3g}' for value in found)}),")
    else:
        print(table())


if __name__ == "__main__":
    arguments.run(main)
