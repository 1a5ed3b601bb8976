"""TASK=text-ranking: how well a text answers a query, by a cross-encoder: the score of `CrossEncoder.predict`.

`POST /rerank`, in workers/protocols/rerank.py, asks it for many texts at once.
"""

import math
from typing import Any

from workers.errors import Malformed
from workers.settings import Settings
from workers.tasks import Description, Query
from workers.tasks.common.sentence import CUTTING, SentenceTask, read_modules
from workers.tasks.common.text import (
    BOOLEAN_RULE,
    TEXT_SCHEMA,
    Content,
    TextModel,
    check_parameters,
    object_schema,
    require_text,
    schemas,
)
from workers.tasks.pipeline import load_model

SIGMOID = "torch.nn.modules.activation.Sigmoid"


class Task(SentenceTask):
    """A query and a text in, a number out."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        if unknown := {kind for kind, _ in read_modules(settings)} - {"Transformer"}:
            raise ValueError(
                f"modules.json: {unknown.pop()} is not known here; a reranker is a Transformer only"
            )
        self.rules = CUTTING | {"raw_scores": BOOLEAN_RULE}

    def check(self, inputs: Any, parameters: dict[str, Any]) -> Query:
        check_parameters(parameters, self.rules)
        if not isinstance(inputs, dict) or inputs.keys() != {"query", "text"}:
            raise Malformed('"inputs" must be {"query": "a text", "text": "another"}')
        query, text = (require_text(inputs[name], name) for name in ("query", "text"))
        return self.query(inputs, parameters, self.cut(parameters, self.prompt({}) + query, text))

    def load(self, instance: int) -> "Ranker":
        return Ranker(self, load_model(self.settings, instance, "AutoModelForSequenceClassification"))

    def examples(self) -> list[Query]:
        inputs = [{"query": "a question", "text": "a text " * n} for n in (1, 20, 100)]
        return [self.check(one, {"truncate": True}) for one in inputs]

    def describe(self) -> Description:
        example = {"query": "What is the capital of France?", "text": "Paris is the capital of France."}
        inputs = object_schema({"query": TEXT_SCHEMA, "text": TEXT_SCHEMA})
        gives = "how well the text answers it"
        return Description("a query and a text", gives, {"inputs": example}, inputs, schemas(self.rules))

    def score(self, raw: float) -> float:
        """Return the score of a raw score. The raw ones have the finer order: as float32, those of 20 and of 25 are both 1.0."""
        if self.activation == SIGMOID:
            return 1 / (1 + math.exp(-raw)) if raw > -700 else 0.0
        import torch  # for other activations only: where HTTP is, it may not be needed otherwise

        from workers.tasks.common.pooling import activation

        return float(activation(self.activation)(torch.tensor(raw)))

    def first_tokens(self, text: str, n: int) -> str:
        """Return the text up to its `n`th token; all of it if its tokenizer can't tell where that is."""
        backend: Any = getattr(self.tokens, "backend", None)
        if backend is None or n >= self.limit:
            return text
        start = text[: 64 * n]  # to tokenise all of a megabyte takes a second
        (encoding,) = backend.encode_batch([start], add_special_tokens=False)
        return text[: encoding.offsets[n - 1][1]] if len(encoding) > n else text

    @property
    def activation(self) -> str:
        """The activation that the model's files name, as today or as once; else what sentence-transformers takes for one label."""
        return (
            self.sentence.get("activation_fn")
            or self.config.get("sentence_transformers", {}).get("activation_fn")
            or self.config.get("sbert_ce_default_activation_function")
            or SIGMOID
        )


class Ranker(TextModel):
    """The loaded model: scores. `raw_scores`: the model's own number, without the activation."""

    per_text = True

    def __init__(self, task: Task, loaded: Any) -> None:
        from workers.tasks.common.pooling import activation  # needs torch

        labels = loaded.model.config.num_labels
        if labels != 1:
            raise ValueError(f"the model has {labels} labels; a reranker has one")
        super().__init__(task, loaded)
        self.activation = activation(task.activation)

    def answers(self, contents: list[Content]) -> list[Any]:
        raw = self.logits([row for content in contents for row in content.rows])[:, 0]
        scores = self.activation(raw)
        return [
            float(own if content.parameters.get("raw_scores") else score)
            for own, score, content in zip(raw, scores, contents)
        ]
