"""Fill-mask is audited against the plain pipeline, which is asked text by text: its answers are the promise."""

import random
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import pipeline

from tests.support.small_models import SPACED, make_model, save
from workers import tasks
from workers.errors import Malformed
from workers.settings import Settings
from workers.tasks import fill_mask
from workers.tasks.common.packed import PackedLinear

MODEL = str(Path(__file__).parents[1] / "models" / "minilm-mlm")

SENTENCES = [
    "{m} is the capital of France.",
    "Paris is the {m} of France.",
    "I can't {m} it, don't you know? He's {m}!",
    "They 've said : \" it isn ' t {m} \" ; we 're done .",
    "{m}",
    "{m} {m}",
    "{m}, {m} and {m}!?",
    "A na\u00efve caf\u00e9 in Z\u00fcrich serves {m} cr\u00e8me br\u00fbl\u00e9e.",
    "\u6771\u4eac\u306f{m}\u306e\u9996\u90fd\u3067\u3059\u3002",
    "\u5317\u4eac\u662f {m} \u7684\u9996\u90fd\uff0c{m}\u3002",
    "I \u2764\ufe0f {m} \U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467!",
    "un{m}able, antidisestablishment{m}arianism, electroencephalo{m}",
    "[CLS] already {m} [SEP] here [PAD] [UNK]",
    "<s> already {m} </s> here <pad>",
    "[PAD] <pad> {m} [PAD] {m} <pad>",
    "\t spaces \n\n and  lines {m}   . ",
    "- {m} -- 3.14 % of #1 @ (x_{m}) \\ / ~ `",
    "\u0645\u0631\u062d\u0628\u0627 {m} \u0434\u043e\u0431\u0440\u044b\u0439 {m}",
    "' {m} ' s n't 'm 've 're ' , . ! ?",
]
WORDS = SPACED.split()
TARGETS = [
    (),
    (),
    (),
    ("dog",),
    ("river", "old", "the"),
    ("zzzqqq", "dog"),
    ("caf\u00e9", "Dog", "42", "dog"),
]


def queries(mask: str, count: int, seed: int = 0) -> list[tuple[str, int, tuple[str, ...]]]:
    """`count` varied queries: every sentence above, and words of any number with one to three masks among them."""
    draw = random.Random(seed)
    texts = [sentence.replace("{m}", mask) for sentence in SENTENCES]
    while len(texts) < count:
        words = draw.choices(WORDS, k=draw.choice([1, 4, 8, 8, 8, 12, 40, 90]))
        for _ in range(draw.choice([1, 1, 1, 2, 3])):
            words.insert(draw.randrange(len(words) + 1), mask)
        texts.append(" ".join(words))
    draw.shuffle(texts)
    return [(text, draw.choice([1, 2, 5, 5, 5, 30]), draw.choice(TARGETS)) for text in texts]


def assert_same(stock, ours, tolerance: float = 1e-4) -> None:
    """The same JSON; scores may differ by rounding, and so may the order of two that differ by less than that."""
    assert len(stock) == len(ours)
    if stock and isinstance(stock[0], list):
        for a, b in zip(stock, ours, strict=True):
            assert_same(a, b, tolerance)
        return
    for a, b in zip(stock, ours, strict=True):
        assert list(a) == list(b) and list(map(type, a.values())) == list(map(type, b.values()))
        assert a["score"] == pytest.approx(b["score"], abs=tolerance)
        if a["token"] == b["token"]:
            assert a | {"score": 0} == b | {"score": 0}
        else:
            assert a["score"] == pytest.approx(b["score"], rel=1e-5), "not a tie, and another token"


Asked = tuple[str, int, tuple[str, ...]]


class Ours:
    """Our model of a folder, asked as the plain pipeline is."""

    def __init__(self, folder: str, **settings: Any) -> None:
        self.task = tasks.make(
            Settings(MODEL=folder, MAX_MASKS=50, MAX_TOP_K=10_000, TORCH_THREADS=1, **settings)
        )
        self.model: Any = self.task.load(0)

    def __call__(self, asked: list[Asked]) -> list[Any]:
        contents = []
        for text, top_k, targets in asked:
            parameters = {"top_k": top_k} | ({"targets": list(targets)} if targets else {})
            contents.append(self.task.check(text, parameters).content)
        return self.model(contents)


def audit(plain: Any, ours: Ours, asked: list[Asked], batch: int = 32) -> None:
    expected = [plain(text, top_k=top_k, targets=targets or None) for text, top_k, targets in asked]
    for start in range(0, len(asked), batch):
        for a, b in zip(expected[start:], ours(asked[start : start + batch]), strict=False):
            assert_same(a, b)


def pair(folder: str) -> tuple[Any, Ours]:
    """The plain pipeline and ours, each with its own instance of the model: ours changes its layers."""
    return pipeline("fill-mask", model=folder, dtype=torch.float32, device="cpu"), Ours(folder)


@pytest.fixture(scope="module")
def embedded() -> tuple[Any, Ours]:
    return pair(MODEL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save(tmp_path_factory.mktemp("bert"), "bert", make_model("bert", "MaskedLM"))


@pytest.fixture(scope="module")
def small(folder: str) -> tuple[Any, Ours]:
    return pair(folder)


def test_bundled_model_answers_as_the_plain_pipeline_does(embedded):
    audit(*embedded, queries("[MASK]", 50))


@pytest.mark.parametrize(
    "family",
    [
        "bert",
        "distilbert",
        "roberta",
        "xlm-roberta",
        "mpnet",
        "electra",
        "deberta-v2",
        "modernbert",
        "albert",
    ],
)
def test_each_family_of_heads_answers_as_the_plain_pipeline_does(family, tmp_path):
    plain, ours = pair(save(tmp_path, family, make_model(family, "MaskedLM")))
    assert ours.model.encoder.strategy.prepacked and not ours.model.encoder.strategy.whole
    audit(plain, ours, queries(plain.tokenizer.mask_token, 60))


def test_answers_do_not_depend_on_how_the_batch_was_cut(small, monkeypatch):
    plain, ours = small
    asked = queries("[MASK]", 60, seed=3)
    monkeypatch.setattr(ours.model.encoder, "pass_tokens", 40)
    monkeypatch.setattr(ours.model.encoder, "head_rows", 2)
    audit(plain, ours, asked, batch=60)
    monkeypatch.undo()
    audit(plain, ours, asked, batch=1)


def test_ties_fall_as_they_do_in_the_plain_pipeline(tmp_path):
    model = make_model("bert", "MaskedLM")
    with torch.no_grad():
        model.cls.predictions.decoder.weight.zero_()
        model.cls.predictions.bias.copy_(torch.arange(model.config.vocab_size) % 3)
    plain, ours = pair(save(tmp_path, "bert", model))
    asked = [
        ("the [MASK] dog", k, t) for k in (1, 3, 5, 40) for t in ((), ("dog", "old", "the", "of", "river"))
    ]
    expected = [plain(text, top_k=k, targets=t or None) for text, k, t in asked]
    for a, b in zip(expected, ours(asked), strict=True):
        assert [row["token"] for row in a] == [row["token"] for row in b]


def test_every_token_of_the_vocabulary_is_written_as_the_plain_pipeline_writes_it(small):
    plain, ours = small
    count = len(plain.tokenizer)
    for text in ("[MASK] it is", "un [MASK] .", "[MASK] 's [MASK]", "[PAD] [MASK]"):
        assert_same(plain(text, top_k=count), ours([(text, count, ())])[0])


def test_targets_are_the_plain_pipelines(small):
    plain, ours = small
    for targets in (["dog"], ["dog", "dog"], ["river", "nosuchword", "the"], ["\u2603", "old"]):
        query = ours.task.check("the [MASK]", {"targets": targets})
        assert set(query.content.targets) == set(plain.get_target_ids(targets))


@pytest.mark.parametrize("fast", [True, False])
def test_loop_may_give_it_batches(folder, fast):
    assert Ours(folder, FAST=fast).model.description.max_batch >= 32


@pytest.mark.parametrize("fast", [True, False])
def test_words_of_a_client_stay_out_of_the_log(folder, fast, caplog):
    Ours(folder, FAST=fast)([("the [MASK]", 5, ("diagnosis", "dog"))])
    assert "diagnosis" not in caplog.text


def test_targets_are_bounded_and_tokenised_once_per_request(small, monkeypatch):
    task = small[1].task
    with pytest.raises(Malformed, match=r'"targets" must be a list of .* words of at most 100 characters'):
        task.check("the [MASK]", {"targets": ["dog", "." * 101]})
    seen = []
    part = task.tokens._part
    monkeypatch.setattr(
        task.tokens, "short_part", lru_cache(128)(lambda text: seen.append(text) or part(text))
    )
    words = [f"nosuchword{n}" for n in range(90)]
    for _ in range(64):
        task.check("the [MASK]", {"targets": words})
    assert seen == words


def test_head_runs_once_and_sees_the_masked_tokens_only(small):
    ours, seen = small[1], []
    hook = ours.model.pipe.model.cls.register_forward_pre_hook(
        lambda module, args: seen.append(args[0].shape[:-1].numel())
    )
    try:
        ours([("the [MASK] of [MASK]", 5, ()), ("the old dog [MASK] over the river", 2, ("runs",))])
    finally:
        hook.remove()
    assert seen == [3]


def test_head_that_mixes_positions_sees_whole_texts(folder, monkeypatch):
    class Mixing(torch.nn.Module):
        def __init__(self, head):
            super().__init__()
            self.head = head

        def forward(self, states):
            return self.head(states + states.cumsum(1) * 0.1)

    plain, ours = pipeline("fill-mask", model=folder), pipeline("fill-mask", model=folder)
    for pipe in (plain, ours):
        pipe.model.cls = Mixing(pipe.model.cls)
    monkeypatch.setattr(fill_mask, "load_pipeline", lambda settings, instance: ours)
    mixing = Ours(folder)
    assert mixing.model.encoder.strategy.whole
    audit(plain, mixing, queries("[MASK]", 40))


def test_head_that_reads_its_weights_itself_is_served_fast_without_packing(folder, monkeypatch):
    plain, ours = pipeline("fill-mask", model=folder), pipeline("fill-mask", model=folder)
    for pipe in (plain, ours):
        transform = pipe.model.cls.predictions.transform
        transform.forward = lambda x, t=transform: t.LayerNorm(torch.nn.functional.linear(x, t.dense.weight))
    monkeypatch.setattr(fill_mask, "load_pipeline", lambda settings, instance: ours)
    reading = Ours(folder)
    assert not any(isinstance(module, PackedLinear) for module in ours.model.modules()), "left as it was"
    audit(plain, reading, queries("[MASK]", 25))


def test_bfloat16_keeps_the_first_candidate_and_its_score_nearly_always(embedded):
    half = Ours(MODEL, DTYPE="bfloat16")
    lines = (Path(MODEL) / "cloze60.tsv").read_text().splitlines()
    asked = [(line.split("\t")[0], 1, ()) for line in lines]
    full, rounded = embedded[1](asked), half(asked)
    agree = [a[0]["token"] == b[0]["token"] for a, b in zip(full, rounded, strict=True)]
    assert sum(agree) >= 0.9 * len(asked)
    for same, a, b in zip(agree, full, rounded, strict=True):
        assert not same or a[0]["score"] == pytest.approx(b[0]["score"], abs=0.06)
