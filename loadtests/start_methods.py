"""fork, spawn and forkserver compared: how soon a model process answers, what it weighs, what breaks with torch loaded.

    $ python -m loadtests.start_methods

Prints a Markdown table. The parent is a fresh interpreter for every row, as what it did before decides what breaks.
"""

import json
import multiprocessing
import subprocess
import sys
import time
from multiprocessing.connection import Connection

import psutil

PARENT = {
    "nothing": "",
    "imported torch": "import torch, transformers",
    "computed with torch": "import torch; torch.ones(512, 512) @ torch.ones(512, 512)",
}
PATIENCE_S = 20.0  # a child that has not answered by then hangs


def child(pipe: Connection) -> None:
    """Load the embedded model and answer once; stay until the pipe closes."""
    from workers.model import Model, Query
    from workers.settings import Settings

    pipe.send(Model(Settings())([Query("Paris is the [MASK] of France.")])[0][0]["token_str"])
    pipe.poll(None)


def measure(method: str, parent: str) -> dict[str, float | str]:
    """Start one model process by `method` after the parent did `parent`: {start_s, pss_mb, shared_mb, outcome}."""
    exec(PARENT[parent], {})
    context = multiprocessing.get_context(method)
    if method == "forkserver":
        context.set_forkserver_preload(
            ["torch", "transformers"]
        )  # imported once, by the server, which never computes
    durations = []
    for _ in range(2):  # the forkserver itself starts with the first
        began = time.perf_counter()
        ours, theirs = context.Pipe()
        process = context.Process(target=child, args=(theirs,), daemon=True)
        process.start()
        theirs.close()
        try:
            answered = ours.poll(PATIENCE_S) and ours.recv() == "capital"
        except EOFError:
            answered = False
        durations.append(time.perf_counter() - began)
        memory = psutil.Process(process.pid).memory_full_info()
        process.kill()
        process.join()
        ours.close()
        if not answered:
            break
    return {
        "first_s": durations[0],
        "next_s": durations[-1],
        "own_mb": memory.uss / 1e6,
        "pss_mb": memory.pss / 1e6,
        "outcome": "answers" if answered else f"hangs (given {PATIENCE_S:g} s)",
    }


def table() -> str:
    """All combinations, in Markdown."""
    lines = [
        "| start method | the parent has | first answer after | the next process | memory of its own | its share | |",
        "|---|---|---:|---:|---:|---:|---|",
    ]
    for method in multiprocessing.get_all_start_methods():
        for parent in PARENT:
            argv = [sys.executable, "-m", "loadtests.start_methods", method, parent]
            row = json.loads(subprocess.run(argv, check=True, capture_output=True, text=True).stdout)
            numbers = (
                [
                    f"{row['first_s']:.1f} s",
                    f"{row['next_s']:.1f} s",
                    f"{row['own_mb']:.0f} MB",
                    f"{row['pss_mb']:.0f} MB",
                ]
                if row["outcome"] == "answers"
                else ["-"] * 4
            )
            lines.append(f"| {' | '.join([method, parent, *numbers, row['outcome']])} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(json.dumps(measure(*sys.argv[1:])) if sys.argv[1:] else table())
