"""The model part of `make bench`: each text task's stock pipeline against ours, without a server.

    python -m loadtests.bench.model [--task fill-mask ...] [--quick] [--device cpu|cuda]
    python -m loadtests.bench.model --memory 20000
    python -m loadtests.bench.model --agreement

Prints texts per second as Markdown tables. Every case is timed in turn, several times over, so that a slower minute of
the machine falls on all alike; the median of each is shown. On a CPU it uses one thread. `--memory`: what the process
takes after so many requests of all lengths, over what it took after warm-up. `--agreement`: how far bfloat16's answers are from float32's.
"""

import argparse
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers
from tqdm import tqdm

from loadtests import arguments
from notebooks.support.l10_runtimes import FILLER, texts
from workers import resources as memory
from workers import tasks
from workers.settings import HERE, Settings
from workers.tasks.common.packed import PackedLinear
from workers.tasks.pipeline import load_model, load_pipeline

FOLDER = HERE / "models" / "minilm-mlm"
HEADS = {  # the bundled model's encoder under another head, whose weights are random
    "text-classification": ("BertForSequenceClassification", 3),
    "token-classification": ("BertForTokenClassification", 9),
    "zero-shot-classification": ("BertForSequenceClassification", 3),
    "question-answering": ("BertForQuestionAnswering", 2),
}
PARAMETERS = {"zero-shot-classification": {"candidate_labels": ["sports", "politics"]}}
QUESTION = "Where did they go?"
TASKS = ("fill-mask", *HEADS)
DTYPES = ("float32", "bfloat16")

Case = tuple[str, str, int, str]  # stock or ours, dtype, batch size, short or mixed
Asked = list[tuple[Any, Any]]  # an input, and what the task makes of it


def an_input(task: str, text: str) -> Any:
    """What the task is asked of a text."""
    return {"question": QUESTION, "context": text} if task == "question-answering" else text


def folder_for(task: str) -> str:
    """A folder with a model for the task."""
    if task not in HEADS:
        return str(FOLDER)
    kind, labels = HEADS[task]
    torch.manual_seed(0)
    folder = tempfile.mkdtemp()
    getattr(transformers, kind).from_pretrained(FOLDER, num_labels=labels).save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(FOLDER).save_pretrained(folder)
    return folder


def stock_call(settings: Settings) -> Callable[[Asked], Any]:
    """The stock pipeline, a batch a call. Where Transformers has none any more its tokenizer and its model alone."""
    if settings.TASK == "question-answering":
        loaded = load_model(settings, 0, "AutoModelForQuestionAnswering")

        @torch.inference_mode()
        def forward(batch: Asked) -> Any:
            pairs = [(inputs["question"], inputs["context"]) for inputs, _ in batch]
            return loaded.model(
                **loaded.tokenizer(pairs, padding=True, return_tensors="pt").to(loaded.model.device)
            )

        return forward
    pipe, parameters = load_pipeline(settings), PARAMETERS.get(settings.TASK, {})
    rows = len(parameters.get("candidate_labels", " "))  # an input's, which a batch keeps together
    return lambda batch: pipe([text for text, _ in batch], batch_size=rows * len(batch), **parameters)


def our_call(model: Any) -> Callable[[Asked], Any]:
    """Ours, as the server calls it; where HTTP is the text has been tokenised already."""
    return lambda batch: model([content for _, content in batch])


def rate(call: Callable[[Asked], Any], batch: int, asked: Asked) -> float:
    """Texts per second over `asked`, `batch` at a time; answers come back to the host, so a GPU has finished."""
    start = time.perf_counter()
    for i in range(0, len(asked), batch):
        call(asked[i : i + batch])
    return len(asked) / (time.perf_counter() - start)


def measure(name: str, batches: list[int], repeats: int, device: str) -> dict[Case, float]:
    """The median rate of every case of a task."""
    calls, folder = {}, folder_for(name)
    for dtype in DTYPES:
        settings = Settings(MODEL=folder, TASK=name, DTYPE=dtype, DEVICE=device, TORCH_THREADS=1)
        task = tasks.make(settings)
        calls["stock", dtype] = stock_call(settings)
        calls["ours", dtype] = our_call(task.load(0))
    rates: dict[Case, list[float]] = {}
    for _ in range(repeats + 1):
        for lengths in ("short", "mixed"):
            for batch in batches:
                inputs = [an_input(name, text) for text in texts(max(32, batch), lengths)]
                asked = [(one, task.check(one, PARAMETERS.get(name, {})).content) for one in inputs]
                for (kind, dtype), call in calls.items():
                    rates.setdefault((kind, dtype, batch, lengths), []).append(rate(call, batch, asked))
    # The first call of a size pays for buffers and kernels.
    return {case: statistics.median(found[1:]) for case, found in rates.items()}


def table(rates: dict[Case, float], batches: list[int]) -> str:
    lines = [
        "| | " + " | ".join(f"batch {batch}" for batch in batches) + " |",
        "|---" * (len(batches) + 1) + "|",
    ]
    for lengths in ("short", "mixed"):
        for dtype in DTYPES:
            cells = []
            for batch in batches:
                stock, ours = (rates[kind, dtype, batch, lengths] for kind in ("stock", "ours"))
                cells.append(f"{stock:.0f} → {ours:.0f} (x{ours / stock:.1f})")
            lines.append(f"| {lengths}, {dtype} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def peak(dtype: str, seconds: float = 1.0) -> float:
    """The operations per second of one packed product that stays in the caches: what this core can do at most."""
    rows, width, wide = 512, 384, 1536
    linear = PackedLinear(torch.nn.Linear(width, wide).to(getattr(torch, dtype)))
    x, best, end = torch.randn(rows, width).to(getattr(torch, dtype)), 0.0, time.perf_counter() + seconds
    with torch.inference_mode():
        while time.perf_counter() < end:
            start = time.perf_counter()
            for _ in range(10):
                linear(x)
            best = max(best, 10 * 2 * rows * width * wide / (time.perf_counter() - start))
    return best


def shares_of_peak(rates: dict[Case, float], batches: list[int]) -> str:
    """How much of that the bundled model's fill-mask does: 21.2 million operations a token, 23.7 a mask."""
    task, lines = tasks.make(Settings()), []
    for dtype in DTYPES:
        limit = peak(dtype)
        for lengths in ("short", "mixed"):
            sizes = [task.check(text, {}).size for text in texts(60, lengths)]
            operations = statistics.mean(21.2e6 * size + 23.7e6 for size in sizes)
            shares = [f"{rates['ours', dtype, batch, lengths] * operations / limit:.0%}" for batch in batches]
            at_most = f"{limit / 1e9:.0f} GFLOP/s, {limit / operations:.0f} texts/s"
            lines.append(f"| {lengths}, {dtype} | {at_most} | " + " | ".join(shares) + " |")
    head = "| | this core's limit | " + " | ".join(f"batch {batch}" for batch in batches) + " |"
    return "\n".join([head, "|---" * (len(batches) + 2) + "|", *lines])


def grow(dtype: str, requests: int) -> None:
    """Print the memory after warm-up and after so many requests, of 4 to 510 tokens, in batches of 1 to 32."""
    settings = Settings(DTYPE=dtype, TORCH_THREADS=1)
    task = tasks.make(settings)
    model, draw = task.load(0), random.Random(0)
    for batch in tasks.warm_up_batches(task, 32):
        model([query.content for query in batch])
    before, done, words = memory.resident_bytes([os.getpid()]), 0, FILLER.split() * 30
    while done < requests:
        size = min(draw.randint(1, 32), requests - done)
        chosen = [" ".join(["[MASK]", *words[: int(500 ** draw.random())]]) for _ in range(size)]
        model([task.check(text, {}).content for text in chosen])
        done += size
    after = memory.resident_bytes([os.getpid()])
    print(f"| {dtype} | {before / 1e6:.0f} MB | {after / 1e6:.0f} MB | {after / before:.2f} |", flush=True)


def agreement() -> str:
    """Say how far the bundled model's answers in bfloat16 are from those in float32, on short texts and on long ones."""
    answers = []
    asked = [*texts(60), *(f"{text} {FILLER * n}" for n in (2, 6) for text in texts(60))]
    for dtype in DTYPES:
        task = tasks.make(Settings(DTYPE=dtype, TORCH_THREADS=1))
        model = task.load(0)
        answers.append([model([task.check(text, {}).content])[0] for text in asked])
    same = statistics.mean(one[0]["token"] == other[0]["token"] for one, other in zip(*answers, strict=True))
    scores = [{each["token"]: each["score"] for each in one} for one in answers[1]]
    moved = [
        abs(each["score"] - there[each["token"]])
        for one, there in zip(answers[0], scores, strict=True)
        for each in one
        if each["token"] in there
    ]
    return (
        f"Of {len(asked)} texts {same:.1%} keep their first candidate in bfloat16; scores of the first five move by "
        f"{statistics.mean(moved):.4f} on average, {max(moved):.3f} at most."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--task", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--quick", action="store_true", help="few repeats")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--memory", type=int, metavar="REQUESTS", help="measure memory, not speed")
    parser.add_argument("--agreement", action="store_true", help="compare bfloat16's answers with float32's")
    parser.add_argument("--dtype", choices=DTYPES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    if options.dtype:
        return grow(options.dtype, options.memory)
    if options.agreement:
        return print(agreement())
    if options.memory:
        print(
            f"| fill-mask | after warm-up | after {options.memory} requests | ratio |\n|---|---|---|---|",
            flush=True,
        )
        for dtype in DTYPES:  # each in a process of its own
            one = [
                sys.executable,
                "-m",
                "loadtests.bench.model",
                "--memory",
                str(options.memory),
                "--dtype",
                dtype,
            ]
            subprocess.run(one, check=True)
        return None
    cpu = options.device == "cpu"
    batches = [1, 8, 32] if cpu else [1, 8, 32, 128, 512, 1024]
    print(f"Texts per second, stock → ours, on {'one core' if cpu else torch.cuda.get_device_name()}")
    for name in tqdm(options.task, "tasks", file=sys.stderr):
        rates = measure(name, batches, 3 if options.quick else 7, options.device)
        print(f"\n### {name}\n\n{table(rates, batches)}", flush=True)
        if cpu and name == "fill-mask":
            print(f"\n{shares_of_peak(rates, batches)}", flush=True)
    return None


if __name__ == "__main__":
    arguments.run(main)
