"""Reranking, where TASK=text-ranking: POST /rerank, in the forms that its clients know. The best come first.

    {"query": "…", "texts": ["…", …]}      text-embeddings-inference: [{"index": 1, "score": 0.98}, …]
    {"query": "…", "documents": ["…", …]}  Cohere, Jina, vLLM: {"results": [{"index": 1, "relevance_score": 0.98}, …], …}

Cohere's clients send it to /v1/rerank or /v2/rerank. Each pair of query and text is a job of its own in the queue. Long
documents are cut, as Cohere and Jina do; long texts are refused unless `truncate` is true.
"""

from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from workers.errors import Malformed
from workers.protocols import read_json, whole
from workers.protocols.openapi import an_object, asking
from workers.service import Service
from workers.settings import Settings
from workers.web.replies import AnswerResponse

PATHS = ("/rerank", "/v1/rerank", "/v2/rerank")
FOR_THE_TASK = ("truncate", "truncation_direction", "raw_scores")
KNOWN = ("query", "texts", "documents", "model", "top_n", "return_text", "return_documents", *FOR_THE_TASK)


def routes(settings: Settings) -> list[Route]:
    if settings.TASK != "text-ranking" or settings.is_custom:
        return []
    return [Route(path, rerank, methods=["POST"]) for path in PATHS]


def operations(service: Service) -> dict[str, Any]:
    parameters = service.task.describe().parameters or {}
    query = {"query": {"type": "string", "pattern": r"\S"}}
    text = {"type": "string", "pattern": r"\S"}
    document = {"anyOf": [text, {"type": "object", "properties": {"text": text}, "required": ["text"]}]}
    several = {"type": "array", "items": document, "minItems": 1, "maxItems": service.settings.MAX_INPUTS}
    free: dict[str, Any] = {name: {} for name in ("model", "return_text", "return_documents")}
    rest = (
        free
        | {"top_n": {"type": "integer", "minimum": 1}}
        | {name: parameters[name] for name in FOR_THE_TASK}
    )
    forms = [an_object(query | {name: several}, rest) for name in ("texts", "documents")]
    asked = asking(
        "Rank texts", "Their scores, the best first.", {"application/json": {"schema": {"anyOf": forms}}}
    )
    return {path: {"post": asked} for path in PATHS}


async def rerank(request: Request) -> Response:
    """POST /rerank: the texts by how well they answer the query."""
    service: Service = request.state.service
    content, n_bytes = await read_json(request, KNOWN)
    given = texts(content, service.settings.MAX_INPUTS)
    top_n = whole(content.get("top_n", len(given)))
    if type(top_n) is not int or top_n < 1:
        raise Malformed('"top_n" must be a whole number of at least 1')
    parameters = {"truncate": "documents" in content} | {k: content[k] for k in FOR_THE_TASK if k in content}
    pairs = [{"query": content.get("query"), "text": text} for text in given]
    answers, n_tokens = await service.ask(request, pairs, parameters, n_bytes)
    scores = [answer.value for answer in answers]
    best = sorted(range(len(scores)), key=scores.__getitem__, reverse=True)[:top_n]
    with_text = bool(content.get("return_text") or content.get("return_documents"))
    if "texts" in content:
        ranks = [{"index": i, "score": scores[i]} | ({"text": given[i]} if with_text else {}) for i in best]
        return AnswerResponse(answers, ranks)
    results = [
        {"index": i, "relevance_score": scores[i]} | ({"document": {"text": given[i]}} if with_text else {})
        for i in best
    ]
    usage = {"prompt_tokens": n_tokens, "total_tokens": n_tokens}
    reply = {"model": service.settings.model_name, "usage": usage, "results": results}
    return AnswerResponse(answers, reply)


def texts(content: dict[str, Any], most: int) -> list[str]:
    """The texts to rank."""
    if "texts" in content and "documents" in content:
        raise Malformed('there are "texts" and "documents"; send one of them')
    name = "texts" if "texts" in content else "documents"
    given = content.get(name)
    if not isinstance(given, list) or not 1 <= len(given) <= most:
        raise Malformed(f'"{name}" must be a list of 1 to {most} texts')
    return [text["text"] if isinstance(text, dict) and "text" in text else text for text in given]
