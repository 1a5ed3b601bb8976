"""Any causal language model of Transformers, unmodified, on a cache of slots; `llama.py` is faster for those it knows.

Transformers lets a model's cache have layers of one's own. Ours keep the keys and values of all slots in one tensor,
[slots, heads, tokens, head size], and hand the model those of the slots that are in this step. The rows that continue by one
token go through the model together, padded to the longest by a mask; chunks of prompts one after the other.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from workers.generation.steps import Limits, Row


class Places:
    """Where the step that is running writes in every layer, and how far it reads."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.slots = self.start = torch.zeros(0, dtype=torch.long)
        self.longest = 0


class SlotLayer(CacheLayerMixin):  # type: ignore[misc]
    """The keys and values of all slots in one layer."""

    is_sliding = False  # also where the model's attention is: the mask hides what is too far back

    def __init__(self, places: Places) -> None:
        super().__init__()
        self.places = places

    def lazy_initialization(self, keys: Tensor, values: Tensor) -> None:
        slots, capacity = self.places.limits
        self.keys = keys.new_zeros(slots, keys.shape[1], capacity, keys.shape[3])
        self.values = values.new_zeros(slots, values.shape[1], capacity, values.shape[3])
        self.is_initialized = True

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
        places, n = self.places, keys.shape[2]
        at = places.start[:, None] + torch.arange(n, device=keys.device)
        self.keys.transpose(1, 2)[places.slots[:, None], at] = keys.transpose(1, 2)
        self.values.transpose(1, 2)[places.slots[:, None], at] = values.transpose(1, 2)
        return self.keys[places.slots, :, : places.longest], self.values[places.slots, :, : places.longest]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.places.longest, 0

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return self.places.limits.capacity

    get_max_cache_shape = get_max_length


class StockForward:
    """Rows in, the logits of those that get a token out."""

    def __init__(self, model: Any, limits: Limits) -> None:
        self.model, self.places = model, Places(limits)
        config = model.config.get_text_config()
        self.cache = Cache(layers=[SlotLayer(self.places) for _ in range(config.num_hidden_layers)])
        self.windows = windows(config)

    def __call__(self, rows: Sequence[Row]) -> Tensor:
        """Return the logits behind the last token of each row with a choice, in order: [choices, vocabulary]."""
        found: dict[int, Tensor] = {}
        alike = [i for i, row in enumerate(rows) if len(row.ids) == 1]
        if alike:
            found.update(zip(alike, self._run([rows[i] for i in alike])))
        for i, row in enumerate(rows):
            if i not in found:
                (found[i],) = self._run([row])
        chosen = [found[i] for i, row in enumerate(rows) if row.choice]
        return torch.stack(chosen) if chosen else torch.zeros(0, 0)

    def clear(self, slot: int) -> None:
        """Forget what a slot holds: what is not a number would spoil the next sequence, hidden or not."""
        for layer in self.cache.layers:
            layer.keys[slot].zero_()
            layer.values[slot].zero_()

    def _run(self, rows: Sequence[Row]) -> Tensor:
        """One pass over rows of the same length: the logits behind the last token of each."""
        places, device = self.places, self.model.device
        places.slots = torch.tensor([row.slot for row in rows], device=device)
        places.start = torch.tensor([row.start for row in rows], device=device)
        places.longest = max(row.start + len(row.ids) for row in rows)
        ids = torch.tensor([row.ids for row in rows], device=device)
        at = places.start[:, None] + torch.arange(ids.shape[1], device=device)
        out = self.model(
            input_ids=ids,
            position_ids=at,
            past_key_values=self.cache,
            use_cache=True,
            attention_mask=self._mask(at),
            logits_to_keep=1,
        )
        return out.logits[:, -1]

    def _mask(self, at: Tensor) -> Any:
        """Which keys each token at these positions sees: those before it, as far as the layer's window reaches."""
        keys = torch.arange(self.places.longest, device=at.device)
        seen = (keys <= at[..., None])[:, None]
        masks = {
            kind: self._as_taken(seen if window is None else seen & (keys > at[..., None] - window)[:, None])
            for kind, window in self.windows.items()
        }
        return masks if len(masks) > 1 else next(iter(masks.values()))

    def _as_taken(self, seen: Tensor) -> Tensor:
        """The mask as the model's attention takes it: PyTorch's own which keys are seen, others what to add to their scores."""
        if self.model.config._attn_implementation == "sdpa":
            return seen
        return torch.zeros_like(seen, dtype=self.model.dtype).masked_fill(
            ~seen, torch.finfo(self.model.dtype).min
        )


def windows(config: Any) -> dict[str, int | None]:
    """How far back each kind of layer looks; None: all the way."""
    window = getattr(config, "sliding_window", None)
    if window is None or not getattr(config, "use_sliding_window", True):
        return {"full_attention": None}
    kinds = set(getattr(config, "layer_types", None) or ["sliding_attention"])
    return {kind: window if kind == "sliding_attention" else None for kind in kinds}
