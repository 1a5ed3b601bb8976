"""What the tasks on models of sentence-transformers share: how those make a vector of a text, by the model's own files."""

from typing import TYPE_CHECKING, Any, NamedTuple

from workers.errors import Unprocessable
from workers.settings import Settings
from workers.tasks.common.text import (
    BOOLEAN_RULE,
    Content,
    TextModel,
    TextTask,
    choice_rule,
    read_model_json,
)
from workers.tasks.common.tokens import Row

if TYPE_CHECKING:
    from torch import Tensor

# text-embeddings-inference has its directions capitalised, its predecessors don't.
DIRECTIONS = choice_rule("left", "right", "Left", "Right")
CUTTING = {"truncate": BOOLEAN_RULE, "truncation_direction": DIRECTIONS}
# What a Pooling's configuration said once, in the order in which several vectors stand side by side.
MODES = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}


class Recipe(NamedTuple):
    """What makes a text's vector of its tokens', by the files of a sentence-transformers model."""

    modes: list[str]
    dimensions: int
    include_prompt: bool = True
    # Dense or Normalize, its folder, its configuration
    then: tuple[tuple[str, str, dict[str, Any]], ...] = ()

    @classmethod
    def read(cls, settings: Settings) -> "Recipe | None":
        """Return the model's; None where there is no modules.json. Raises ValueError where it names what is not known here."""
        recipe = None
        for kind, folder in read_modules(settings):
            config = read_model_json(settings, f"{folder}/config.json") if folder else {}
            if kind == "Pooling":
                recipe = cls.of(config)
            elif recipe and kind in ("Dense", "Normalize"):
                size = config.get("out_features", recipe.dimensions)
                recipe = recipe._replace(dimensions=size, then=(*recipe.then, (kind, folder, config)))
            elif kind != "Transformer":
                raise ValueError(f"modules.json: {kind} is not known here; Pooling, Dense and Normalize are")
        return recipe

    @classmethod
    def of(cls, config: dict[str, Any]) -> "Recipe":
        """Return that of a Pooling's configuration, in its old form or its new one."""
        modes = config.get("pooling_mode") or [mode for name, mode in MODES.items() if config.get(name)]
        modes = [modes] if isinstance(modes, str) else modes or ["mean"]
        size = config.get("embedding_dimension") or config["word_embedding_dimension"]
        return cls(modes, size * len(modes), config.get("include_prompt", True))


def read_modules(settings: Settings) -> list[tuple[str, str]]:
    """Return what modules.json names, where there is one: kind and folder of each."""
    modules: Any = read_model_json(settings, "modules.json")
    return [(module["type"].rpartition(".")[2], module["path"]) for module in modules]


# Of these sentence-transformers takes the encoder alone: AutoModel would want a decoder, too.
ENCODER_OF = {"t5": "T5EncoderModel", "mt5": "MT5EncoderModel", "umt5": "UMT5EncoderModel"}


class SentenceTask(TextTask):
    """What the tasks on models of sentence-transformers share: prompts, the limit, cutting what is longer."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self.sentence = read_model_json(settings, "config_sentence_transformers.json")
        self.prompts = {"query": "", "document": ""} | self.sentence.get("prompts", {})
        bert = read_model_json(settings, "sentence_bert_config.json")
        self.limit = min(self.limit, bert.get("max_seq_length") or self.limit)
        self.lowers = bool(bert.get("do_lower_case"))
        if self.lowers:
            lower_case(self.tokens.backend)
        self.kind = ENCODER_OF.get(self.config.get("model_type", ""), "AutoModel")

    def prompt(self, parameters: dict[str, Any]) -> str:
        """Return what `prompt_name` puts before a text; without one, what the model's default does."""
        name = parameters.get("prompt_name", self.sentence.get("default_prompt_name"))
        if name and name not in self.prompts:
            known = ", ".join(f'"{known}"' for known in sorted(self.prompts))
            raise Unprocessable(f"the model knows the prompts {known}; send the name of one")
        return self.prompts.get(name) or ""

    def cut(self, parameters: dict[str, Any], text: str, pair: str | None = None) -> Row:
        """Return the tokens of a text, or of a pair; those that the model can take where `truncate` says so."""
        direction = parameters.get("truncation_direction", "right").lower()
        start, pair_start = self.starts(self.limit, text, pair, direction == "left")
        row = self.tokens.join(start, pair_start)
        if len(row.ids) > self.limit and parameters.get("truncate"):
            return self.tokens.join(start, pair_start, self.limit, direction)
        is_whole = (start, pair_start) == (text, pair)
        return self.fits(row, is_whole, or_else=', or "truncate": true')

    def skip(self, prompt: str) -> int:
        """Return how many tokens a prompt puts before a text's own, as sentence-transformers counts them."""
        return self.tokens.count(prompt) - self.tokens.ends_special


class SentenceModel(TextModel):
    """A loaded instance of a model of sentence-transformers: texts to vectors."""

    task: SentenceTask

    def __init__(self, task: Any, loaded: Any, recipe: Recipe | None) -> None:
        if task.lowers:
            lower_case(loaded.tokenizer.backend_tokenizer)
        super().__init__(task, loaded)
        if recipe:
            from workers.tasks.common.pooling import Embedder  # needs torch

            self.leaves_prompt_out = not recipe.include_prompt
            self.embed = Embedder(self.encoder, task.settings, recipe)

    def vectors(self, contents: list[Content]) -> "Tensor":
        """Return the vectors: [rows of all contents, dimensions], float32, on the CPU."""
        skips = [self.skip(content) if self.leaves_prompt_out else 0 for content in contents]
        rows = [row for content in contents for row in content.rows]
        per_row = [skip for skip, content in zip(skips, contents) for _ in content.rows]
        return self.embed(*self.batch(rows), per_row).cpu()

    def skip(self, content: Content) -> int:
        """Return how many tokens of each row are a prompt's."""
        prompt = "" if is_ids(content.inputs) else self.task.prompt(content.parameters)
        return self.task.skip(prompt) if prompt else 0


def lower_case(backend: Any) -> None:
    """Make a tokenizer read every text in lower case."""
    from tokenizers.normalizers import Lowercase, Sequence

    backend.normalizer = Sequence([Lowercase(), *filter(None, [backend.normalizer])])


def is_ids(inputs: Any) -> bool:
    """Return whether it is a list of token ids."""
    return isinstance(inputs, list) and bool(inputs) and all(type(one) is int for one in inputs)
