"""The fast path: what `pipeline("fill-mask")` answers, computed for a whole batch at once.

    pipe = pipeline("fill-mask", model=folder, pipeline_class=FastFillMaskPipeline)
    pipe.answer([("Paris is the [MASK] of France.", 5, ()), ("I [MASK] you.", 2, ("love", "know"))])

Where the stock pipeline's time goes         What is done here instead
the output head, over every token            over the masked ones only, once per batch
padding to the longest text                  texts sorted by length, one forward pass for similar ones
laying out the weights anew at every call    packed once for oneDNN
five decodes per mask                        the text around the mask decoded once
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from tokenizers.decoders import WordPiece
from torch import Tensor, nn
from transformers import FillMaskPipeline
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils import logging

logger = logging.get_logger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
Want = tuple[int, tuple[int, ...] | None]  # top_k, the ids of the targets
Candidates = list[tuple[float, int]]  # (score, token), best first


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


class PackedLinear(nn.Module):  # type: ignore[misc]
    """A Linear for CPU inference that holds its weights in oneDNN's own layout, by the op that inductor uses."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach())
        self.packed, self.bias = nn.Parameter(packed, requires_grad=False), linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")


class FastFillMaskPipeline(FillMaskPipeline):  # type: ignore[misc]
    """The stock pipeline's answers from batched work; a model that can't be served so gets the stock way.

    Like the stock one it is for one thread at a time. It packs the weights of the model that it is given.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # A forward pass takes at most `pass_tokens`, so that its activations stay in the caches; a text that would cost
        # a pass more padding than `pass_cost` tokens starts another. The output head takes `head_rows` masks at a
        # time: a row of logits is 120 KB. Measured on a CPU; a GPU wants few and large passes, how large is a guess.
        cpu = self.device.type == "cpu"
        self.pass_tokens, self.pass_cost, self.head_rows = (512, 16, 32) if cpu else (65536, 4096, 1024)
        self._vocab: dict[str, int] = self.tokenizer.get_vocab()
        self._pieces: dict[int, tuple[str, str, str]] = {}
        # This decoder, and only this one of those in use, turns each token into text by itself.
        decoder = getattr(getattr(self.tokenizer, "backend_tokenizer", None), "decoder", None)
        self._piecewise = isinstance(decoder, WordPiece) and not self.tokenizer.clean_up_tokenization_spaces
        if cpu and self.model.dtype == torch.bfloat16:
            self.model.set_attn_implementation(
                "eager"
            )  # measured: two matmuls beat the fused kernel at every length
        self.fast = self._become_fast()

    def __call__(self, inputs: Any, **kwargs: Any) -> Any:
        """The stock call: a text or a list of texts in, the stock answers out."""
        texts = [inputs] if isinstance(inputs, str) else inputs
        ours = (
            self.fast and isinstance(texts, list) and texts and all(isinstance(text, str) for text in texts)
        )
        if not ours or self._preprocess_params or kwargs.keys() - {"top_k", "targets", "batch_size"}:
            return super().__call__(inputs, **kwargs)
        size = kwargs.pop("batch_size", None) or self._batch_size or len(texts)
        params = self._postprocess_params | self._sanitize_parameters(**kwargs)[2]
        ids = params.get("target_ids")
        want = (params.get("top_k", 5), None if ids is None else tuple(ids.tolist()))
        batches = (texts[start : start + size] for start in range(0, len(texts), size))
        answers = [
            answer for batch in batches for answer in self._answer(self._ids(batch), [want] * len(batch))
        ]
        return answers[0] if len(texts) == 1 else answers

    def answer(self, queries: Sequence[tuple[Any, ...]]) -> list[Any]:
        """One answer per (text, top_k, targets), in order: what the stock pipeline returns for it alone.

        A fourth item may hold the text's token ids, special ones included, where they are known already.
        """
        if not queries:
            return []
        if not self.fast:
            return [self(text, top_k=top_k, targets=targets or None) for text, top_k, targets, *_ in queries]
        texts, top_ks, targets, *known = zip(*queries)
        ids = known[0] if known and all(known[0]) else self._ids(texts)
        target_ids = [tuple(self.get_target_ids(words).tolist()) if words else None for words in targets]
        return self._answer(ids, list(zip(top_ks, target_ids)))

    def get_target_ids(self, targets: str | Sequence[str]) -> np.ndarray:
        """The stock ids for `targets`, without the 10 ms that the stock class spends on listing the vocabulary."""
        ids: list[int] = []
        for target in [targets] if isinstance(targets, str) else targets:
            if target in self._vocab:
                ids.append(self._vocab[target])
            else:
                pieces = self.tokenizer(target, add_special_tokens=False, max_length=1, truncation=True)[
                    "input_ids"
                ]
                logger.warning(
                    f"Target {target!r} is not in the vocabulary: its first piece is taken, if any."
                )
                ids += pieces[:1]
        if not ids:
            raise ValueError("At least one target must be provided when passed.")
        return np.array(list(set(ids)))

    @torch.inference_mode()  # type: ignore[untyped-decorator]
    def _answer(self, ids: Sequence[Sequence[int]], wants: list[Want]) -> list[Any]:
        masks = self._masks(ids)
        for row, found in zip(ids, masks):
            if not found:
                self._ensure_exactly_one_mask_token(
                    torch.tensor(row)
                )  # raises, in the stock pipeline's words
        hidden = self._hidden(ids, masks)
        same: dict[Want, list[int]] = defaultdict(list)  # the masks that one top-k can serve
        for number, want in enumerate(want for want, found in zip(wants, masks) for _ in found):
            same[want].append(number)
        best: list[Candidates] = [[]] * len(hidden)
        for want, numbers in same.items():
            for number, candidates in zip(numbers, self._best(hidden[self._tensor(numbers)], *want)):
                best[number] = candidates
        stop = accumulate(map(len, masks))
        return [self._result(row, at, best[end - len(at) : end]) for row, at, end in zip(ids, masks, stop)]

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        return self.tokenizer(list(texts))["input_ids"]

    def _masks(self, ids: Sequence[Sequence[int]]) -> list[list[int]]:
        mask = self.tokenizer.mask_token_id
        return [[i for i, token in enumerate(row) if token == mask] for row in ids]

    def _hidden(self, ids: Sequence[Sequence[int]], masks: list[list[int]]) -> Tensor:
        """The base model's last hidden state at each mask, text by text: [masks, hidden size]."""
        pad, lengths = self.tokenizer.pad_token_id or 0, list(map(len, ids))
        start, kept, order = [0, *accumulate(map(len, masks))], [], []
        for chunk in self._chunks(lengths):
            width = lengths[chunk[-1]]
            padded = [[*ids[text], *[pad] * (width - lengths[text])] for text in chunk]
            batch = {"input_ids": self._tensor(padded)}
            if (
                lengths[chunk[0]] < width
            ):  # else no mask: a faster kernel, and a GPU need not wait to look into it
                seen = [[1] * lengths[text] + [0] * (width - lengths[text]) for text in chunk]
                batch["attention_mask"] = self._tensor(seen)
            where = [n * width + i for n, text in enumerate(chunk) for i in masks[text]]
            states = self.model.base_model(**batch, return_dict=True).last_hidden_state
            kept.append(states.flatten(0, 1)[self._tensor(where)])
            order += [row for text in chunk for row in range(start[text], start[text + 1])]
        return torch.cat(kept)[self._tensor(sorted(range(len(order)), key=order.__getitem__))]

    def _chunks(self, lengths: list[int]) -> Iterator[list[int]]:
        """The texts in groups of similar length, one for each forward pass, the longest last."""
        chunk: list[int] = []
        for text in sorted(range(len(lengths)), key=lengths.__getitem__):
            padding = len(chunk) * (lengths[text] - lengths[chunk[-1]]) if chunk else 0
            if chunk and (padding > self.pass_cost or (len(chunk) + 1) * lengths[text] > self.pass_tokens):
                yield chunk
                chunk = []
            chunk.append(text)
        yield chunk

    def _tensor(self, rows: Sequence[Any]) -> Tensor:
        cuda = self.device.type == "cuda"  # from pinned memory the copy runs beside the kernels
        return torch.tensor(rows, pin_memory=cuda).to(self.device, non_blocking=cuda)

    def _best(self, hidden: Tensor, top_k: int, target_ids: tuple[int, ...] | None) -> Iterator[Candidates]:
        """The candidates for each row of `hidden`. Softmax before top-k, as in the stock class: ties fall alike."""
        targets = None if target_ids is None else self._tensor(target_ids)
        found = []
        for part in hidden.split(self.head_rows):
            scores = self._logits(part).softmax(-1, dtype=torch.float32)
            if targets is not None:
                scores, top_k = scores[:, targets], min(top_k, len(targets))
            found.append(scores.topk(top_k))
        values, tokens = (
            torch.cat([best.values for best in found]),
            torch.cat([best.indices for best in found]),
        )
        tokens = tokens if targets is None else targets[tokens]
        return (list(zip(*row)) for row in zip(values.tolist(), tokens.tolist()))

    def _logits(self, hidden: Tensor) -> Tensor:
        """The model's own output head on [masks, hidden size]: the whole model, over a base that knows its result."""
        base = self.model.base_model
        base.forward = lambda *args, **kwargs: BaseModelOutput(last_hidden_state=hidden[None])
        try:
            return self.model(
                input_ids=torch.zeros(1, len(hidden), dtype=torch.long, device=self.device)
            ).logits[0]
        finally:
            del base.forward

    def _result(self, ids: Sequence[int], masks: list[int], best: list[Candidates]) -> Any:
        rows = []
        for mask, candidates in zip(masks, best):
            sequences = self._sequences(ids, mask, [token for _, token in candidates], len(masks) == 1)
            row = zip(candidates, sequences)
            rows.append(
                [dict(score=s, token=t, token_str=self._piece(t)[0], sequence=text) for (s, t), text in row]
            )
        return rows[0] if len(masks) == 1 else rows

    def _sequences(self, ids: Sequence[int], mask: int, tokens: list[int], skip: bool) -> Iterator[str]:
        """The text with each of `tokens` at the mask; special tokens are left out if `skip`, padding always."""
        decode, pad, after = self.tokenizer.decode, self.tokenizer.pad_token_id, None
        before = (
            decode([t for t in ids[:mask] if t != pad], skip_special_tokens=skip) if self._piecewise else ""
        )
        for token in tokens:
            _, first, later = self._piece(token)
            piece = later if before else first
            if after is not None and piece:
                yield before + piece + after
                continue
            text = decode(
                [t for t in (*ids[:mask], token, *ids[mask + 1 :]) if t != pad], skip_special_tokens=skip
            )
            after = text[len(before) + len(piece) :] if piece else after
            yield text

    def _piece(self, token: int) -> tuple[str, str, str]:
        """The token's `token_str`; its share in a text where it is first, and later: empty if only the whole tells."""
        if token not in self._pieces:
            decode, first, later = self.tokenizer.decode, "", ""
            if self._piecewise:
                first = decode([token], skip_special_tokens=True)
                later = decode([token, token], skip_special_tokens=True)[len(first) :]
            self._pieces[token] = decode([token]), first, later
        return self._pieces[token]

    @torch.inference_mode()  # type: ignore[untyped-decorator]
    def _become_fast(self) -> bool:
        """Pack the weights and compare with the stock way on a probe; undone where the model doesn't fit."""
        mask, name = self.tokenizer.mask_token, type(self.model).__name__
        texts = [f"{mask} a b c {mask} d e", f"{mask}"]
        ids = self._ids(texts)
        masks = self._masks(ids)
        stock = [
            self.model(**self.tokenizer(text, return_tensors="pt").to(self.device)).logits[0]
            for text in texts
        ]
        expected = torch.cat([logits[found] for logits, found in zip(stock, masks)]).float()
        tolerance = (1e-3 if self.model.dtype == torch.float32 else 0.25) * float(expected.std()) + 1e-6
        for linears in (self._packable(), []):
            for parent, child, linear in linears:
                setattr(parent, child, PackedLinear(linear))
            try:
                if (self._logits(self._hidden(ids, masks)) - expected).abs().max() <= tolerance:
                    return True
                logger.warning(
                    f"{name}: the fast path gives another result, with {len(linears)} layers packed."
                )
            except Exception as error:  # whatever a foreign model raises, the stock way still serves it
                logger.warning(f"{name}: the fast path fails with {len(linears)} layers packed: {error!r}.")
            for parent, child, linear in linears:
                setattr(parent, child, linear)
        return False

    def _packable(self) -> list[tuple[nn.Module, str, nn.Linear]]:
        """On a CPU, every Linear: float32 by MKL runs at half of oneDNN's speed on AMD; elsewhere each call saves."""
        native = self.model.dtype in (torch.float32, pick_dtype("auto", self.device))
        if self.device.type != "cpu" or not native or not torch.backends.mkldnn.is_available():
            return []
        return [
            (m, name, c)
            for m in self.model.modules()
            for name, c in m.named_children()
            if type(c) is nn.Linear
        ]
