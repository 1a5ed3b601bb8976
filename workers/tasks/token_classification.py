"""TASK=token-classification: a text; its entities, token by token or joined, and where they stand in it."""

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
    require_text,
    schemas,
    words_rule,
)
from workers.tasks.common.tokens import Row
from workers.tasks.pipeline import Stock, load_pipeline


class Task(TextTask):
    """What `pipeline("token-classification")` takes and gives."""

    keeps_encodings = True

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self.rules = {
            "aggregation_strategy": choice_rule("none", "simple", "first", "average", "max"),
            "ignore_labels": words_rule(settings.MAX_TOP_K, least=0),  # none: what is outside, too
            "stride": number_rule(0, self.longest // 2),
        }

    def check(self, inputs: Any, parameters: dict[str, Any]) -> Query:
        check_parameters(parameters, self.rules)
        text = require_text(inputs)
        if (stride := parameters.get("stride")) is None:
            return self.query(inputs, parameters, self.row(text))
        if parameters.get("aggregation_strategy", "none") == "none":
            raise Malformed(
                '"stride" joins what overlaps: it needs an "aggregation_strategy" other than none'
            )
        return self.query(inputs, parameters, *self.windows(self.longest, stride, text))

    def load(self, instance: int) -> Any:
        pipe = load_pipeline(self.settings, instance)
        return (TokenClassification if self.settings.FAST and pipe.tokenizer.is_fast else Stock)(self, pipe)

    def describe(self) -> Description:
        example = {"inputs": "Ada lives in London.", "parameters": {"aggregation_strategy": "simple"}}
        gives = "its entities and where they stand"
        return Description("a text", gives, example, TEXT_SCHEMA, schemas(self.rules))


class TokenClassification(TextModel):
    """The loaded pipeline."""

    def answers(self, contents: list[Content]) -> list[Any]:
        rows = [row for content in contents for row in content.rows]
        outputs = map(self.output, rows, self.logits(rows).split([len(row.ids) for row in rows]))
        return [self.answer(content, [next(outputs) for _ in content.rows]) for content in contents]

    def output(self, row: Row, logits: Any) -> dict[str, Any]:
        """Return what the pipeline's own forward gives for a row."""
        return {
            "sentence": row.text,
            "logits": logits[None],
            "input_ids": [row.ids],
            "offset_mapping": [row.each("offsets")],
            "special_tokens_mask": logits.new_tensor([row.each("special_tokens_mask")]),
        }

    def answer(self, content: Content, outputs: list[dict[str, Any]]) -> Any:
        return self.pipe.postprocess(outputs, **self.pipe._sanitize_parameters(**content.parameters)[2])
