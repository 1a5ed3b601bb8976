"""Embeddings, where TASK=feature-extraction gives a vector per text, in the forms of two more APIs. OpenAI's is in openai.py.

    POST /embed                {"inputs": ["…", …]}  text-embeddings-inference: [[0.1, …], …]
    POST /v1/embed, /v2/embed  {"texts": ["…", …]}   Cohere: {"embeddings": {"float": [[0.1, …], …]}, …}

Vectors have length 1, as those of both. Cohere's long texts are cut unless `truncate` is NONE; the others are rejected
unless `truncate` is true.
"""

from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from workers.context import context_of
from workers.errors import Malformed
from workers.protocols import embedder, embeds, read_json, whole
from workers.protocols.openai import encoded_all
from workers.protocols.openapi import asking, json_of
from workers.service import Service
from workers.settings import Settings
from workers.tasks.common.text import object_schema
from workers.web.replies import AnswerResponse

# All fields of the reference of text-embeddings-inference; null is "not given".
TEI_FIELDS = {
    "inputs": "a text, a list of texts, token ids in place of a text",
    "normalize": "vectors of length 1 unless false",
    "prompt_name": "the name of one of the model's prompts",
    "truncate": "cut long texts",
    "truncation_direction": '"left" or "right", also capitalised',
    "dimensions": "the first so many numbers of each vector, at length 1",
}
# All fields of the references of Cohere, v1 and v2; null is "not given".
COHERE_FIELDS = {
    "texts": "a list of texts",
    "model": "any name: there is one model",
    "input_type": "search_query and search_document take the model's prompts query and document; others none",
    "embedding_types": '"float", "base64" or both',
    "output_dimension": "the first so many numbers of each vector, at length 1",
    "truncate": "END, the default, and START cut long texts; NONE rejects them",
    "inputs": 'a list of {"content": [{"type": "text", "text": "…"}]} in place of `texts`',
    "images": "rejected",
    "max_tokens": "rejected",
    "priority": "no effect",
}
PROMPTS: dict[str, dict[str, Any]] = {
    "search_query": {"prompt_name": "query"},
    "search_document": {"prompt_name": "document"},
    "classification": {},
    "clustering": {},
}
TRUNCATION: dict[str, dict[str, Any]] = {
    "NONE": {},
    "START": {"truncate": True, "truncation_direction": "left"},
    "END": {"truncate": True},
}
FORMS = ("float", "base64")


def routes(settings: Settings) -> list[Route]:
    if settings.TASK != "feature-extraction" or settings.is_custom:
        return []
    paths = {"/embed": embed, "/v1/embed": cohere_embed, "/v2/embed": cohere_embed}
    return [Route(path, endpoint, methods=["POST"]) for path, endpoint in paths.items()]


def operations(service: Service) -> dict[str, Any]:
    if not embeds(service):
        return {}
    description, most = service.task.describe(), service.settings.MAX_INPUTS
    text = description.inputs["anyOf"][0]
    parameters = description.parameters or {}

    def list_of(schema: dict[str, Any]) -> dict[str, Any]:
        return {"type": "array", "items": schema, "minItems": 1, "maxItems": most}

    inputs = {"anyOf": [text, list_of(description.inputs)]}
    tei = json_of({"inputs": inputs}, {name: parameters[name] for name in TEI_FIELDS if name in parameters})
    types = list_of({"enum": list(FORMS)}) | {"maxItems": len(FORMS)}
    optional = {
        "model": {},
        "priority": {},
        "input_type": {"enum": list(PROMPTS)},
        "embedding_types": types,
        "output_dimension": parameters["dimensions"],
        "truncate": {"enum": list(TRUNCATION)},
    }
    part = object_schema({"type": {"const": "text"}, "text": text})
    content = object_schema({"content": list_of(part) | {"maxItems": 1}})
    parts = json_of({"inputs": list_of(content)}, optional)
    cohere = json_of({"texts": list_of(text)}, optional)
    schemas = [one["application/json"]["schema"] for one in (cohere, parts)]
    cohere = {"application/json": {"schema": {"anyOf": schemas}}}
    return {
        "/embed": {"post": asking("Embed texts", "A list of vectors.", tei)},
        **{
            path: {"post": asking("Embed texts", "Vectors in Cohere's form.", cohere)}
            for path in ("/v1/embed", "/v2/embed")
        },
    }


async def embed(request: Request) -> Response:
    """POST /embed: a list of vectors, also for one text."""
    service = embedder(request)
    content, n_bytes = await read_json(request, TEI_FIELDS)
    given = content.pop("inputs", None)
    inputs = given if isinstance(given, list) and not is_ids(given) else [given]
    if not 1 <= len(inputs) <= service.settings.MAX_INPUTS:
        raise Malformed(f'"inputs" must be a text or a list of 1 to {service.settings.MAX_INPUTS} texts')
    inputs = [list(map(whole, one)) if isinstance(one, list) else one for one in inputs]
    answers, _ = await service.ask(request, inputs, {"normalize": True} | content, n_bytes)
    return AnswerResponse(answers, encoded_all(answers, "float"))


def is_ids(inputs: list[Any]) -> bool:
    return bool(inputs) and type(whole(inputs[0])) is int


async def cohere_embed(request: Request) -> Response:
    """POST /v1/embed, /v2/embed: vectors in Cohere's form. v1 gives a plain list where no `embedding_types` are given."""
    service = embedder(request)
    content, n_bytes = await read_json(request, COHERE_FIELDS)
    inputs = texts(content, service.settings.MAX_INPUTS)
    forms = content.get("embedding_types", ["float"])
    if (
        not isinstance(forms, list)
        or not 1 <= len(forms) <= len(FORMS)
        or any(form not in FORMS for form in forms)
    ):
        raise Malformed('"embedding_types" must be a list of "float", "base64" or both')
    answers, n_tokens = await service.ask(request, inputs, parameters(content), n_bytes)
    context = context_of(request.scope)
    version = context.path[2]
    is_plain = version == "1" and "embedding_types" not in content
    by_type = {form: encoded_all(answers, form) for form in forms}
    reply = {
        "id": context.request_id,
        "response_type": "embeddings_floats" if is_plain else "embeddings_by_type",
        "embeddings": by_type["float"] if is_plain else by_type,
        "texts": inputs,
        "meta": {"api_version": {"version": version}, "billed_units": {"input_tokens": n_tokens}},
    }
    return AnswerResponse(answers, reply)


def texts(content: dict[str, Any], most: int) -> list[Any]:
    """Return the texts to embed. Raises Malformed if there is no list of them, and for what the model can't take."""
    for name in ("images", "max_tokens"):
        if name in content:
            raise Malformed(f'"{name}" is not supported; send "texts", which are cut at the end by default')
    if ("texts" in content) == ("inputs" in content):
        raise Malformed('"texts" is missing, or there is "inputs", too; send one of them')
    given = content.get("texts", content.get("inputs"))
    if not isinstance(given, list) or not 1 <= len(given) <= most:
        name = "texts" if "texts" in content else "inputs"
        raise Malformed(f'"{name}" must be a list of 1 to {most} texts')
    return given if "texts" in content else list(map(text_of, given))


def text_of(given: Any) -> Any:
    """Return the text of one of Cohere's inputs. Raises Malformed if there is anything else in it."""
    match given:
        case {"content": [{"type": "text", "text": str(text), **more}], **others} if not more | others:
            return text
    raise Malformed('each of "inputs" must be {"content": [{"type": "text", "text": "a text"}]}')


def parameters(content: dict[str, Any]) -> dict[str, Any]:
    """Return the task's parameters."""
    prompt = chosen(content, "input_type", PROMPTS, "classification")
    found = {"normalize": True} | chosen(content, "truncate", TRUNCATION, "END") | prompt
    if "output_dimension" in content:
        found["dimensions"] = whole(content["output_dimension"])
    return found


def chosen(
    content: dict[str, Any], name: str, choices: dict[str, dict[str, Any]], default: str
) -> dict[str, Any]:
    """Return what a field's word means. Raises Malformed for any other."""
    word = content.get(name, default)
    if not isinstance(word, str) or word not in choices:
        raise Malformed(f'"{name}" must be one of {", ".join(choices)}')
    return choices[word]
