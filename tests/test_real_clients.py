"""The real clients: huggingface_hub's, OpenAI's, Cohere's, curl. Each gets what the oracle of its task gives.

A task is served once; what its clients ask of it is one line in ASKED.
"""

import asyncio
import contextlib
import io
import json
import subprocess
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import cohere
import httpx
import httpx2
import numpy as np
import openai
import pytest
from huggingface_hub import AsyncInferenceClient, InferenceClient
from huggingface_hub.errors import HfHubHTTPError

from loadtests.modes import MODES, ROOT, start
from tests.support.embedding_models import MINILM, small_bert

TEXT = "The old house on the hill is in Paris."
ENTITIES = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]
SENTENCES = ["A man eats food.", "The dog runs.", TEXT]
LONG = "of the old house on the hill " * 100


def labels(names: list[str]) -> dict[str, Any]:
    """What a configuration says of a head's labels."""
    return {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}


def small_vit(folder: Path) -> str:
    """A random image classifier, saved."""
    import transformers

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    config = transformers.ViTConfig(image_size=32, patch_size=8, num_labels=5, initializer_range=0.5, **sizes)
    transformers.ViTForImageClassification(config).save_pretrained(str(folder))
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(str(folder))
    return str(folder)


MADE: dict[str, Callable[[Path], str]] = {
    "feature-extraction": lambda folder: MINILM,
    "sentence-similarity": lambda folder: MINILM,
    "fill-mask": lambda folder: str(ROOT / "models" / "minilm-mlm"),
    "text-classification": lambda folder: small_bert(folder, "ForSequenceClassification", num_labels=3),
    "token-classification": lambda folder: small_bert(folder, "ForTokenClassification", **labels(ENTITIES)),
    "question-answering": lambda folder: small_bert(folder, "ForQuestionAnswering"),
    "text-ranking": lambda folder: small_bert(folder, "ForSequenceClassification", num_labels=1),
    "zero-shot-classification": lambda folder: small_bert(folder, "ForSequenceClassification", num_labels=3),
    "image-classification": small_vit,
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The folder of each task's model."""
    return {task: make(tmp_path_factory.mktemp(task)) for task, make in MADE.items()}


# Each task that is asked for costs a server that imports torch: five seconds of a core. The slow tests ask the others.
EACH_COMMIT = {"feature-extraction", "fill-mask", "text-ranking", "image-classification"}


class Urls(dict[str, str]):
    """Where the server of each task answers; it is started when it is first asked for."""

    def __init__(self, models: dict[str, str], running: contextlib.ExitStack) -> None:
        self.models, self.running = models, running

    def __missing__(self, task: str) -> str:
        settings = {"MODEL": self.models[task], "TASK": task, "BATCH_SIZE": "4", "TORCH_THREADS": "1"}
        self[task] = self.running.enter_context(start(MODES["thread"], settings)).url
        return self[task]


@pytest.fixture(scope="module")
def urls(models: dict[str, str]) -> Iterator[dict[str, str]]:
    with contextlib.ExitStack() as running:
        yield Urls(models, running)


@pytest.fixture(scope="module")
def oracle(models: dict[str, str], urls: dict[str, str]) -> Callable[[str], Any]:
    """The stock pipeline of a task; sentence-transformers; where Transformers has none any more, POST / by hand."""

    @cache
    def oracle(task: str) -> Any:
        import sentence_transformers
        import transformers

        if models[task] == MINILM:
            return sentence_transformers.SentenceTransformer(MINILM, device="cpu")
        if task == "text-ranking":
            return sentence_transformers.CrossEncoder(models[task], device="cpu")
        if task == "question-answering":
            return lambda **inputs: httpx2.post(urls[task], json={"inputs": inputs}).json()
        return transformers.pipeline(task, model=models[task], device="cpu", dtype="float32")

    return oracle


@cache
def jpeg() -> bytes:
    from PIL import Image

    image, file = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 50, 3), "u1")), io.BytesIO()
    image.save(file, "JPEG")
    return file.getvalue()


def alike(client: Any, oracle: Any) -> None:
    """Whether both are the same, numbers nearly, whatever classes they are made of."""
    if isinstance(oracle, dict):
        for name, value in oracle.items():
            alike(client[name], value)
    elif isinstance(oracle, list | tuple):
        assert len(client) == len(oracle)
        for one, other in zip(client, oracle, strict=True):
            alike(one, other)
    elif isinstance(oracle, float | np.ndarray | np.floating):
        np.testing.assert_allclose(client, oracle, atol=1e-4)
    else:
        assert client == oracle


def picture(pipe: Any, **parameters: Any) -> Any:
    from PIL import Image

    return pipe(Image.open(io.BytesIO(jpeg())), **parameters)


# A method of InferenceClient, what it is given, and what the oracle of its task says.
Asked = tuple[str, tuple[Any, ...], dict[str, Any], Callable[[Any], Any]]
ASKED: list[Asked] = [
    ("feature_extraction", (TEXT,), {}, lambda model: model.encode(TEXT)),
    ("feature_extraction", (SENTENCES,), {"normalize": True}, lambda model: model.encode(SENTENCES)),
    ("feature_extraction", (LONG,), {"truncate": True}, lambda model: model.encode(LONG)),
    ("feature_extraction", (TEXT,), {"prompt_name": "query"}, lambda model: model.encode(TEXT)),
    (
        "feature_extraction",
        (TEXT,),
        {"dimensions": 64, "encoding_format": "float"},
        lambda model: model.encode(TEXT, truncate_dim=64, normalize_embeddings=True),
    ),
    (
        "sentence_similarity",
        (TEXT,),
        {"other_sentences": SENTENCES},
        lambda model: model.similarity(model.encode(TEXT), model.encode(SENTENCES))[0].tolist(),
    ),
    ("token_classification", (TEXT,), {}, lambda pipe: pipe(TEXT)),
    (
        "token_classification",
        (TEXT,),
        {"aggregation_strategy": "simple", "ignore_labels": ["LOC"]},
        lambda pipe: pipe(TEXT, aggregation_strategy="simple", ignore_labels=["LOC"]),
    ),
    (
        "question_answering",
        (),
        {"question": "Where is it?", "context": TEXT},
        lambda pipe: pipe(question="Where is it?", context=TEXT),
    ),
    (
        "fill_mask",
        ("Paris is the [MASK] of France.",),
        {"top_k": 2},
        lambda pipe: pipe("Paris is the [MASK] of France.", top_k=2),
    ),
    (
        "fill_mask",
        ("I [MASK] you.",),
        {"targets": ["love", "know"]},
        lambda pipe: pipe("I [MASK] you.", targets=["love", "know"]),
    ),
    ("image_classification", (jpeg(),), {}, picture),
    ("image_classification", (jpeg(),), {"top_k": 2}, lambda pipe: picture(pipe, top_k=2)),
]
# What it reads in another form than the pipeline's.
ASKED_OF_THE_DOOR: list[Asked] = [
    ("text_classification", (TEXT,), {}, lambda pipe: pipe(TEXT, top_k=None)),
    (
        "text_classification",
        (TEXT,),
        {"top_k": 2, "function_to_apply": "sigmoid"},
        lambda pipe: pipe(TEXT, top_k=2, function_to_apply="sigmoid"),
    ),
    ("zero_shot_classification", (TEXT, ["old", "new"]), {}, lambda pipe: listed(pipe(TEXT, ["old", "new"]))),
    (
        "zero_shot_classification",
        (TEXT, ["old", "new"]),
        {"multi_label": True, "hypothesis_template": "It is {}!"},
        lambda pipe: listed(pipe(TEXT, ["old", "new"], multi_label=True, hypothesis_template="It is {}!")),
    ),
]


def listed(found: dict[str, Any]) -> list[dict[str, Any]]:
    """What the zero-shot pipeline says, label by label."""
    return [{"label": label, "score": score} for label, score in zip(found["labels"], found["scores"])]


@pytest.mark.parametrize(
    ("door", "method", "args", "kwargs", "expected"),
    [
        pytest.param(
            door,
            *asked,
            id=f"/{door} {asked[0]} {list(asked[2])}",
            marks=[] if asked[0].replace("_", "-") in EACH_COMMIT else pytest.mark.slow,
        )
        for door, some in (("", ASKED), ("hf-inference", ASKED + ASKED_OF_THE_DOOR))
        for asked in some
    ],
)
def test_hugging_faces_client_gets_what_the_oracle_gives(
    urls: dict[str, str],
    oracle: Callable[[str], Any],
    door: str,
    method: str,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    expected: Callable[[Any], Any],
) -> None:
    task = method.replace("_", "-")
    found = getattr(InferenceClient(model=urls[task] + door), method)(*args, **kwargs)
    alike(found, expected(oracle(task)))


def test_hugging_faces_async_client_gets_the_same(urls: dict[str, str], oracle: Callable[[str], Any]) -> None:
    async def ask() -> Any:
        async with AsyncInferenceClient(model=urls["feature-extraction"]) as client:
            return await asyncio.gather(*(client.feature_extraction(text) for text in SENTENCES))

    alike(asyncio.run(ask()), list(oracle("feature-extraction").encode(SENTENCES)))


@pytest.mark.slow
def test_hf_inference_answers_lists_with_lists_and_errors_as_post_does(urls: dict[str, str]) -> None:
    def ask(task: str, inputs: Any, **parameters: Any) -> Any:
        content = {"inputs": inputs, "parameters": parameters}
        return httpx2.post(urls[task] + "hf-inference", json=content)

    one, both = (ask("text-classification", asked).json() for asked in (TEXT, [TEXT, "Hm"]))
    assert len(both) == 2 and len(one) == 1
    alike(both[0], one[0])
    one, both = (
        ask("zero-shot-classification", asked, candidate_labels="a, b").json() for asked in (TEXT, [TEXT] * 2)
    )
    alike(both, [one, one])
    reply = ask("zero-shot-classification", TEXT)
    assert reply.status_code == 400 and reply.json()["error"].startswith('"candidate_labels" must be')


def test_hugging_faces_client_shows_the_sentence_of_an_error(urls: dict[str, str]) -> None:
    client = InferenceClient(model=urls["feature-extraction"])
    with pytest.raises(HfHubHTTPError, match="702 tokens; send at most 256"):
        client.feature_extraction(LONG)
    with pytest.raises(HfHubHTTPError, match="POST to /v1/embeddings for base64"):
        client.feature_extraction(TEXT, encoding_format="base64")


def test_openais_client_gets_the_vectors(urls: dict[str, str], oracle: Callable[[str], Any]) -> None:
    expected = list(oracle("feature-extraction").encode(SENTENCES))
    with openai.OpenAI(base_url=urls["feature-extraction"] + "v1", api_key="none") as client:
        (model,) = client.models.list().data
        for asked in ({}, {"encoding_format": "float"}):  # by default it asks for base64
            found = client.embeddings.create(model=model.id, input=SENTENCES, **asked)
            alike([one.embedding for one in found.data], expected)
        assert found.usage.prompt_tokens == found.usage.total_tokens > len(SENTENCES)
        found = client.embeddings.create(model="any", input=SENTENCES[0], dimensions=64)
        assert len(found.data[0].embedding) == 64
        with pytest.raises(openai.BadRequestError, match="702 tokens; send at most 256") as caught:
            client.embeddings.create(model="any", input=LONG)
        assert caught.value.type == "invalid_request_error" and caught.value.request_id
        with pytest.raises(openai.InternalServerError, match="allow more time") as late:
            client.with_options(max_retries=0).embeddings.create(
                model="any", input=TEXT, extra_headers={"Prefer": "wait=0"}
            )
        assert late.value.status_code == 504


def test_openais_async_client_gets_the_vectors(urls: dict[str, str], oracle: Callable[[str], Any]) -> None:
    async def ask() -> list[Any]:
        async with openai.AsyncOpenAI(base_url=urls["feature-extraction"] + "v1", api_key="none") as client:
            asked = [client.embeddings.create(model="any", input=text) for text in SENTENCES]
            return [found.data[0].embedding for found in await asyncio.gather(*asked)]

    alike(asyncio.run(ask()), list(oracle("feature-extraction").encode(SENTENCES)))


@pytest.mark.parametrize("kind", [cohere.Client, cohere.ClientV2])
def test_coheres_client_gets_the_ranking(
    urls: dict[str, str], oracle: Callable[[str], Any], kind: Any
) -> None:
    texts = [*SENTENCES, LONG]
    with httpx.Client() as http:
        client = kind(api_key="none", base_url=urls["text-ranking"].rstrip("/"), httpx_client=http)
        cut = {"max_tokens_per_doc": 4096} if kind is cohere.ClientV2 else {"max_chunks_per_doc": 10}
        found = client.rerank(model="any", query="Where is it?", documents=texts, top_n=3, **cut)
        with pytest.raises(cohere.BadRequestError, match="must be a list of 1 to 64 texts"):
            client.rerank(model="any", query="Where is it?", documents=[])
    expected = oracle("text-ranking").rank("Where is it?", texts, top_k=3)
    assert [one.index for one in found.results] == [one["corpus_id"] for one in expected]
    alike([one.relevance_score for one in found.results], [float(one["score"]) for one in expected])


def test_curl_sends_a_picture(urls: dict[str, str], oracle: Callable[[str], Any], tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(jpeg())
    command = ["curl", "-sS", "-H", "Content-Type: image/jpeg", "--data-binary", "@a.jpg"]
    found = subprocess.check_output([*command, urls["image-classification"]], cwd=tmp_path)
    alike(json.loads(found), picture(oracle("image-classification")))
