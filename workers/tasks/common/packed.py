"""What makes a forward pass fast on a CPU: prepacked Linears, and BERT's layers over packed sequences, without padding.

oneDNN compiles code for every number of rows, and keeps it: 290 KB and more each; for attention in bfloat16 for every
length, 700 KB. So both are rounded up, to a few numbers: memory stays flat.

One short text is bound by reading the weights and by the number of operations, not by arithmetic: query, key and value
are one product, and nothing is copied that needn't be (lesson 10 has figures).
"""

from collections.abc import Callable, Sequence
from itertools import accumulate, chain, groupby
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workers.tasks.common.probe import Rows, differ

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class UnsupportedArchitecture(Exception):
    """The model is not built like the encoders that the packed forward pass knows: the stock one serves it."""


def pick_dtype(name: str, device: str | torch.device) -> torch.dtype:
    """Return the dtype for a DTYPE setting; `auto` is bfloat16 where the device multiplies it natively, else float32."""
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


def row_buckets(most: int) -> list[int]:
    """Return the numbers that those from 1 to `most` are rounded up to."""
    return sorted(set(map(round_up, range(1, most + 1))))


def round_up(rows: int) -> int:
    """Round up a row count or a length: to a multiple of 2 up to 16 (1 stays 1), of 4 up to 64, of 32 up to 512, then to
    8 steps per doubling.
    """
    if rows <= 1:
        return rows
    step = 2 if rows <= 16 else 4 if rows <= 64 else max(32, 1 << (rows - 1).bit_length() - 4)
    return -(-rows // step) * step


class PackedLinear(nn.Module):  # type: ignore[misc]
    """Hold a Linear's weights in oneDNN's own layout, for CPU inference, by the ops that inductor uses.

    Of several Linears: those of one product, whose outputs stand side by side.
    """

    def __init__(self, *linears: nn.Linear) -> None:
        super().__init__()
        weight, self.bias = linears[0].weight.detach(), linears[0].bias
        if len(linears) > 1:
            weight = torch.cat([linear.weight.detach() for linear in linears])
            self.bias = nn.Parameter(torch.cat([linear.bias.detach() for linear in linears]), False)
        self.packed = nn.Parameter(torch.ops.mkldnn._reorder_linear_weight(weight), requires_grad=False)
        self.n_out, self.n_in = weight.shape
        # Looked up once: for a short text that counts.
        self.weights = self.packed, self.bias
        self.product, self.product_sum = (
            getattr(torch.ops.mkldnn._linear_pointwise, kind) for kind in ("default", "binary")
        )

    def forward(self, x: Tensor) -> Tensor:
        rows = x.shape[:-1].numel()
        if extra := round_up(rows) - rows:
            padded = F.pad(x.reshape(rows, -1), (0, 0, 0, extra))
            return self.linear_activation(padded)[:rows].view(*x.shape[:-1], -1)
        return self.linear_activation(x)

    def linear_activation(self, x: Tensor, activation: str = "none", algorithm: str = "none") -> Tensor:
        """Return the activation of the product, in one go."""
        return self.product(x, *self.weights, activation, [], algorithm)

    def linear_add(self, x: Tensor, other: Tensor) -> Tensor:
        """Return the product plus `other`, in one go."""
        return self.product_sum(x, other, *self.weights, "add")


# The first layer's attention, and the parts of a layer: query, key, value, out, its norm, up, down, its norm.
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
    """Neighbouring texts whose attention is computed together as [texts, length]."""

    rows: slice
    texts: int
    length: int
    # If some are shorter: the row of each position in [texts, length]; after a text's end its last one.
    padded: Tensor | None = None
    # Which of these positions hold a token.
    real: Tensor | None = None
    # What is added to the attention's scores.
    bias: Tensor | None = None


# Texts of up to so many tokens attend in float32 at their own length, whatever the dtype: as fast, and nothing to compile.
EXACT = 64


class PaddingFree:
    """The forward pass of BERT, and of the models built like it, over packed sequences: nothing is padded.

    Making it prepacks the Linears of the layers, in the model itself: query holds key and value, too. Raises
    UnsupportedArchitecture, and changes nothing, for any other model.
    """

    def __init__(self, base: Any) -> None:
        modules = dict(base.named_modules())
        layout = next((name for name in LAYOUTS if name in modules), None)
        activation = getattr(base.config, "hidden_act", None) or getattr(base.config, "activation", None)
        if layout is None or activation not in ACTIVATIONS:
            raise UnsupportedArchitecture
        layers = modules[layout.partition(".0")[0]]
        self.layers = [prepack(layer, LAYOUTS[layout].split()) for layer in layers]
        self.heads, self.activation = base.config.num_attention_heads, ACTIVATIONS[activation]
        self.bias = getattr(modules.get("encoder"), "compute_position_bias", None)
        self.project = None
        if project := modules.get("embeddings_project"):
            self.project = PackedLinear(project)
            base.set_submodule("embeddings_project", self.project)
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
        more = [0] * (round_up(total) - total)  # rows outside of every text
        at = [*chain.from_iterable(map(self.position_ids, rows)), *more]
        x = F.embedding(torch.tensor(ids + more), self.words) + F.embedding(torch.tensor(at), self.positions)
        if types is not None and self.types is not None:
            x = x + F.embedding(torch.tensor([*chain(*types), *more]), self.types)
        x = self.norm(x)
        if self.project is not None:
            x = self.project.linear_activation(x)
        groups = [
            self.group(x, starts, list(texts))
            for _, texts in groupby(range(len(rows)), lambda text: self.attended(lengths[text]))
        ]
        for layer in self.layers[:-1]:
            x = self.layer(x, layer, groups)
        wanted = None
        if kept != list(range(total)):
            wanted = torch.tensor([*kept, *[0] * (round_up(len(kept)) - len(kept))])
        return self.layer(x, self.layers[-1], groups, wanted)[: len(kept)]

    @torch.inference_mode()  # type: ignore[untyped-decorator]
    def prove_row_buckets(self, most: int) -> None:
        """Run a layer on every number of rows that passes of up to `most` tokens round up to.

        So oneDNN compiles their kernels now, not while a request waits. Raises ArithmeticError where one of them gives
        other results than the largest.
        """
        x = torch.randn(
            round_up(most), self.layers[0][0].n_in, generator=torch.Generator().manual_seed(0)
        ).to(self.words.dtype)
        expected = self.layer(x, self.layers[0], [Group(slice(len(x)), len(x), 1)])  # texts of one token
        for rows in row_buckets(most):
            check_equal(self.layer(x[:rows], self.layers[0], [Group(slice(rows), rows, 1)]), expected[:rows])
            if self.attended(rows) == rows:
                self.attend(x[:rows].repeat(1, 3), [Group(slice(rows), 1, rows)])

    def position_ids(self, row: Sequence[int]) -> Sequence[int]:
        """Return the rows of a text's tokens in the table of positions."""
        if self.pad is None:
            return range(len(row))
        if self.pad not in row:
            return range(self.pad + 1, self.pad + 1 + len(row))
        seen = accumulate(token != self.pad for token in row)
        return [self.pad + count * (token != self.pad) for token, count in zip(row, seen)]

    def layer(self, x: Tensor, layer: list[Any], groups: list[Group], wanted: Tensor | None = None) -> Tensor:
        """Run one layer; after its attention for the wanted rows only."""
        joined, out, norm, up, down, last_norm = layer
        seen = self.attend(joined.linear_activation(x), groups)
        if wanted is not None:
            x, seen = x[wanted], seen[wanted]
        x = norm(out.linear_add(seen, x))
        return last_norm(down.linear_add(up.linear_activation(x, *self.activation), x))

    def attended(self, length: int) -> int:
        """Return the length that a text's attention is computed at."""
        exact = self.words.dtype == torch.float32 or length <= EXACT
        return length if exact else round_up(-(-length // 16) * 16)

    def group(self, x: Tensor, starts: list[int], texts: list[int]) -> Group:
        """Return neighbouring texts whose attention has the same length as a group."""
        first, count = starts[texts[0]], len(texts)
        lengths = [starts[text + 1] - starts[text] for text in texts]
        length = self.attended(lengths[-1])
        rows = slice(first, starts[texts[-1] + 1])
        bias = self.bias(x.new_empty(1, length)) if self.bias else None
        if lengths[0] == length:
            bias = bias.float() if bias is not None and length <= EXACT else bias
            return Group(rows, count, length, bias=bias)
        positions, sizes = torch.arange(length), torch.tensor(lengths)[:, None]
        is_real = positions < sizes
        padded = torch.tensor([starts[text] for text in texts])[:, None] + positions.minimum(sizes - 1)
        hidden = torch.zeros(is_real.shape, dtype=x.dtype).masked_fill_(~is_real, -torch.inf)[:, None, None]
        bias = hidden if bias is None else hidden + bias
        return Group(rows, count, length, padded.flatten(), is_real.flatten().nonzero().flatten(), bias)

    def attend(self, joined: Tensor, groups: list[Group]) -> Tensor:
        """Return the attention of each text within itself: [rows, hidden]; `joined`: query, key and value, [rows, 3 * hidden]."""
        parts = []
        for rows, texts, length, padded, real, bias in groups:
            part = joined[rows if padded is None else padded]
            part = part.float() if length <= EXACT else part
            query, key, value = part.view(texts, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
            found = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
            found = found.transpose(1, 2).reshape(texts * length, -1)
            parts.append(found if real is None else found[real])
        if more := len(joined) - groups[-1].rows.stop:
            parts.append(parts[0].new_zeros(more, parts[0].shape[1]))
        return (torch.cat(parts) if len(parts) > 1 else parts[0]).to(joined.dtype)


def prepack(layer: nn.Module, names: Sequence[str]) -> list[Any]:
    """Prepack the Linears of a layer, query, key and value as one; return its parts: joined, out, norm, up, down, norm."""
    query, key, value, *others = map(layer.get_submodule, names)
    parts = [PackedLinear(query, key, value)]
    parts += [PackedLinear(part) if type(part) is nn.Linear else part for part in others]
    for name, part in zip(names, [parts[0], nn.Identity(), nn.Identity(), *parts[1:]]):
        layer.set_submodule(name, part)
    return [norm_alone(part) if type(part) is nn.LayerNorm else part for part in parts]


def norm_alone(norm: nn.LayerNorm) -> Callable[[Tensor], Tensor]:
    """Return a LayerNorm without what a module costs."""
    shape, weight, bias, eps = norm.normalized_shape, norm.weight, norm.bias, norm.eps
    return lambda x: torch.layer_norm(x, shape, weight, bias, eps)


def packable(model: Any) -> list[tuple[nn.Module, str, nn.Linear]]:
    """Return every Linear to prepack, as (parent, name, Linear); none on a GPU, or in a dtype that the CPU does not multiply natively.

    Prepacked, float32 is twice as fast on AMD as by MKL. Elsewhere each call saves laying out the weights.
    """
    native = model.dtype in (torch.float32, pick_dtype("auto", model.device))
    if model.device.type != "cpu" or not native or not torch.backends.mkldnn.is_available():
        return []
    return [(m, name, c) for m in model.modules() for name, c in m.named_children() if type(c) is nn.Linear]


@torch.inference_mode()  # type: ignore[untyped-decorator]
def prove_row_buckets(linears: Sequence[PackedLinear], most: int, most_cells: int) -> None:
    """Run a Linear of each shape on every number of rows that a pass can have: at most `most`, of `most_cells` numbers.

    Raises ArithmeticError where one gives other results than the largest.
    """
    shapes = {(linear.n_in, linear.n_out): linear for linear in linears}
    for (n_in, n_out), linear in shapes.items():
        rows = max(4, min(most, most_cells // n_out))
        x = torch.randn(round_up(rows), n_in, generator=torch.Generator().manual_seed(0)).to(
            linear.packed.dtype
        )
        expected = linear(x)
        for count in row_buckets(rows):
            check_equal(linear(x[:count]), expected[:count])


def check_equal(outputs: Tensor, expected: Tensor) -> None:
    """Raise ArithmeticError where results differ by more than rounding."""
    if problem := differ(outputs, expected):
        raise ArithmeticError(f"{len(outputs)} rows are {problem}")
