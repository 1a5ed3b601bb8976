"""OpenAI's newer form, where TASK=text-generation: POST /v1/responses, text in and text out. It needs the folder chat/.

    client = openai.OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none")
    client.responses.create(model="any", input="Name a city in France.").output_text

Nothing is stored, so a chat's next turn sends all of it: `input` as a list. No tools.
"""

import time
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from workers.context import context_of
from workers.errors import Malformed
from workers.generation.stream import Piece, Stream
from workers.protocols import read_json
from workers.protocols.chat.fields import ROLES, prompt_of, text_of
from workers.protocols.chat.replies import usage as usage_of
from workers.protocols.chat.template import chat_prompt
from workers.protocols.openai import ERROR, error_body
from workers.protocols.openapi import an_object, asking, json_of
from workers.service import Service
from workers.settings import Settings
from workers.tasks.common.text import BOOLEAN_RULE, Rule, check_parameters, schemas
from workers.tasks.text_generation import Prompt, Task
from workers.web.generation import EventStream, event, written
from workers.web.replies import AnswerResponse, rendered

__all__ = ["error_body", "operations", "routes"]

FIELDS = {
    "input": "a text, or a list of messages: role, content as a text or parts of type input_text and output_text",
    "instructions": "a system message before all others",
    "model": "any name: there is one model",
    "max_output_tokens": "by default as many as there is room for",
    "temperature": "0: always the likeliest token",
    "top_p": "as OpenAI has it",
    "stream": "the answer as events",
    "text": '{"format": {"type": "text"}}',
    "store": "false: nothing is stored",
    "truncation": '"disabled": a prompt that is too long is a 400',
    "user": "no effect",
    "safety_identifier": "no effect",
}
PARAMETERS = {"max_output_tokens": "max_new_tokens", "temperature": "temperature", "top_p": "top_p"}
FIXED: dict[str, Any] = {"text": {"format": {"type": "text"}}, "store": False, "truncation": "disabled"}
PARTS = ("input_text", "output_text")
MESSAGE_FIELDS = {"type", "role", "content", "id", "status"}  # the last two: of an output that comes back
Fields = dict[str, Any]


def routes(settings: Settings) -> list[Route]:
    return [Route("/v1/responses", responses, methods=["POST"])] if settings.is_token_by_token else []


def operations(service: Service) -> dict[str, Any]:
    if not service.generation:
        return {}
    message = an_object({"role": {"enum": list(ROLES)}, "content": {}}, {"type": {"const": "message"}}, True)
    several = {"type": "array", "items": message, "minItems": 1}
    optional = {name: {} for name in FIELDS if name != "input"} | schemas(rules(service.generation.task))
    body = json_of({"input": {"anyOf": [{"type": "string", "minLength": 1}, several]}}, optional)
    return {"/v1/responses": {"post": asking("Respond", "An OpenAI response.", body, ERROR)}}


def rules(task: Task) -> dict[str, Rule]:
    return {name: task.rules[ours] for name, ours in PARAMETERS.items()} | {"stream": BOOLEAN_RULE}


async def responses(request: Request) -> Response:
    """POST /v1/responses: the model's response, whole or as a stream of events."""
    service: Service = request.state.service
    generation, context = service.generating(), context_of(request.scope)
    content, n_bytes = await read_json(request, FIELDS)
    for name, only in FIXED.items():
        if content.get(name, only) != only:
            raise Malformed(f'"{name}" must be {rendered(only).decode()}: nothing else is supported')
    known = rules(generation.task)
    given = check_parameters({name: content[name] for name in known if name in content}, known)
    content |= given
    ids = await chat_prompt(request, generation.task, messages_of(content), n_bytes)
    parameters = {PARAMETERS[name]: value for name, value in given.items() if name in PARAMETERS}
    prompt = prompt_of(generation.task, ids, parameters, None)
    form = Form(content, context.request_id, service.settings.model_name, prompt)
    if given.get("stream"):
        (form.stream,) = streams = generation.submit([prompt], context.left_s)
        return EventStream(
            streams, form.events, generation.stall_s, lambda failure: error_body(failure.status, failure.sentence)
        )  # fmt: skip
    work = written(generation, [prompt], context)
    (form.stream,), (piece,) = await service.in_flight.unless_left(request, work)
    return AnswerResponse(context.answers, form.response(piece.text, piece.reason))


def messages_of(content: Fields) -> list[Fields]:
    """Return the chat. Raises Malformed with a sentence."""
    instructions, given = content.get("instructions"), content.get("input")
    if instructions is not None and not isinstance(instructions, str):
        raise Malformed('"instructions" must be a text')
    messages = [] if instructions is None else [{"role": "system", "content": instructions}]
    if isinstance(given, str) and given:
        return [*messages, {"role": "user", "content": given}]
    if not isinstance(given, list) or not given:
        raise Malformed('"input" must be a text or a list such as [{"role": "user", "content": "a text"}]')
    for index, one in enumerate(given):
        where = f'"input", number {index}'
        if (
            not isinstance(one, dict)
            or one.get("type", "message") != "message"
            or one.get("role") not in ROLES
        ):
            raise Malformed(f'{where}: send {{"role": "user", "content": "a text"}}; no tools, no references')
        if unknown := sorted({name for name in one if one[name] is not None} - MESSAGE_FIELDS):
            raise Malformed(f'{where}: "{unknown[0][:100]}" is not supported; leave it out')
        role = "system" if one["role"] == "developer" else one["role"]
        messages.append({"role": role, "content": text_of(where, one.get("content"), PARTS)})
    return messages


class Form:
    """How a response reads, whole and as events."""

    def __init__(self, content: Fields, request_id: str, model: str, prompt: Prompt) -> None:
        self.content, self.prompt, self.model = content, prompt, model
        self.response_id, self.item_id = f"resp_{request_id}", f"msg_{request_id}"
        self.created_at = int(time.time())
        self.stream: Stream | None = None
        self.text, self.number = "", 0  # so far: of a stream

    def response(self, text: str, reason: str) -> Fields:
        """Return the response; `reason` is empty while it is written."""
        status = {"": "in_progress", "stop": "completed", "length": "incomplete"}[reason]
        options = self.prompt.options
        return {
            "id": self.response_id,
            "object": "response",
            "created_at": self.created_at,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if reason == "length" else None,
            "instructions": self.content.get("instructions"),
            "model": self.model,
            "max_output_tokens": self.content.get("max_output_tokens"),
            "temperature": options.temperature,
            "top_p": options.top_p,
            "output": [self.item(text, status)] if reason else [],
            "usage": self.usage() if reason else None,
            "tools": [],
            "tool_choice": "none",
            "parallel_tool_calls": False,
            "previous_response_id": None,
            "metadata": {},
            **FIXED,
        }

    def item(self, text: str, status: str) -> Fields:
        content = [] if status == "in_progress" else [self.part(text)]
        return {
            "type": "message",
            "id": self.item_id,
            "status": status,
            "role": "assistant",
            "content": content,
        }

    def part(self, text: str) -> Fields:
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}

    def usage(self) -> Fields:
        assert self.stream
        counts = usage_of([self.prompt], [self.stream])
        return {
            "input_tokens": counts["prompt_tokens"],
            "input_tokens_details": {"cached_tokens": self.stream.sequence.reused},
            "output_tokens": counts["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": counts["total_tokens"],
        }

    def events(self, index: int, piece: Piece) -> bytes:
        """Return the events of this piece: the first have what begins, the last what ends."""
        begun = [] if self.number else self.begin()
        self.text += piece.text
        at = {"item_id": self.item_id, "output_index": 0, "content_index": 0}
        delta = [("output_text.delta", at | {"delta": piece.text, "logprobs": []})] if piece.text else []
        ended = self.end(at, piece.reason) if piece.reason else []
        return b"".join(self.event(*one) for one in [*begun, *delta, *ended])

    def begin(self) -> list[tuple[str, Fields]]:
        response = {"response": self.response("", "")}
        at = {"item_id": self.item_id, "output_index": 0, "content_index": 0}
        return [
            ("created", response),
            ("in_progress", response),
            ("output_item.added", {"output_index": 0, "item": self.item("", "in_progress")}),
            ("content_part.added", at | {"part": self.part("")}),
        ]

    def end(self, at: Fields, reason: str) -> list[tuple[str, Fields]]:
        response = self.response(self.text, reason)
        return [
            ("output_text.done", at | {"text": self.text, "logprobs": []}),
            ("content_part.done", at | {"part": self.part(self.text)}),
            ("output_item.done", {"output_index": 0, "item": self.item(self.text, response["status"])}),
            (response["status"], {"response": response}),
        ]

    def event(self, kind: str, content: Fields) -> bytes:
        name, number = f"response.{kind}", self.number
        self.number += 1
        return b"event: %s\n" % name.encode() + event({"type": name, "sequence_number": number, **content})
