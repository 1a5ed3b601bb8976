"""Folders as the Hub has them, not as `save_pretrained` writes them; and what a text may cost before it is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from tests.support.small_models import LIKE_ROBERTA, make_model, make_tokenizer, save
from workers import tasks
from workers.errors import Malformed, Unprocessable
from workers.settings import Settings
from workers.tasks.common.tokens import Tokens

SHORT = {"do_lower_case": True, "model_max_length": 512}


def names(folder: Path, content: Any) -> None:
    """Write tokenizer_config.json as old repositories have it, or none."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        (folder / name).unlink(missing_ok=True)
    if content is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(content))


def vocabulary(folder: Path) -> None:
    """Leave the files of before tokenizer.json: what `tokenizers`' own model writes."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.backend_tokenizer.model.save(str(folder))
    (folder / "tokenizer.json").unlink()


def add_a_word(folder: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["newword"])
    tokenizer.save_pretrained(folder)
    model = transformers.AutoModelForMaskedLM.from_pretrained(folder)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.save_pretrained(folder)


FOLDERS: dict[str, list[Callable[[Path], None]]] = {
    "as saved": [],
    "a short tokenizer_config.json": [lambda folder: names(folder, SHORT)],
    "no tokenizer_config.json": [lambda folder: names(folder, None)],
    "a vocabulary alone": [vocabulary, lambda folder: names(folder, None)],
    "a vocabulary and a short tokenizer_config.json": [vocabulary, lambda folder: names(folder, SHORT)],
    "an added word": [add_a_word],
    "an added word, a short tokenizer_config.json": [add_a_word, lambda folder: names(folder, SHORT)],
}


def assert_same(answers: Any, expected: Any) -> None:
    for one, other in zip(answers, expected, strict=True):
        for a, b in zip(one, other, strict=True):
            assert a == {**b, "score": pytest.approx(b["score"], abs=1e-4)}


@pytest.mark.parametrize("kind", FOLDERS)
@pytest.mark.parametrize("family", ["bert", "distilbert", "roberta"])
def test_fill_mask_of_any_folder_answers_as_the_plain_pipeline(
    tmp_path: Path, family: str, kind: str
) -> None:
    folder = save(tmp_path, family, make_model(family, "MaskedLM"))
    for change in FOLDERS[kind]:
        change(tmp_path)
    plain = transformers.pipeline("fill-mask", model=folder, dtype=torch.float32, device="cpu")
    task = tasks.make(Settings(MODEL=folder, TORCH_THREADS=1))
    mask = plain.tokenizer.mask_token
    texts = [f"the Old dog {mask} over it", mask, f"the newword {mask} isn't caf\u00e9"]
    before = [task.check(text, {}).content for text in texts]
    model = task.load(0)
    after = [task.check(text, {"targets": ["dog", "newword"]}).content for text in texts]
    assert [row.ids for content in before for row in content.rows] == [
        plain.tokenizer(text)["input_ids"] for text in texts
    ]
    assert_same(model(after), [plain(text, targets=["dog", "newword"]) for text in texts])


def test_model_without_a_fast_tokenizer_answers_as_the_plain_pipeline(tmp_path: Path) -> None:
    make_model("canine", "SequenceClassification").save_pretrained(tmp_path)
    transformers.CanineTokenizer(model_max_length=512).save_pretrained(tmp_path)
    plain = transformers.pipeline("text-classification", model=str(tmp_path), device="cpu")
    assert not plain.tokenizer.is_fast
    task = tasks.make(Settings(MODEL=str(tmp_path), TASK="text-classification", TORCH_THREADS=1))
    texts = ["the old dog", "it", "over the river it runs"]
    model = task.load(0)
    assert_same(model([task.check(text, {}).content for text in texts]), [plain(text) for text in texts])


def test_token_types_that_are_all_zero_reach_a_model_to_which_they_matter(tmp_path: Path) -> None:
    folder = save(tmp_path, "gpt2", make_model("gpt2", "SequenceClassification"))
    plain = transformers.pipeline("text-classification", model=folder, device="cpu")
    assert "token_type_ids" in plain.tokenizer("the dog")
    task = tasks.make(Settings(MODEL=folder, TASK="text-classification", TORCH_THREADS=1))
    model, texts = task.load(0), ["the dog", "the river", "the old dog runs over the river"]
    expected = [plain(text) for text in texts]
    assert_same([model([task.check(text, {}).content])[0] for text in texts], expected)
    assert_same(model([task.check(text, {}).content for text in texts]), expected)


def test_token_types_that_transformers_5_has_lost_are_reported_at_start(tmp_path: Path, caplog: Any) -> None:
    folder = save(tmp_path, "albert", make_model("albert", "QuestionAnswering"))
    tokenizer = make_tokenizer("albert")
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    tokenizer.save_pretrained(folder)
    tasks.make(Settings(MODEL=folder, TASK="question-answering", TORCH_THREADS=1)).load(0)
    assert "Transformers 5 gives albert models no token types" in caplog.text


def test_encoder_of_t5_embeds_as_sentence_transformers_does(tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling, Transformer

    tokenizer = make_tokenizer("bert")
    tokenizer.model_max_length = 256
    config = transformers.T5Config(
        vocab_size=len(tokenizer), d_model=32, num_layers=2, num_heads=4, d_kv=8, d_ff=64, pad_token_id=0
    )
    torch.manual_seed(0)
    transformers.T5EncoderModel(config).save_pretrained(tmp_path / "t5")
    tokenizer.save_pretrained(tmp_path / "t5")
    parts = [Transformer(str(tmp_path / "t5")), Pooling(32, "mean")]
    parts += [Dense(32, 24, bias=False, activation_function=torch.nn.Identity()), Normalize()]
    SentenceTransformer(modules=parts).save(str(tmp_path / "model"))
    oracle = SentenceTransformer(str(tmp_path / "model"), device="cpu")
    task = tasks.make(Settings(MODEL=str(tmp_path / "model"), TASK="feature-extraction", TORCH_THREADS=1))
    model, texts = task.load(0), ["the dog", "the old dog runs", "it isn't over the river " * 9]
    for vectors in (
        model([task.check(text, {}).content for text in texts]),
        [model([task.check(text, {}).content])[0] for text in texts],
    ):
        np.testing.assert_allclose(np.stack(vectors), oracle.encode(texts), atol=1e-5)


MEGABYTE = 1 << 20
EXPENSIVE: list[tuple[str, Any, dict[str, Any]]] = [
    ("fill-mask", "[MASK]" + "." * MEGABYTE, {}),
    ("text-classification", {"text": "." * MEGABYTE, "text_pair": "." * MEGABYTE}, {}),
    ("token-classification", "." * MEGABYTE, {"stride": 5, "aggregation_strategy": "simple"}),
    ("zero-shot-classification", "." * MEGABYTE, {"candidate_labels": ["." * MEGABYTE, "a"]}),
    ("question-answering", {"question": "." * MEGABYTE, "context": "." * MEGABYTE}, {}),
    ("feature-extraction", "." * MEGABYTE, {}),
    ("feature-extraction", "." * MEGABYTE, {"truncate": True}),
    ("sentence-similarity", {"source_sentence": "." * MEGABYTE, "sentences": ["a"]}, {"truncate": True}),
    ("text-ranking", {"query": "." * MEGABYTE, "text": "." * MEGABYTE}, {"truncate": True}),
]


@pytest.fixture
def characters(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many characters of each text were tokenised."""
    seen: list[int] = []
    for name in ("__call__", "count", "_part"):
        real = getattr(Tokens, name)

        def spy(self: Tokens, *texts: Any, real: Any = real) -> Any:
            seen.extend(len(text) for text in texts if text)
            return real(self, *texts)

        monkeypatch.setattr(Tokens, name, spy)
    return seen


@pytest.mark.parametrize(("name", "inputs", "parameters"), EXPENSIVE)
def test_megabyte_of_dots_is_rejected_or_cut_by_its_start(
    name: str, inputs: Any, parameters: dict[str, Any], characters: list[int]
) -> None:
    task = tasks.make(Settings(TASK=name))
    if "truncate" in parameters:
        assert task.check(inputs, parameters).size <= 1024
    else:
        with pytest.raises(Unprocessable):
            task.check(inputs, parameters)
    windows = 64 if name in ("token-classification", "question-answering") else 1
    assert sum(characters) < 100_000 + windows * 16 * 512 * 2


@pytest.mark.parametrize("direction", ["right", "left"])
@pytest.mark.parametrize(
    "text",
    ["the old dog isn't unbelievable, " * 3_000, "\u6771\u4eac" * 20_000, "x" * 50_000 + " dog" * 9_000],
)
def test_text_cut_by_its_start_has_the_tokens_of_the_whole_text_cut(text: str, direction: str) -> None:
    task = tasks.make(Settings(TASK="feature-extraction"))
    found = task.check(text, {"truncate": True, "truncation_direction": direction}).content.rows[0].ids
    tokenizer = transformers.AutoTokenizer.from_pretrained(Settings().MODEL, truncation_side=direction)
    assert found == tokenizer(text, truncation=True, max_length=512)["input_ids"]


def test_what_a_request_repeats_is_tokenised_once(characters: list[int]) -> None:
    ranking = tasks.make(Settings(TASK="text-ranking"))
    for n in range(64):
        ranking.check({"query": "word " * 90_000, "text": f"text {n}"}, {"truncate": True})
    labels = [f"label {n}" for n in range(100)]
    zero_shot = tasks.make(Settings(TASK="zero-shot-classification"))
    sizes = [zero_shot.check(f"a text {n}", {"candidate_labels": labels}).size for n in range(64)]
    assert len(set(sizes)) <= 2 and sum(characters) < 50_000


@pytest.mark.parametrize(
    ("name", "inputs", "parameters"),
    [
        ("question-answering", {"question": "who?", "context": "dog " * 15_000}, {}),
        ("token-classification", "dog " * 15_000, {"stride": 5, "aggregation_strategy": "simple"}),
    ],
)
def test_windows_are_bounded_by_max_tokens(name: str, inputs: Any, parameters: dict[str, Any]) -> None:
    task = tasks.make(Settings(TASK=name, MAX_TOKENS=64))
    with pytest.raises(Unprocessable, match=r"send (at most 64|one that takes at most 64)"):
        task.check(inputs, parameters)


def test_window_of_a_question_is_at_most_max_tokens() -> None:
    task = tasks.make(Settings(TASK="question-answering", MAX_TOKENS=64))
    with pytest.raises(Malformed, match='"max_seq_len" must be a whole number from 1 to 64'):
        task.check({"question": "who?", "context": "a dog"}, {"max_seq_len": 65})
    rows = task.check({"question": "who?", "context": "dog " * 100}, {"max_seq_len": 64}).content.rows
    assert len(rows) > 1 and max(len(row.ids) for row in rows) <= 64


def test_lowest_limit_of_positions_is_known_for_each_that_counts_after_the_padding(tmp_path: Path) -> None:
    for family in ("roberta", "camembert", "ibert", "xmod"):
        assert LIKE_ROBERTA["max_position_embeddings"] == 514
        folder = save(tmp_path / family, family, make_model(family, "Model"))
        Path(folder, "tokenizer_config.json").write_text("{}")
        task = tasks.make(Settings(MODEL=folder, TASK="feature-extraction", MAX_TOKENS=1000))
        assert task.limit == 512
