"""python -m loadtests.bench.gpu: every path that a GPU takes, beside the same on the CPU; writes the table of docs/gpu.md.

For a machine that has one, with `pip install -r requirements-dev.txt` there. Never run on one: `--device cpu` runs the same paths
on small models and writes nothing, to see that they run at all. Where the GPU is cut into MIG slices each runs the first path.
"""

import argparse
import gc
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from loadtests.bench.generation import Stepper
from loadtests.modes import ROOT
from tests.support import small_language_models, small_media
from workers import tasks
from workers.generation.model import TokenModel
from workers.generation.scheduler import Sequence as TokenSequence
from workers.generation.steps import Options
from workers.settings import EMBEDDED, Settings
from workers.tasks import text_generation
from workers.tasks.common import media
from workers.tasks.common.stock import same

DTYPES = ("float32", "bfloat16", "float16")
SEQUENCES = (1, 8, 32, 64)
PACKED = "fill-mask, packed encoder"
Cells = tuple[str, ...]
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
    yield Trial(PACKED, {"MODEL": EMBEDDED, "TASK": "fill-mask"}, texts, (1, 32, 256))
    stock = {"MODEL": EMBEDDED, "TASK": "fill-mask", "FAST": False}
    yield Trial("fill-mask, stock pipeline", stock, texts, (1, 32))
    for name, sizes in {"vit": (1, 32), "ctc": (1, 8), "whisper": (1,)}.items():
        kind, make = small_media.MODELS[name]
        (where := folder / name).mkdir()
        make(where)
        example: Any = media.example_image if kind.startswith("image") else media.example_sound
        settings = {"MODEL": str(where), "TASK": kind}
        yield Trial(f"{kind}, {name}", settings, partial(examples, example), sizes)


def examples(make: Callable[[int], bytes]) -> list[bytes]:
    return [make(seed) for seed in range(32)]


def rows(device: str) -> Iterator[Cells]:
    """Run each path; yield the cells of its row."""
    dtypes = DTYPES if device != "cpu" else DTYPES[:1]
    with tempfile.TemporaryDirectory() as folder:
        for path in paths(Path(folder)):
            if device == "cpu":
                path = path._replace(sizes=path.sizes[:1])
            expected = answers(load(path, "cpu", "float32"), path.inputs()[:8])
            for dtype in dtypes:
                yield from or_why_not(path.name, dtype, rows_of(path, device, dtype, expected))
        where = language_model(Path(folder) / "language model", is_small=device == "cpu")
        tokens = greedy(token_model(where, "cpu", "float32"))
        for dtype in dtypes:
            yield from or_why_not("text-generation", dtype, generation_rows(where, device, dtype, tokens))
    if device != "cpu":
        yield from or_why_not("MIG", "", slice_rows())


def or_why_not(name: str, dtype: str, found: Iterator[Cells]) -> Iterator[Cells]:
    """Yield the rows; where one can't be had, a row that says why: the other paths still run."""
    try:
        yield from found
    except Exception as exc:
        yield name, dtype, "", f"fails: {type(exc).__name__}", "", ""


def rows_of(path: Trial, device: str, dtype: str, expected: list[Any]) -> Iterator[Cells]:
    """Yield a row for each number of inputs per call."""
    forget(device)
    task, model = load(path, device, dtype)
    inputs = path.inputs()
    agree = same(answers((task, model), inputs[:8]), expected)
    for n in path.sizes:
        batch = [task.check(one, {}).content for one in inputs[:n]]
        took_s = quickest_s(partial(model, batch), device)
        yield path.name, dtype, str(n), words(agree), f"{1000 * took_s:.1f}", megabytes(device)


def words(agree: bool) -> str:
    return "the CPU's" if agree else "other than the CPU's"


def forget(device: str) -> None:
    """Give the last model's memory back, and count the next one's from here."""
    gc.collect()
    if device != "cpu":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def megabytes(device: str) -> str:
    """The most that was taken of the GPU's memory since `forget`."""
    return f"{torch.cuda.max_memory_allocated() / 1e6:.0f}" if device != "cpu" else ""


# --- text, token by token -----------------------------------------------------------------------------------------------


class Wall(Stepper):
    """Times by the wall: the CPU waits for the GPU's tokens at each step."""

    clock = staticmethod(time.perf_counter)


def language_model(folder: Path, is_small: bool) -> str:
    """Write a random Llama, of SmolLM2-135M's shape unless it is a small one; return where."""
    shape = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30}
    heads = {"num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64}
    more: dict[str, Any] = {} if is_small else shape | heads
    folder.mkdir()
    return small_language_models.save(folder, max_position_embeddings=1024, **more)


def token_model(where: str, device: str, dtype: str) -> TokenModel:
    """Load it; KV_CACHE_MB is not set: of a GPU's memory the cache takes most of what is free."""
    settings = Settings(MODEL=where, TASK="text-generation", DEVICE=device, DTYPE=dtype, CONTEXT_TOKENS=512)
    return text_generation.Task(settings).load(0)


def prompt(n: int, salt: int = 0) -> list[int]:
    """A prompt of n tokens of the small vocabulary."""
    return [
        (13 * i * i + 7 * salt + 2 * i + 5) % (small_language_models.VOCABULARY - 2) + 2 for i in range(n)
    ]


def streams(model: TokenModel, n: int, n_prompt: int = 10) -> tuple[Wall, list[TokenSequence]]:
    """Return n sequences that have their first token, and what steps them."""
    stepper = Wall(model, 512)
    sequences = [TokenSequence(prompt(n_prompt, salt), Options(400)) for salt in range(n)]
    for sequence in sequences:
        stepper.scheduler.add(sequence)
    while not all(sequence.tokens for sequence in sequences):
        stepper.step()
    return stepper, sequences


def greedy(model: TokenModel) -> list[list[int]]:
    """Return what follows four prompts."""
    stepper, sequences = streams(model, 4, 40)
    for _ in range(15):
        stepper.step()
    return [sequence.tokens[:] for sequence in sequences]


def generation_rows(where: str, device: str, dtype: str, expected: list[list[int]]) -> Iterator[Cells]:
    """Yield the rows of a step by sequences at once, of a first token and of the KV cache."""
    forget(device)
    model = token_model(where, device, dtype)
    agree = words(greedy(model) == expected)
    for n in SEQUENCES if device != "cpu" else SEQUENCES[:1]:
        if n <= model.limits.slots:
            stepper, _ = streams(model, n)
            took_s = statistics.median(stepper.step() for _ in range(20))
            step = "text-generation, a step of as many sequences"
            yield step, dtype, str(n), agree, f"{1000 * took_s:.1f}", megabytes(device)
    took_s = quickest_s(partial(streams, model, 1, 400), device)
    first = "text-generation, first token after a prompt of 400"
    yield first, dtype, "1", agree, f"{1000 * took_s:.1f}", megabytes(device)
    cache = f"text-generation, {model.limits.slots} slots of {model.limits.capacity} tokens"
    yield cache, dtype, "", model.description.rpartition(", KV")[0].replace("|", "/"), "", megabytes(device)


# --- MIG ----------------------------------------------------------------------------------------------------------------


def slice_rows() -> Iterator[Cells]:
    """Run the first path on each MIG slice, in a process that sees no other."""
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False).stdout
    slices = re.findall(r"MIG-[\w/-]+", listed)
    if not slices:
        yield "MIG", "", "", "no slices on this machine", "", ""
    for name in slices:
        env = os.environ | {"CUDA_VISIBLE_DEVICES": name}
        command = [sys.executable, "-m", "loadtests.bench.gpu", "--slice"]
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        *_, last = done.stdout.splitlines() or [f"| | fails: exit status {done.returncode} | | "]
        yield (f"MIG slice {slices.index(name)}: {PACKED}", *last.split(" | ")[1:])


def on_a_slice() -> None:
    """Print the row of the first path on the only GPU that this process sees."""
    with tempfile.TemporaryDirectory() as folder:
        path = next(paths(Path(folder)))
        expected = answers(load(path, "cpu", "float32"), path.inputs()[:8])
        for cells in rows_of(path, "cuda", "bfloat16", expected):
            print(*cells, sep=" | ", flush=True)


# --- what both need -----------------------------------------------------------------------------------------------------


def load(path: Trial, device: str, dtype: str) -> tuple[Any, Any]:
    settings = Settings(**path.settings, DEVICE=device, DTYPE=dtype, BATCH_SIZE=max(path.sizes))
    task = tasks.make(settings)
    return task, tasks.load(task, settings)


def answers(loaded: tuple[Any, Any], inputs: Sequence[Any]) -> list[Any]:
    task, model = loaded
    return model([task.check(one, {}).content for one in inputs])


def quickest_s(call: Callable[[], Any], device: str) -> float:
    """Return the shortest of five calls, to the end of what the GPU does for it."""
    times_s = []
    for _ in range(5):
        began = time.perf_counter()
        call()
        if device != "cpu":
            torch.cuda.synchronize()
        times_s.append(time.perf_counter() - began)
    return min(times_s)


def machine(device: str) -> str:
    return torch.cuda.get_device_name() if device != "cpu" else "the CPU"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1 or cpu")
    parser.add_argument("--slice", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    device = asked.device
    if device != "cpu" and not torch.cuda.is_available():
        raise SystemExit("there is no GPU that torch can use; --device cpu only tries the paths")
    if asked.slice:
        return on_a_slice()
    lines = []
    for cells in rows(device):
        print(*cells, sep=" | ", flush=True)
        lines.append(f"| {' | '.join(cells)} |\n")
    if device != "cpu":
        PAGE.write_text(with_table(PAGE.read_text(), lines, device))


def with_table(page: str, lines: list[str], device: str) -> str:
    """Return the page with these rows in its table."""
    made = f"On {machine(device)}, torch {torch.__version__}:\n\n{HEAD}{''.join(lines)}"
    return TABLE.sub(lambda found: f"{found[1]}{made}{found[2]}", page)


if __name__ == "__main__":
    main()
