"""Each parameter that docs/models.md lists: the answer with it is that of the plain pipeline, or of what stands for one.

The table there and the list here are one. Images and sounds are compared in test_pipeline_tasks.py, generated text in
test_generation_http.py; both name their parameters, and a parameter without a case fails here.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from test_generation_http import PARAMETERS as GENERATION
from test_pipeline_tasks import NEEDED, TABLE_PARAMETERS
from test_pipeline_tasks import PARAMETERS as MEDIA
from transformers.pipelines import document_question_answering
from transformers.pipelines.document_question_answering import select_starts_ends

from docs.generate import task_rules
from tests.support import small_media
from tests.support.embedding_models import sentence_model, small_bert
from tests.support.small_models import ENTAILMENT, ENTITIES, make_model, save, wordpiece_tokenizer
from workers import tasks
from workers.errors import Malformed, Unprocessable
from workers.settings import Settings
from workers.tasks.common import media
from workers.web.replies import rendered

Oracle = Callable[..., Any]  # the inputs and their parameters: the answer to them alone
TEXT = "Old dogs run quickly over the river, unbelievable cafe 42!"
LONG = "first of all " + "of the old house on the hill " * 100 + "the end"
QUESTION = {"question": "which old dog runs?", "context": f"{TEXT} " * 12}
IMAGE = media.example_image(1, 64, 48)


def same(one: Any, other: Any) -> bool:
    """Whether two answers in JSON are the same, but for rounding: the scores of an untrained model are small."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[name], other[name]) for name in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-3, abs_tol=1e-5)
    return bool(one == other)


# --- oracles ------------------------------------------------------------------------------------------------------------


def plain(task: str) -> Callable[[str], Oracle]:
    """The plain pipeline of that name."""

    def loaded(where: str) -> Oracle:
        return transformers.pipeline(task, model=where, device="cpu", dtype=torch.float32)

    return loaded


def cut_by_pipeline(where: str) -> Oracle:
    """The plain pipeline, which takes what its tokenizer cuts by other names."""
    pipe = plain("feature-extraction")(where)

    def vectors(text: str, truncate: bool, truncation_direction: str = "right") -> Any:
        pipe.tokenizer.truncation_side = truncation_direction.lower()
        return pipe(text, tokenize_kwargs={"truncation": truncate, "max_length": 512})

    return vectors


def encoded(where: str) -> Oracle:
    """The vectors of sentence-transformers."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(where, device="cpu")

    def vector(
        text: Any,
        truncate: bool = True,
        truncation_direction: str = "right",
        prompt_name: str | None = None,
        normalize: bool = False,
        dimensions: int | None = None,
        encoding_format: str = "float",
    ) -> Any:
        model.tokenizer.truncation_side = truncation_direction.lower()
        return model.encode(
            text, prompt_name=prompt_name, normalize_embeddings=normalize, truncate_dim=dimensions
        ).tolist()

    vector.model = model  # type: ignore[attr-defined]
    return vector


def compared(where: str) -> Oracle:
    """The similarities of sentence-transformers."""
    encode: Any = encoded(where)

    def similarities(inputs: dict[str, Any], **parameters: Any) -> Any:
        source, *others = encode([inputs["source_sentence"], *inputs["sentences"]], **parameters)
        return encode.model.similarity([source], others)[0].tolist()

    return similarities


def ranked(where: str) -> Oracle:
    """The score of sentence-transformers' CrossEncoder."""
    from sentence_transformers import CrossEncoder

    model = CrossEncoder(where, device="cpu")

    def score(
        inputs: dict[str, str], truncate: bool, truncation_direction: str = "right", raw_scores: bool = False
    ) -> float:
        model.tokenizer.truncation_side = truncation_direction.lower()
        activation = torch.nn.Identity() if raw_scores else None
        return float(model.predict([tuple(inputs.values())], activation_fn=activation)[0])

    return score


def answered_in_4(where: str) -> Oracle:
    """The pipeline that Transformers 5 has dropped: `preprocess` and `postprocess` of 4.57's QuestionAnsweringPipeline."""
    model = transformers.AutoModelForQuestionAnswering.from_pretrained(where).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(where)

    def answer(
        inputs: dict[str, str],
        top_k: int = 1,
        handle_impossible_answer: bool = False,
        max_answer_len: int = 15,
        align_to_words: bool = True,
        max_seq_len: int = 384,
        doc_stride: int | None = None,
        max_question_len: int = 64,  # of tokenizers without a fast form only
    ) -> Any:
        stride = min(max_seq_len // 2, 128) if doc_stride is None else doc_stride
        cut = {"truncation": "only_second", "max_length": max_seq_len, "stride": stride}
        more = {"return_token_type_ids": True, "return_overflowing_tokens": True}
        windows = tokenizer(inputs["question"], inputs["context"], **cut, **more)
        answers: list[dict[str, Any]] = []
        no_answer = 1000000
        for n in range(len(windows["input_ids"])):
            ids, encoding = windows["input_ids"][n], windows[n]
            with torch.no_grad():
                types = torch.tensor([windows["token_type_ids"][n]])
                found = model(torch.tensor([ids]), token_type_ids=types)
            mask = [
                part != 1 and token != tokenizer.cls_token_id
                for part, token in zip(windows.sequence_ids(n), ids)
            ]
            *spans, no_answer = select_starts_ends(
                found.start_logits,
                found.end_logits,
                mask,
                None,
                no_answer,
                top_k * 2 + 10 if align_to_words else top_k,
                handle_impossible_answer,
                max_answer_len,
            )
            for first, last, score in zip(*spans):
                start, end = indices(encoding, first, last, align_to_words)
                text = inputs["context"][start:end]
                alike = [one for one in answers if one["answer"].lower() == text.lower()]
                if alike:
                    alike[0]["score"] += score.item()
                else:
                    answers.append({"score": score.item(), "start": start, "end": end, "answer": text})
        if handle_impossible_answer:
            answers.append({"score": no_answer, "start": 0, "end": 0, "answer": ""})
        answers = sorted(answers, key=lambda one: one["score"], reverse=True)[:top_k]
        return answers[0] if len(answers) == 1 else answers

    return answer


def indices(encoding: Any, first: int, last: int, align_to_words: bool) -> tuple[int, int]:
    """4.57's `get_indices`."""
    if not align_to_words:
        return encoding.offsets[first][0], encoding.offsets[last][1]
    try:
        words = encoding.token_to_word(first), encoding.token_to_word(last)
        return encoding.word_to_chars(words[0], 1)[0], encoding.word_to_chars(words[1], 1)[1]
    except Exception:
        return encoding.offsets[first][0], encoding.offsets[last][1]


def answered_on_paper(where: str) -> Oracle:
    """The plain pipeline of documents."""
    pipe = plain("document-question-answering")(where)

    def answer(inputs: dict[str, Any], **parameters: Any) -> Any:
        return pipe(media.read_image(IMAGE), inputs["question"], **parameters)

    return answer


# --- models -------------------------------------------------------------------------------------------------------------


def bert(head: str, **config: Any) -> Callable[[Path], str]:
    return lambda folder: save(folder, "bert", make_model("bert", head, **config))


def sentences(folder: Path) -> str:
    sentence_model(folder, prompts={"query": "Look for: "}, max_seq_length=16)
    return str(folder / "model")


def reranker(folder: Path) -> str:
    return small_bert(folder, "ForSequenceClassification", num_labels=1)


def layout(folder: Path) -> str:
    """A model of documents: it gets the words and where they stand, as Tesseract reads them."""
    tokenizer = wordpiece_tokenizer()
    tokenizer.model_max_length = 512
    config = transformers.LayoutLMConfig(**small_media.SIZE, vocab_size=len(tokenizer))
    small_media.save(folder, transformers.LayoutLMForQuestionAnswering(config), tokenizer)
    return str(folder)


def words_on_paper(*_: Any, **__: Any) -> tuple[list[str], list[list[int]]]:
    words = TEXT.split()
    return words, [[50 * i, 10, 50 * i + 40, 20] for i in range(len(words))]


# --- the cases ----------------------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """A row of the table in docs/models.md."""

    model: Callable[[Path], str]
    oracle: Callable[[str], Oracle]
    inputs: Any
    cases: list[dict[str, Any]]
    needed: dict[str, Any] = {}  # noqa: RUF012  without one of these the inputs are rejected
    silent: tuple[str, ...] = ()  # changes nothing, neither here nor there


LABELLED = {"id2label": ENTAILMENT, "label2id": {label: i for i, label in ENTAILMENT.items()}}
MASKED = "the old [MASK] runs over the river"
ROWS = {
    "fill-mask": Row(
        bert("MaskedLM"),
        plain("fill-mask"),
        MASKED,
        [{"top_k": 2}, {"targets": ["dog", "river"]}, {"targets": ["dog", "old"], "top_k": 1}],
    ),
    "text-classification": Row(
        bert("SequenceClassification", num_labels=3),
        plain("text-classification"),
        TEXT,
        [{"top_k": 2}, {"function_to_apply": "sigmoid"}, {"function_to_apply": "none", "top_k": 3}],
    ),
    "token-classification": Row(
        bert("TokenClassification", id2label=ENTITIES),
        plain("token-classification"),
        TEXT,
        [
            {"aggregation_strategy": "simple"},
            {"ignore_labels": []},
            {"aggregation_strategy": "max", "ignore_labels": ["PER", "O"]},
            {"aggregation_strategy": "first", "stride": 17},
        ],
    ),
    "zero-shot-classification": Row(
        bert("SequenceClassification", **LABELLED),
        plain("zero-shot-classification"),
        TEXT,
        [{"hypothesis_template": "It is {}!"}, {"multi_label": True}],
        needed={"candidate_labels": ["dog", "old river", "42"]},
    ),
    "question-answering": Row(
        bert("QuestionAnswering"),
        answered_in_4,
        QUESTION,
        [
            {"top_k": 9},
            {"max_answer_len": 2},
            {"handle_impossible_answer": True, "top_k": 40},
            {"align_to_words": False},
            {"max_seq_len": 60},
            {"max_seq_len": 60, "doc_stride": 7},
            {"max_question_len": 2},
        ],
        silent=("max_question_len",),
    ),
    "feature-extraction": Row(
        small_bert, cut_by_pipeline, LONG, [{"truncation_direction": "left"}], needed={"truncate": True}
    ),
    "feature-extraction, sentence-transformers": Row(
        sentences,
        encoded,
        LONG,
        [
            {"truncation_direction": "Left"},
            {"prompt_name": "query"},
            {"normalize": True},
            {"dimensions": 8},
            {"encoding_format": "float"},
        ],
        needed={"truncate": True},
        silent=("encoding_format",),
    ),
    "sentence-similarity": Row(
        sentences,
        compared,
        {"source_sentence": LONG, "sentences": [TEXT, LONG[::-1]]},
        [{"truncation_direction": "left"}, {"prompt_name": "query"}],
        needed={"truncate": True},
    ),
    "text-ranking": Row(
        reranker,
        ranked,
        {"query": TEXT, "text": LONG},
        [{"truncation_direction": "left"}, {"raw_scores": True}],
        needed={"truncate": True},
    ),
    "document-question-answering": Row(
        layout,
        answered_on_paper,
        {"image": IMAGE, "question": "which old dog runs?"},
        [{"top_k": 3}, {"max_answer_len": 1}, {"handle_impossible_answer": True, "top_k": 60}],
    ),
}


@pytest.fixture
def ocr(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tesseract, which reads the same words in every image."""
    monkeypatch.setattr(document_question_answering, "TESSERACT_LOADED", True)
    monkeypatch.setattr(document_question_answering, "apply_tesseract", words_on_paper)


@pytest.mark.filterwarnings("ignore")  # Transformers' own
@pytest.mark.usefixtures("ocr")
@pytest.mark.parametrize("name", ROWS)
def test_parameter_changes_the_answer_to_that_of_the_plain_pipeline(name: str, tmp_path: Path) -> None:
    row = ROWS[name]
    where = row.model(tmp_path)
    task = tasks.make(Settings(MODEL=where, TASK=name.partition(",")[0], TORCH_THREADS=1))
    model, expected = task.load(0), row.oracle(where)
    asked = [row.needed, *(row.needed | case for case in row.cases)]
    contents = [task.check(row.inputs, dict(parameters)).content for parameters in asked]
    answers = [json.loads(rendered(answer)) for answer in model(contents)]
    for parameters, answer in zip(asked, answers, strict=True):
        assert same(answer, json.loads(rendered(expected(row.inputs, **parameters)))), parameters
    for case, answer in zip(row.cases, answers[1:], strict=True):
        assert same(answer, answers[0]) == (case.keys() <= set(row.silent)), f"what {case} changes"
    for needed in row.needed:
        with pytest.raises((Malformed, Unprocessable)):
            task.check(row.inputs, {key: value for key, value in row.needed.items() if key != needed})


def parameters_with_a_case() -> dict[str, set[str]]:
    """The parameters of each row that a case has, here and in the tests of images, sounds, tables and generated text."""
    found = {name: set[str]().union(row.needed, *row.cases) for name, row in ROWS.items()}
    found["text-generation"] = set[str]().union(*GENERATION)
    found["table-question-answering"] = set[str]().union(*TABLE_PARAMETERS)
    kinds = {"ctc": ", CTC", "whisper": ", Whisper"}
    for name, (task, _) in small_media.MODELS.items():
        row = found.setdefault(task + kinds.get(name, ""), set())
        row.update(NEEDED.get(name, {}), *MEDIA.get(name, []))
    return found


@pytest.mark.parametrize(("row", "rules"), [(name, rules) for name, _, rules in task_rules()])
def test_each_parameter_of_the_docs_is_compared_with_the_plain_pipeline(
    row: str, rules: dict[str, Any]
) -> None:
    assert parameters_with_a_case().get(row.replace("`", ""), set()) == rules.keys()
