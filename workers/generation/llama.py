"""The forward pass of Llama and its relatives by hand, for CPUs: Llama, Mistral, Qwen2 and 3, SmolLM, Gemma.

Where Transformers' own forward pass spends its time    What is done here instead
laying out weights at every product                packed once for oneDNN
q, k and v, three products                              one, with the scale folded in
activation, residual: passes of their own               done while a product's result is still in the cache
padding                                                 the tokens of all sequences end to end
keys and values repeated for every query head           the query heads of a key head as further queries
the head on every token                                 only where a token is chosen

The cache is kept [slot, position, key or value, head, dim]: a token's keys and values lie side by side, so that a layer writes
them with one copy, and PyTorch's flash attention reads them where they are.
"""

from collections.abc import Iterator, Sequence
from itertools import accumulate, chain, pairwise
from operator import itemgetter
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from workers.generation.steps import Limits, Row
from workers.generation.stock import windows

ACTIVATIONS = {"silu": ("swish", "none"), "gelu_pytorch_tanh": ("gelu", "tanh"), "gelu": ("gelu", "none")}
# Slots with a step's tokens are computed together with those between them: so many idle ones at most cost less than a product
# of their own.
MOST_IDLE = 3


FAMILY = {f"{name}ForCausalLM" for name in ("Llama", "Mistral", "Qwen2", "Qwen3", "Gemma")}


class UnsupportedModel(Exception):
    """The model is not built like Llama."""


class Packed:
    """A Linear in oneDNN's own layout."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous())
        self.bias = None if bias is None else bias.detach().clone()

    def __call__(self, x: Tensor, activation: str = "none", algorithm: str = "none") -> Tensor:
        """The activation of the product."""
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, activation, [], algorithm)

    def with_(self, x: Tensor, operation: str, other: Tensor) -> Tensor:
        """The product plus ("add") or times ("mul") `other`."""
        return torch.ops.mkldnn._linear_pointwise.binary(x, other, self.weight, self.bias, operation)


class Layer(NamedTuple):
    """A layer's weights, packed, and its part of the KV cache."""

    norm: Tensor
    qkv: Packed
    head_norms: tuple[Tensor, Tensor] | None  # of each query and key head, where the model has them
    out: Packed
    last_norm: Tensor
    gate: Packed
    up: Packed
    down: Packed
    cache: Tensor  # [slots + 1, position, key or value, key heads, dim]
    is_near: bool  # looks back only as far as the window


class Group(NamedTuple):
    """Neighbouring slots with as many new tokens each, whose attention is computed at once."""

    slots: slice
    tokens: int  # new ones of each
    longest: int  # keys to look at
    rows: Tensor | slice  # of this step: whose queries; an idle slot between others has any
    mine: Tensor | None  # which of the results count; None: all
    # Which keys each query sees, where a layer looks back all the way or is near: added to the scores; None: all.
    masks: dict[bool, Tensor | None]


class Llama:
    """Takes over a Transformers model; forget that afterwards, its weights are freed on the way.

    Raises UnsupportedModel for a model that is not built so.
    """

    def __init__(self, model: Any, limits: Limits) -> None:
        check_build(model)
        config, base = model.config, model.model
        self.limits, self.dtype, self.eps = limits, model.dtype, config.rms_norm_eps
        self.heads, self.key_heads = config.num_attention_heads, config.num_key_value_heads
        self.dim = base.layers[0].self_attn.head_dim
        # Gemma's norms count from one, and its words are longer.
        is_gemma = type(model).__name__.startswith("Gemma")
        self.norm_offset = 1.0 if is_gemma else 0.0
        self.scale_words = torch.tensor(config.hidden_size**0.5 if is_gemma else 1.0, dtype=self.dtype)
        self.activation = ACTIVATIONS[activation_of(config)]
        kinds = windows(config)
        types = getattr(config, "layer_types", None) or [next(iter(kinds))] * len(base.layers)
        self.window = next((window for window in kinds.values() if window), None)
        cos, sin = base.rotary_emb(torch.zeros(1), torch.arange(limits.capacity)[None])
        sin[..., : self.dim // 2] *= -1  # so that no half of a key need be negated
        self.cos, self.sin = cos[0, :, None].to(self.dtype), sin[0, :, None].to(self.dtype)
        self.layers = [self._layer(layer, bool(kinds.get(kind))) for layer, kind in zip(base.layers, types)]
        # A copy of its own, as of all weights here: a view would keep the whole file mapped.
        self.words, self.norm = base.embed_tokens.weight.detach().clone(), self._norm(base.norm)
        self.head = Packed(model.lm_head.weight, model.lm_head.bias)

    def _norm(self, norm: Any) -> Tensor:
        return norm.weight.detach() + self.norm_offset

    def _layer(self, layer: Any, is_near: bool) -> Layer:
        """Pack a layer's weights; give back the memory of its own."""
        a, m, scale = layer.self_attn, layer.mlp, layer.self_attn.scaling
        norms = (a.q_norm, a.k_norm) if hasattr(a, "q_norm") else None
        scale_q = 1.0 if norms else scale  # with norms of its own the scale goes there
        qkv = torch.cat([a.q_proj.weight * scale_q, a.k_proj.weight, a.v_proj.weight])
        biases = [a.q_proj.bias, a.k_proj.bias, a.v_proj.bias]
        bias = None if biases[0] is None else torch.cat([biases[0] * scale_q, *biases[1:]])
        slots, capacity = self.limits
        packed = Layer(
            self._norm(layer.input_layernorm),
            Packed(qkv, bias),
            (norms[0].weight.detach() * scale, norms[1].weight.detach().clone()) if norms else None,
            Packed(a.o_proj.weight, a.o_proj.bias),
            self._norm(layer.post_attention_layernorm),
            Packed(m.gate_proj.weight, m.gate_proj.bias),
            Packed(m.up_proj.weight, m.up_proj.bias),
            Packed(m.down_proj.weight, m.down_proj.bias),
            torch.zeros(slots + 1, capacity, 2, self.key_heads, self.dim, dtype=self.dtype),
            is_near,
        )
        for linear in (a.q_proj, a.k_proj, a.v_proj, a.o_proj, m.gate_proj, m.up_proj, m.down_proj):
            linear.weight = None
        return packed

    def __call__(self, rows: Sequence[Row]) -> Tensor:
        """Return the logits behind the last token of each row with a choice, in order: [choices, vocabulary]."""
        order = sorted(range(len(rows)), key=lambda i: (len(rows[i].ids) > 1, rows[i].slot))
        rows = [rows[i] for i in order]
        ids = list(chain.from_iterable(row.ids for row in rows))
        slots = [row.slot for row in rows for _ in row.ids]
        positions = [at for row in rows for at in range(row.start, row.start + len(row.ids))]
        # Rows that belong to nobody: they write to a slot of their own.
        spare = [0] * (rounded(len(ids)) - len(ids))
        states = self.forward(
            torch.tensor(ids + spare),
            torch.tensor(slots + [self.limits.slots] * len(spare)),
            torch.tensor(positions + spare),
            list(self.groups(rows)),
        )
        ends = accumulate(len(row.ids) for row in rows)
        # Each row's last token, in the order in which the rows were given.
        wanted = [end - 1 for _, end, row in sorted(zip(order, ends, rows), key=itemgetter(0)) if row.choice]
        keep = torch.tensor(wanted + [0] * (rounded(len(wanted)) - len(wanted)), dtype=torch.long)
        x = F.rms_norm(states[keep], self.norm.shape, self.norm, self.eps)
        return self.head(x)[: len(wanted)] if wanted else x

    def forward(self, ids: Tensor, slots: Tensor, positions: Tensor, groups: list[Group]) -> Tensor:
        """Return the last hidden states of these tokens, before the last norm."""
        x = F.embedding(ids, self.words) * self.scale_words
        cos, sin = self.cos[positions], self.sin[positions]
        places = slots * self.limits.capacity + positions
        heads, both = self.heads, self.heads + self.key_heads
        for layer in self.layers:
            y = layer.qkv(F.rms_norm(x, layer.norm.shape, layer.norm, self.eps)).view(len(ids), -1, self.dim)
            r = y[:, :both] if layer.head_norms is None else self.normed(y, layer.head_norms)
            torch.addcmul(r * cos, r.roll(self.dim // 2, -1), sin, out=y[:, :both])
            layer.cache.flatten(0, 1).flatten(1).index_copy_(0, places, y[:, heads:].flatten(1))
            x = layer.out.with_(self.attend(y[:, :heads], layer, groups), "add", x)
            y = F.rms_norm(x, layer.last_norm.shape, layer.last_norm, self.eps)
            x = layer.down.with_(layer.up.with_(y, "mul", layer.gate(y, *self.activation)), "add", x)
        return x

    def normed(self, y: Tensor, norms: tuple[Tensor, Tensor]) -> Tensor:
        """The query and key heads of y, each divided by its own size."""
        q, k = y[:, : self.heads], y[:, self.heads : self.heads + self.key_heads]
        return torch.cat([F.rms_norm(x, (self.dim,), norm, self.eps) for x, norm in zip((q, k), norms)], 1)

    def attend(self, q: Tensor, layer: Layer, groups: list[Group]) -> Tensor:
        """Return each token's attention to its own slot: [rows, hidden]."""
        found = []
        for slots, count, longest, rows, mine, masks in groups:
            n = slots.stop - slots.start
            keys, values = layer.cache[slots, :longest].permute(2, 0, 3, 1, 4)
            # The query heads of a key head stand below each other, as if they were further queries.
            g = q[rows].view(n, count, self.key_heads, -1, self.dim).transpose(1, 2).flatten(2, 3)
            o = F.scaled_dot_product_attention(g, keys, values, masks[layer.is_near], scale=1.0)
            o = o.view(n, self.key_heads, count, -1, self.dim).transpose(1, 2).reshape(n * count, -1)
            found.append(o if mine is None else o[mine])
        if extra := len(q) - sum(map(len, found)):
            found.append(found[0].new_zeros(extra, found[0].shape[1]))
        return found[0] if len(found) == 1 else torch.cat(found)

    def groups(self, rows: Sequence[Row]) -> Iterator[Group]:
        """Rows of one token, by runs of neighbouring slots; then each longer one alone."""
        singles = [row for row in rows if len(row.ids) == 1]
        starts = [
            i for i, row in enumerate(singles) if not i or row.slot > singles[i - 1].slot + 1 + MOST_IDLE
        ]
        for start, end in pairwise([*starts, len(singles)]):
            yield self.group(singles[start:end], start)
        at = len(singles)
        for row in rows[len(singles) :]:
            longest = row.start + len(row.ids)
            positions = torch.arange(row.start, longest).repeat_interleave(self.heads // self.key_heads)
            masks = self.masks(positions[None], longest)
            slots, span = slice(row.slot, row.slot + 1), slice(at, at + len(row.ids))
            yield Group(slots, len(row.ids), longest, span, None, masks)
            at += len(row.ids)

    def group(self, run: list[Row], at: int) -> Group:
        """The group of these rows of one token, in neighbouring slots; the first is this step's row `at`."""
        first, last = run[0].slot, run[-1].slot
        slots, n = slice(first, last + 1), last + 1 - first
        longest = max(row.start for row in run) + 1
        rows: Tensor | slice = slice(at, at + n)
        mine = None
        positions = [0] * n
        for row in run:
            positions[row.slot - first] = row.start
        if n > len(run):
            mine = torch.tensor([row.slot - first for row in run])
            places = torch.full((n,), at)
            places[mine] = torch.arange(at, at + len(run))
            rows = places
        is_even = min(positions) == longest - 1
        masks = self.masks(torch.tensor(positions)[:, None], longest)
        return Group(slots, 1, longest, rows, mine, masks | ({False: None} if is_even else {}))

    def masks(self, positions: Tensor, longest: int) -> dict[bool, Tensor | None]:
        """What to add to the scores of queries at these positions [slots, queries], so that they see nothing behind and too far
        before them: [slots, 1, queries, longest]."""
        keys = torch.arange(longest)
        hidden = keys > positions[..., None]
        masks: dict[bool, Tensor | None] = {}
        for is_near in {False, self.window is not None}:
            if is_near:
                hidden = hidden | (keys <= positions[..., None] - self.window)
            mask = torch.zeros(hidden.shape, dtype=self.dtype).masked_fill_(hidden, -torch.inf)
            masks[is_near] = mask[:, None]
        return masks

    def clear(self, slot: int) -> None:
        """Forget what a slot holds: what is not a number would spoil the next sequence, hidden or not."""
        for layer in self.layers:
            layer.cache[slot].zero_()


def rounded(rows: int) -> int:
    """A number of rows, rounded up: oneDNN compiles code for every number. One and two alone are worth their own."""
    step = 1 if rows <= 2 else 4 if rows <= 64 else max(32, 1 << (rows - 1).bit_length() - 4)
    return -(-rows // step) * step


def check_build(model: Any) -> None:
    """Raise UnsupportedModel where a model is not built like Llama, or not on a CPU that multiplies its numbers natively."""
    config = model.config
    if type(model).__name__ not in FAMILY or model.device.type != "cpu":
        raise UnsupportedModel(f"{type(model).__name__} on {model.device.type}")
    if not torch.backends.mkldnn.is_available() or activation_of(config) not in ACTIVATIONS:
        raise UnsupportedModel(f"activation {activation_of(config)}")
    if model.dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        raise UnsupportedModel("bfloat16 on this CPU")
    if model.dtype not in (torch.float32, torch.bfloat16):
        raise UnsupportedModel(str(model.dtype))


def activation_of(config: Any) -> str:
    return str(getattr(config, "hidden_activation", None) or config.hidden_act)
