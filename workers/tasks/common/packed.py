"""What makes a forward pass fast on a CPU: packed Linears, and BERT's layers over texts laid end to end.

oneDNN compiles code for every number of rows, and keeps it: 290 KB and more each; for attention in bfloat16 for every
length, 700 KB. So both are rounded up, to a few numbers: memory stays flat.
"""

from collections.abc import Sequence
from itertools import accumulate, chain, groupby
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workers.errors import UnsupportedArchitecture

Rows = Sequence[Sequence[int]]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pick_dtype(name: str, device: str | torch.device) -> torch.dtype:
    """The dtype for a DTYPE setting; `auto` is bfloat16 where the device multiplies it natively, else float32."""
    if name != "auto":
        return DTYPES[name]
    device = torch.device(device)
    if device.type == "cuda":
        with torch.cuda.device(device):
            native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        can = torch.cpu.get_capabilities()
        native = device.type == "cpu" and any(can.get(key) for key in ("amx_bf16", "avx512_bf16"))
    return torch.bfloat16 if native else torch.float32


def few(most: int) -> list[int]:
    """The numbers that those from 1 to `most` are rounded up to."""
    return sorted(set(map(rounded, range(1, most + 1))))


def rounded(rows: int) -> int:
    """A row count or a length, rounded up: to a multiple of 4 up to 64, of 32 up to 512, then 8 steps a doubling."""
    step = 4 if rows <= 64 else max(32, 1 << (rows - 1).bit_length() - 4)
    return -(-rows // step) * step


class PackedLinear(nn.Module):  # type: ignore[misc]
    """A Linear for CPU inference that holds its weights in oneDNN's own layout, by the ops that inductor uses."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach())
        self.packed, self.bias = nn.Parameter(packed, requires_grad=False), linear.bias

    def forward(self, x: Tensor) -> Tensor:
        rows = x.shape[:-1].numel()
        if extra := rounded(rows) - rows:
            padded = F.pad(x.reshape(rows, -1), (0, 0, 0, extra))
            return self.then(padded)[:rows].view(*x.shape[:-1], -1)
        return self.then(x)

    def then(self, x: Tensor, activation: str = "none", algorithm: str = "none") -> Tensor:
        """The activation of the product, in one go."""
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, activation, [], algorithm)

    def plus(self, x: Tensor, other: Tensor) -> Tensor:
        """The product plus `other`, in one go."""
        return torch.ops.mkldnn._linear_pointwise.binary(x, other, self.packed, self.bias, "add")


# Where the layers are and what is in one: query, key, value, out, its norm, up, down, its norm.
LAYOUTS = {
    "encoder.layer.0.attention.self": (
        "attention.self.query attention.self.key attention.self.value attention.output.dense "
        "attention.output.LayerNorm intermediate.dense output.dense output.LayerNorm"
    ),
    "encoder.layer.0.attention.attn": (  # MPNet
        "attention.attn.q attention.attn.k attention.attn.v attention.attn.o "
        "attention.LayerNorm intermediate.dense output.dense output.LayerNorm"
    ),
    "transformer.layer.0.ffn": (  # DistilBERT
        "attention.q_lin attention.k_lin attention.v_lin attention.out_lin "
        "sa_layer_norm ffn.lin1 ffn.lin2 output_layer_norm"
    ),
}
ACTIVATIONS = {  # as oneDNN calls them
    "gelu": ("gelu", "none"),
    "gelu_new": ("gelu", "tanh"),
    "gelu_pytorch_tanh": ("gelu", "tanh"),
    "relu": ("relu", "none"),
}


class Group(NamedTuple):
    """Texts, one behind the other, whose attention is computed together as [texts, length]."""

    rows: slice
    texts: int
    length: int
    # If some are shorter: the row of each place in [texts, length], behind a text's end its last one.
    padded: Tensor | None = None
    # Which of these places hold a token.
    real: Tensor | None = None
    # What is added to the attention's scores.
    bias: Tensor | None = None


class EndToEnd:
    """The forward pass of BERT, and of the models built like it, over texts laid end to end.

    Raises UnsupportedArchitecture for any other. Its Linears must be packed.
    """

    def __init__(self, base: Any) -> None:
        modules = dict(base.named_modules())
        layout = next((name for name in LAYOUTS if name in modules), None)
        activation = getattr(base.config, "hidden_act", None) or getattr(base.config, "activation", None)
        if layout is None or activation not in ACTIVATIONS:
            raise UnsupportedArchitecture
        layers = modules[layout.partition(".0")[0]]
        self.layers = [[layer.get_submodule(name) for name in LAYOUTS[layout].split()] for layer in layers]
        self.heads, self.activation = base.config.num_attention_heads, ACTIVATIONS[activation]
        self.bias = getattr(modules.get("encoder"), "compute_position_bias", None)
        self.project = modules.get("embeddings_project")
        self.words, self.norm = modules["embeddings.word_embeddings"].weight, modules["embeddings.LayerNorm"]
        positions, types = (
            modules["embeddings.position_embeddings"],
            modules.get("embeddings.token_type_embeddings"),
        )
        self.pad = positions.padding_idx  # RoBERTa counts from behind it, and not where it stands in a text
        self.positions, self.types = positions.weight.detach(), None
        if types is not None:
            self.positions = self.positions + types.weight[0].detach()
            self.types = types.weight.detach() - types.weight[0].detach()

    def __call__(self, rows: Rows, keep: Rows, types: Rows | None) -> Tensor:
        ids, lengths = list(chain(*rows)), list(map(len, rows))
        starts = [0, *accumulate(lengths)]
        total, kept = starts[-1], [start + i for start, row in zip(starts, keep) for i in row]
        more = [0] * (rounded(total) - total)  # rows that belong to no text
        at = [*chain.from_iterable(map(self.places, rows)), *more]
        x = F.embedding(torch.tensor(ids + more), self.words) + F.embedding(torch.tensor(at), self.positions)
        if types is not None and self.types is not None:
            x = x + F.embedding(torch.tensor([*chain(*types), *more]), self.types)
        x = self.norm(x)
        if self.project is not None:
            x = self.project.then(x)
        groups = [
            self.group(x, starts, list(texts))
            for _, texts in groupby(range(len(rows)), lambda text: self.attended(lengths[text]))
        ]
        for layer in self.layers[:-1]:
            x = self.layer(x, layer, groups)
        wanted = None
        if kept != list(range(total)):
            wanted = torch.tensor([*kept, *[0] * (rounded(len(kept)) - len(kept))])
        return self.layer(x, self.layers[-1], groups, wanted)[: len(kept)]

    @torch.inference_mode()  # type: ignore[untyped-decorator]
    def compile(self, most: int) -> None:
        """Have oneDNN compile now what passes of up to so many tokens need, so that no request waits for it."""
        for rows in few(most):
            x = self.words.new_zeros(rows, self.layers[0][0].bias.shape[0])
            self.layer(
                x, self.layers[0], [Group(slice(rows), 1, rows)] if self.attended(rows) == rows else []
            )

    def places(self, row: Sequence[int]) -> Sequence[int]:
        """The rows of a text's tokens in the table of positions."""
        if self.pad is None:
            return range(len(row))
        if self.pad not in row:
            return range(self.pad + 1, self.pad + 1 + len(row))
        seen = accumulate(token != self.pad for token in row)
        return [self.pad + count * (token != self.pad) for token, count in zip(row, seen)]

    def layer(self, x: Tensor, layer: list[Any], groups: list[Group], wanted: Tensor | None = None) -> Tensor:
        """One layer; behind its attention for the wanted rows only."""
        query, key, value, out, norm, up, down, last_norm = layer
        seen = self.attend(query.then(x), key.then(x), value.then(x), groups)
        if wanted is not None:
            x, seen = x[wanted], seen[wanted]
        x = norm(out.plus(seen, x))
        return last_norm(down.plus(up.then(x, *self.activation), x))

    def attended(self, length: int) -> int:
        """The length that a text's attention is computed at."""
        return length if self.words.dtype == torch.float32 else rounded(-(-length // 16) * 16)

    def group(self, x: Tensor, starts: list[int], texts: list[int]) -> Group:
        """Texts whose attention has the same length, as a group."""
        first, count = starts[texts[0]], len(texts)
        lengths = [starts[text + 1] - starts[text] for text in texts]
        length = self.attended(lengths[-1])
        rows = slice(first, starts[texts[-1] + 1])
        bias = self.bias(x.new_empty(1, length)) if self.bias else None
        if lengths[0] == length:
            return Group(rows, count, length, bias=bias)
        places, sizes = torch.arange(length), torch.tensor(lengths)[:, None]
        is_real = places < sizes
        padded = torch.tensor([starts[text] for text in texts])[:, None] + places.minimum(sizes - 1)
        hidden = torch.zeros(is_real.shape, dtype=x.dtype).masked_fill_(~is_real, -torch.inf)[:, None, None]
        bias = hidden if bias is None else hidden + bias
        return Group(rows, count, length, padded.flatten(), is_real.flatten().nonzero().flatten(), bias)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, groups: list[Group]) -> Tensor:
        """The attention of each text within itself: [tokens, hidden]."""
        seen = torch.zeros_like(query)
        for rows, texts, length, padded, real, bias in groups:
            q, k, v = (
                t[rows if padded is None else padded].view(texts, length, self.heads, -1).transpose(1, 2)
                for t in (query, key, value)
            )
            found = (
                F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
                .transpose(1, 2)
                .reshape(-1, seen.shape[1])
            )
            seen[rows] = found if real is None else found[real]
        return seen


def packable(model: Any) -> list[tuple[nn.Module, str, nn.Linear]]:
    """Every Linear to pack, as (parent, name, Linear); none on a GPU, or in a dtype that the CPU does not multiply natively.

    Packed, float32 is twice as fast on AMD as by MKL. Elsewhere each call saves laying out the weights.
    """
    native = model.dtype in (torch.float32, pick_dtype("auto", model.device))
    if model.device.type != "cpu" or not native or not torch.backends.mkldnn.is_available():
        return []
    return [(m, name, c) for m in model.modules() for name, c in m.named_children() if type(c) is nn.Linear]
