"""Reranking, where TASK=text-ranking: POST /rerank, in the forms that its clients know. The best come first.

    {"query": "…", "texts": ["…", …]}      text-embeddings-inference: [{"index": 1, "score": 0.98}, …]
    {"query": "…", "documents": ["…", …]}  Cohere, Jina, vLLM: {"results": [{"index": 1, "relevance_score": 0.98}, …], …}

Cohere clients send it to /v1/rerank or /v2/rerank. Each pair of query and text is a job of its own in the queue. Long
documents are cut, as Cohere and Jina do; long texts are refused unless `truncate` is true.
"""

from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from workers.context import context_of
from workers.errors import Malformed, Unprocessable
from workers.protocols import read_json, whole
from workers.protocols.openapi import an_object, asking
from workers.service import Service
from workers.settings import Settings
from workers.tasks.common.sentence import CUTTING
from workers.web.replies import AnswerResponse

PATHS = ("/rerank", "/v1/rerank", "/v2/rerank")
# All fields of the references of text-embeddings-inference and of Cohere, v1 and v2; null is "not given".
FIELDS = {
    "query": "a text",
    "texts": "a list of texts: text-embeddings-inference",
    "documents": 'a list of texts, or of objects with "text" or the fields in `rank_fields`: Cohere, Jina, vLLM',
    "model": "any name: there is one model",
    "top_n": "the best so many only",
    "return_text": "the texts in the reply, too",
    "return_documents": "the same",
    "raw_scores": "the model's own numbers, before the activation",
    "truncate": "cut long texts; documents are always cut",
    "truncation_direction": '"left" or "right", also capitalised',
    "max_tokens_per_doc": "cut each document to its first so many tokens",
    "rank_fields": "which fields of the documents to rank by, in this order",
    "max_chunks_per_doc": "no effect: of a long document the first chunk counts",
    "priority": "no effect",
}
WHOLE = ("top_n", "max_tokens_per_doc", "max_chunks_per_doc")


def routes(settings: Settings) -> list[Route]:
    if settings.TASK != "text-ranking" or settings.is_custom:
        return []
    return [Route(path, rerank, methods=["POST"]) for path in PATHS]


def operations(service: Service) -> dict[str, Any]:
    text = {"type": "string", "pattern": r"\S"}
    named = {"type": "object", "additionalProperties": True}
    most = service.settings.MAX_INPUTS
    several = {"type": "array", "minItems": 1, "maxItems": most}
    flag, a_count = {"type": "boolean"}, {"type": "integer", "minimum": 1}
    shared = {
        "model": {},
        "return_text": {},
        "return_documents": {},
        "raw_scores": flag,
        "truncate": flag,
        "truncation_direction": CUTTING["truncation_direction"].schema,
        "rank_fields": {"type": "array", "items": {"type": "string"}, "minItems": 1},
        "priority": {},
        **dict.fromkeys(WHOLE, a_count),
    }
    forms = [
        an_object({"query": text, "texts": several | {"items": text}}, shared),
        an_object({"query": text, "documents": several | {"items": {"anyOf": [text, named]}}}, shared),
    ]
    content = {"application/json": {"schema": {"anyOf": forms}}}
    asked = asking("Rank texts by how well they answer a query", "Their scores, the best first.", content)
    return {path: {"post": asked} for path in PATHS}


async def rerank(request: Request) -> Response:
    """POST /rerank: the texts by how well they answer the query."""
    service: Service = request.state.service
    content, n_bytes = await read_json(request, FIELDS)
    for name in WHOLE:
        if name in content and (type(whole(content[name])) is not int or content[name] < 1):
            raise Malformed(f'"{name}" must be a whole number of at least 1')
    given = texts(content, service.settings.MAX_INPUTS)
    task: Any = service.task
    if (most := content.get("max_tokens_per_doc")) and "documents" in content:

        def cut() -> list[Any]:
            return [task.first_tokens(one, whole(most)) if isinstance(one, str) else one for one in given]

        given = await service.checks.run(context_of(request.scope), n_bytes, cut)
    raw_scores = content.get("raw_scores", False)
    if type(raw_scores) is not bool:
        raise Malformed('"raw_scores" must be true or false')
    pairs = [{"query": content.get("query"), "text": text} for text in given]
    answers, n_tokens = await service.ask(request, pairs, parameters(content), n_bytes)
    raw = [answer.value for answer in answers]
    best = sorted(range(len(raw)), key=raw.__getitem__, reverse=True)[: whole(content.get("top_n", len(raw)))]
    scores = raw if raw_scores else [task.score(one) for one in raw]
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


def parameters(content: dict[str, Any]) -> dict[str, Any]:
    """Return the task's parameters. The raw score is always asked for: many scores of 1.0 have an order in it."""
    cutting = {name: content[name] for name in CUTTING if name in content}
    return {"truncate": "documents" in content, "raw_scores": True} | cutting


def texts(content: dict[str, Any], most: int) -> list[Any]:
    """Return the texts to rank. Raises Malformed if there is no list of them, Unprocessable for an object without a text."""
    if "texts" in content and "documents" in content:
        raise Malformed('there are "texts" and "documents"; send one of them')
    name = "texts" if "texts" in content else "documents"
    given = content.get(name)
    if not isinstance(given, list) or not 1 <= len(given) <= most:
        raise Malformed(f'"{name}" must be a list of 1 to {most} texts')
    fields = content.get("rank_fields", ["text"])
    if not isinstance(fields, list) or not fields or not all(isinstance(field, str) for field in fields):
        raise Malformed('"rank_fields" must be a list of names of fields, such as ["text"]')
    return [text_of(one, fields) for one in given]


def text_of(document: Any, fields: list[str]) -> Any:
    """Return what to rank of a document: itself, or these fields of an object, a line each."""
    if not isinstance(document, dict):
        return document
    parts = [document[field] for field in fields if field in document]
    if not parts or not all(isinstance(part, str) for part in parts):
        shown = " or ".join(f'"{field}"' for field in fields)
        raise Unprocessable(
            f'no text in the field {shown} of a document; send one, or name other fields in "rank_fields"'
        )
    return "\n".join(parts)
