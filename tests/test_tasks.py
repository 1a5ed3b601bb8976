"""Every task against its oracle: the plain pipeline, one input at a time. However it was batched, the answer is the same."""

import base64
import io
import json
import os
import random
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from tests.support.small_models import ENTAILMENT, ENTITIES, make_model, make_tokenizer, save
from workers import tasks
from workers.errors import Malformed, Unprocessable
from workers.settings import HERE, Settings
from workers.tasks import pipeline
from workers.tasks.common import encoder, packed
from workers.tasks.common.media import open_image
from workers.tasks.common.packed import PackedLinear, PaddingFree
from workers.tasks.common.probe import differ
from workers.tasks.common.tokens import SlowTokens
from workers.web.replies import rendered

TEXTS = [
    "the dog",
    "a bad one, isn't it?",
    "Old dogs run quickly over the river, unbelievable café 42!",
    "it's " * 60,
    "  中 naïve\n\n the café's  DOG ",
    "the old dog [SEP] runs </s> over [PAD] <pad> it",
]
PAIR = {"text": "the old dog", "text_pair": "runs over the river, it's unbelievable"}
TASKS: dict[str, tuple[str, dict[str, Any], list[tuple[Any, dict[str, Any]]]]] = {
    "text-classification": (
        "SequenceClassification",
        {"num_labels": 3},
        [(text, {}) for text in [*TEXTS, PAIR]]
        + [
            (text, parameters)
            for text in (TEXTS[1], PAIR)
            for parameters in ({"top_k": 1}, {"top_k": 2, "function_to_apply": "sigmoid"}, {"top_k": 9})
        ],
    ),
    "token-classification": (
        "TokenClassification",
        {"id2label": ENTITIES},
        [(text, {}) for text in TEXTS]
        + [
            (text, {"aggregation_strategy": strategy})
            for text in TEXTS[1:3]
            for strategy in ("none", "simple", "first", "average", "max")
        ]
        + [
            (TEXTS[2], {"aggregation_strategy": "simple", "ignore_labels": ["PER", "O"]}),
            (TEXTS[2], {"ignore_labels": []}),
            ("the dog isn't quickly " * 150, {"aggregation_strategy": "simple", "stride": 17}),
        ],
    ),
    "zero-shot-classification": (
        "SequenceClassification",
        {"id2label": ENTAILMENT, "label2id": {label: i for i, label in ENTAILMENT.items()}},
        [
            (text, parameters)
            for text in TEXTS[:4]
            for parameters in (
                {"candidate_labels": ["dog", "old river", "42"]},
                {"candidate_labels": "dog, old river"},
                {"candidate_labels": ["dog"]},
                {"candidate_labels": ["a", "b"], "multi_label": True, "hypothesis_template": "It is {}!"},
            )
        ],
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The folder of a small random model: `folder("bert", "TokenClassification", num_labels=3)`."""

    def make(family: str, head: str, **config: Any) -> str:
        return save(tmp_path_factory.mktemp(family), family, make_model(family, head, **config))

    return make


def same(found: Any, wanted: Any) -> bool:
    """Whether both are the same, numbers within 1e-4, the order of keys included."""
    if isinstance(wanted, dict):
        return list(found) == list(wanted) and all(same(found[key], wanted[key]) for key in wanted)
    if isinstance(wanted, list):
        return len(found) == len(wanted) and all(map(same, found, wanted))
    if isinstance(wanted, float | np.floating):
        return abs(found - wanted) < 1e-4
    return found == wanted


def load(folder: str, task: str, **settings: Any) -> tuple[Any, Any]:
    """The task and its loaded model."""
    made = tasks.make(Settings(MODEL=folder, TASK=task, TORCH_THREADS=1, **settings))
    return made, made.load(0)


def audit(task: Any, model: Any, asked: list[tuple[Any, dict[str, Any]]], expected: list[Any]) -> None:
    """Singly, all at once, and in batches at random."""
    contents = [task.check(*one).content for one in asked]
    assert same([model([content])[0] for content in contents], expected)
    assert same(model(contents), expected)
    draw = random.Random(0)
    for _ in range(3):
        batch = draw.choices(range(len(asked)), k=5)
        assert same(model([contents[i] for i in batch]), [expected[i] for i in batch])


def plain(folder: str, task: str, asked: list[tuple[Any, dict[str, Any]]]) -> list[Any]:
    """The plain pipeline's answers, one by one."""
    pipe = transformers.pipeline(task, model=folder, dtype=torch.float32, device="cpu")
    return [pipe(inputs, **parameters) for inputs, parameters in asked]


FAST = "prepacked weights, padding-free"
STRATEGIES = {
    **dict.fromkeys(["bert", "distilbert", "roberta", "xlm-roberta", "mpnet", "electra"], FAST),
    **dict.fromkeys(["deberta-v2", "modernbert"], "prepacked weights, padded"),
}


@pytest.mark.filterwarnings("ignore:Tokenizer does not support real words")  # the pipeline's own words
@pytest.mark.parametrize("family", STRATEGIES)
@pytest.mark.parametrize("task", ["text-classification", "token-classification"])
def test_task_answers_as_its_pipeline_does_for_each_family(folder: Any, task: str, family: str) -> None:
    head, config, asked = TASKS[task]
    where = folder(family, head, **config)
    made, model = load(where, task)
    assert str(model.encoder.strategy) == STRATEGIES[family]
    audit(made, model, asked, plain(where, task, asked))


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_zero_shot_classification_answers_as_its_pipeline_does(folder: Any, family: str) -> None:
    task = "zero-shot-classification"
    head, config, asked = TASKS[task]
    where = folder(family, head, **config)
    audit(*load(where, task), asked, plain(where, task, asked))


@pytest.mark.parametrize("task", TASKS)
def test_without_the_fast_path_it_is_the_plain_pipeline(folder: Any, task: str) -> None:
    head, config, asked = TASKS[task]
    where = folder("bert", head, **config)
    audit(*load(where, task, FAST=False), asked[:8], plain(where, task, asked[:8]))


@pytest.mark.parametrize(
    "config",
    [
        {"num_labels": 1},
        {"num_labels": 1, "problem_type": "regression"},
        {"num_labels": 3, "problem_type": "multi_label_classification"},
    ],
    ids=["one label", "regression", "multi-label"],
)
def test_classifier_of_another_kind_applies_what_its_pipeline_applies(folder: Any, config: Any) -> None:
    where, asked = folder("bert", "SequenceClassification", **config), TASKS["text-classification"][2]
    audit(*load(where, "text-classification"), asked, plain(where, "text-classification", asked))


# Question answering: its pipeline is gone from Transformers. The oracle tries every span of every window.

QUESTION = "which old dog runs?"
CONTEXTS = [" ".join(random.Random(n).choices(TEXTS[2].split(), k=n)) for n in (3, 9, 9, 40, 150)]
CONTEXTS.append("the old dog. " * 60)  # the same answer in many windows


@cache
def load_qa(where: str) -> Any:
    model = transformers.AutoModelForQuestionAnswering.from_pretrained(where)
    return model.eval(), transformers.AutoTokenizer.from_pretrained(where)


def best_of_window(where: str, windows: Any, n: int, max_answer_len: int) -> tuple[float, int, int]:
    """The likeliest span of a window: its score, where it starts and ends."""
    model, tokenizer = load_qa(where)
    ids, parts, at = windows["input_ids"][n], windows.sequence_ids(n), windows["offset_mapping"][n]
    with torch.no_grad():
        types = torch.tensor([windows["token_type_ids"][n]])
        said = model(input_ids=torch.tensor([ids]), token_type_ids=types)
    outside = torch.tensor([part != 1 and token != tokenizer.cls_token_id for part, token in zip(parts, ids)])
    start, end = (
        logits[0].masked_fill(outside, -10_000).softmax(-1).tolist()
        for logits in (said.start_logits, said.end_logits)
    )
    inside = [i for i, part in enumerate(parts) if part == 1]
    return max(
        (start[i] * end[j], at[i][0], at[j][1]) for i in inside for j in inside if i <= j < i + max_answer_len
    )


def best_span(
    where: str, context: str, max_answer_len: int = 15, max_seq_len: int = 384, doc_stride: int = 128
) -> Any:
    """The likeliest answer: each window names one, those that read alike add up."""
    cut = {"truncation": "only_second", "max_length": max_seq_len, "stride": doc_stride}
    windows = load_qa(where)[1](
        QUESTION, context, return_overflowing_tokens=True, return_offsets_mapping=True, **cut
    )
    found: dict[str, dict[str, Any]] = {}
    for n in range(len(windows["input_ids"])):
        score, start, end = best_of_window(where, windows, n, max_answer_len)
        text = context[start:end]
        first = found.setdefault(text.lower(), {"score": 0.0, "start": start, "end": end, "answer": text})
        first["score"] += score
    return max(found.values(), key=lambda answer: answer["score"])


def test_question_answering_finds_the_likeliest_span_of_all_windows(folder: Any) -> None:
    where = folder("bert", "QuestionAnswering")
    wanted = ({}, {"max_answer_len": 3}, {"max_seq_len": 60, "doc_stride": 10})
    asked, expected = [], []
    for context in CONTEXTS:
        for parameters in wanted:
            asked.append(({"question": QUESTION, "context": context}, parameters | {"align_to_words": False}))
            expected.append(best_span(where, context, **parameters))
    audit(*load(where, "question-answering"), asked, expected)


def test_question_answering_answers_in_whole_words_best_first_and_may_say_none(folder: Any) -> None:
    task, model = load(folder("bert", "QuestionAnswering"), "question-answering")
    inputs = {"question": QUESTION, "context": CONTEXTS[3].replace(",", "").replace("!", "")}
    found = model([task.check(inputs, {"top_k": 9, "handle_impossible_answer": True}).content])[0]
    assert len(found) == 9
    assert found == sorted(found, key=lambda answer: answer["score"], reverse=True)
    words = inputs["context"].split()
    for answer in found:
        assert answer["answer"] == inputs["context"][answer["start"] : answer["end"]]
        assert set(answer["answer"].split()) <= set(words)


# The encoder

PROBE = [[2, *range(5, 5 + n), 3] for n in (1, 7, 12, 7, 30)]


def states_of(model: Any, rows: list[list[int]], types: list[list[int]] | None = None) -> list[torch.Tensor]:
    """The plain forward's last hidden states, row by row."""
    with torch.no_grad():
        more = [{"token_type_ids": torch.tensor([row])} for row in types] if types else [{}] * len(rows)
        return [
            model.base_model(input_ids=torch.tensor([row]), **m).last_hidden_state[0]
            for row, m in zip(rows, more)
        ]


@pytest.mark.parametrize("family", STRATEGIES)
def test_states_are_those_of_the_plain_forward_at_the_positions_kept(family: str) -> None:
    model = make_model(family, "MaskedLM").base_model
    expected = states_of(model, PROBE)
    encode = encoder.Encoder(model, PROBE)
    assert str(encode.strategy) == STRATEGIES[family]
    torch.testing.assert_close(encode(PROBE), torch.cat(expected), atol=1e-4, rtol=1e-4)
    for keep in ([[0], [], [3, 3, 1], [8, 0], [31]], [range(len(row))[::-1] for row in PROBE]):
        wanted = torch.cat([states[list(positions)] for states, positions in zip(expected, keep)])
        torch.testing.assert_close(encode(PROBE, keep), wanted, atol=1e-4, rtol=1e-4)


def test_texts_of_several_lengths_share_one_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """In bfloat16, where memory wants few lengths; in float32 it can be told whether it is exact."""
    monkeypatch.setattr(packed, "EXACT", 0)
    monkeypatch.setattr(PaddingFree, "attended", lambda self, length: packed.round_up(-(-length // 16) * 16))
    for family in ("bert", "roberta", "mpnet"):
        model = make_model(family, "MaskedLM").base_model
        expected = torch.cat(states_of(model, PROBE))
        encode = encoder.Encoder(model, PROBE)
        assert str(encode.strategy) == FAST
        torch.testing.assert_close(encode(PROBE), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", [name for name in STRATEGIES if STRATEGIES[name] == FAST])
def test_texts_longer_and_shorter_than_the_exact_ones_share_a_pass_in_bfloat16(family: str) -> None:
    model = make_model(family, "MaskedLM").base_model.bfloat16()
    rows = [*PROBE, [2, *range(5, 5 + packed.EXACT), 3], [2, *range(5, 10 + packed.EXACT), 3]]
    expected = torch.cat(states_of(model, rows))
    encode = encoder.Encoder(model, PROBE, longest=100)
    assert str(encode.strategy) == FAST
    assert not differ(encode(rows), expected)


def test_bfloat16_gives_the_scores_of_float32_but_for_rounding(folder: Any) -> None:
    head, config, _ = TASKS["text-classification"]
    where = folder("bert", head, **config)
    answers = []
    for dtype in ("float32", "bfloat16"):
        task, model = load(where, "text-classification", DTYPE=dtype)
        answers.append(model([task.check(text, {"top_k": 9}).content for text in TEXTS]))
    for full, half in zip(*answers):
        assert {one["label"]: one["score"] for one in half} == pytest.approx(
            {one["label"]: one["score"] for one in full}, abs=0.15
        )


def test_token_types_count_where_the_model_knows_them() -> None:
    model = make_model("bert", "MaskedLM").base_model
    types = [[0, *[1] * (len(row) - 1)] for row in PROBE]
    expected = torch.cat(states_of(model, PROBE, types))
    assert not torch.allclose(expected, torch.cat(states_of(model, PROBE)), atol=0.1)
    encode = encoder.Encoder(model, PROBE)
    torch.testing.assert_close(encode(PROBE, None, types), expected, atol=1e-4, rtol=1e-4)


def break_padding_free(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = PaddingFree.layer
    monkeypatch.setattr(PaddingFree, "layer", lambda *args: layer(*args) + 1)


def break_prepacking(monkeypatch: pytest.MonkeyPatch) -> None:
    linear = PackedLinear.linear_activation
    monkeypatch.setattr(PackedLinear, "linear_activation", lambda *args: linear(*args) * 1.1)


def break_one_row_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a kernel that oneDNN compiles for this number of rows might be; no text of the probe has so many."""
    linear = PackedLinear.linear_activation
    monkeypatch.setattr(
        PackedLinear,
        "linear_activation",
        lambda self, x, *args: linear(self, x, *args) * (1 + (len(x) == 480)),
    )


def break_head(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoder.Encoder, "_head", lambda *args: 1 / 0)


def break_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    break_padding_free(monkeypatch)
    batch = encoder.Encoder._batch

    def blind(self: Any, rows: Any, types: Any) -> Any:
        return {name: value for name, value in batch(self, rows, types).items() if name != "attention_mask"}

    monkeypatch.setattr(encoder.Encoder, "_batch", blind)


def break_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    break_padding(monkeypatch)
    base = encoder.Encoder._base

    def mixed(self: Any, rows: Any, keep: Any, types: Any) -> Any:
        return base(self, rows, keep, types) + len(rows) - 1

    monkeypatch.setattr(encoder.Encoder, "_base", mixed)


@pytest.mark.parametrize(
    ("breaks", "strategy"),
    [
        (break_padding_free, "prepacked weights, padded"),
        (break_prepacking, "padded"),
        (break_one_row_count, "padded"),
        (break_head, "prepacked weights, padded, head on every token"),
        (break_padding, "prepacked weights, equal lengths"),
        (break_batches, "prepacked weights, one by one"),
    ],
)
def test_strategy_that_changes_answers_is_not_used_and_the_log_says_so(
    breaks: Any, strategy: str, folder: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    breaks(monkeypatch)
    head, config, asked = TASKS["text-classification"]
    where = folder("bert", head, **config)
    task, model = load(where, "text-classification")
    assert str(model.encoder.strategy) == strategy
    (line,) = [record.getMessage() for record in caplog.records]
    assert (
        f"is computed {strategy}; not used, as the answers would change: prepacked weights, padding-free:"
        in line
    )
    audit(task, model, asked, plain(where, "text-classification", asked))


def test_two_threads_share_one_encoder() -> None:
    model = make_model("bert", "TokenClassification")
    encode = encoder.Encoder(model, PROBE)
    expected = encode.logits(PROBE)
    with ThreadPoolExecutor(2) as threads:
        for outputs in threads.map(lambda _: encode.logits(PROBE), range(100)):
            assert torch.equal(outputs, expected)


def test_layers_are_given_few_row_counts_so_that_memory_stays_flat(
    folder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = set()

    def spy(real: Any) -> Any:
        return lambda self, x, *args: counts.add(x.shape[:-1].numel()) or real(self, x, *args)

    monkeypatch.setattr(PackedLinear, "linear_activation", spy(PackedLinear.linear_activation))
    monkeypatch.setattr(PackedLinear, "linear_add", spy(PackedLinear.linear_add))
    for family in ("bert", "deberta-v2"):  # end to end, and padded
        encode = encoder.Encoder(make_model(family, "TokenClassification"), PROBE)
        draw = random.Random(0)
        for _ in range(100):
            encode.logits([[2] * draw.choice([3, 9, 20, 100]) for _ in range(draw.randint(1, 32))])
    assert counts == set(map(packed.round_up, counts))
    assert len(counts) <= 9 + 12 + (512 - 64) // 32, (
        "none but 1, multiples of 2 up to 16, of 4 up to 64, of 32 up to a pass's tokens"
    )


def test_dtype_auto_is_bfloat16_only_where_the_processor_multiplies_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert packed.pick_dtype("float16", "cpu") is torch.float16
    for can, expected in [
        ({"avx512_bf16": True}, torch.bfloat16),
        ({"amx_bf16": True, "avx512_bf16": False}, torch.bfloat16),
        ({"avx512_f": True, "avx512_bf16": False}, torch.float32),
        ({}, torch.float32),
    ]:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda can=can: can)
        assert packed.pick_dtype("auto", "cpu") is expected
    assert packed.pick_dtype("auto", "mps") is torch.float32


# The check

CHECKS: list[tuple[str, Any, dict[str, Any], type, str]] = [
    ("text-classification", 7, {}, Malformed, '"inputs" must be a text'),
    ("text-classification", "  ", {}, Malformed, '"inputs" is empty'),
    ("text-classification", {"text": "a", "pair": "b"}, {}, Malformed, "or a pair"),
    ("text-classification", "a", {"top_k": 0}, Malformed, '"top_k" must be a whole number from 1 to 100'),
    ("text-classification", "a", {"top_k": True}, Malformed, '"top_k" must be a whole number'),
    ("text-classification", "a", {"function_to_apply": "x"}, Malformed, "softmax or sigmoid or none"),
    ("text-classification", "a", {"temperature": 1}, Malformed, '"temperature" is not a known field'),
    ("text-classification", "a " * 600, {}, Unprocessable, "has 602 tokens; send at most 512"),
    ("token-classification", "a", {"aggregation_strategy": "most"}, Malformed, "none or simple or first"),
    ("token-classification", "a", {"stride": 5}, Malformed, '"stride" joins what overlaps'),
    ("token-classification", "a", {"ignore_labels": "O"}, Malformed, "a list of 0 to 100 words"),
    ("zero-shot-classification", "a", {}, Malformed, '"candidate_labels" must be a list'),
    ("zero-shot-classification", "a", {"candidate_labels": " , "}, Malformed, '"candidate_labels" must be'),
    (
        "zero-shot-classification",
        "a",
        {"candidate_labels": ["x"], "hypothesis_template": "{:>99999}"},
        Malformed,
        "must have one {} where the label goes",
    ),
    ("question-answering", "a", {}, Malformed, '{"question": "...", "context": "..."}'),
    ("question-answering", {"question": "", "context": "a"}, {}, Malformed, '"question" is empty'),
    (
        "question-answering",
        {"question": "a " * 600, "context": "a"},
        {},
        Unprocessable,
        "leaves no room for the context",
    ),
]


@pytest.mark.parametrize(("task", "inputs", "parameters", "error", "sentence"), CHECKS)
def test_input_that_cannot_be_answered_is_rejected_with_a_sentence_that_says_what_to_send(
    task: str, inputs: Any, parameters: dict[str, Any], error: type, sentence: str
) -> None:
    with pytest.raises(error) as refused:
        tasks.make(Settings(TASK=task)).check(inputs, parameters)
    assert sentence in str(refused.value)


@pytest.mark.parametrize("family", ["bert", "distilbert", "roberta", "electra"])
def test_check_gives_the_ids_that_transformers_gives(folder: Any, family: str) -> None:
    where = folder(family, "SequenceClassification")
    task, tokenizer = tasks.make(Settings(MODEL=where, TASK="text-classification")), make_tokenizer(family)
    for texts in [*((text,) for text in TEXTS), tuple(PAIR.values())]:
        row = task.tokens(*texts)
        wanted = tokenizer(*texts, return_token_type_ids=True)
        assert row.ids == wanted["input_ids"]
        if family in ("bert", "electra"):  # the others know no second type
            assert (row.types or [0] * len(row.ids)) == wanted["token_type_ids"]


@pytest.mark.parametrize("offload", ["thread", "process"])
def test_tokenizer_json_that_transformers_reads_otherwise_is_noticed(
    offload: str, folder: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Transformers makes some tokenizers itself, from the vocabulary and what tokenizer_config.json says."""
    head, config, asked = TASKS["token-classification"]
    where = folder("bert", head, **config)
    tokenizer = make_tokenizer("bert")
    cased = transformers.BertTokenizer(vocab=tokenizer.get_vocab(), do_lower_case=False)
    assert cased(TEXTS[2])["input_ids"] != tokenizer(TEXTS[2])["input_ids"]
    cased.save_pretrained(where)
    tokenizer.backend_tokenizer.save(f"{where}/tokenizer.json")
    asked = [one for one in asked if "stride" not in one[1]]
    web, model = load(where, "token-classification", OFFLOAD=offload)
    if offload == "process":  # the web process has a task of its own
        web = tasks.make(Settings(MODEL=where, TASK="token-classification"))
    lines = [record.getMessage() for record in caplog.records]
    assert (
        lines
        == ["tokenizer.json isn't what Transformers makes of it: each text is tokenised twice"][
            : offload == "process"
        ]
    )
    audit(web, model, asked, plain(where, "token-classification", asked))


def test_text_beyond_roberta_s_positions_is_rejected_not_run(folder: Any) -> None:
    where = folder("roberta", "SequenceClassification")
    names = Path(where, "tokenizer_config.json")
    names.write_text(json.dumps(json.loads(names.read_text()) | {"model_max_length": None}))
    task = tasks.make(Settings(MODEL=where, TASK="text-classification", MAX_TOKENS=1000))
    assert task.limit == 512, "of 514 positions two come before the first token"


def test_web_process_checks_without_torch_and_transformers_in_100_mb() -> None:
    program = """
import os, sys
from workers import resources as memory, tasks
from workers.settings import Settings
task = tasks.make(Settings())
task.check("Paris is the [MASK] of France.", {"top_k": 3})
print(*({"torch", "transformers", "numpy"} & sys.modules.keys()))
print(memory.resident_bytes([os.getpid()]) / 1e6)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=HERE, capture_output=True, text=True, check=True
    )
    modules, megabytes = done.stdout.split("\n")[:2]
    assert modules == ""
    assert float(megabytes) <= 100


def test_model_of_the_hub_is_read_from_its_cache(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--some--model" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (tmp_path / "models--some--model" / "refs").mkdir()
    (tmp_path / "models--some--model" / "refs" / "main").write_text("abc")
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(Settings().MODEL, name), snapshot)
    program = """
import sys
from workers import tasks
from workers.settings import Settings
print(tasks.make(Settings(MODEL="some/model")).check("a [MASK]", {}).size, "torch" in sys.modules)
"""
    cached = os.environ | {"HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=HERE, env=cached, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["4", "False"]


# Any other pipeline


def picture(width: int = 40, height: int = 30, form: str = "PNG") -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, form)
    return file.getvalue()


@pytest.fixture(scope="module")
def eye(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small model of images."""
    folder = tmp_path_factory.mktemp("vit")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    config = transformers.ViTConfig(image_size=16, patch_size=8, num_labels=7, **sizes)
    transformers.ViTForImageClassification(config).save_pretrained(folder)
    transformers.ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    return str(folder)


def test_image_is_classified_as_by_its_pipeline_from_bytes_and_from_base64(eye: str) -> None:
    task, model = load(eye, "image-classification")
    assert "image/png".startswith(task.media)
    pipe = transformers.pipeline("image-classification", model=eye)
    for form in ("PNG", "JPEG"):
        data = picture(form=form)
        expected = pipe(Image.open(io.BytesIO(data)), top_k=3)
        code = base64.b64encode(data).decode()
        for inputs in (data, code, f"data:image/png;base64,{code}"):
            assert same(model([task.check(inputs, {"top_k": 3}).content]), [expected])


@pytest.mark.parametrize(
    "inputs", ["/etc/passwd", "http://127.0.0.1/a.png", "not base64!", ["a"], {"image": "a"}]
)
def test_pipeline_of_images_never_gets_a_path_or_an_address(eye: str, inputs: Any) -> None:
    task = tasks.make(Settings(MODEL=eye, TASK="image-classification"))
    with pytest.raises((Malformed, Unprocessable)):
        task.check(inputs, {})


def test_small_file_with_a_huge_image_is_rejected(eye: str) -> None:
    task = tasks.make(Settings(MODEL=eye, TASK="image-classification"))
    file = io.BytesIO()
    Image.new("1", (9_000, 9_000)).save(file, "PNG")
    assert len(file.getvalue()) < 100_000
    with pytest.raises(Unprocessable, match="81000000 pixels; send at most"):
        task.check(file.getvalue(), {})


@pytest.mark.parametrize("form", ["JPEG", "PNG"])
def test_half_an_image_is_rejected_not_run(eye: str, form: str) -> None:
    task = tasks.make(Settings(MODEL=eye, TASK="image-classification"))
    data = picture(form=form)
    with pytest.raises(Unprocessable, match="send a whole JPEG or PNG"):
        task.check(data[: len(data) // 2], {})


def test_no_program_is_run_for_an_image(eye: str) -> None:
    task = tasks.make(Settings(MODEL=eye, TASK="image-classification"))
    with pytest.raises(Unprocessable, match="cannot be read"):
        task.check(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n%%EOF\n", {})


def test_masks_are_images_in_base64(tmp_path: Path) -> None:
    config = transformers.SegformerConfig(
        num_labels=4,
        hidden_sizes=[8, 16, 16, 16],
        num_attention_heads=[1] * 4,
        depths=[1] * 4,
        decoder_hidden_size=16,
    )
    transformers.SegformerForSemanticSegmentation(config).save_pretrained(tmp_path)
    transformers.SegformerImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    task, model = load(str(tmp_path), "image-segmentation")
    (expected,) = plain(str(tmp_path), "image-segmentation", [(open_image(picture()), {})])
    (found,) = json.loads(rendered(model([task.check(picture(), {}).content])))
    assert [one["label"] for one in found] == [one["label"] for one in expected]
    for one, other in zip(found, expected):
        mask = Image.open(io.BytesIO(base64.b64decode(one["mask"])))
        assert np.array_equal(np.asarray(mask), np.asarray(other["mask"]))


@pytest.mark.parametrize(
    ("name", "inputs", "parameters"),
    [
        ("question-answering", {"question": "who?", "context": "dog " * 20_000}, {}),
        ("question-answering", {"question": "who?", "context": "dog " * 500}, {"doc_stride": 376}),
        ("token-classification", "dog " * 40_000, {"aggregation_strategy": "simple", "stride": 17}),
    ],
)
def test_text_of_too_many_windows_is_rejected_before_it_keeps_the_model(
    folder: Any, name: str, inputs: Any, parameters: dict[str, Any]
) -> None:
    task = tasks.make(Settings(MODEL=folder("bert", "MaskedLM"), TASK=name))
    with pytest.raises(Unprocessable, match=r"windows of .* tokens; send one that takes at most 64"):
        task.check(inputs, parameters)


def test_slow_tokenizer_cuts_no_windows_and_says_so() -> None:
    with pytest.raises(Unprocessable, match="no fast tokenizer"):
        SlowTokens(None).windows(64, 512, 17, "a text")


def test_pipeline_that_padding_would_change_answers_one_by_one(folder: Any) -> None:
    where = folder("bert", "MaskedLM")
    task = pipeline.Task(Settings(MODEL=where, TASK="feature-extraction", TORCH_THREADS=1))
    model = task.load(0)
    assert "one by one" in str(model.description)
    asked = [(text, {}) for text in TEXTS]
    audit(task, model, asked, plain(where, "feature-extraction", asked))


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "modules.json"])
@pytest.mark.parametrize("content", [b'{"half": ', b"\xff\xfe", b"7"])
def test_broken_file_of_the_model_is_named(tmp_path: Path, name: str, content: bytes) -> None:
    shutil.copytree(HERE / "models" / "minilm-mlm", tmp_path, dirs_exist_ok=True)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"^{name} "):
        tasks.make(Settings(MODEL=str(tmp_path), TASK="feature-extraction"))


def test_task_that_nobody_knows_says_how_to_serve_it_all_the_same() -> None:
    with pytest.raises(ValueError, match=r"TASK=weather-forecast is not known; known are .* a custom class"):
        tasks.make(Settings(TASK="weather-forecast"))


@pytest.mark.parametrize("name", ["fill_mask", "Fill-Mask", "fillmask"])
def test_misspelt_task_is_answered_by_what_was_meant_and_what_there_is(name: str) -> None:
    with pytest.raises(ValueError, match=f"TASK={name} is not known, did you mean fill-mask") as caught:
        tasks.make(Settings(TASK=name))
    known = str(caught.value).partition("known are ")[2].partition(";")[0].split(", ")
    assert {"feature-extraction", "image-classification", "text-ranking"} <= set(known)
    assert not {"custom", "pipeline", "text", "encoder"} & set(known)


@pytest.mark.parametrize("name", ["custom", "pipeline", "encoder"])
def test_file_beside_the_tasks_is_none(name: str) -> None:
    with pytest.raises(ValueError, match=f"TASK={name} is not known"):
        tasks.make(Settings(TASK=name))


def test_client_cannot_hand_the_pipeline_whatever_it_takes(folder: Any) -> None:
    task = pipeline.Task(Settings(TASK="text-generation"))
    with pytest.raises(Malformed, match='"custom_generate" is not a known field'):
        task.check("a text", {"custom_generate": "somebody/code", "trust_remote_code": True})
