"""The torch half of the text tasks: texts as token ids in, states or logits out, each text's as if it were alone.

    encoder = Encoder(model, probe=[[101, 7592, 102], ...])
    encoder(rows)                  the base model's last hidden states, all rows of all texts: [tokens, hidden]
    encoder(rows, [[0], [0], ...]) those at the positions kept of each text: [kept, hidden]
    encoder.logits(rows, keep)     the same through the model's own head: [kept, labels]

Where the stock pipeline's time goes       What is done here instead
padding to the longest text                texts laid end to end, each one's attention within itself
the last layer and the head on all tokens  on those that are kept
laying out weights anew at every call      packed once for oneDNN
GELU and residual as passes of their own   done while a product's result is still in the cache

A probe decides at load: what doesn't give the stock forward's results is not used.
"""

import inspect
import logging
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from workers.errors import UnsupportedArchitecture
from workers.tasks.common.packed import EndToEnd, PackedLinear, Rows, packable

log = logging.getLogger("uvicorn.error")

# of texts sorted by length, the positions to keep of each, their token types or None
Pass = Callable[..., Tensor]


class Strategy(NamedTuple):
    """How a batch is computed."""

    packed: bool = False  # by packed Linears
    end_to_end: bool = False  # texts end to end, not padded
    whole: bool = False  # by the whole model, not base and head apart
    alone: bool = False  # one text a pass

    def __str__(self) -> str:
        names = ("layers packed", "texts end to end", "the whole model", "text by text")
        return ", ".join(name for name, is_so in zip(names, self) if is_so) or "texts padded"


# The fastest first. The last is the stock forward, which the others are compared with.
*STRATEGIES, STOCK = (
    Strategy(packed=True, end_to_end=True),
    Strategy(packed=True),
    Strategy(),
    Strategy(packed=True, whole=True),
    Strategy(whole=True),
    Strategy(whole=True, alone=True),
)


class Encoder:
    """A model's forward pass over many texts at once. For one thread at a time; it may change the model's layers.

    `probe`: the ids of a few texts of different lengths, best of the kind that will come, with `probe_types` where the
    model knows token types. `per_text`: the head gives one row a text (sequence classification), else one a token.
    """

    def __init__(
        self,
        model: Any,
        probe: Rows,
        probe_types: Rows | None = None,
        per_text: bool = False,
        fast: bool = True,
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
        self.largest_pass = self.pass_tokens
        self.way = self._choose(probe, probe_types, STRATEGIES if fast else ())
        if isinstance(self.forward, EndToEnd):
            self.forward.compile(self.pass_tokens)

    @torch.inference_mode()  # type: ignore[untyped-decorator]
    def __call__(self, rows: Rows, keep: Rows | None = None, types: Rows | None = None) -> Tensor:
        """The last hidden states at the positions `keep` of each text (None: at all), text by text: [n, hidden]."""
        return self._run(rows, keep, types)

    @torch.inference_mode()  # type: ignore[untyped-decorator]
    def logits(self, rows: Rows, keep: Rows | None = None, types: Rows | None = None) -> Tensor:
        """The model's output at the positions `keep` of each text, text by text: [n, labels].

        Of a question-answering model the starts' and the ends'. `per_text`: one row a text, whatever `keep` is.
        """
        if self.per_text:
            keep = [[0]] * len(rows)
        found = self._run(rows, keep, types)
        return found if self.way.whole else self.head(found)

    @torch.inference_mode()  # type: ignore[untyped-decorator]
    def head(self, states: Tensor) -> Tensor:
        """The model's own output head on states [n, hidden]: [n, labels]."""
        found = [self._head(part) for part in states.split(self.head_rows)]
        return torch.cat(found) if len(found) > 1 else found[0]

    def _head(self, states: Tensor) -> Tensor:
        """Run the whole model, but with a base that returns these states instead of computing any."""
        pooler = getattr(self.base, "pooler", None)
        states = states[:, None] if self.per_text else states[None]
        known = BaseModelOutputWithPooling(states, pooler(states) if pooler else None)
        self.base.forward = lambda *args, **kwargs: known
        try:
            ids = torch.zeros(states.shape[:2], dtype=torch.long, device=self.device)
            found = scores(self.model(input_ids=ids))
            return found if self.per_text else found[0]
        finally:
            del self.base.forward

    def _run(self, rows: Rows, keep: Rows | None, types: Rows | None) -> Tensor:
        """One pass for each chunk of the texts; what they give, in the texts' order."""
        lengths = list(map(len, rows))
        keep = [range(n) for n in lengths] if keep is None else keep
        found, order = [], []
        for chunk in self.chunks(lengths):
            order += chunk
            given = (None if of is None else [of[text] for text in chunk] for of in (rows, keep, types))
            found.append(self.forward(*given))
        states = torch.cat(found) if len(found) > 1 else found[0]
        if order == sorted(order):
            return states
        start = [0, *accumulate(map(len, keep))]
        came = [row for text in order for row in range(start[text], start[text + 1])]
        return states[self.tensor(sorted(range(len(came)), key=came.__getitem__))]

    def chunks(self, lengths: Sequence[int]) -> Iterator[list[int]]:
        """The texts in groups of similar length, one for each forward pass, the longest last."""
        chunk: list[int] = []
        tokens = 0
        for text in sorted(range(len(lengths)), key=lengths.__getitem__):
            longer = lengths[text] - lengths[chunk[-1]] if chunk else 0
            padding = 0 if self.way.end_to_end else len(chunk) * longer
            if chunk and (padding > self.pass_cost or tokens + padding + lengths[text] > self.pass_tokens):
                yield chunk
                chunk, tokens, padding = [], 0, 0
            chunk.append(text)
            tokens += padding + lengths[text]
        yield chunk

    def tensor(self, rows: Sequence[Any]) -> Tensor:
        """Whole numbers on the model's device."""
        cuda = self.device.type == "cuda"  # from pinned memory the copy runs beside the kernels
        return torch.tensor(rows, pin_memory=cuda).to(self.device, non_blocking=cuda)

    def _batch(self, rows: Rows, types: Rows | None) -> dict[str, Tensor]:
        """The texts as the model's own forward takes them: padded to the longest, the last."""
        width = len(rows[-1])
        batch = {"input_ids": self.tensor([[*row, *[self.pad] * (width - len(row))] for row in rows])}
        if len(rows[0]) < width:  # else no mask: a faster kernel, and a GPU need not wait to look into it
            batch["attention_mask"] = self.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
        if types is not None and self.takes_types:
            batch["token_type_ids"] = self.tensor([[*row, *[0] * (width - len(row))] for row in types])
        return batch

    def _padded(self, rows: Rows, keep: Rows, types: Rows | None) -> Tensor:
        """A pass of the model's own base."""
        states = self.base(**self._batch(rows, types), return_dict=True).last_hidden_state
        return self._kept(states, keep)

    def _whole(self, rows: Rows, keep: Rows, types: Rows | None) -> Tensor:
        """A pass of the whole model, its head on every token."""
        found = scores(self.model(**self._batch(rows, types)))
        return found if self.per_text else self._kept(found, keep)

    def _kept(self, states: Tensor, keep: Rows) -> Tensor:
        width = states.shape[1]
        return states.flatten(0, 1)[self.tensor([n * width + i for n, row in enumerate(keep) for i in row])]

    def _choose(self, probe: Rows, types: Rows | None, ways: Sequence[Strategy]) -> Strategy:
        """Take the fastest way that gives the stock forward's results on the probe."""
        linears = packable(self.model)
        self._take(STOCK, linears)
        expected = self._probe(probe, types)
        self.head_rows = max(32, min(self.largest_pass, self.head_cells // expected.shape[-1] // 32 * 32))
        tolerance = (1e-3 if expected.dtype == torch.float32 else 0.25) * float(expected.float().std()) + 1e-6
        problems = []
        for way in ways:
            if (way.packed and not linears) or (way.whole and not self.has_head):
                continue
            try:
                self._take(way, linears)
                gap = float((self._probe(probe, types) - expected).abs().max())
                if gap <= tolerance:
                    break
                problems.append(f"{way}: off by {gap:.2g}")
            except UnsupportedArchitecture:
                continue
            except Exception as error:  # whatever a foreign model raises, another way serves it
                problems.append(f"{way}: {error!r:.80}")
        else:
            self._take(way := STOCK, linears)
        if way.whole and problems:
            name, tried = type(self.model).__name__, "; ".join(problems)
            log.warning("%s is served by its own forward, %s; tried: %s", name, way, tried)
        return way

    def _take(self, way: Strategy, linears: list[tuple[nn.Module, str, nn.Linear]]) -> None:
        """Make the model ready for it."""
        for parent, name, linear in linears:
            if way.packed != isinstance(getattr(parent, name), PackedLinear):
                setattr(parent, name, PackedLinear(linear) if way.packed else linear)
        self.way, self.pass_tokens = way, 0 if way.alone else self.largest_pass
        self.forward: Pass = self._whole if way.whole and self.has_head else self._padded
        if way.end_to_end:
            self.forward = EndToEnd(self.base)

    def _probe(self, rows: Rows, types: Rows | None) -> Tensor:
        return (self.logits if self.has_head else self)(rows, None, types)


def scores(found: Any) -> Tensor:
    """What a head says: [texts, labels] or [texts, tokens, labels]."""
    if "start_logits" in found:
        return torch.stack([found.start_logits, found.end_logits], -1)
    return found.logits
