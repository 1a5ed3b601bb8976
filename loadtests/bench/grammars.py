"""What a mask of a grammar takes: `python -m loadtests.bench.grammars`, on an idle machine, after `make chat`.

Walks through texts that follow their JSON Schemas, token by token, as the token loop does, and prints milliseconds per mask.
"""

import argparse
import json
import statistics
import time
from typing import Any

from transformers import AutoTokenizer

from loadtests import arguments
from loadtests.modes import ROOT
from loadtests.plan.planner import markdown
from workers.generation.grammar import Grammars

ROUNDS = 20
WORDS = "One answers only what was asked and leaves the rest to those who know it better. "
ITEM = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "amount": {"type": "number"}},
    "required": ["name", "amount"],
    "additionalProperties": False,
}
CASES: dict[str, tuple[dict[str, Any], Any]] = {  # what the schema has: it, and a text's value
    "one of some words": ({"enum": ["red", "green", "blue"]}, "green"),
    "a long string": ({"type": "string"}, WORDS * 5),
    "a list of objects": ({"type": "array", "items": ITEM}, [{"name": "sugar", "amount": 12.5}] * 10),
    "a date and a pattern": (
        {
            "type": "object",
            "properties": {
                "on": {"type": "string", "format": "date"},
                "code": {"type": "string", "pattern": "^[A-Z]{3}-[0-9]{4}$"},
            },
            "required": ["on", "code"],
            "additionalProperties": False,
        },
        {"on": "2026-12-01", "code": "ABC-1234"},
    ),
}


def walk(grammars: Grammars, schema: dict[str, Any], tokens: list[int]) -> tuple[float, list[float]]:
    """Return the milliseconds of the grammar with its first masks, and of each mask on the way through the text."""
    began = time.perf_counter()
    matcher = grammars.matcher(schema).copy()
    made, took = time.perf_counter(), []
    for token in tokens:
        asked = time.perf_counter()
        mask = matcher.mask()
        took.append(1000 * (time.perf_counter() - asked))
        if not mask[token // 8] >> token % 8 & 1:
            raise RuntimeError("the text does not follow its schema")
        matcher.accept(token)
    return 1000 * (made - began), took


def main() -> None:
    argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0]).parse_args()
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "models" / "chat")
    began = time.perf_counter()
    grammars = Grammars(tokenizer.backend_tokenizer, tokenizer.eos_token_id)
    print(f"{len(tokenizer):,} tokens; their tables take {time.perf_counter() - began:.2f} s, once.\n")
    rows = []
    for name, (schema, value) in CASES.items():
        tokens = tokenizer.encode(json.dumps(value), add_special_tokens=False)
        walks = [walk(grammars, schema, tokens) for _ in range(ROUNDS)]
        took = sorted(one for _, masks in walks for one in masks)
        rows.append(
            {
                "the schema has": name,
                "tokens": str(len(tokens)),
                "grammar, ms": f"{statistics.median(made for made, _ in walks):.1f}",
                "mask, median ms": f"{statistics.median(took):.3f}",
                "p99 ms": f"{took[int(0.99 * len(took))]:.2f}",
                "greatest ms": f"{took[-1]:.2f}",
            }
        )
    print(markdown(rows))


if __name__ == "__main__":
    arguments.run(main)
