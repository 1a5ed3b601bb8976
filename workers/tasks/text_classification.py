"""TASK=text-classification: a text, or a pair of them; the likeliest label, or the `top_k` of them."""

from typing import Any

from workers.errors import Malformed
from workers.settings import Settings
from workers.tasks import Description, Query
from workers.tasks.common.text import (
    TEXT_SCHEMA,
    Content,
    TextModel,
    TextTask,
    check_parameters,
    choice_rule,
    number_rule,
    object_schema,
    require_text,
    schemas,
)
from workers.tasks.pipeline import Stock, load_pipeline


class Task(TextTask):
    """What `pipeline("text-classification")` takes and gives."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        apply = choice_rule("softmax", "sigmoid", "none")
        self.rules = {"top_k": number_rule(1, settings.MAX_TOP_K), "function_to_apply": apply}

    def check(self, inputs: Any, parameters: dict[str, Any]) -> Query:
        check_parameters(parameters, self.rules)
        if not isinstance(inputs, dict):
            return self.query(inputs, parameters, self.row(require_text(inputs)))
        if inputs.keys() - {"text", "text_pair"} or "text" not in inputs:
            raise Malformed('"inputs" must be a text, or a pair: {"text": "...", "text_pair": "..."}')
        pair = inputs.get("text_pair")
        row = self.row(
            require_text(inputs["text"], "text"), None if pair is None else require_text(pair, "text_pair")
        )
        return self.query(inputs, parameters, row)

    def load(self, instance: int) -> Any:
        kind = TextClassification if self.settings.FAST else Stock
        return kind(self, load_pipeline(self.settings, instance))

    def examples(self) -> list[Query]:
        pair = {"text": "a text", "text_pair": "another text"}
        return self.fitting("a text", pair, "a text " * 50)

    def describe(self) -> Description:
        pair = object_schema({"text": TEXT_SCHEMA}, text_pair={"anyOf": [TEXT_SCHEMA, {"type": "null"}]})
        return Description(
            "a text, or a pair of texts",
            "its labels, the likeliest first",
            {"inputs": "a text"},
            {"anyOf": [TEXT_SCHEMA, pair]},
            schemas(self.rules),
        )


class TextClassification(TextModel):
    """The loaded pipeline."""

    per_text = True

    def answers(self, contents: list[Content]) -> list[Any]:
        logits = self.logits([row for content in contents for row in content.rows])
        return [self.answer(content, row) for content, row in zip(contents, logits)]

    def answer(self, content: Content, logits: Any) -> Any:
        parameters = self.pipe._sanitize_parameters(**content.parameters)[2]
        found = self.pipe.postprocess({"logits": logits[None]}, **parameters)
        # The pipeline wraps what it says of a text, not of a pair, unless `top_k` is given.
        is_wrapped = isinstance(content.inputs, str) and "top_k" not in content.parameters
        return [found] if is_wrapped else found
