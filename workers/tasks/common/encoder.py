"""The torch half of the text tasks: texts as token ids in, states or logits out, each text's as if it were alone.

    encoder = Encoder(model, probe=[[101, 7592, 102], ...])
    encoder(rows)                  the base model's last hidden states, all rows of all texts: [tokens, hidden]
    encoder(rows, [[0], [0], ...]) those at the positions kept of each text: [kept, hidden]
    encoder.logits(rows, keep)     the same through the model's own head: [kept, labels]

Where the stock pipeline's time goes       What is done here instead
padding to the longest text                padding-free: packed sequences, attention within each text
the last layer and the head on all tokens  on those that are kept
laying out weights at every call           once, in oneDNN's own layout
GELU and residual as passes of their own   done while a product's result is still in the cache

Nothing of this is trusted. At load a probe compares each strategy with the model's own forward on one text at a time, as
the stock pipeline calls it; a strategy that gives anything else is not used (see `probe.py`).
"""

import copy
import inspect
import logging
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from workers.tasks.common.packed import (
    PackedLinear,
    PaddingFree,
    UnsupportedArchitecture,
    packable,
    prove_row_buckets,
)
from workers.tasks.common.probe import Probe, Rows, differ

log = logging.getLogger("uvicorn.error")

# Texts sorted by length, the positions to keep of each, their token types or None.
Pass = Callable[..., Tensor]


class Strategy(NamedTuple):
    """How a batch is computed."""

    batching: str = "one by one"  # or "padding-free", "padded", "equal lengths"
    prepacked: bool = False  # weights in oneDNN's own layout
    whole: bool = False  # the whole model on every token; else its head apart, on the tokens kept

    def __str__(self) -> str:
        names = ("prepacked weights" * self.prepacked, self.batching, "head on every token" * self.whole)
        return ", ".join(filter(None, names))


def strategies(has_head: bool, can_prepack: bool) -> list[Strategy]:
    """Return the strategies to try, the fastest first. The last one is the model's own forward: the reference."""
    ways = [(prepacked, whole) for whole in (False, True)[: 1 + has_head] for prepacked in (True, False)]
    return [Strategy("padding-free", True)] * can_prepack + [
        Strategy(batching, prepacked, whole)
        for prepacked, whole in ways
        if can_prepack or not prepacked
        for batching in ("padded", "equal lengths", "one by one")
    ]


class Encoder:
    """A model's forward pass over many texts at once. Making it may change the model's layers; calls change nothing.

    `probe`: the token ids of a few short texts of the kind that will come; `probe_types`: their token types, None where
    the pipeline gives the model none. `longest`: the most tokens that a text will have. `per_text`: the head gives one row
    per text (sequence classification), else one per token.
    """

    def __init__(
        self,
        model: Any,
        probe: Rows,
        probe_types: Rows | None = None,
        per_text: bool = False,
        fast: bool = True,
        longest: int = 512,
    ) -> None:
        self.model, self.base, self.per_text = model, model.base_model, per_text
        self.device, self.has_head = model.device, model.base_model is not model
        # A pass takes at most `pass_tokens`, so that its activations stay in the caches; a text that would cost a pass
        # more padding than `pass_cost` tokens starts another; the head gives at most `head_cells` numbers at a time.
        # Measured on a CPU; a GPU wants few and large passes, how large is a guess.
        cpu = self.device.type == "cpu"
        self.pass_tokens = 2048 // model.dtype.itemsize if cpu else 65536
        self.pass_cost, self.head_cells = (16, 1 << 20) if cpu else (4096, 1 << 25)
        self.pad = model.config.pad_token_id or 0
        self.takes_types = "token_type_ids" in inspect.signature(self.base.forward).parameters
        self.drops_zero_types = False
        self.head_rows, self.most = 32, longest
        self._choose(Probe.of(model, probe, probe_types, min(longest, self.pass_tokens)), fast)

    @torch.inference_mode()  # type: ignore[untyped-decorator]
    def __call__(self, rows: Rows, keep: Rows | None = None, types: Rows | None = None) -> Tensor:
        """Return the last hidden states at the positions `keep` of each text (None: all), text by text: [n, hidden]."""
        return self._run(rows, keep, types)

    @torch.inference_mode()  # type: ignore[untyped-decorator]
    def logits(self, rows: Rows, keep: Rows | None = None, types: Rows | None = None) -> Tensor:
        """Return the model's output at the positions `keep` of each text, text by text: [n, labels].

        Of a question-answering model the starts' and the ends'. `per_text`: one row per text, whatever `keep` is.
        """
        if self.per_text:
            keep = [[0]] * len(rows)
        outputs = self._run(rows, keep, types)
        return outputs if self.strategy.whole else self.head(outputs)

    @torch.inference_mode()  # type: ignore[untyped-decorator]
    def head(self, states: Tensor) -> Tensor:
        """Return what the model's own output head makes of states [n, hidden]: [n, labels]."""
        logits = [self._head(part) for part in states.split(self.head_rows)]
        return torch.cat(logits) if len(logits) > 1 else logits[0]

    def _head(self, states: Tensor) -> Tensor:
        states = states[:, None] if self.per_text else states[None]
        ids = torch.zeros(states.shape[:2], dtype=torch.long, device=self.device)
        logits = scores(self.head_alone(input_ids=ids, inputs_embeds=states))
        return logits if self.per_text else logits[0]

    def _run(self, rows: Rows, keep: Rows | None, types: Rows | None) -> Tensor:
        """Run one pass for each chunk of the texts; return their results in the texts' order."""
        lengths = list(map(len, rows))
        keep = [range(n) for n in lengths] if keep is None else keep
        outputs, order = [], []
        for chunk in self.chunks(lengths):
            order += chunk
            chunk_rows, chunk_keep = [rows[text] for text in chunk], [keep[text] for text in chunk]
            outputs.append(self.forward(chunk_rows, chunk_keep, self._types(types, chunk)))
        states = torch.cat(outputs) if len(outputs) > 1 else outputs[0]
        if order == sorted(order):
            return states
        start = [0, *accumulate(map(len, keep))]
        came = [row for text in order for row in range(start[text], start[text + 1])]
        return states[self.tensor(sorted(range(len(came)), key=came.__getitem__))]

    def _types(self, types: Rows | None, chunk: list[int]) -> list[Sequence[int]] | None:
        """Return the token types of a chunk; None where the model takes none, or they would change nothing."""
        if types is None or not self.takes_types:
            return None
        chunk_types = [types[text] for text in chunk]
        return None if self.drops_zero_types and not any(chain(*chunk_types)) else chunk_types

    def chunks(self, lengths: Sequence[int]) -> Iterator[list[int]]:
        """Yield the texts in groups, one for each forward pass: of similar length, the longest last."""
        batching = self.strategy.batching
        most = 0 if batching == "one by one" else self.pass_tokens
        chunk: list[int] = []
        tokens = 0
        for text in sorted(range(len(lengths)), key=lengths.__getitem__):
            longer = lengths[text] - lengths[chunk[-1]] if chunk else 0
            padding = 0 if batching == "padding-free" else len(chunk) * longer
            too_different = padding > (0 if batching == "equal lengths" else self.pass_cost)
            if chunk and (too_different or tokens + padding + lengths[text] > most):
                yield chunk
                chunk, tokens, padding = [], 0, 0
            chunk.append(text)
            tokens += padding + lengths[text]
        yield chunk

    def tensor(self, rows: Sequence[Any]) -> Tensor:
        """Return whole numbers as a tensor on the model's device."""
        cuda = self.device.type == "cuda"  # from pinned memory the copy runs beside the kernels
        return torch.tensor(rows, pin_memory=cuda).to(self.device, non_blocking=cuda)

    def _batch(self, rows: Rows, types: Rows | None) -> dict[str, Tensor]:
        """Return the texts as the pipeline gives them to the model: padded to the longest, the last."""
        width = len(rows[-1])
        batch = {
            "input_ids": self.tensor([[*row, *[self.pad] * (width - len(row))] for row in rows]),
            "attention_mask": self.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows]),
        }
        if types is not None:
            batch["token_type_ids"] = self.tensor([[*row, *[0] * (width - len(row))] for row in types])
        return batch

    def _base(self, rows: Rows, keep: Rows, types: Rows | None) -> Tensor:
        """Run a pass of the model's own base."""
        states = self.base(**self._batch(rows, types), return_dict=True).last_hidden_state
        return self._kept(states, keep)

    def _whole(self, rows: Rows, keep: Rows, types: Rows | None) -> Tensor:
        """Run a pass of the whole model, its head on every token."""
        logits = scores(self.model(**self._batch(rows, types)))
        return logits if self.per_text else self._kept(logits, keep)

    def _kept(self, states: Tensor, keep: Rows) -> Tensor:
        width = states.shape[1]
        return states.flatten(0, 1)[self.tensor([n * width + i for n, row in enumerate(keep) for i in row])]

    def _choose(self, probe: Probe, fast: bool) -> None:
        """Take the fastest strategy that gives the results of the model's own forward on the probe, and say which aren't used."""
        linears = packable(self.model)
        *others, own = strategies(self.has_head, bool(linears))
        self._take(own, linears)
        expected = self._on(probe)
        self.drops_zero_types = self._ignores_zero_types(probe)
        self.head_rows = max(32, min(self.pass_tokens, self.head_cells // expected.shape[-1] // 32 * 32))
        problems = []
        for strategy in others if fast else ():
            try:
                self._take(strategy, linears)
                if not (problem := differ(self._on(probe), expected)):
                    self._prove_row_buckets(linears)
                    break
            except UnsupportedArchitecture:
                continue
            except Exception as error:  # whatever a foreign model raises, another strategy serves it
                problem = f"{error!r:.80}"
            problems.append(f"{strategy}: {problem}")
        else:
            self._take(own, linears)
        if problems:
            name, tried = type(self.model).__name__, "; ".join(problems)
            log.warning(
                "%s is computed %s; not used, as the answers would change: %s", name, self.strategy, tried
            )

    def _take(self, strategy: Strategy, linears: list[tuple[nn.Module, str, nn.Linear]]) -> None:
        """Make the model ready for a strategy."""
        for parent, name, linear in linears:
            setattr(parent, name, linear)
        packed_layers = PaddingFree(self.base) if strategy.batching == "padding-free" else None
        for parent, name, linear in linears if strategy.prepacked else ():
            if getattr(parent, name) is linear:
                setattr(parent, name, PackedLinear(linear))
        self.strategy = strategy
        self.head_alone: Any = head_alone(self.model) if self.has_head else None
        stock = self._whole if strategy.whole and self.has_head else self._base
        self.forward: Pass = packed_layers or stock

    def _on(self, probe: Probe) -> Tensor:
        return (self.logits if self.has_head else self)(probe.rows, probe.keep, probe.types)

    def _ignores_zero_types(self, probe: Probe) -> bool:
        """Return whether token types that are all 0 are the same to the model as none."""
        if probe.types is None or not self.takes_types:
            return False
        rows = probe.rows[:2]
        none, zeros = self._on(Probe(rows, None)), self._on(Probe(rows, [[0] * len(row) for row in rows]))
        return torch.allclose(none, zeros, rtol=0, atol=0, equal_nan=True)

    def _prove_row_buckets(self, linears: list[tuple[nn.Module, str, nn.Linear]]) -> None:
        """Run every kernel that a pass can need. Raises ArithmeticError where two don't agree."""
        if isinstance(self.forward, PaddingFree):
            self.forward.prove_row_buckets(self.pass_tokens)
        elif self.strategy.prepacked:
            prove_row_buckets(
                [getattr(parent, name) for parent, name, _ in linears], self.pass_tokens, self.head_cells
            )


def head_alone(model: Any) -> Any:
    """Return a model that shares all of `model` but its base: in place of that stands one that returns its `inputs_embeds`.

    So the model's own forward computes its own head on states that are there already, and nothing of the model is changed
    for it: threads can share one. Where a forward doesn't hand `inputs_embeds` on, the probe finds out.
    """
    base, alone = copy.copy(model.base_model), copy.copy(model)
    pooler = getattr(base, "pooler", None)

    def forward(*_: Any, inputs_embeds: Tensor, **__: Any) -> BaseModelOutputWithPooling:
        return BaseModelOutputWithPooling(inputs_embeds, pooler(inputs_embeds) if pooler else None)

    base.forward = forward
    alone.__dict__["_modules"] = {**model._modules, model.base_model_prefix: base}
    return alone


def scores(outputs: Any) -> Tensor:
    """Return what a head gives: [texts, labels] or [texts, tokens, labels]."""
    if "start_logits" in outputs:
        return torch.stack([outputs.start_logits, outputs.end_logits], -1)
    return outputs.logits
