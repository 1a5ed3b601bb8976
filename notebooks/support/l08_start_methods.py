"""fork, spawn and forkserver compared: how soon a model process answers, what it weighs, what breaks with torch loaded.

    $ python -m notebooks.support.l08_start_methods

Prints a Markdown table. The parent is a fresh interpreter for every row, as what it did before decides what breaks. The
imports up here are paid by every spawned child, too: so there are no heavy ones.
"""

import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

ROOT = Path(__file__).resolve().parents[2]
PRODUCT = "torch.ones(512, 512) @ torch.ones(512, 512)"
PARENT = {
    "nothing": "",
    "imported torch": "import torch, transformers",
    "computed with torch": f"import torch; torch.set_num_threads(2); {PRODUCT}",
}
MORE = {"computed on one thread": f"import torch; torch.set_num_threads(1); {PRODUCT}"}
PRELOAD = ("torch", "transformers")
COLUMNS = [
    "start method",
    "the parent has",
    "first answer, s",
    "the next process, s",
    "its own memory, MB",
    "with its share, MB",
    "outcome",
]
PATIENCE_S = 20.0  # a forked child that has not answered by then hangs: others take 2 to 4 s


def answer_at_once(pipe: Connection) -> None:
    """Need nothing."""
    pipe.send("capital")
    pipe.poll(None)


def compute(pipe: Connection) -> None:
    """Import torch, unless it is here already, and compute once."""
    import torch

    torch.ones(512, 512) @ torch.ones(512, 512)
    pipe.send("capital")
    pipe.poll(None)


def load_and_answer(pipe: Connection) -> None:
    """Load the embedded model and answer once; stay until the pipe closes."""
    from workers import tasks
    from workers.settings import Settings

    task = tasks.make(Settings())
    query = task.check("Paris is the [MASK] of France.", {})
    pipe.send(task.load(0)([query.content])[0][0]["token_str"])
    pipe.poll(None)


CHILDREN: dict[str, Callable[[Connection], None]] = {
    "answers at once": answer_at_once,
    "computes with torch": compute,
    "loads the model": load_and_answer,
}


def measure(
    method: str, parent: str, patience_s: float, child: str, preload: Iterable[str]
) -> dict[str, float | str]:
    """Start two processes by `method`, one after the other, after the parent did `parent`."""
    import psutil

    exec((PARENT | MORE)[parent], {})
    context: Any = multiprocessing.get_context(method)
    if method == "forkserver":
        # Imported once, by the server of forks, which itself never computes.
        context.set_forkserver_preload(list(preload))
    took_s: list[float] = []
    while len(took_s) < 2:  # the server of forks itself starts with the first
        began = time.perf_counter()
        ours, theirs = context.Pipe()
        process = context.Process(target=CHILDREN[child], args=(theirs,), daemon=True)
        process.start()
        theirs.close()
        outcome = f"hangs (given {patience_s:g} s)"
        if ours.poll(patience_s):
            try:
                outcome = ours.recv()
            except EOFError:
                outcome = "dies"
        took_s.append(time.perf_counter() - began)
        seen = psutil.Process(process.pid)
        memory, helper = seen.memory_full_info(), seen.ppid() != os.getpid() and seen.parent()
        more = {
            "threads of the parent": psutil.Process().num_threads(),
            "threads of the child": seen.num_threads(),
            "child of": "the helper" if helper else "the parent",
            "the helper's memory with its share, MB": round(helper.memory_full_info().pss / 1e6)
            if helper
            else 0,
        }
        process.kill()
        process.join()
        ours.close()
        if outcome != "capital":
            return {"outcome": outcome, **more}
    return {
        "first answer, s": round(took_s[0], 3),
        "the next process, s": round(took_s[1], 3),
        "its own memory, MB": round(memory.uss / 1e6),
        "with its share, MB": round(memory.pss / 1e6),
        "outcome": "answers",
        **more,
    }


def measure_afresh(
    method: str,
    parent: str = "nothing",
    *,
    patience_s: float = PATIENCE_S,
    child: str = "loads the model",
    preload: Iterable[str] = PRELOAD,
) -> dict[str, Any]:
    """`measure` in a fresh interpreter. Who waits for ever has no numbers."""
    # Only after a fork, or in a preloaded module, can anything hang; the others are only slow.
    hangs = method == "fork" or tuple(preload) not in (PRELOAD, ())
    patience_s *= 1 if hangs else 10
    options = (method, parent, str(patience_s), child, ",".join(preload))
    argv = [sys.executable, "-m", "notebooks.support.l08_start_methods", *options]
    limit_s = 2 * patience_s + 120
    run = subprocess.run(argv, check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT, timeout=limit_s)
    return dict(json.loads(run.stdout))


def compare() -> "pd.DataFrame":
    """Measure every combination with a child that loads the model, each from a fresh interpreter."""
    import pandas as pd

    rows = []
    for method in ("fork", "spawn", "forkserver"):
        for parent in PARENT:
            rows.append({"start method": method, "the parent has": parent} | measure_afresh(method, parent))
    return pd.DataFrame(rows).reindex(columns=COLUMNS).round(1)


if __name__ == "__main__":
    if sys.argv[1:]:
        method, parent, patience, child, preload = sys.argv[1:]
        print(json.dumps(measure(method, parent, float(patience), child, filter(None, preload.split(",")))))
    else:
        from loadtests.plan.planner import markdown

        print(markdown(compare().astype(object).fillna("-").astype(str).to_dict("records")))
