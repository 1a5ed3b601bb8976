"""The model part of `make bench`: the stock fill-mask pipeline against the fast one, without a server.

    python -m loadtests.bench_model [--quick] [--device cpu|cuda]

Prints texts per second as Markdown tables. Every case of a model is timed in turn, several times over, so that a
slower minute of the machine falls on all alike; the median of each is shown. On a CPU it uses one thread.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoTokenizer, BertConfig, BertForMaskedLM, pipeline
from workers.fill_mask import FastFillMaskPipeline

FOLDER = Path(__file__).parents[1] / "models" / "minilm-mlm"
SMALL = {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 1024}
MODELS: dict[str, dict[str, int] | None] = {
    "embedded (6 x 384)": None,
    "4 x 256": SMALL,
    "bert-base-uncased's shape (12 x 768)": {},
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TARGETS = {"embedded (6 x 384)": (2.3, 1.6, 4.5), "4 x 256": (3.5, 1.8, 5.0)}
FILLER = "and then they went along the old road that led from the harbour to the town on the hill"
WORDS = FILLER.split()

Case = tuple[str, str, int, str]  # stock or fast, dtype, batch size, short or mixed


def texts(count: int, lengths: str) -> list[str]:
    """Sentences of 6 to 14 tokens; if mixed, one in ten has 200."""
    lines = (FOLDER / "cloze60.tsv").read_text(encoding="utf-8").splitlines()
    short = [text for text in (line.split("\t")[0] for line in lines) if "[MASK]" in text]
    chosen = [short[i % len(short)] for i in range(count)]
    if lengths == "mixed":
        filler = (WORDS * 12)[:190]
        chosen = [" ".join([text, *filler]) if i % 10 == 5 else text for i, text in enumerate(chosen)]
    return chosen


def load(shape: dict[str, int] | None, kind: str, dtype: torch.dtype, device: str) -> Any:
    """The pipeline of one kind; each has a model of its own, the same weights for the same shape."""
    given: Any = str(FOLDER)
    if shape is not None:
        torch.manual_seed(0)
        given = BertForMaskedLM(BertConfig(**shape)).eval().to(dtype)
    return pipeline(
        "fill-mask",
        model=given,
        tokenizer=AutoTokenizer.from_pretrained(FOLDER),
        dtype=dtype,
        device=device,
        pipeline_class=FastFillMaskPipeline if kind == "fast" else None,
    )


def call(pipe: Any, batch: list[str]) -> None:
    """One batch, as a server asks for it."""
    if isinstance(pipe, FastFillMaskPipeline):
        pipe.answer([(text, 5, ()) for text in batch])
    elif len(batch) == 1:
        pipe(batch[0])
    else:
        pipe(batch, batch_size=len(batch))


def rate(pipe: Any, batch: int, asked: list[str]) -> float:
    """Texts per second over `asked`, `batch` at a time; answers come back to the host, so a GPU has finished."""
    start = time.perf_counter()
    for i in range(0, len(asked), batch):
        call(pipe, asked[i : i + batch])
    return len(asked) / (time.perf_counter() - start)


def measure(shape: dict[str, int] | None, batches: list[int], repeats: int, device: str) -> dict[Case, float]:
    """The median rate of every case."""
    pipes = {(k, d): load(shape, k, DTYPES[d], device) for d in DTYPES for k in ("stock", "fast")}
    rates: dict[Case, list[float]] = {}
    for lengths in ("short", "mixed"):
        for pipe in pipes.values():
            for batch in batches:
                call(pipe, texts(batch, lengths))  # the first call of a size pays for buffers and kernels
    for _ in range(repeats):
        for lengths in ("short", "mixed"):
            for batch in batches:
                asked = texts(max(32, batch), lengths)
                for (kind, dtype), pipe in pipes.items():
                    rates.setdefault((kind, dtype, batch, lengths), []).append(rate(pipe, batch, asked))
    return {case: statistics.median(found) for case, found in rates.items()}


def table(rates: dict[Case, float], batches: list[int]) -> str:
    lines = [
        "| | " + " | ".join(f"batch {batch}" for batch in batches) + " |",
        "|---" * (len(batches) + 1) + "|",
    ]
    for lengths in ("short", "mixed"):
        for dtype in DTYPES:
            cells = []
            for batch in batches:
                stock, fast = (rates[kind, dtype, batch, lengths] for kind in ("stock", "fast"))
                cells.append(f"{stock:.0f} → {fast:.0f} (x{fast / stock:.1f})")
            lines.append(f"| {lengths}, {dtype} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def targets(name: str, rates: dict[Case, float], batches: list[int]) -> str:
    """The goals for a CPU, each with what was reached."""
    in_32, singly, bfloat16 = TARGETS[name]
    stock, fast = (lambda *case: rates["stock", *case]), (lambda *case: rates["fast", *case])
    best: Callable[[str], float] = lambda dtype: max(fast("bfloat16", batch, "short") for batch in batches)  # noqa: E731
    stock_best = max(stock("float32", batch, "short") for batch in batches)
    rows = [
        (
            "float32, batch 32, to stock at 32",
            fast("float32", 32, "short") / stock("float32", 32, "short"),
            in_32,
        ),
        (
            "float32, singly, to stock singly",
            fast("float32", 1, "short") / stock("float32", 1, "short"),
            singly,
        ),
        ("bfloat16 at its best batch, to stock float32 at its best", best("bfloat16") / stock_best, bfloat16),
        (
            "mixed, batch 32, to stock at 32",
            fast("float32", 32, "mixed") / stock("float32", 32, "mixed"),
            5.0,
        ),
        (
            "mixed, batch 32, to the same texts singly",
            fast("float32", 32, "mixed") / fast("float32", 1, "mixed"),
            1.0,
        ),
    ]
    lines = [
        f"| {what} | {goal} | {got:.1f} | {'yes' if got >= goal else 'no'} |" for what, got, goal in rows
    ]
    return "\n".join(["| ratio | target | here | reached |", "|---|---|---|---|", *lines])


def rounding() -> str:
    """What bfloat16 does to the embedded model's answers."""
    asked = [(text, 5, ()) for lengths in ("short", "mixed") for text in texts(60, lengths)]
    words = (WORDS * 9)[: 20 * 8]
    cut = [words[i : i + 8 + i % 5] for i in range(0, len(words) - 12)]
    asked += [
        (" ".join([*w[: i % 7 + 1], "[MASK]", *w[i % 7 + 2 :]]) + ".", 5, ()) for i, w in enumerate(cut)
    ]
    full, rounded = (load(None, "fast", dtype, "cpu").answer(asked) for dtype in DTYPES.values())
    first = sum(a[0]["token"] == b[0]["token"] for a, b in zip(full, rounded))
    shared = [
        abs(x["score"] - y["score"])
        for a, b in zip(full, rounded)
        for x in a
        for y in b
        if x["token"] == y["token"]
    ]
    return (
        f"bfloat16 on the embedded model, {len(asked)} texts: the first candidate is float32's in "
        f"{first / len(asked):.1%}; scores of shared candidates differ by {statistics.mean(shared):.4f} on average, "
        f"{max(shared):.3f} at most."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--quick", action="store_true", help="few repeats, without the largest model")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    options = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    cpu = options.device == "cpu"
    batches = [1, 8, 32] if cpu else [1, 8, 32, 128, 512, 1024]
    print(f"Texts per second, stock → fast, on {'one core' if cpu else torch.cuda.get_device_name()}")
    for name, shape in MODELS.items():
        if options.quick and shape == {}:
            continue
        rates = measure(shape, batches, 3 if options.quick or shape == {} else 7, options.device)
        print(f"\n### {name}\n\n{table(rates, batches)}", flush=True)
        if cpu and name in TARGETS:
            print(f"\n{targets(name, rates, batches)}", flush=True)
    print(f"\n{rounding()}")


if __name__ == "__main__":
    main()
