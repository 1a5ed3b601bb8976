"""TASK=sentence-similarity: how alike a sentence and each of several others are, by the model's own measure."""

from typing import Any

from workers.errors import Malformed, Unprocessable
from workers.settings import Settings
from workers.tasks import Description, Query
from workers.tasks.common.sentence import CUTTING, Recipe, SentenceModel, SentenceTask
from workers.tasks.common.text import (
    TEXT_RULE,
    TEXT_SCHEMA,
    Content,
    check_parameters,
    object_schema,
    require_text,
    schemas,
)
from workers.tasks.common.tokens import Row
from workers.tasks.pipeline import load_model

FORM = '{"source_sentence": "a text", "sentences": ["another", ...]}'


class Task(SentenceTask):
    """A sentence and others in, a number for each of the others out."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        # Without a modules.json sentence-transformers itself takes the mean.
        self.recipe = Recipe.read(settings) or Recipe(["mean"], 0)
        self.rules = CUTTING | {"prompt_name": TEXT_RULE}

    def check(self, inputs: Any, parameters: dict[str, Any]) -> Query:
        check_parameters(parameters, self.rules)
        if not isinstance(inputs, dict) or inputs.keys() != {"source_sentence", "sentences"}:
            raise Malformed(f'"inputs" must be {FORM}')
        sentences, most = inputs["sentences"], self.settings.MAX_INPUTS
        if not isinstance(sentences, list) or not 1 <= len(sentences) <= most:
            raise Malformed(f'"sentences" must be a list of 1 to {most} texts')
        named = {f"sentences[{number}]": text for number, text in enumerate(sentences)}
        rows = [
            self.named_row(name, text, parameters)
            for name, text in {"source_sentence": inputs["source_sentence"], **named}.items()
        ]
        return self.query(inputs, parameters, *rows)

    def named_row(self, name: str, text: Any, parameters: dict[str, Any]) -> Row:
        """Return its tokens; an error names it."""
        text = self.prompt(parameters) + require_text(text, name)
        try:
            return self.cut(parameters, text)
        except Unprocessable as exc:
            raise Unprocessable(f"{name}: {exc}") from exc

    def load(self, instance: int) -> "Similarity":
        return Similarity(self, load_model(self.settings, instance, self.kind), self.recipe)

    def examples(self) -> list[Query]:
        inputs = [{"source_sentence": "a text", "sentences": ["a text " * n]} for n in (1, 20, 100)]
        return [self.check(one, {"truncate": True}) for one in inputs]

    def describe(self) -> Description:
        example = {"source_sentence": "a text", "sentences": ["another", "a third"]}
        several = {"type": "array", "items": TEXT_SCHEMA, "minItems": 1, "maxItems": self.settings.MAX_INPUTS}
        return Description(
            "a sentence and others",
            "a number for each of the others",
            {"inputs": example},
            object_schema({"source_sentence": TEXT_SCHEMA, "sentences": several}),
            schemas(self.rules),
        )


class Similarity(SentenceModel):
    """The loaded model: similarities, as NumPy's float32."""

    def answers(self, contents: list[Content]) -> list[Any]:
        from workers.tasks.common.pooling import SIMILARITIES

        alike = SIMILARITIES[self.task.sentence.get("similarity_fn_name") or "cosine"]
        groups = self.vectors(contents).split([len(content.rows) for content in contents])
        return [alike(group[0], group[1:]).numpy() for group in groups]
