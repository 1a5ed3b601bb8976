"""What the strategies of an encoder are compared on, and how.

A probe must reach what it is to prove: texts that share a pass with others of their own length, of nearly theirs and of
another; a padding token inside a text; each kind of token type; positions up to the last one. The test of every
architecture (tests/test_architectures.py) shows which models need which strategy.
"""

import random
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

Rows = Sequence[Sequence[int]]

# By how many tokens the probe's texts are longer than the shortest one: some share a pass with padding, some without.
LONGER = (0, 1, 1, 2, 5, 12, 12, 13, 15, 29, 45, 46, 48)


class Probe(NamedTuple):
    """Texts as token ids, and their token types; None where the model gets none."""

    rows: list[list[int]]
    types: list[list[int]] | None

    @property
    def keep(self) -> list[list[int]]:
        """The positions to compare: of a long text the first, the last and some between. A head can be 30,000 wide."""
        steps = [max(1, len(row) // 16) for row in self.rows]
        return [sorted({*range(0, len(row), step), len(row) - 1}) for row, step in zip(self.rows, steps)]

    @classmethod
    def of(cls, model: Any, rows: Rows, types: Rows | None, longest: int) -> "Probe":
        """Lengthen the shortest text of each kind by random tokens, to many lengths; one of them to `longest`."""
        draw = random.Random(0)
        config, ends = model.config, {row[i] for row in rows for i in (0, -1)}
        named = {getattr(config, f"{name}_token_id", None) for name in ("pad", "sep", "cls", "bos", "eos")}
        size = getattr(config, "vocab_size", None) or max(map(max, rows)) + 1
        words = sorted(set(range(size)) - ends - named)
        probe = cls([], None if types is None else [])
        for n in shortest_of_each_kind(rows, types):
            row, row_types, room = rows[n], types[n] if types else None, longest - len(rows[n])
            for more in (*LONGER, room if not probe.rows else 0):
                if 0 <= more <= room:
                    probe.add(row, row_types, draw.choices(words, k=more))
            if (pad := getattr(config, "pad_token_id", None)) is not None and room >= 3:
                probe.add(row, row_types, [words[0], pad, words[-1]])  # a text may say it
        return probe

    def add(self, row: Sequence[int], types: Sequence[int] | None, tokens: list[int]) -> None:
        """Add a text with more tokens before its last."""
        self.rows.append([*row[:-1], *tokens, *row[-1:]])
        if self.types is not None and types is not None:
            self.types.append([*types[:-1], *[types[-2:][0]] * len(tokens), *types[-1:]])


def shortest_of_each_kind(rows: Rows, types: Rows | None) -> list[int]:
    """Return the number of the shortest text of those with the same set of token types."""
    shortest: dict[frozenset[int], int] = {}
    for n in sorted(range(len(rows)), key=lambda n: len(rows[n])):
        shortest.setdefault(frozenset(types[n]) if types else frozenset(), n)
    return list(shortest.values())


def differ(outputs: Tensor, expected: Tensor) -> str:
    """Return by how much results differ; nothing where that is rounding. NaN equals NaN: so may a model say of a text."""
    part = 1e-3 if expected.dtype == torch.float32 else 0.25
    outputs, expected = outputs.float(), expected.float()
    same = (outputs == expected) | (outputs.isnan() & expected.isnan())
    gap = float((outputs - expected).abs().masked_fill(same, 0).max())
    scale = float(expected[expected.isfinite()].std(correction=0))
    return "" if gap <= part * scale + 1e-6 else f"off by {gap:.2g}"
