"""OpenAI chat and text completions, where TASK=text-generation: POST /v1/chat/completions, POST /v1/completions.

    client = openai.OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none")
    messages = [{"role": "user", "content": "Name a city in France."}]
    for chunk in client.chat.completions.create(model="any", messages=messages, stream=True):
        print(chunk.choices[0].delta.content or "", end="")

fields.py has all that may be sent; any other field is a 400 that names it. replies.py has what comes back.
"""

from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from workers.context import context_of
from workers.errors import Malformed, Unprocessable
from workers.protocols import read_json
from workers.protocols.chat.fields import (
    CHAT_FIELDS,
    COMPLETION_FIELDS,
    COMPLETION_TOKENS,
    PARTS,
    ROLES,
    UNSUPPORTED,
    described,
    messages_of,
    prompt_of,
    prompts_of,
    sampling,
    schema_of,
)
from workers.protocols.chat.replies import Chat, Completion, answer
from workers.protocols.chat.template import chat_prompt, checked
from workers.protocols.chat.tools import ToolChat, tools_of
from workers.protocols.openai import ERROR, error_body, model_list
from workers.protocols.openapi import STATUSES, an_object, asking, json_of, operation
from workers.service import Service
from workers.settings import Settings

__all__ = ["error_body", "operations", "routes"]


def routes(settings: Settings) -> list[Route]:
    if not settings.is_token_by_token:
        return []
    return [
        Route("/v1/chat/completions", chat, methods=["POST"]),
        # Where huggingface_hub's chat_completion goes with model="…/hf-inference".
        Route("/hf-inference/v1/chat/completions", chat, methods=["POST"]),
        Route("/v1/completions", completions, methods=["POST"]),
        Route("/v1/models", models),
    ]


def operations(service: Service) -> dict[str, Any]:
    if not service.generation:
        return {}
    task = service.generation.task
    text = {"type": "string"}
    content = {"anyOf": [text, PARTS]}
    calls = {"tool_calls": {}, "tool_call_id": text}
    message = an_object({"role": {"enum": [*ROLES, "tool"]}}, {"content": content, "name": text, **calls})
    messages = {"type": "array", "items": message, "minItems": 1}
    ids = {
        "type": "array",
        "items": {"type": "integer", "minimum": 0, "maximum": task.vocabulary - 1},
        "minItems": 1,
    }
    prompt = {"anyOf": [text, ids, {"type": "array", "items": text, "minItems": 1}]}
    chat_body = json_of({"messages": messages}, described(task, CHAT_FIELDS))
    text_body = json_of({"prompt": prompt}, described(task, COMPLETION_FIELDS))
    listed = operation("Models", {200: "An OpenAI list of the one model.", **STATUSES}, error=ERROR)
    chat_operation = {"post": asking("Chat", "An OpenAI chat completion.", chat_body, ERROR)}
    return {
        "/v1/chat/completions": chat_operation,
        "/hf-inference/v1/chat/completions": chat_operation,
        "/v1/completions": {"post": asking("Complete texts", "An OpenAI completion.", text_body, ERROR)},
        "/v1/models": {"get": listed},
    }


async def models(request: Request) -> Response:
    """GET /v1/models: the model that is served."""
    return model_list(request.state.service)


async def chat(request: Request) -> Response:
    """POST /v1/chat/completions: the next message of a chat, whole or as a stream of events."""
    service: Service = request.state.service
    generation = service.generating()
    task = generation.task
    content, n_bytes = await read_json(request, [*CHAT_FIELDS, *UNSUPPORTED])
    given = sampling(content, task, CHAT_FIELDS)
    most = given.pop("top_logprobs", 0)
    if most and not content.get("logprobs"):
        raise Malformed('"top_logprobs" needs "logprobs": true')
    tools = tools_of(content, task)
    logprobs = bool(given.pop("logprobs", False))
    form = ToolChat(request, generation, tools) if tools else Chat(request, generation, logprobs)
    schema = tools.schema() if tools and tools.must_call else schema_of(content)
    messages = messages_of(content.get("messages"), task.takes_tools)
    ids = await chat_prompt(request, task, messages, n_bytes, tools.given if tools else None)
    prompt = prompt_of(task, ids, given | {"logprobs": most}, content.get("stop"))
    if schema is not None:
        prompt = prompt._replace(grammar=await checked(request, n_bytes, lambda: task.grammar(schema)))
    return await answer(request, form, [prompt], content)


async def completions(request: Request) -> Response:
    """POST /v1/completions: the text that follows a prompt, or each of several."""
    service: Service = request.state.service
    generation = service.generating()
    task = generation.task
    content, n_bytes = await read_json(request, [*COMPLETION_FIELDS, *UNSUPPORTED])
    given = {"max_new_tokens": COMPLETION_TOKENS} | sampling(content, task, COMPLETION_FIELDS)
    echo, logprobs = given.pop("echo", False), given.pop("logprobs", None)
    if echo and logprobs is not None:
        raise Malformed('"echo" with "logprobs" is not supported: the prompt has no logprobs; leave one out')
    prompts = prompts_of(content.get("prompt"), task, service.settings.MAX_INPUTS)

    def tokenised() -> list[list[int]]:
        return [one if isinstance(one, list) else task.prompt_ids(one) for one in prompts]

    try:
        ids = await service.checks.run(context_of(request.scope), n_bytes, tokenised)
    except Unprocessable as exc:
        raise Malformed(str(exc)) from exc  # OpenAI has no 422
    echoed = [one for one in prompts for _ in range(content.get("n", 1))] if echo else None
    form = Completion(request, generation, logprobs is not None, echoed)
    given["logprobs"] = logprobs or 0
    return await answer(
        request, form, [prompt_of(task, one, given, content.get("stop")) for one in ids], content
    )
