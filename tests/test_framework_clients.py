"""LangChain, LiteLLM, LlamaIndex and Haystack, as their users install them: each gets what sentence-transformers gives.

Each runs `tests/clients/ask_NAME.py` in an environment of its own, made of `tests/clients/NAME.txt`.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loadtests.modes import MODES, start
from tests.support.embedding_models import MINILM, small_bert
from tests.support.environments import ask

pytestmark = pytest.mark.slow
QUERY = "Where does the dog run?"
TEXTS = ["A man eats food.", "The dog runs on the hill.", "The old house is in Paris."]


@pytest.fixture(scope="module")
def reranker(tmp_path_factory: pytest.TempPathFactory) -> str:
    return small_bert(tmp_path_factory.mktemp("reranker"), "ForSequenceClassification", num_labels=1)


@pytest.fixture(scope="module")
def urls(reranker: str) -> Iterator[list[str]]:
    """Where an embedder and a reranker answer."""
    tasks = {"feature-extraction": MINILM, "text-ranking": reranker}
    first, second = [{"MODEL": model, "TASK": task} for task, model in tasks.items()]
    with start(MODES["thread"], first) as embeds, start(MODES["thread"], second) as ranks:
        yield [embeds.url, ranks.url]


@pytest.fixture(scope="module")
def expected(reranker: str) -> dict[str, Any]:
    """What sentence-transformers gives."""
    from sentence_transformers import CrossEncoder, SentenceTransformer

    embedder = SentenceTransformer(MINILM, device="cpu")
    ranks = CrossEncoder(reranker, device="cpu").rank(QUERY, TEXTS)
    return {
        "vectors": embedder.encode(TEXTS),
        "vector": embedder.encode(QUERY),
        "ranking": [(rank["corpus_id"], float(rank["score"])) for rank in ranks],
    }


@pytest.mark.parametrize("name", ["langchain", "litellm", "llama_index", "haystack"])
def test_framework_gets_what_sentence_transformers_gives(
    name: str, urls: list[str], expected: dict[str, Any], tmp_path: Path
) -> None:
    found = json.loads(ask(name, tmp_path, *urls, QUERY, *TEXTS))
    for client, ((kind, value),) in ((client, answer.items()) for client, answer in found.items()):
        if kind == "error":
            assert "don't begin with [101]" in value, client
        elif kind == "ranking":
            best = expected["ranking"][: len(value)]
            assert [index for index, _ in value] == [index for index, _ in best], client
            np.testing.assert_allclose(
                [score for _, score in value], [score for _, score in best], atol=1e-4, err_msg=client
            )
        else:
            np.testing.assert_allclose(value, expected[kind], atol=1e-4, err_msg=client)
