"""TASK=question-answering: a question and a text that holds the answer; where it stands.

Transformers 5 dropped its pipeline. This answers as that of 4.57 did, from the model's start and end of every window.
"""

from itertools import groupby
from typing import Any

from workers.errors import Malformed, Unprocessable
from workers.settings import Settings
from workers.tasks import Description, Query
from workers.tasks.common.text import (
    BOOLEAN_RULE,
    TEXT_SCHEMA,
    Content,
    TextModel,
    TextTask,
    check_parameters,
    number_rule,
    object_schema,
    require_text,
    schemas,
)
from workers.tasks.common.tokens import Row
from workers.tasks.pipeline import load_model

Edges = tuple[int, int] | None  # the first and the last token of a word


class Task(TextTask):
    """What `pipeline("question-answering")` took and gave."""

    keeps_encodings = True

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self.rules = {
            "top_k": number_rule(1, settings.MAX_TOP_K),
            "max_answer_len": number_rule(1, self.longest),
            "handle_impossible_answer": BOOLEAN_RULE,
            "align_to_words": BOOLEAN_RULE,
            "doc_stride": number_rule(0, self.limit),
            "max_seq_len": number_rule(1, self.limit),
            "max_question_len": number_rule(1, self.longest),  # never had an effect with today's tokenizers
        }

    def check(self, inputs: Any, parameters: dict[str, Any]) -> Query:
        if not isinstance(inputs, dict) or inputs.keys() != {"question", "context"}:
            raise Malformed('"inputs" must be {"question": "...", "context": "..."}')
        question, context = (require_text(inputs[name], name) for name in ("question", "context"))
        check_parameters(parameters, self.rules)
        length = parameters.get("max_seq_len", min(self.longest, 384))
        stride = parameters.get("doc_stride", min(length // 2, 128))
        try:
            or_else = f', or "max_seq_len": {self.limit}'
            windows = self.windows(length, stride, question, context, or_else)
        except Unprocessable:
            raise
        except ValueError:
            raise Unprocessable(f"the question leaves no room for the context in {length} tokens") from None
        return self.query(inputs, parameters, *windows)

    def load(self, instance: int) -> "QuestionAnswering":
        return QuestionAnswering(self, load_model(self.settings, instance, "AutoModelForQuestionAnswering"))

    def examples(self) -> list[Query]:
        short = {"question": "Who?", "context": "It was me."}
        return self.fitting(short, {"question": "What is it?", "context": "It is a text. " * 40})

    def describe(self) -> Description:
        example = {"inputs": {"question": "Where does Ada live?", "context": "Ada lives in London."}}
        inputs, gives = (
            object_schema({"question": TEXT_SCHEMA, "context": TEXT_SCHEMA}),
            "the answer, as it stands in the context",
        )
        return Description("a question and a context", gives, example, inputs, schemas(self.rules))


class QuestionAnswering(TextModel):
    """The loaded model."""

    def answers(self, contents: list[Content]) -> list[Any]:
        rows = [row for content in contents for row in content.rows]
        logits = iter(self.logits(rows).split([len(row.ids) for row in rows]))
        return [self.answer(content, [next(logits).numpy() for _ in content.rows]) for content in contents]

    def answer(self, content: Content, logits: list[Any]) -> Any:
        answers: dict[str, dict[str, Any]] = {}  # by their text in lower case: those that read alike add up
        top_k, no_answer = content.parameters.get("top_k", 1), 1.0
        for row, window in zip(content.rows, logits):
            no_answer = min(no_answer, self.add(answers, row, window, top_k, content.parameters))
        candidates = [*answers.values()]
        if content.parameters.get("handle_impossible_answer"):
            candidates.append({"score": no_answer, "start": 0, "end": 0, "answer": ""})
        best = sorted(candidates, key=lambda answer: answer["score"], reverse=True)[:top_k]
        return best[0] if len(best) == 1 else best

    def add(
        self,
        answers: dict[str, dict[str, Any]],
        row: Row,
        logits: Any,
        top_k: int,
        parameters: dict[str, Any],
    ) -> float:
        """Add a window's best spans to the answers; return the score of there being no answer in it."""
        from transformers.pipelines.document_question_answering import select_starts_ends

        offsets, whole_words = row.each("offsets"), parameters.get("align_to_words", True)
        edges: list[Edges] = word_edges(row.each("word_ids")) if whole_words else [None] * len(offsets)
        cls = self.pipe.tokenizer.cls_token_id
        outside = [part != 1 and token != cls for part, token in zip(row.each("sequence_ids"), row.ids)]
        *spans, no_answer = select_starts_ends(
            logits[None, :, 0],
            logits[None, :, 1],
            [outside],
            None,
            top_k=2 * top_k + 10 if whole_words else top_k,  # some are joined below
            handle_impossible_answer=True,
            max_answer_len=parameters.get("max_answer_len", 15),
        )
        for first, last, score in zip(*spans):
            start, end = place(offsets, edges, first.item(), last.item())
            text = str(row.pair)[start:end]
            if same := answers.get(text.lower()):
                same["score"] += score.item()
            else:
                answers[text.lower()] = {"score": score.item(), "start": start, "end": end, "answer": text}
        return no_answer


def word_edges(words: list[int | None]) -> list[Edges]:
    """Return for each token the first and the last token of the word that it belongs to; None where it belongs to none."""
    edges: list[Edges] = []
    for word, group in groupby(range(len(words)), words.__getitem__):
        tokens = [*group]
        edges += [None if word is None else (tokens[0], tokens[-1])] * len(tokens)
    return edges


def place(offsets: list[Any], edges: list[Edges], first: int, last: int) -> tuple[int, int]:
    """Return where in the context the tokens `first` to `last` stand, or the whole words that they belong to."""
    if (first_word := edges[first]) and (last_word := edges[last]):
        first, last = first_word[0], last_word[1]
    return offsets[first][0], offsets[last][1]
