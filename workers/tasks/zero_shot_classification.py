"""TASK=zero-shot-classification: a text and labels that the model needn't know; how well each one fits."""

from typing import Any

from workers.errors import Malformed
from workers.settings import Settings
from workers.tasks import Description, Query
from workers.tasks.common.text import (
    BOOLEAN_RULE,
    TEXT_RULE,
    TEXT_SCHEMA,
    Content,
    TextModel,
    TextTask,
    check_parameters,
    require_text,
    schemas,
    words_rule,
)
from workers.tasks.common.tokens import Row
from workers.tasks.pipeline import Stock, load_pipeline

TEMPLATE = "This example is {}."


class Task(TextTask):
    """What `pipeline("zero-shot-classification")` takes and gives: a pair of texts for each label."""

    checks_at_once = False  # 1 KB holds 64 texts and 100 labels: 6,400 pairs, which take half a second

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        labelled = words_rule(settings.MAX_TOP_K)
        self.rules = {
            "candidate_labels": labelled,
            "hypothesis_template": TEXT_RULE,
            "multi_label": BOOLEAN_RULE,
        }

    def check(self, inputs: Any, parameters: dict[str, Any]) -> Query:
        labels = parameters.get("candidate_labels", [])
        if isinstance(labels, str):
            labels = [label.strip() for label in labels.split(",") if label.strip()]
        parameters = parameters | {"candidate_labels": labels}
        check_parameters(parameters, self.rules)
        template, text = parameters.get("hypothesis_template", TEMPLATE), require_text(inputs)
        # Not more than that: `str.format` would obey a client who asks for a width of a billion.
        if template.count("{}") != 1 or set("{}") & set(template.replace("{}", "")):
            raise Malformed('"hypothesis_template" must have one {} where the label goes, and no other brace')
        return self.query(text, parameters, *self.pairs(text, [template.format(label) for label in labels]))

    def pairs(self, text: str, hypotheses: list[str]) -> list[Row]:
        """Return a row for each hypothesis. The text is tokenised once, and each hypothesis once per request."""
        premise, rows = self.tokens.start(text, self.limit), []
        for hypothesis in hypotheses:
            pair = premise, self.tokens.start(hypothesis, self.limit)
            rows.append(self.fits(self.tokens.join(*pair), is_whole=pair == (text, hypothesis)))
        return rows

    def load(self, instance: int) -> Any:
        kind = ZeroShotClassification if self.settings.FAST else Stock
        return kind(self, load_pipeline(self.settings, instance))

    def examples(self) -> list[Query]:
        labels = ["news", "sports"][: self.settings.MAX_TOP_K]
        return self.fitting("a text", "a text " * 50, candidate_labels=labels)

    def describe(self) -> Description:
        example = {"inputs": "a text", "parameters": {"candidate_labels": ["news", "sports"]}}
        gives = "the labels, the likeliest first, and their scores"
        # One text: with commas between.
        labels = {"anyOf": [TEXT_SCHEMA, self.rules["candidate_labels"].schema]}
        template = {"type": "string", "pattern": r"^[^{}]*\{\}[^{}]*$"}
        parameters = schemas(self.rules) | {"candidate_labels": labels, "hypothesis_template": template}
        return Description("a text", gives, example, TEXT_SCHEMA, parameters)


class ZeroShotClassification(TextModel):
    """The loaded pipeline."""

    per_text = True

    def answers(self, contents: list[Content]) -> list[Any]:
        logits = iter(self.logits([row for content in contents for row in content.rows]))
        return [self.answer(content, logits) for content in contents]

    def answer(self, content: Content, logits: Any) -> Any:
        outputs = [
            {"candidate_label": label, "sequence": content.inputs, "logits": next(logits)[None]}
            for label in content.parameters["candidate_labels"]
        ]
        return self.pipe.postprocess(outputs, multi_label=content.parameters.get("multi_label", False))
