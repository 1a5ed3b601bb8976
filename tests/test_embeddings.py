"""Sentence vectors, similarities and rankings: those of sentence-transformers, singly and in batches of any mix."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loadtests.modes import ROOT
from tests.support.embedding_models import MINILM, sentence_model, small_bert
from tests.support.small_models import FAMILIES, make_model, save
from workers import tasks
from workers.errors import Malformed, Unprocessable
from workers.settings import Settings
from workers.tasks import Query

TEXTS = [
    "A man is eating food.",
    "Someone in a gorilla costume is playing a set of drums.",
    "Zürich",
    "東京 is the capital of Japan, isn't it?",
    "The old house on the hill " * 12,
    "A cheetah is running behind its prey. " * 3,
]
LONG = "of the old house on the hill " * 100


def served(model: str, task: str = "feature-extraction", **settings: Any) -> "Served":
    return Served(tasks.make(Settings(MODEL=model, TASK=task, TORCH_THREADS=1, **settings)))


class Served:
    """A task and a loaded instance of its model."""

    def __init__(self, task: tasks.Task) -> None:
        self.task, self.model = task, task.load(0)

    def __call__(self, *inputs: Any, **parameters: Any) -> list[Any]:
        """The answers of one batch."""
        return self.model([self.task.check(one, parameters).content for one in inputs])


def in_random_batches(answer: Callable[..., list[Any]], inputs: list[Any]) -> Iterator[tuple[Any, Any]]:
    """Each input and its answer: alone, and in batches of random mixes."""
    yield from ((one, answer(one)[0]) for one in inputs)
    rng = np.random.default_rng(0)
    for size in (2, 5, 8, 32):
        batch = [inputs[i] for i in rng.integers(0, len(inputs), size)]
        yield from zip(batch, answer(*batch), strict=True)


def assert_same(found: Any, expected: Any, tolerance: float = 1e-5) -> None:
    """Vectors of the same length and direction, within the tolerance."""
    found, expected = np.asarray(found, "f8"), np.asarray(expected, "f8")
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * max(1.0, np.abs(expected).max()))


@pytest.fixture(scope="module")
def minilm() -> Served:
    return served(MINILM)


def test_minilm_gives_the_vectors_of_sentence_transformers_singly_and_in_random_batches(
    minilm: Served,
) -> None:
    from sentence_transformers import SentenceTransformer

    oracle = SentenceTransformer(MINILM, device="cpu")
    for text, vector in in_random_batches(minilm, TEXTS):
        expected = oracle.encode(text)
        assert vector.dtype == np.float32
        assert_same(vector, expected)
        assert 1 - vector @ expected < 1e-5


MODELS: dict[str, dict[str, Any]] = {
    "mean": {},
    "cls": {"modes": "cls"},
    "lasttoken": {"modes": "lasttoken"},
    "max": {"modes": "max"},
    "weightedmean": {"modes": "weightedmean"},
    "mean_sqrt_len": {"modes": "mean_sqrt_len_tokens"},
    "cls and mean": {"modes": ("cls", "mean"), "normalize": True},
    "tanh": {"dense": "Tanh"},
    "linear, normalized": {"dense": "Identity", "normalize": True},
    "prompts": {"prompts": {"query": "Look for: ", "passage": "passage: "}, "default_prompt_name": "query"},
    "prompts left out": {
        "prompts": {"query": "Look for: "},
        "modes": ("mean", "cls"),
        "include_prompt": False,
    },
    "last without prompt": {"prompts": {"query": "Look: "}, "modes": "weightedmean", "include_prompt": False},
    "16 tokens": {"max_seq_length": 16},
    "lower case": {"do_lower_case": True},
}


@pytest.fixture(scope="module", params=MODELS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Served, Any]:
    """A model as it is served, and sentence-transformers' own."""
    from torch import nn

    made = dict(MODELS[request.param])
    if "dense" in made:
        made["dense"] = getattr(nn, made["dense"])()
    folder = tmp_path_factory.mktemp("sentence-model")
    oracle = sentence_model(folder, **made)
    return served(str(folder / "model")), oracle


def test_every_kind_of_sentence_model_gives_the_vectors_of_sentence_transformers(pair: Any) -> None:
    ours, oracle = pair
    for text, vector in in_random_batches(lambda *texts: ours(*texts, truncate=True), TEXTS):
        assert_same(vector, oracle.encode(text))


def test_every_prompt_gives_the_vectors_of_sentence_transformers(pair: Any) -> None:
    ours, oracle = pair
    for name in oracle.prompts:
        for text in TEXTS[:2]:
            (vector,) = ours(text, prompt_name=name, truncate=True)
            assert_same(vector, oracle.encode(text, prompt_name=name))


def test_dimensions_cut_the_vector_and_normalize_makes_its_length_1(pair: Any) -> None:
    ours, oracle = pair
    (vector,) = ours(TEXTS[0], normalize=True)
    assert_same(vector, oracle.encode(TEXTS[0], normalize_embeddings=True))
    (vector,) = ours(TEXTS[0], dimensions=8, normalize=True)
    assert_same(vector, oracle.encode(TEXTS[0], truncate_dim=8, normalize_embeddings=True))
    (vector,) = ours(TEXTS[0], dimensions=8)
    is_unit = np.isclose(np.linalg.norm(oracle.encode(TEXTS[1])), 1)
    assert_same(vector, oracle.encode(TEXTS[0], truncate_dim=8, normalize_embeddings=is_unit))


def test_long_text_is_rejected_or_cut_where_asked_for(minilm: Served) -> None:
    from sentence_transformers import SentenceTransformer

    with pytest.raises(Unprocessable, match="702 tokens; send at most 256, or"):
        minilm(LONG)
    oracle = SentenceTransformer(MINILM, device="cpu")
    assert_same(minilm(LONG, truncate=True)[0], oracle.encode(LONG))
    oracle.tokenizer.truncation_side = "left"
    (vector,) = minilm("first of all " + LONG + "the end", truncate=True, truncation_direction="left")
    assert_same(vector, oracle.encode("first of all " + LONG + "the end"))


@pytest.mark.parametrize(
    ("parameters", "error", "sentence"),
    [
        ({"normalize": 1}, Malformed, '"normalize" must be true or false'),
        ({"truncate": "yes"}, Malformed, '"truncate" must be true or false'),
        ({"truncation_direction": "up"}, Malformed, '"truncation_direction" must be left or right'),
        ({"dimensions": 0}, Malformed, '"dimensions" must be a whole number from 1 to 384'),
        ({"dimensions": 385}, Malformed, '"dimensions" must be a whole number from 1 to 384'),
        ({"prompt_name": "?"}, Unprocessable, 'the model knows the prompts "document", "query"'),
        ({"encoding_format": "base64"}, Malformed, "/v1/embeddings"),
        ({"top_k": 1}, Malformed, '"top_k" is not a known field'),
    ],
)
def test_parameter_that_makes_no_sense_is_rejected_with_a_sentence(
    minilm: Served, parameters: dict[str, Any], error: type[Exception], sentence: str
) -> None:
    with pytest.raises(error, match=sentence):
        minilm("a text", **parameters)


def test_token_ids_give_the_vector_of_their_text_and_foreign_ones_are_rejected(minilm: Served) -> None:
    ids = minilm.task.check("a text", {}).content.rows[0].ids
    assert_same(minilm(ids)[0], minilm("a text")[0])
    with pytest.raises(Unprocessable, match="30522 is not a token of this model"):
        minilm([101, 30522, 102])


def test_any_other_model_gives_the_pipelines_token_vectors_without_paddings(tmp_path: Path) -> None:
    import transformers

    folder = small_bert(tmp_path)
    oracle, ours = transformers.pipeline("feature-extraction", model=folder, device="cpu"), served(folder)
    for text, vectors in in_random_batches(ours, TEXTS):
        assert_same(vectors, oracle(text))


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - {"gpt2"}))  # no encoder
def test_every_family_of_models_embeds_as_sentence_transformers_does(tmp_path: Path, family: str) -> None:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    folder = save(tmp_path / "base", family, make_model(family, "MaskedLM"))
    SentenceTransformer(modules=[Transformer(folder), Pooling(32, "mean")]).save(str(tmp_path / "model"))
    oracle, ours = SentenceTransformer(str(tmp_path / "model"), device="cpu"), served(str(tmp_path / "model"))
    for text, vector in in_random_batches(ours, [*TEXTS, *(text.lower() for text in TEXTS)]):
        assert_same(vector, oracle.encode(text), 1e-4)


def test_module_that_is_not_known_is_rejected_at_start(tmp_path: Path) -> None:
    sentence_model(tmp_path)
    modules = tmp_path / "model" / "modules.json"
    modules.write_text(modules.read_text().replace("Pooling", "LSTM"))
    with pytest.raises(ValueError, match=r"modules\.json: LSTM is not known here"):
        served(str(tmp_path / "model"))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"use_residual": True}, "2_Dense: a Dense of this kind is not known here"),
        ({"module_input_name": "token_embeddings"}, "2_Dense: a Dense of this kind is not known here"),
        ({"activation_function": "this.Zen"}, r"this\.Zen is not an activation of torch\.nn"),
        ({"activation_function": "torch.nn.init.zeros_"}, r"zeros_ is not an activation of torch\.nn"),
    ],
)
def test_dense_that_asks_for_more_is_rejected_at_start(
    tmp_path: Path, change: dict[str, Any], sentence: str
) -> None:
    from torch import nn

    sentence_model(tmp_path, dense=nn.Tanh())
    config = tmp_path / "model" / "2_Dense" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    with pytest.raises(ValueError, match=sentence):
        served(str(tmp_path / "model"))
    assert "this" not in sys.modules, "what a configuration names is not run"


@pytest.mark.parametrize("name", ["cosine", "dot", "euclidean", "manhattan"])
def test_similarities_are_those_of_the_models_own_function(tmp_path: Path, name: str) -> None:
    oracle = sentence_model(tmp_path, similarity_fn_name=name)
    ours = served(str(tmp_path / "model"), "sentence-similarity")
    asked = [{"source_sentence": text, "sentences": TEXTS[: n + 1]} for n, text in enumerate(TEXTS)]
    for one, found in in_random_batches(ours, asked):
        source, others = oracle.encode(one["source_sentence"]), oracle.encode(one["sentences"])
        assert_same(found, oracle.similarity(source, others)[0])


def test_model_without_modules_compares_by_the_mean_of_its_tokens_as_sentence_transformers_does(
    tmp_path: Path,
) -> None:
    from sentence_transformers import SentenceTransformer

    folder = small_bert(tmp_path)
    ours, oracle = served(folder, "sentence-similarity"), SentenceTransformer(folder, device="cpu")
    (found,) = ours({"source_sentence": TEXTS[0], "sentences": TEXTS[1:]})
    assert_same(found, oracle.similarity(oracle.encode(TEXTS[0]), oracle.encode(TEXTS[1:]))[0])


@pytest.mark.parametrize(
    ("inputs", "sentence"),
    [
        ("a text", '"inputs" must be {"source_sentence": "a text", "sentences": \\["another", ...\\]}'),
        ({"source_sentence": "a text"}, '"inputs" must be'),
        ({"source_sentence": "a text", "sentences": []}, '"sentences" must be a list of 1 to 64 texts'),
        ({"source_sentence": "a text", "sentences": ["a", 1]}, '"sentences\\[1\\]" must be a text'),
    ],
)
def test_invalid_comparison_is_rejected_with_a_sentence(inputs: Any, sentence: str) -> None:
    task = tasks.make(Settings(MODEL=MINILM, TASK="sentence-similarity"))
    with pytest.raises(Malformed, match=sentence):
        task.check(inputs, {})


@pytest.fixture(scope="module")
def reranker(tmp_path_factory: pytest.TempPathFactory) -> tuple[Served, Any]:
    """A random cross-encoder as it is served, and sentence-transformers' own."""
    from sentence_transformers import CrossEncoder

    folder = small_bert(tmp_path_factory.mktemp("reranker"), "ForSequenceClassification", num_labels=1)
    return served(folder, "text-ranking"), CrossEncoder(folder, device="cpu")


def pairs(*texts: str) -> list[dict[str, str]]:
    return [{"query": query, "text": text} for query in TEXTS[:3] for text in texts]


def test_rerankers_scores_are_those_of_sentence_transformers_singly_and_in_random_batches(
    reranker: tuple[Served, Any],
) -> None:
    ours, oracle = reranker
    scores = []
    for one, score in in_random_batches(ours, pairs(*TEXTS)):
        assert_same(score, oracle.predict([(one["query"], one["text"])])[0])
        scores.append(float(score))
    assert np.std(scores) > 0.01, "else the oracle can't tell a wrong pair from a right one"


def test_raw_scores_are_the_logits(reranker: tuple[Served, Any]) -> None:
    from torch import nn

    ours, oracle = reranker
    for one in pairs(*TEXTS):
        expected = oracle.predict([(one["query"], one["text"])], activation_fn=nn.Identity())[0]
        assert_same(ours(one, raw_scores=True)[0], expected, 1e-4)


def test_longer_of_a_pair_is_cut_first_as_sentence_transformers_does(
    reranker: tuple[Served, Any],
) -> None:
    ours, oracle = reranker
    for query, text in ((TEXTS[0], LONG), (LONG, TEXTS[0]), (LONG, LONG), (LONG[:1500], LONG[:2000])):
        with pytest.raises(Unprocessable, match="send at most 512, or"):
            ours({"query": query, "text": text})
        score = ours({"query": query, "text": text}, truncate=True)[0]
        assert_same(score, oracle.predict([(query, text)])[0])


@pytest.mark.parametrize("name", ["Identity", "Tanh"])
def test_rerankers_own_activation_is_applied(tmp_path: Path, name: str) -> None:
    from sentence_transformers import CrossEncoder
    from torch import nn

    folder = small_bert(tmp_path / "bert", "ForSequenceClassification", num_labels=1)
    oracle = CrossEncoder(folder, device="cpu", activation_fn=getattr(nn, name)())
    oracle.save(str(tmp_path / "model"))
    ours = served(str(tmp_path / "model"), "text-ranking")
    assert_same(ours(*pairs(*TEXTS)), oracle.predict([tuple(one.values()) for one in pairs(*TEXTS)]))


def test_classifier_of_several_labels_is_rejected_as_a_reranker_at_start(tmp_path: Path) -> None:
    folder = small_bert(tmp_path, "ForSequenceClassification", num_labels=3)
    with pytest.raises(ValueError, match="the model has 3 labels; a reranker has one"):
        served(folder, "text-ranking")


@pytest.mark.parametrize(
    ("task", "model", "inputs"),
    [
        ("feature-extraction", MINILM, "a text"),
        ("sentence-similarity", MINILM, {"source_sentence": "a text", "sentences": ["another"]}),
        ("text-ranking", str(ROOT / "models" / "minilm-mlm"), {"query": "a text", "text": "another"}),
    ],
)
def test_check_needs_no_torch(task: str, model: str, inputs: Any) -> None:
    code = f"""
import sys
from workers import tasks
from workers.settings import Settings
task = tasks.make(Settings(MODEL={model!r}, TASK={task!r}))
task.check({inputs!r}, {{}})
task.examples()
assert not sys.modules.keys() & {{"torch", "transformers", "huggingface_hub"}}
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_its_examples_warm_it_up(minilm: Served, reranker: tuple[Served, Any]) -> None:
    for one in (minilm, reranker[0]):
        examples: list[Query] = one.task.examples()
        assert len(one.model([query.content for query in examples])) == len(examples) > 1
        body = one.task.describe().example
        assert one(body["inputs"], **body.get("parameters", {}))
