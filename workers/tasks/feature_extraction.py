"""TASK=feature-extraction: a text's vector.

A sentence-transformers model (it has a modules.json) gives one vector per text, that of `SentenceTransformer.encode`. Any
other gives one per token, those of the stock pipeline: [1, tokens, hidden].
"""

from typing import TYPE_CHECKING, Any

from workers.errors import Unprocessable
from workers.settings import Settings
from workers.tasks import Description, Query
from workers.tasks.common.sentence import CUTTING, Recipe, SentenceModel, SentenceTask, is_ids
from workers.tasks.common.text import (
    BOOLEAN_RULE,
    TEXT_RULE,
    TEXT_SCHEMA,
    Content,
    Rule,
    check_parameters,
    number_rule,
    require_text,
    schemas,
)
from workers.tasks.common.tokens import Row
from workers.tasks.pipeline import load_model

if TYPE_CHECKING:
    from torch import Tensor


class Task(SentenceTask):
    """A text, or its token ids, in; its vector or its tokens' out."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self.recipe = Recipe.read(settings)
        self.embeds = self.recipe is not None
        self.rules = CUTTING
        if self.recipe:
            dimensions = number_rule(1, self.recipe.dimensions)
            float_only = Rule(
                '"float"; POST to /v1/embeddings for base64', lambda form: form == "float", {"const": "float"}
            )
            self.rules = CUTTING | {
                "prompt_name": TEXT_RULE,
                "normalize": BOOLEAN_RULE,
                "dimensions": dimensions,
                "encoding_format": float_only,
            }

    def check(self, inputs: Any, parameters: dict[str, Any]) -> Query:
        check_parameters(parameters, self.rules)
        if is_ids(inputs):
            return self.query(inputs, parameters, self.known(inputs))
        prompt = self.prompt(parameters) if self.recipe else ""
        return self.query(inputs, parameters, self.cut(parameters, prompt + require_text(inputs)))

    def known(self, ids: list[int]) -> Row:
        """Return the row of token ids, if they are this model's, special ones included.

        Another tokenizer's would be other words: many of them are larger, and they don't begin as this model's do. LangChain
        sends OpenAI's unless told not to.
        """
        size = self.config.get("vocab_size") or len(self.tokens)
        if foreign := [token for token in ids if not 0 <= token < size]:
            raise Unprocessable(
                f"{foreign[0]} is not a token of this model; send texts, or its ids, below {size}"
            )
        if ids[: len(self.begin)] != self.begin:
            raise Unprocessable(
                f"the token ids don't begin with {self.begin}, as this model's do; send texts, or its ids, special ones too"
            )
        if len(ids) > self.limit:
            raise Unprocessable(f"there are {len(ids)} tokens; send at most {self.limit}")
        return Row("", None, ids)

    @property
    def begin(self) -> list[int]:
        """The special tokens that every text begins with."""
        return self.tokens.frame[0]

    def load(self, instance: int) -> "FeatureExtraction":
        return FeatureExtraction(self, load_model(self.settings, instance, self.kind), self.recipe)

    def examples(self) -> list[Query]:
        return [self.check("a text " * n, {"truncate": True}) for n in (1, 20, 100)]

    def describe(self) -> Description:
        gives = "its vector" if self.recipe else "the vectors of its tokens"
        ids = {
            "type": "array",
            "items": {"type": "integer", "minimum": 0},
            "minItems": max(1, len(self.begin)),
        }
        if self.begin:
            ids["prefixItems"] = [{"const": token} for token in self.begin]
        inputs = {"anyOf": [TEXT_SCHEMA, ids]}
        return Description("a text", gives, {"inputs": "a text"}, inputs, schemas(self.rules))


class FeatureExtraction(SentenceModel):
    """The loaded model: a vector per text, or one per token, as NumPy's float32."""

    task: Task

    def answers(self, contents: list[Content]) -> list[Any]:
        if self.task.embeds:
            found = zip(self.vectors(contents), contents)
            return [self.shaped(vector, **content.parameters).numpy() for vector, content in found]
        ids, types = self.batch([content.rows[0] for content in contents])
        states = self.encoder(ids, None, types).float().cpu()
        return [part[None].numpy() for part in states.split([len(row) for row in ids])]

    def shaped(
        self, vector: "Tensor", normalize: bool = False, dimensions: int | None = None, **_: Any
    ) -> "Tensor":
        """Return the first `dimensions` of it, of length 1 where the client asks for it or where the whole was."""
        is_unit = self.embed.normalizes
        if dimensions is not None:
            vector, normalize, is_unit = vector[:dimensions], normalize or is_unit, False
        return vector / vector.norm().clamp_min(1e-12) if normalize and not is_unit else vector
