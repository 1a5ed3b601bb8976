"""What LiteLLM's clients get: run in their own environment by tests/test_framework_clients.py."""

import json
import sys
from typing import Any

import litellm

embedder, reranker, query, *texts = sys.argv[1:]


def vectors(model: str, path: str, **more: Any) -> dict[str, Any]:
    reply = litellm.embedding(model, input=texts, api_base=embedder + path, api_key="none", **more)
    return {"vectors": [one["embedding"] for one in reply.data]}


def ranking(model: str, url: str, **more: Any) -> dict[str, Any]:
    reply = litellm.rerank(model, query=query, documents=texts, api_base=url, api_key="none", **more)
    return {"ranking": [[rank["index"], rank["relevance_score"]] for rank in reply.results]}


whole = reranker.rstrip("/")
found = {
    "openai/": vectors("openai/any", "v1"),
    "hosted_vllm/": vectors("hosted_vllm/any", "v1"),
    "cohere/, v2": vectors("cohere/embed-v4.0", "v2/embed"),
    "cohere/, v1": vectors("cohere/embed-english-v3.0", "v1/embed"),
    "huggingface/": vectors("huggingface/any", "", input_type="feature-extraction"),
    "huggingface/, embed": vectors("huggingface/any", "embed", input_type="embed"),
    "cohere/, rerank": ranking("cohere/any", whole, max_tokens_per_doc=4096, return_documents=True),
    "huggingface/, rerank": ranking("huggingface/any", whole, top_n=2),
    "jina_ai/, rerank": ranking("jina_ai/any", whole + "/v1"),
    "hosted_vllm/, rerank": ranking("hosted_vllm/any", whole),
}
print(json.dumps(found))
