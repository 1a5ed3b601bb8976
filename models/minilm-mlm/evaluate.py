"""The model card's numbers, offline: 60 cloze sentences, and masked tokens of a held-out text.

    $ python models/minilm-mlm/evaluate.py
    cloze sentences    n = 60      top 1 53.3 % ± 6.4    top 5 81.7 % ± 5.0

± is one binomial standard error. `train.py` writes a held-out text; `--held-out FILE` scores it too.
"""

import argparse
import math
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import FillMaskPipeline, pipeline

HERE = Path(__file__).parent
MASKED_SHARE = 0.15


def load(folder: str | Path = HERE) -> FillMaskPipeline:
    """The fill-mask pipeline of `folder` in float32: half precision is slow on a CPU."""
    return pipeline("fill-mask", model=str(folder), dtype=torch.float32, device="cpu")


def cloze(path: str | Path) -> Iterator[tuple[str, list[str]]]:
    """Each line's sentence, which holds one [MASK], and the answers accepted for it."""
    for line in Path(path).read_text().splitlines():
        sentence, answers = line.split("\t")
        yield sentence, answers.split(",")


def score(pipe: FillMaskPipeline, path: str | Path = HERE / "cloze60.tsv") -> tuple[float, float]:
    """The shares (0 to 1) of sentences whose first guess, or any of the first five, is accepted."""
    first = among_five = total = 0
    for sentence, answers in cloze(path):
        guesses = [reply["token_str"] for reply in pipe(sentence, top_k=5)]
        first += guesses[0] in answers
        among_five += any(guess in answers for guess in guesses)
        total += 1
    return first / total, among_five / total


@torch.inference_mode()
def score_held_out(pipe: FillMaskPipeline, path: str | Path) -> tuple[int, float, float]:
    """Mask 15 % of the tokens of each line (the same ones each time): how many, top 1, top 5 (0 to 1)."""
    tokenizer, random = pipe.tokenizer, torch.Generator().manual_seed(0)
    first = among_five = total = 0
    for line in Path(path).read_text().splitlines():
        ids = tokenizer(line, truncation=True, max_length=128, return_tensors="pt").input_ids
        masked = torch.rand(ids.shape, generator=random) < MASKED_SHARE
        masked[:, [0, -1]] = False  # [CLS] and [SEP] are no words
        if not masked.any():
            continue
        logits = pipe.model(ids.masked_fill(masked, tokenizer.mask_token_id)).logits[masked]
        hits = logits.topk(5).indices == ids[masked].unsqueeze(1)
        first += int(hits[:, 0].sum())
        among_five += int(hits.sum())
        total += len(hits)
    return total, first / total, among_five / total


def row(name: str, n: int, top1: float, top5: float) -> str:
    shares = (
        f"top {k} {100 * p:.1f} % ± {100 * math.sqrt(p * (1 - p) / n):.1f}" for k, p in ((1, top1), (5, top5))
    )
    return f"{name:<18} n = {n:<7,} " + "    ".join(shares)


def report(folder: str | Path = HERE, held_out: str | Path | None = None) -> None:
    """Print one line for each evaluation of the model in `folder`."""
    pipe, path = load(folder), HERE / "cloze60.tsv"
    print(row("cloze sentences", sum(1 for _ in cloze(path)), *score(pipe, path)), flush=True)
    if held_out:
        print(row("held-out tokens", *score_held_out(pipe, held_out)), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", nargs="?", default=HERE, help="a Hugging Face folder (default: this one)")
    parser.add_argument("--held-out", metavar="FILE", help="one text a line, such as train.py's heldout.txt")
    arguments = parser.parse_args()
    report(arguments.folder, arguments.held_out)
