"""What torch's threads do where others want the cores too: `make bench`.

    python -m loadtests.bench.threads [--quick]

Prints texts per second with one thread, with one for each core, and as workers/tasks/threads.py chooses, and the last as a
fraction of the better of the first two. They take turns, several times over; medians are shown.
"""

import argparse
import contextlib
import multiprocessing
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection

from tqdm import tqdm

from loadtests import arguments
from loadtests.plan.planner import markdown

CORES = len(os.sched_getaffinity(0))
PERIOD_S = 0.01

Scene = list[float]  # for each neighbour, how much of a core it wants
SCENES: dict[str, Scene] = {
    "nothing else": [],
    "a client at 15 %": [0.15],
    "a client at 40 %": [0.40],
    "one core busy": [1.0],
    "all cores busy": [1.0] * CORES,
}


def neighbour(share: float) -> None:
    """Want `share` of a core, forever."""
    while True:
        until = time.perf_counter() + share * PERIOD_S
        while time.perf_counter() < until:
            pass
        if share < 1:
            time.sleep((1 - share) * PERIOD_S)


@contextlib.contextmanager
def beside(scene: Scene) -> Iterator[None]:
    """Run the neighbours of a scene meanwhile."""
    spawn = multiprocessing.get_context("spawn")
    running = [spawn.Process(target=neighbour, args=(share,), daemon=True) for share in scene]
    for process in running:
        process.start()
    time.sleep(0.5)
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.join()


def answer(pipe: Connection) -> None:
    """For every (how, batch size, seconds) from the pipe: texts per second of calling the model in a loop."""

    from loadtests.bench.overhead import texts
    from workers import tasks
    from workers.settings import Settings
    from workers.tasks.threads import WINDOW_S, Threads

    settings = Settings(BATCH_SIZE=32, TORCH_THREADS=CORES)
    task = tasks.make(settings)
    model = tasks.load(task, settings)
    import torch  # only now: before, the task says how OpenMP waits

    while order := pipe.recv():
        how, batch_size, duration_s = order
        queries = [task.check(text, {}).content for text in texts(batch_size)]
        ours = how == "ours"
        threads = Threads(CORES if ours else 1)
        torch.set_num_threads(CORES if ours else int(how))
        for seconds in (WINDOW_S + 0.2, duration_s):  # warm until the choice is made, then measure
            done, began = 0, time.perf_counter()
            while (elapsed := time.perf_counter() - began) < seconds:
                threads.between_calls()
                model(queries)
                done += batch_size
        pipe.send(done / elapsed)


@contextlib.contextmanager
def answering() -> Iterator[Callable[[str, int, float], float]]:
    """`answer` in a process of its own and in a thread of that, as in the server, as a function."""
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    process = spawn.Process(target=in_thread, args=(theirs,), daemon=True)
    process.start()
    theirs.close()  # or its death would not close the pipe

    def rate(how: str, batch_size: int, duration_s: float) -> float:
        ours.send((how, batch_size, duration_s))
        return float(ours.recv())

    yield rate
    ours.send(None)
    process.join()


def in_thread(pipe: Connection) -> None:
    thread = threading.Thread(target=answer, args=(pipe,), daemon=True)
    thread.start()
    thread.join()


def row(scene: str, batch_size: int, rates: dict[str, list[float]]) -> dict[str, str]:
    """Medians, and ours to the better of the two."""
    one, most, ours = (statistics.median(found) for found in rates.values())
    return {
        "beside it": scene,
        "batch": str(batch_size),
        "1 thread": f"{one:.0f}",
        f"{CORES} threads": f"{most:.0f}",
        "ours": f"{ours:.0f}",
        "ours ÷ best": f"{ours / max(one, most):.2f}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one short round of the three main scenes")
    options = parser.parse_args()
    rounds, duration_s = (1, 0.3) if options.quick else (6, 1.0)
    scenes = {name: scene for name, scene in SCENES.items() if not options.quick or "client" not in name}
    rows = []
    with answering() as rate:
        for name, scene in tqdm(scenes.items(), "torch's threads", file=sys.stderr):
            with beside(scene):
                for batch_size in (1, 32):
                    rates: dict[str, list[float]] = {"1": [], str(CORES): [], "ours": []}
                    for i in range(rounds):
                        for how in [*list(rates)[i % 3 :], *list(rates)[: i % 3]]:  # none always comes last
                            rates[how].append(rate(how, batch_size, duration_s))
                    rows.append(row(name, batch_size, rates))
    print(f"Texts per second, {CORES} cores\n\n{markdown(rows)}")


if __name__ == "__main__":
    arguments.run(main)
