"""The API description: GET /openapi.json (OpenAPI 3.1) and GET /info.

Both are made from the description of the task, once it is known: until then they are 503, as all else. The paths of the other
APIs come from the `operations(service)` of their files.
"""

import os
import re
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

import workers
from workers.apis import discover
from workers.errors import ModelFailed
from workers.service import Service
from workers.settings import Settings
from workers.tasks import Description, ModelInfo
from workers.tasks.common.text import find
from workers.web import forms, replies, stream

SHOWN = (
    "OFFLOAD",
    "INSTANCES",
    "WEB_CONCURRENCY",
    "BATCH_SIZE",
    "MAX_QUEUE",
    "QUEUE_TARGET_S",
)
ERROR = {"$ref": "#/components/schemas/Error"}
STATUSES = {  # of every request, then of those to the model
    403: "The Host or the Origin is not allowed.",
    431: "The headers are too long.",
    503: "The server is loading, stopping or overloaded. Retry after `Retry-After` seconds.",
}
MODEL_STATUSES = {
    400: "The request is malformed; the sentence says what to send.",
    408: "The body did not arrive in time.",
    413: "The body is too large.",
    415: "The media type, its charset or its encoding is not supported.",
    422: "The request is well-formed, but the model can't answer it; the sentence says what to change.",
    500: "The model failed on this input; report it with the X-Request-ID.",
    504: "There was no answer before the deadline.",
}


def routes(settings: Settings) -> list[Route]:
    return [Route("/openapi.json", openapi), Route("/info", info)]


async def openapi(request: Request) -> Response:
    """GET /openapi.json: the OpenAPI document."""
    return JSONResponse(document(request.state.service))


async def info(request: Request) -> Response:
    """GET /info: what is served, its limits, and the settings that matter; no path and no secret."""
    service: Service = request.state.service
    settings, task = service.settings, service.task
    description = task.describe()
    dtype, device = where(service)
    limits = {name: getattr(settings, name) for name in ("MAX_INPUTS", "MAX_TOP_K", "MAX_MASKS")}
    content = {
        "version": workers.__version__,
        "task": "custom" if settings.is_custom else settings.TASK,
        "model": {"name": settings.model_name, "revision": revision(settings)},
        "dtype": dtype,
        "device": device,
        "takes": description.takes,
        "gives": description.gives,
        "example": sayable(description.example),
        "media": list(task.media),
        "has_chat": bool(service.generation and service.generation.task.has_chat),
        "limits": {
            "MAX_BODY_BYTES": service.in_flight.most_bytes,
            "MAX_TOKENS": getattr(task, "limit", settings.MAX_TOKENS),
            **limits,
            "DEADLINE_S": settings.DEADLINE_S,
        },
        "settings": {name: getattr(settings, name) for name in SHOWN},
    }
    return Response(replies.rendered(content), media_type="application/json")


def where(service: Service) -> tuple[str | None, str | None]:
    """The dtype and the device that a loaded instance says it has; None where it says nothing, as a custom class."""
    infos = [info for info in service.descriptions if isinstance(info, ModelInfo) and info.dtype]
    return (infos[0].dtype, infos[0].device) if infos else (None, None)


def revision(settings: Settings) -> str | None:
    """Return the commit of a model from the hub; None for a folder and for a custom class."""
    if settings.is_custom or os.path.isdir(settings.MODEL):
        return None
    found = re.search(r"/snapshots/(\w+)/", find(settings.MODEL, "config.json") or "")
    return found[1] if found else None


def sayable(example: dict[str, Any]) -> Any:
    """Return the example, None if JSON can't say it."""
    try:
        replies.rendered(example)
    except ModelFailed:
        return None
    return example


def document(service: Service) -> dict[str, Any]:
    """Return the OpenAPI 3.1 document."""
    settings, said = service.settings, service.task.describe()
    paths: dict[str, Any] = {
        "/": {"post": model_operation(said, service)},
        "/health": {
            "get": operation("Liveness", {200: "The server is healthy.", 503: "Restart the server."})
        },
        "/ready": {"get": operation("Readiness", {200: "A model is loaded.", 503: "No model is loaded."})},
        "/metrics": {"get": operation("Metrics", {200: "Prometheus text format.", **STATUSES}, "text/plain")},
        "/info": {
            "get": operation(
                "Model, limits and settings", {200: "The model, limits and settings.", **STATUSES}
            )
        },
        "/openapi.json": {"get": operation("API description", {200: "The OpenAPI document.", **STATUSES})},
    }
    unlocked = {("/health", "get"), ("/ready", "get")} | (
        {("/metrics", "get")} if settings.METRICS_OPEN else set()
    )
    for api in discover():
        if there := api.routes(settings):
            unlocked |= {(r.path, "get") for r in there if getattr(r.endpoint, "is_public", False)}
            for path, methods in api.operations(service).items():
                paths[path] = paths.get(path, {}) | methods
    whole = {
        "openapi": "3.1.0",
        "info": {
            "title": settings.model_name,
            "version": workers.__version__,
            "description": f"Takes {said.takes}; gives {said.gives}. Every error is JSON and says what to do.",
        },
        "paths": paths,
        "components": {"schemas": {"Error": ERROR_SCHEMA}},
    }
    if settings.API_KEY:
        lock(whole, unlocked)
    return whole


def lock(whole: dict[str, Any], unlocked: set[tuple[str, str]]) -> None:
    """Add that a key is needed everywhere but at these paths with these methods."""
    bearer, header = (
        {"type": "http", "scheme": "bearer"},
        {"type": "apiKey", "in": "header", "name": "x-api-key"},
    )
    whole["components"]["securitySchemes"] = {"bearer": bearer, "header": header}
    for path, methods in whole["paths"].items():
        for method, asked in methods.items():
            if (path, method) not in unlocked:
                asked["security"] = [{"bearer": []}, {"header": []}]
                asked["responses"]["401"] = response(
                    401,
                    "The API key is missing or wrong.",
                    "",
                    asked["responses"]["503"]["content"]["application/json"]["schema"],
                )


ERROR_SCHEMA = {
    "type": "object",
    "properties": {"error": {"type": "string", "description": "One sentence that says what to do."}},
    "required": ["error"],
    "additionalProperties": False,
}
PREFER = {
    "name": "Prefer",
    "in": "header",
    "description": "`wait=SECONDS` (RFC 7240): the time limit, 504 after it. It can shorten DEADLINE_S, not extend it.",
    "schema": {"type": "string", "examples": ["wait=2"]},
}


def operation(
    summary: str,
    statuses: dict[int, str],
    media_type: str = "application/json",
    error: dict[str, Any] = ERROR,
) -> dict[str, Any]:
    """Return a request without a body, or the shared part of all: its responses by status; `error`: the schema of all but 200."""
    responses = {str(status): response(status, what, media_type, error) for status, what in statuses.items()}
    return {"summary": summary, "responses": responses}


def response(status: int, what: str, media_type: str, error: dict[str, Any]) -> dict[str, Any]:
    headers = {
        "X-Request-ID": {
            "schema": {"type": "string"},
            "description": "The client's own, if it is short and plain.",
        }
    }
    if status == 401:
        headers["WWW-Authenticate"] = {"schema": {"type": "string"}}
    if status == 503:
        headers["Retry-After"] = {"schema": {"type": "integer", "minimum": 1}, "description": "In seconds."}
    content: dict[str, Any] = {media_type: {}} if status == 200 else {"application/json": {"schema": error}}
    return {"description": what, "headers": headers, "content": content}


def model_operation(said: Description, service: Service) -> dict[str, Any]:
    """Return the operation of POST /."""
    gives = f"{said.gives}: one answer, or a list of them for a list of inputs."
    asked = asking(f"Ask the model: {said.takes}", gives, bodies(said, service))
    asked["responses"]["200"]["content"] |= {form: {} for form in stream.FORMS}
    return asked


def asking(
    summary: str,
    gives: str,
    content: dict[str, Any],
    error: dict[str, Any] = ERROR,
) -> dict[str, Any]:
    """Return a request to the model: `content` is what may be posted, by media type."""
    asked = operation(summary, {200: gives, **STATUSES, **MODEL_STATUSES}, error=error)
    asked["parameters"] = [PREFER]
    asked["requestBody"] = {"required": True, "content": content}
    asked["responses"]["200"]["headers"]["Server-Timing"] = {
        "schema": {"type": "string"},
        "description": "Where the time went: queue and model in ms, size of the batch and why it was dispatched.",
    }
    return asked


def json_of(required: dict[str, Any], optional: dict[str, Any]) -> dict[str, Any]:
    """Return the content that is a JSON object of these fields and no others."""
    return {"application/json": {"schema": an_object(required, optional)}}


def an_object(required: dict[str, Any], optional: dict[str, Any], is_open: bool = False) -> dict[str, Any]:
    """Return the schema of an object; what is optional may be null, too."""
    return {
        "type": "object",
        "properties": required | {name: or_null(schema) for name, schema in optional.items()},
        "required": list(required),
        "additionalProperties": is_open,
    }


def or_null(schema: dict[str, Any]) -> dict[str, Any]:
    return {"anyOf": [schema, {"type": "null"}]} if schema else {}


def bodies(said: Description, service: Service) -> dict[str, Any]:
    """Return what may be posted, by media type."""
    one = {} if getattr(service.task, "rank", 0) else alone(said.inputs)
    several = {"type": "array", "items": said.inputs, "minItems": 1, "maxItems": service.settings.MAX_INPUTS}
    named, is_open = said.parameters or {}, said.parameters is None
    parameters = {"parameters": an_object({}, named, is_open)}
    schema = an_object({"inputs": {"anyOf": [one, several]}}, parameters | named, is_open)
    example = sayable(said.example)
    content: dict[str, Any] = {"application/json": {"schema": schema}}
    if example and example["inputs"] is not None:
        content["application/json"]["example"] = example
    media = [kind + "*" for kind in service.task.media if kind.endswith("/")]
    texts = [] if media else [choice for choice in choices(one) if "string" in choice["type"]]
    if texts:
        content["text/plain"] = {"schema": {"pattern": r"\S"} | texts[0] | {"type": "string"}}
    if media:
        file = {"type": "string", "contentMediaType": "application/octet-stream"}
        content[forms.MEDIA_TYPE] = {"schema": an_object({"file": file}, named, is_open)}
    return content | {kind: {"schema": {}} for kind in media}


def choices(schema: dict[str, Any]) -> list[dict[str, Any]]:
    return schema.get("anyOf", [schema])


def alone(schema: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of an input that is sent alone: not a list, which would be several inputs."""
    if not schema:
        return {"type": ["string", "number", "boolean", "object"]}
    return {"anyOf": [choice for choice in choices(schema) if choice["type"] != "array"]}
