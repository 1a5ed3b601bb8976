"""fork, spawn and forkserver compared: how soon a model process answers, what it weighs, what breaks with torch loaded.

    $ python -m loadtests.start_methods

Prints a Markdown table. The parent is a fresh interpreter for every row, as what it did before decides what breaks.
"""

import json
import multiprocessing
import subprocess
import sys
import time
from collections.abc import Iterable
from multiprocessing.connection import Connection
from typing import Any

import pandas as pd
import psutil

from loadtests.modes import ROOT
from loadtests.planner import markdown

PARENT = {
    "nothing": "",
    "imported torch": "import torch, transformers",
    "computed with torch": "import torch; torch.ones(512, 512) @ torch.ones(512, 512)",
}
PATIENCE_S = 20.0  # a forked child that has not answered by then hangs: others take 2 to 4 s


def child(pipe: Connection) -> None:
    """Load the embedded model and answer once; stay until the pipe closes."""
    from workers import tasks
    from workers.settings import Settings

    task = tasks.make(Settings())
    query = task.check("Paris is the [MASK] of France.", {})
    pipe.send(task.load(0)([query.content])[0][0]["token_str"])
    pipe.poll(None)


def measure(method: str, parent: str, patience_s: float) -> dict[str, float | str]:
    """Start two model processes by `method`, one after the other, after the parent did `parent`."""
    exec(PARENT[parent], {})
    if method != "fork":
        patience_s *= 10  # these are only slow
    context: Any = multiprocessing.get_context(method)
    if method == "forkserver":
        # Imported once, by the server of forks, which itself never computes.
        context.set_forkserver_preload(["torch", "transformers"])
    took_s: list[float] = []
    while len(took_s) < 2:  # the server of forks itself starts with the first
        began = time.perf_counter()
        ours, theirs = context.Pipe()
        process = context.Process(target=child, args=(theirs,), daemon=True)
        process.start()
        theirs.close()
        outcome = f"hangs (given {patience_s:g} s)"
        if ours.poll(patience_s):
            try:
                outcome = ours.recv()
            except EOFError:
                outcome = "dies"
        took_s.append(time.perf_counter() - began)
        memory = psutil.Process(process.pid).memory_full_info()
        process.kill()
        process.join()
        ours.close()
        if outcome != "capital":
            return {"outcome": outcome}
    return {
        "first answer, s": round(took_s[0], 1),
        "the next process, s": round(took_s[1], 1),
        "its own memory, MB": round(memory.uss / 1e6),
        "with its share, MB": round(memory.pss / 1e6),
        "outcome": "answers",
    }


def compare(
    methods: Iterable[str] = ("fork", "spawn", "forkserver"),
    parents: Iterable[str] = tuple(PARENT),
    patience_s: float = PATIENCE_S,
) -> pd.DataFrame:
    """Measure every combination, each from a fresh interpreter; what hangs has no numbers."""
    rows = []
    for method in methods:
        for parent in parents:
            argv = [sys.executable, "-m", "loadtests.start_methods", method, parent, str(patience_s)]
            found = json.loads(
                subprocess.run(argv, check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT).stdout
            )
            rows.append({"start method": method, "the parent has": parent} | found)
    return pd.DataFrame(rows)


if __name__ == "__main__":
    if sys.argv[1:]:
        print(json.dumps(measure(sys.argv[1], sys.argv[2], float(sys.argv[3]))))
    else:
        print(markdown(compare().astype(object).fillna("-").astype(str).to_dict("records")))
