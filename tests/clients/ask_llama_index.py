"""What LlamaIndex's clients get: run in their own environment by tests/test_framework_clients.py."""

import json
import sys
from typing import Any

from llama_index.core.schema import NodeWithScore, TextNode
from llama_index.embeddings.huggingface_api import HuggingFaceInferenceAPIEmbedding
from llama_index.embeddings.openai_like import OpenAILikeEmbedding
from llama_index.embeddings.text_embeddings_inference import TextEmbeddingsInference
from llama_index.postprocessor.cohere_rerank import CohereRerank
from llama_index.postprocessor.tei_rerank import TextEmbeddingInference

embedder, reranker, query, *texts = sys.argv[1:]
by_openai = OpenAILikeEmbedding(model_name="any", api_base=embedder + "v1", api_key="none")
by_tei = TextEmbeddingsInference(model_name="any", base_url=embedder.rstrip("/"))
by_hugging_face = HuggingFaceInferenceAPIEmbedding(model_name=embedder, token="none")


def ranking(client: Any) -> dict[str, Any]:
    nodes = [NodeWithScore(node=TextNode(text=text), score=0.5) for text in texts]
    ranks = client.postprocess_nodes(nodes, query_str=query)
    return {"ranking": [[texts.index(rank.text), rank.score] for rank in ranks]}


found = {
    "OpenAILikeEmbedding": {"vectors": by_openai.get_text_embedding_batch(texts)},
    "OpenAILikeEmbedding, a query": {"vector": by_openai.get_query_embedding(query)},
    "TextEmbeddingsInference": {"vectors": by_tei.get_text_embedding_batch(texts)},
    "TextEmbeddingsInference, a query": {"vector": by_tei.get_query_embedding(query)},
    "HuggingFaceInferenceAPIEmbedding": {"vectors": by_hugging_face.get_text_embedding_batch(texts)},
    "TextEmbeddingInference rerank": ranking(TextEmbeddingInference(base_url=reranker.rstrip("/"), top_n=3)),
    "CohereRerank": ranking(CohereRerank(base_url=reranker.rstrip("/"), api_key="none", top_n=3)),
}
print(json.dumps(found))
