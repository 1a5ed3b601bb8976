"""python -m loadtests.bench.gpu: every path that a GPU takes, beside the same on the CPU; writes the table of docs/gpu.md.

For a machine that has one. `--device cpu` runs the same paths without writing, to see that they run at all.
"""

import argparse
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from loadtests.modes import ROOT
from tests.support import small_media
from workers import tasks
from workers.settings import EMBEDDED, Settings
from workers.tasks.common import media
from workers.tasks.common.stock import same

DTYPES = ("float32", "bfloat16", "float16")
PAGE = ROOT / "docs" / "gpu.md"
TABLE = re.compile(r"(<!-- made by python -m loadtests\.bench\.gpu -->\n).*?(<!-- end -->)", re.DOTALL)
HEAD = "| path | dtype | inputs per call | answers | ms per call | MB |\n|---|---|---|---|---|---|\n"


class Trial(NamedTuple):
    """A model and inputs for it."""

    name: str
    settings: dict[str, Any]
    inputs: Callable[[], Sequence[Any]]
    sizes: tuple[int, ...]


def texts() -> list[str]:
    return [f"The {'old ' * (i % 40)}house on the [MASK] is in Paris." for i in range(256)]


def paths(folder: Path) -> Iterator[Trial]:
    """What to run: encoders, an image model, speech; with random weights where none are in the repository."""
    yield Trial("fill-mask, packed encoder", {"MODEL": EMBEDDED, "TASK": "fill-mask"}, texts, (1, 32, 256))
    stock = {"MODEL": EMBEDDED, "TASK": "fill-mask", "FAST": False}
    yield Trial("fill-mask, stock pipeline", stock, texts, (1, 32))
    for name, sizes in {"vit": (1, 32), "ctc": (1, 8), "whisper": (1,)}.items():
        kind, make = small_media.MODELS[name]
        make(where := folder / name)
        example: Any = media.example_image if kind.startswith("image") else media.example_sound
        yield Trial(kind, {"MODEL": str(where), "TASK": kind}, partial(examples, example), sizes)


def examples(make: Callable[[int], bytes]) -> list[bytes]:
    return [make(seed) for seed in range(32)]


def rows(device: str) -> Iterator[tuple[str, ...]]:
    """Run each path; yield the cells of its row."""
    with tempfile.TemporaryDirectory() as folder:
        for name in small_media.MODELS:
            (Path(folder) / name).mkdir()
        for path in paths(Path(folder)):
            inputs, most = path.inputs(), max(path.sizes)
            expected = answers(load(path, "cpu", "float32", most), inputs[:8])
            for dtype in DTYPES if device != "cpu" else DTYPES[:1]:
                try:
                    task, model = load(path, device, dtype, most)
                    is_same = same(answers((task, model), inputs[:8]), expected)
                except Exception as exc:
                    yield path.name, dtype, "", f"fails: {type(exc).__name__}", "", ""
                    continue
                for n in path.sizes:
                    batch = [task.check(one, {}).content for one in inputs[:n]]
                    took_s = quickest_s(model, batch, device)
                    used = torch.cuda.max_memory_allocated() / 1e6 if device != "cpu" else 0
                    agree = "the CPU's" if is_same else "other decimals than the CPU's"
                    yield path.name, dtype, str(n), agree, f"{1000 * took_s:.1f}", f"{used:.0f}"


def load(path: Trial, device: str, dtype: str, batch_size: int) -> tuple[Any, Any]:
    settings = Settings(**path.settings, DEVICE=device, DTYPE=dtype, BATCH_SIZE=batch_size)
    task = tasks.make(settings)
    return task, tasks.load(task, settings)


def answers(loaded: tuple[Any, Any], inputs: Sequence[Any]) -> list[Any]:
    task, model = loaded
    return model([task.check(one, {}).content for one in inputs])


def quickest_s(model: Any, batch: list[Any], device: str) -> float:
    """Return the shortest of five calls, to the end of what the GPU does for it."""
    times_s = []
    for _ in range(5):
        began = time.perf_counter()
        model(batch)
        if device != "cpu":
            torch.cuda.synchronize()
        times_s.append(time.perf_counter() - began)
    return min(times_s)


def machine(device: str) -> str:
    return torch.cuda.get_device_name() if device != "cpu" else "the CPU"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1 or cpu")
    device = parser.parse_args().device
    if device != "cpu" and not torch.cuda.is_available():
        raise SystemExit("there is no GPU that torch can use; --device cpu only tries the paths")
    lines = []
    for cells in rows(device):
        print(*cells, sep=" | ", flush=True)
        lines.append(f"| {' | '.join(cells)} |\n")
    if device != "cpu":
        made = f"On {machine(device)}, torch {torch.__version__}:\n\n{HEAD}{''.join(lines)}"
        PAGE.write_text(TABLE.sub(lambda found: f"{found[1]}{made}{found[2]}", PAGE.read_text()))


if __name__ == "__main__":
    main()
