"""OpenAI embeddings, where TASK=feature-extraction gives a vector per text: POST /v1/embeddings, GET /v1/models.

    client = openai.OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none")
    client.embeddings.create(model="any", input=["a text", "another"]).data[0].embedding

Vectors have length 1, as those of OpenAI. Any `model` means the one that is served: OpenAI clients insist on a name.
Token ids are the model's own tokenizer's, special ones included.
"""

import base64
import time
from typing import Any

import numpy as np
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from workers.errors import Malformed, ModelFailed, Unprocessable
from workers.jobs import Answer
from workers.protocols import embedder, embeds, read_json, whole
from workers.protocols.openapi import STATUSES, an_object, asking, json_of, operation
from workers.service import Service
from workers.settings import Settings
from workers.web.replies import AnswerResponse

STARTED_AT = int(time.time())
ERROR_FIELDS = {"message": {"type": "string"}, "type": {"type": "string"}, "param": {}, "code": {}}
ERROR = an_object({"error": an_object(ERROR_FIELDS, {})}, {})
# All fields of OpenAI's reference; null is "not given".
FIELDS = {
    "input": "a text, a list of texts, token ids in place of a text",
    "model": "any name: there is one model",
    "encoding_format": '"float" or "base64"',
    "dimensions": "the first so many numbers of each vector, at length 1",
    "user": "no effect",
}


def routes(settings: Settings) -> list[Route]:
    if settings.TASK != "feature-extraction" or settings.is_custom:
        return []
    return [Route("/v1/embeddings", embeddings, methods=["POST"]), Route("/v1/models", models)]


def error_body(status: int, sentence: str) -> dict[str, Any]:
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": sentence, "type": kind, "param": None, "code": None}}


def operations(service: Service) -> dict[str, Any]:
    if not embeds(service):
        return {}
    description, most = service.task.describe(), service.settings.MAX_INPUTS
    text, ids = description.inputs["anyOf"]
    task: Any = service.task
    a_token = {
        "type": "integer",
        "minimum": 0,
        "maximum": (task.config.get("vocab_size") or len(task.tokens)) - 1,
    }
    ids = ids | {"items": a_token, "maxItems": task.limit}
    several = {"type": "array", "items": {"anyOf": [text, ids]}, "minItems": 1, "maxItems": most}
    optional = {
        "model": {},
        "user": {},
        "encoding_format": {"enum": ["float", "base64"]},
        "dimensions": (description.parameters or {})["dimensions"],
    }
    content = json_of({"input": {"anyOf": [text, ids, several]}}, optional)
    return {
        "/v1/embeddings": {"post": asking("Embed texts", "An OpenAI list of vectors.", content, ERROR)},
        "/v1/models": {
            "get": operation("Models", {200: "An OpenAI list of the one model.", **STATUSES}, error=ERROR)
        },
    }


async def embeddings(request: Request) -> Response:
    """POST /v1/embeddings: a vector for each text."""
    service: Service = embedder(request)
    content, n_bytes = await read_json(request, FIELDS)
    form = content.get("encoding_format", "float")
    if form not in ("float", "base64"):
        raise Malformed('"encoding_format" must be "float" or "base64"')
    parameters = {"normalize": True} | {k: whole(content[k]) for k in ("dimensions",) if k in content}
    try:
        inputs = texts(content, service.settings.MAX_INPUTS)
        answers, n_tokens = await service.ask(request, inputs, parameters, n_bytes)
    except (Unprocessable, Malformed) as exc:
        raise Malformed(in_openais_words(str(exc))) from exc  # it has no 422
    vectors = enumerate(encoded_all(answers, form))
    data = [{"object": "embedding", "index": index, "embedding": vector} for index, vector in vectors]
    usage = {"prompt_tokens": n_tokens, "total_tokens": n_tokens}
    reply = {"object": "list", "data": data, "model": service.settings.model_name, "usage": usage}
    return AnswerResponse(answers, reply)


async def models(request: Request) -> Response:
    """GET /v1/models: the model that is served."""
    return model_list(embedder(request))


def model_list(service: Service) -> Response:
    """Return the one model as OpenAI lists models."""
    name = service.settings.model_name
    model = {"id": name, "object": "model", "created": STARTED_AT, "owned_by": "owner"}
    return JSONResponse({"object": "list", "data": [model]})


def in_openais_words(sentence: str) -> str:
    """Return the task's sentence without what is not sent here."""
    return sentence.replace('"inputs"', '"input"').removesuffix(', or "truncate": true')


def texts(content: dict[str, Any], most: int) -> list[Any]:
    """Return the inputs: texts, or lists of token ids."""
    given = content.get("input")
    alone = isinstance(given, str) or (isinstance(given, list) and given and type(whole(given[0])) is int)
    inputs = [given] if alone else given
    if not isinstance(inputs, list) or not 1 <= len(inputs) <= most:
        raise Malformed(
            f'"input" must be a text, a list of 1 to {most} texts, or token ids in place of texts'
        )
    return [list(map(whole, one)) if isinstance(one, list) else one for one in inputs]


def encoded_all(answers: list[Answer], form: str) -> list[Any]:
    """Return each answer's vector as the reply has it. Raises ModelFailed, with its index, for one that is not finite."""
    vectors = []
    for index, answer in enumerate(answers):
        try:
            vectors.append(encoded(answer.value, form))
        except ModelFailed as exc:
            exc.index = index if len(answers) > 1 else None
            raise
    return vectors


def encoded(vector: np.ndarray, form: str) -> Any:
    """Return the vector as the reply has it: numbers, or base64 of its float32 in little-endian order.

    Raises ModelFailed for NaN and infinity, which JSON would refuse, too.
    """
    if form == "float":
        return vector
    if not np.isfinite(vector).all():
        raise ModelFailed("the vector is not finite")
    return base64.b64encode(vector.astype("<f4").tobytes()).decode()
