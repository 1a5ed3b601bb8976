"""text-generation-inference, where TASK=text-generation: POST /generate, POST /generate_stream.

    curl --json '{"inputs": "Paris is", "parameters": {"max_new_tokens": 5}}' http://127.0.0.1:8000/generate

POST / takes the same and more, and is what the `text-generation` client and huggingface_hub speak to. Here the answer is an
object, not a list of one, and does not begin with the prompt.
"""

from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from workers.protocols.openapi import an_object, asking, json_of
from workers.service import Service
from workers.settings import Settings
from workers.web.generation import streamed
from workers.web.parsing import ParsedBody
from workers.web.replies import AnswerResponse

TEXT = {"type": "string"}
ERROR = an_object({"error": TEXT, "error_type": TEXT}, {})
# By status; any other is validation.
ERROR_TYPES = {500: "generation", 503: "overloaded", 504: "incomplete_generation"}


def routes(settings: Settings) -> list[Route]:
    if not settings.is_token_by_token:
        return []
    return [
        Route("/generate", generate, methods=["POST"]),
        Route("/generate_stream", generate_stream, methods=["POST"]),
    ]


def error_body(status: int, sentence: str) -> dict[str, str]:
    return {"error": sentence, "error_type": ERROR_TYPES.get(status, "validation")}


def operations(service: Service) -> dict[str, Any]:
    if not service.generation:
        return {}
    description = service.task.describe()
    parameters = {name: schema for name, schema in (description.parameters or {}).items() if name != "stream"}
    body = json_of({"inputs": description.inputs}, {"parameters": an_object({}, parameters)} | parameters)
    events = asking("Generate text, streamed", "An event per token.", body, ERROR)
    events["responses"]["200"]["content"] = {"text/event-stream": {}}
    return {
        "/generate": {"post": asking("Generate text", "An object with the text.", body, ERROR)},
        "/generate_stream": {"post": events},
    }


async def generate(request: Request) -> Response:
    """POST /generate: the text that follows a prompt, as an object."""
    service: Service = request.state.service
    asked, n_bytes = await read(request)
    answers, _ = await service.ask(request, asked.inputs, asked.parameters, n_bytes)
    return AnswerResponse(answers, answers[0].value[0])


async def generate_stream(request: Request) -> Response:
    """POST /generate_stream: the same, an event per token."""
    service: Service = request.state.service
    asked, n_bytes = await read(request)
    (query,) = await service.checked(request, asked, n_bytes)
    return streamed(service.generating(), request, query.content)


async def read(request: Request) -> tuple[ParsedBody, int]:
    """Return what a body asks, and its length in bytes. Raises HTTPException for a list and for "stream"."""
    service: Service = request.state.service
    body = await service.in_flight.read(request)
    asked = await service.parse(request, body)
    if asked.is_list or "stream" in asked.parameters:
        sentence = "one text, or a list at POST /" if asked.is_list else 'no "stream": the path says it'
        raise HTTPException(400, f"send {sentence}")
    return ParsedBody(asked.inputs, {"return_full_text": False} | asked.parameters), len(body)
