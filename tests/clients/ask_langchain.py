"""What LangChain's clients get: run in their own environment by tests/test_framework_clients.py."""

import json
import sys
from typing import Any

import openai
import tiktoken
from huggingface_hub import InferenceClient
from langchain_cohere import CohereEmbeddings, CohereRerank
from langchain_huggingface import HuggingFaceEndpointEmbeddings
from langchain_openai import OpenAIEmbeddings

embedder, reranker, query, *texts = sys.argv[1:]


def token_ids_of_openai() -> str:
    """The sentence that rejects them: LangChain's default sends token ids of OpenAI's tokenizer."""
    # The real one is a download: one whose tokens are bytes.
    ranks = {bytes([one]): one for one in range(256)}
    bytewise = tiktoken.Encoding("bytewise", pat_str=r"\w+|\W+", mergeable_ranks=ranks, special_tokens={})
    tiktoken.encoding_for_model = tiktoken.get_encoding = lambda name: bytewise  # type: ignore[assignment]
    try:
        OpenAIEmbeddings(base_url=embedder + "v1", api_key="none").embed_query(texts[0])
    except openai.BadRequestError as exc:
        return exc.body["message"]  # type: ignore[index]
    return ""


def hugging_face() -> list[list[float]]:
    client = HuggingFaceEndpointEmbeddings(model="any/model", huggingfacehub_api_token="none")
    client.client = InferenceClient(model=embedder)  # since 1.2 it takes no URL itself
    return client.embed_documents(texts)


by_openai = OpenAIEmbeddings(base_url=embedder + "v1", api_key="none", check_embedding_ctx_length=False)
by_cohere = CohereEmbeddings(base_url=embedder.rstrip("/"), cohere_api_key="none", model="any")
ranks = CohereRerank(base_url=reranker.rstrip("/"), cohere_api_key="none", model="any").rerank(texts, query)
found: dict[str, dict[str, Any]] = {
    "OpenAIEmbeddings": {"vectors": by_openai.embed_documents(texts)},
    "OpenAIEmbeddings, a query": {"vector": by_openai.embed_query(query)},
    "OpenAIEmbeddings, token ids": {"error": token_ids_of_openai()},
    "CohereEmbeddings": {"vectors": by_cohere.embed_documents(texts)},
    "CohereEmbeddings, a query": {"vector": by_cohere.embed_query(query)},
    "HuggingFaceEndpointEmbeddings": {"vectors": hugging_face()},
    "CohereRerank": {"ranking": [[rank["index"], rank["relevance_score"]] for rank in ranks]},
}
print(json.dumps(found))
