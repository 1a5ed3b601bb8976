"""What Haystack's clients get: run in their own environment by tests/test_framework_clients.py."""

import json
import sys
from typing import Any

from haystack import Document
from haystack.components.embedders import OpenAIDocumentEmbedder, OpenAITextEmbedder
from haystack.utils import Secret
from haystack_integrations.components.embedders.cohere import CohereDocumentEmbedder, CohereTextEmbedder
from haystack_integrations.components.embedders.huggingface_api import (
    HuggingFaceAPIDocumentEmbedder,
    HuggingFaceAPITextEmbedder,
)
from haystack_integrations.components.rankers.cohere import CohereRanker
from haystack_integrations.components.rankers.huggingface_api import HuggingFaceTEIRanker

embedder, reranker, query, *texts = sys.argv[1:]
key = Secret.from_token("none")
by_openai = {"api_key": key, "model": "any", "api_base_url": embedder + "v1"}
by_cohere = {"api_key": key, "model": "any", "api_base_url": embedder.rstrip("/")}
by_tei: dict[str, Any] = {
    "api_type": "text_embeddings_inference",
    "api_params": {"url": embedder},
    "token": key,
}


def documents() -> list[Document]:
    return [Document(content=text) for text in texts]


def vectors(client: Any) -> dict[str, Any]:
    return {"vectors": [one.embedding for one in client.run(documents())["documents"]]}


def vector(client: Any) -> dict[str, Any]:
    return {"vector": client.run(query)["embedding"]}


def ranking(client: Any) -> dict[str, Any]:
    ranks = client.run(query=query, documents=documents())["documents"]
    return {"ranking": [[texts.index(rank.content), rank.score] for rank in ranks]}


found = {
    "OpenAIDocumentEmbedder": vectors(OpenAIDocumentEmbedder(**by_openai)),
    "OpenAITextEmbedder": vector(OpenAITextEmbedder(**by_openai)),
    "CohereDocumentEmbedder": vectors(CohereDocumentEmbedder(**by_cohere)),
    "CohereTextEmbedder": vector(CohereTextEmbedder(**by_cohere)),
    "HuggingFaceAPIDocumentEmbedder": vectors(HuggingFaceAPIDocumentEmbedder(**by_tei)),
    "HuggingFaceAPITextEmbedder": vector(HuggingFaceAPITextEmbedder(**by_tei)),
    "CohereRanker": ranking(
        CohereRanker(api_key=key, model="any", api_base_url=reranker.rstrip("/"), top_k=3)
    ),
    "HuggingFaceTEIRanker": ranking(HuggingFaceTEIRanker(url=reranker.rstrip("/"), top_k=3, token=key)),
}
print(json.dumps(found))
