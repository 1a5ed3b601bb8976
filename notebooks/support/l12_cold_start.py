"""Where the time goes between a command and the first answer: each part in turn, in a new process.

parts(cpus={0})["import torch"]
"""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TAKEN: dict[str, float] = {}


def parts(cpus: set[int], patience_s: float = 60.0) -> dict[str, float]:
    """The seconds of each part."""
    process = subprocess.run(
        [sys.executable, "-m", "notebooks.support.l12_cold_start", str(time.monotonic())],
        cwd=ROOT,
        env={**os.environ, "TORCH_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=patience_s,
        check=True,
        preexec_fn=lambda: os.sched_setaffinity(0, cpus),
    )
    return json.loads(process.stdout.splitlines()[-1])


@contextlib.contextmanager
def part(name: str) -> Iterator[None]:
    began = time.monotonic()
    yield
    TAKEN[name] = time.monotonic() - began


def main() -> None:
    TAKEN["interpreter"] = time.monotonic() - float(sys.argv[1])
    with part("import torch"):
        import torch  # noqa: F401
    with part("import transformers"):
        from transformers import AutoModelForMaskedLM, AutoTokenizer  # noqa: F401
    with part("import its pipelines"):
        from transformers import pipeline  # noqa: F401
    with part("import the server"):
        import uvicorn  # noqa: F401

        import server  # noqa: F401
    with part("load the weights"):
        from workers import tasks
        from workers.settings import Settings

        settings = Settings.read()
        task = tasks.make(settings)
        model = task.load(0)
    with part("warm up"):
        for batch in tasks.warm_up_batches(task, settings.BATCH_SIZE):
            model([query.content for query in batch])
    print(json.dumps(TAKEN))


if __name__ == "__main__":
    main()
