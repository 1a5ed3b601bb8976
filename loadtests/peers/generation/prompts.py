"""The prompts that every server gets, and what `generate` answers, one prompt alone: made once, in a process of its own.

python -m loadtests.peers.generation.prompts FILE
"""

import json
import random
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from loadtests.modes import ROOT
from loadtests.peers.catalogue import CACHE
from loadtests.peers.generation.catalogue import CHAT

TEXT = ROOT / "models" / "minilm-mlm" / "cloze60.tsv"
FILE = CACHE / "generation-prompts.json"
NEW = 32  # tokens of an answer that is checked


@dataclass(frozen=True)
class Prompts:
    """Texts of about 10, 150 and 400 tokens; `answers`: of the first short and long ones, greedy and in float32."""

    short: list[str]
    long: list[str]
    huge: list[str]
    answers: dict[str, str]

    @classmethod
    def made(cls) -> "Prompts":
        """Return them; they are made at the first time, which takes a minute."""
        if not FILE.exists():
            FILE.parent.mkdir(exist_ok=True)
            command = [sys.executable, "-m", "loadtests.peers.generation.prompts", str(FILE)]
            subprocess.run(command, cwd=ROOT, check=True)
        return cls(**json.loads(FILE.read_text()))


@cache
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(CHAT / "tokenizer.json"))


def count(text: str) -> int:
    """Return how many tokens a text is."""
    return len(tokenizer().encode(text, add_special_tokens=False).ids)


def cut(reader: Any, ids: list[int], rng: random.Random, least: int, most: int) -> str:
    """Return a piece of the text that has as many tokens when it is read again: engines that take text get the same."""
    while True:
        n = rng.randint(least, most)
        at = rng.randrange(len(ids) - n)
        piece = reader.decode(ids[at : at + n]).strip()
        if least <= len(reader(piece)["input_ids"]) <= most:
            return str(piece)


def make(file: Path) -> None:
    """Write the prompts and their answers."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)
    reader: Any = AutoTokenizer.from_pretrained(CHAT)
    model: Any = AutoModelForCausalLM.from_pretrained(CHAT, dtype=torch.float32)
    lines = [line.replace("[MASK]", word) for line, word in sentences()]
    ids, rng = reader(" ".join(lines))["input_ids"], random.Random(7)
    sizes = {"short": (64, 8, 12), "long": (64, 140, 160), "huge": (16, 396, 400)}
    made = {
        name: [cut(reader, ids, rng, least, most) for _ in range(n)]
        for name, (n, least, most) in sizes.items()
    }
    answers = {}
    for prompt in [*made["short"][:4], *made["long"][:4]]:
        inputs = reader(prompt, return_tensors="pt")
        whole = model.generate(**inputs, max_new_tokens=NEW, do_sample=False)
        answers[prompt] = reader.decode(whole[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    file.write_text(json.dumps(made | {"answers": answers}))


def sentences() -> list[tuple[str, str]]:
    """Return the sentences that the bundled model is tested with, and the word that each lacks."""
    rows = [line.split("\t") for line in TEXT.read_text().splitlines()]
    return [(row[0], row[1]) for row in rows]


if __name__ == "__main__":
    make(Path(sys.argv[1]))
