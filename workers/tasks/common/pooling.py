"""From the vectors of a text's tokens to the text's own: what sentence-transformers puts behind the encoder."""

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from workers.settings import Settings
from workers.tasks.common.encoder import Encoder
from workers.tasks.common.probe import Rows
from workers.tasks.common.text import find

SENTENCE = "sentence_embedding"  # the name of a text's vector among modules
ONE_TOKEN = {"cls": 0, "lasttoken": -1}


class Embedder:
    """Make a float32 vector of each text's token ids."""

    def __init__(self, encoder: Encoder, settings: Settings, recipe: Any) -> None:
        self.encoder, self.modes = encoder, recipe.modes
        self.then = [module(settings, *one).to(encoder.device) for one in recipe.then]
        self.normalizes = bool(self.then) and isinstance(self.then[-1], Normalize)

    @torch.inference_mode()  # type: ignore[untyped-decorator]
    def __call__(self, rows: Rows, types: Rows | None, skips: Sequence[int]) -> Tensor:
        """[texts, dimensions]. `skips`: how many of each text's first tokens its vector leaves out."""
        places = [range(min(skip, len(row) - 1), len(row)) for row, skip in zip(rows, skips)]
        if len(self.modes) == 1 and (end := ONE_TOKEN.get(self.modes[0])) is not None:
            vectors = self.encoder(rows, [[place[end]] for place in places], types).float()
        else:
            states = self.encoder(rows, places, types).float().split(list(map(len, places)))
            vectors = torch.stack([self.pool(x, place.start) for x, place in zip(states, places)])
        for module in self.then:
            vectors = module(vectors)
        return vectors

    def pool(self, x: Tensor, skip: int) -> Tensor:
        return torch.cat([pooled(x, skip, mode) for mode in self.modes])


def pooled(x: Tensor, skip: int, mode: str) -> Tensor:
    """Return one vector of those of a text's tokens [tokens, hidden], before which `skip` others stand."""
    match mode:
        case "cls" | "lasttoken":
            return x[ONE_TOKEN[mode]]
        case "max":
            return x.amax(0)
        case "mean":
            return x.mean(0)
        case "mean_sqrt_len_tokens":
            return x.sum(0) / len(x) ** 0.5
        case "weightedmean":
            weights = torch.arange(skip + 1.0, skip + 1.0 + len(x), device=x.device)
            return weights @ x / weights.sum()
    raise ValueError(f"{mode} is not a pooling mode that this server knows")


class Normalize(nn.Module):  # type: ignore[misc]
    """Scale vectors to length 1."""

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=-1)


def module(settings: Settings, kind: str, folder: str, config: dict[str, Any]) -> nn.Module:
    """Return a Dense or a Normalize. Raises ValueError where the configuration asks for more than is known here."""
    known = {"module_input_name", "module_output_name"}
    names = {config.get(name) or SENTENCE for name in known}
    if kind == "Dense":
        known |= {"in_features", "out_features", "bias", "activation_function"}
    if config.keys() - known or names != {SENTENCE}:
        raise ValueError(f"{folder}: a {kind} of this kind is not known here: {config}")
    return dense(settings, folder, config) if kind == "Dense" else Normalize()


def dense(settings: Settings, folder: str, config: dict[str, Any]) -> nn.Module:
    """Return a Linear and its activation."""
    path = find(settings.MODEL, f"{folder}/model.safetensors")
    if not path:
        raise ValueError(
            f"{folder} has no model.safetensors; save the model again with today's sentence-transformers"
        )
    linear = nn.Linear(config["in_features"], config["out_features"], bias=config.get("bias", True))
    linear.load_state_dict({name.removeprefix("linear."): w for name, w in load_file(path).items()})
    name = config.get("activation_function", "torch.nn.modules.activation.Tanh")
    return nn.Sequential(linear.float().eval(), activation(name))


def activation(name: str) -> nn.Module:
    """Return the activation of torch.nn that a configuration names. Raises ValueError for anything else: it would be run."""
    module, _, kind = name.rpartition(".")
    found = getattr(importlib.import_module(module), kind, None) if module.startswith("torch.nn") else None
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise ValueError(f"{name} is not an activation of torch.nn")
    return found()


SIMILARITIES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {  # of one vector to several
    "cosine": lambda one, others: F.normalize(others, dim=-1) @ F.normalize(one, dim=-1),
    "dot": lambda one, others: others @ one,
    "euclidean": lambda one, others: -(others - one).norm(dim=-1),
    "manhattan": lambda one, others: -(others - one).abs().sum(-1),
}
