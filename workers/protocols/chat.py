"""OpenAI chat and text completions, where TASK=text-generation: POST /v1/chat/completions, POST /v1/completions.

    client = openai.OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none")
    messages = [{"role": "user", "content": "Name a city in France."}]
    for chunk in client.chat.completions.create(model="any", messages=messages, stream=True):
        print(chunk.choices[0].delta.content or "", end="")

Any `model` means the one that is served. What is not given is as the model's generation_config.json has it. A field that is
not in the tables below is a 400 that names it.
"""

import asyncio
import time
from collections.abc import Callable
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from workers.context import context_of
from workers.errors import LOADING, Malformed, Rejected, Unprocessable
from workers.generation.steps import Token
from workers.generation.stream import Piece, Stream
from workers.protocols import read_json
from workers.protocols.openai import ERROR, error_body, model_list
from workers.protocols.openapi import STATUSES, an_object, asking, json_of, operation
from workers.service import Service
from workers.settings import Settings
from workers.tasks.common.text import BOOLEAN_RULE, Rule, check_parameters, number_rule, schemas
from workers.tasks.text_generation import MOST_BIASES, MOST_LOGPROBS, MOST_STOPS, Prompt, Task
from workers.web.generation import EventStream, Generation, event

__all__ = ["error_body", "operations", "routes"]

MOST_CHOICES = 8
DONE = b"data: [DONE]\n\n"
# OpenAI's name of each sampling parameter, and the task's.
SAMPLING = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "seed": "seed",
    "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty",
    "repetition_penalty": "repetition_penalty",
    "ignore_eos": "ignore_eos",
    "min_tokens": "min_new_tokens",
    "max_tokens": "max_new_tokens",
}
NO_EFFECT = ("model", "user")
ROLES = ("system", "developer", "user", "assistant")


def routes(settings: Settings) -> list[Route]:
    if not settings.is_token_by_token:
        return []
    return [
        Route("/v1/chat/completions", chat, methods=["POST"]),
        Route("/v1/completions", completions, methods=["POST"]),
        Route("/v1/models", models),
    ]


def operations(service: Service) -> dict[str, Any]:
    if not service.generation:
        return {}
    task = service.generation.task
    text = {"type": "string"}
    message = an_object({"role": {"enum": list(ROLES)}, "content": {"anyOf": [text, PARTS]}}, {"name": text})
    messages = {"type": "array", "items": message, "minItems": 1}
    ids = {
        "type": "array",
        "items": {"type": "integer", "minimum": 0, "maximum": task.vocabulary - 1},
        "minItems": 1,
    }
    prompt = {"anyOf": [text, ids, {"type": "array", "items": text, "minItems": 1}]}
    chat_fields, text_fields = fields(task, chat=True), fields(task, chat=False)
    return {
        "/v1/chat/completions": {
            "post": asking(
                "Chat", "An OpenAI chat completion.", json_of({"messages": messages}, chat_fields), ERROR
            )
        },
        "/v1/completions": {
            "post": asking(
                "Complete texts", "An OpenAI completion.", json_of({"prompt": prompt}, text_fields), ERROR
            )
        },
        "/v1/models": {
            "get": operation("Models", {200: "An OpenAI list of the one model.", **STATUSES}, error=ERROR)
        },
    }


PARTS = {
    "type": "array",
    "items": an_object({"type": {"const": "text"}, "text": {"type": "string"}}, {}),
    "minItems": 1,
}


def fields(task: Task, chat: bool) -> dict[str, Any]:
    """Return what may be sent beside the messages or the prompt, as JSON Schemas."""
    rest: dict[str, Any] = {"model": {}, "user": {}, "stop": {}, "stream_options": {}, "response_format": {}}
    if not chat:
        del rest["response_format"]
    return schemas(rules(task, chat)) | rest


def rules(task: Task, chat: bool) -> dict[str, Rule]:
    """Return the rule of each parameter, by OpenAI's name."""
    found = {name: task.rules[ours] for name, ours in SAMPLING.items()}
    found |= {
        "stream": BOOLEAN_RULE,
        "n": number_rule(1, MOST_CHOICES),
        "logit_bias": bias_rule(task.vocabulary),
    }
    if chat:
        found["max_completion_tokens"] = found["max_tokens"]
        found["logprobs"], found["top_logprobs"] = BOOLEAN_RULE, number_rule(0, MOST_LOGPROBS)
    else:
        found["logprobs"], found["echo"] = number_rule(0, MOST_LOGPROBS), BOOLEAN_RULE
    return found


def bias_rule(vocabulary: int) -> Rule:
    def is_allowed(value: Any) -> bool:
        return (
            isinstance(value, dict)
            and len(value) <= MOST_BIASES
            and all(
                key.isascii() and key.isdigit() and len(key) < 10 and int(key) < vocabulary for key in value
            )
            and all(type(bias) in (int, float) and -100 <= bias <= 100 for bias in value.values())
        )

    words = (
        f"an object of up to {MOST_BIASES} token ids below {vocabulary}, each with a number from -100 to 100"
    )
    return Rule(words, is_allowed, {"type": "object", "maxProperties": MOST_BIASES})


async def models(request: Request) -> Response:
    """GET /v1/models: the model that is served."""
    return model_list(request.state.service)


# --- from a body to prompts -------------------------------------------------------------------------------------------


async def chat(request: Request) -> Response:
    """POST /v1/chat/completions: the next message of a chat, whole or as a stream of events."""
    generation = generating(request)
    task = generation.task
    known = ("messages", *NO_EFFECT, "stop", "stream_options", "response_format", *rules(task, chat=True))
    content, _ = await read_json(request, known)
    if content.get("response_format", {"type": "text"}) != {"type": "text"}:
        raise Malformed('"response_format" must be {"type": "text"}: other formats are not supported')
    given = sampling(content, task, chat=True)
    if "max_completion_tokens" in given:
        given["max_new_tokens"] = given.pop("max_completion_tokens")
    most = given.pop("top_logprobs", 0)
    if most and not content.get("logprobs"):
        raise Malformed('"top_logprobs" needs "logprobs": true')
    try:
        ids = await generation.chat_prompt(messages_of(content.get("messages")))
    except Unprocessable as exc:
        raise Malformed(str(exc)) from exc
    form = Chat(request, generation, bool(given.pop("logprobs", False)))
    return await answer(request, form, [prompt_of(task, ids, given | {"logprobs": most}, content)], content)


async def completions(request: Request) -> Response:
    """POST /v1/completions: the text that follows a prompt, or each of several."""
    service: Service = request.state.service
    generation = generating(request)
    task = generation.task
    known = ("prompt", *NO_EFFECT, "stop", "stream_options", *rules(task, chat=False))
    content, _ = await read_json(request, known)
    given = sampling(content, task, chat=False)
    echo, logprobs = given.pop("echo", False), given.pop("logprobs", None)
    if echo and logprobs is not None:
        raise Malformed('"echo" with "logprobs" is not supported: the prompt has no logprobs; leave one out')
    context = context_of(request.scope)
    prompts = prompts_of(content.get("prompt"), task, service.settings.MAX_INPUTS)
    size = sum(len(one) for one in prompts)
    ids = await service.checks.run(context, size, lambda: [token_ids(one, task) for one in prompts])
    n = content.get("n", 1)
    form = Completion(
        request, generation, logprobs is not None, [one for one in prompts for _ in range(n)] if echo else []
    )
    wanted = given | {"logprobs": logprobs or 0}
    return await answer(request, form, [prompt_of(task, one, wanted, content) for one in ids], content)


def generating(request: Request) -> Generation:
    """Return what generates text. Raises Rejected while the model loads."""
    service: Service = request.state.service
    if not service.generation:
        raise Rejected(LOADING)
    return service.generation


def sampling(content: dict[str, Any], task: Task, chat: bool) -> dict[str, Any]:
    """Return the parameters by the task's names. Raises Malformed with a sentence that has OpenAI's."""
    known = rules(task, chat)
    given = check_parameters({name: value for name, value in content.items() if name in known}, known)
    if given.get("stream") and given.get("n", 1) > 1:
        raise Malformed('"stream" gives one choice; leave "n" out')
    if "logit_bias" in given:
        given["logit_bias"] = {int(key): float(bias) for key, bias in given["logit_bias"].items()}
    return {SAMPLING.get(name, name): value for name, value in given.items() if name not in ("stream", "n")}


def prompt_of(task: Task, ids: list[int], given: dict[str, Any], content: dict[str, Any]) -> Prompt:
    """Return the checked prompt. Raises Malformed where it does not fit: OpenAI has no 422."""
    stop = content.get("stop", [])
    stop = [stop] if isinstance(stop, str) else stop
    if (
        not isinstance(stop, list)
        or len(stop) > MOST_STOPS
        or not all(isinstance(one, str) and one for one in stop)
    ):
        raise Malformed(f'"stop" must be a text or a list of up to {MOST_STOPS} texts, none of them empty')
    if not {"max_new_tokens"} & given.keys():
        given = given | {"max_new_tokens": max(1, task.capacity - len(ids))}  # as many as there is room for
    prompt = Prompt(ids, task.options(given), tuple(stop), full_text=False)
    try:
        task.checked(prompt)
    except Unprocessable as exc:
        raise Malformed(str(exc).replace("max_new_tokens", '"max_tokens"')) from exc
    return prompt


def messages_of(messages: Any) -> list[dict[str, Any]]:
    """Return the messages as a chat template takes them. Raises Malformed with a sentence."""
    if not isinstance(messages, list) or not messages:
        raise Malformed('"messages" must be a list such as [{"role": "user", "content": "a text"}]')
    return [message_of(index, message) for index, message in enumerate(messages)]


def message_of(index: int, message: Any) -> dict[str, Any]:
    if not isinstance(message, dict) or message.get("role") not in ROLES:
        raise Malformed(f'"messages", number {index}: "role" must be {", ".join(ROLES[:-1])} or {ROLES[-1]}')
    given = {name: value for name, value in message.items() if value is not None}
    if unknown := sorted(given.keys() - {"role", "content", "name"}):
        raise Malformed(f'"messages", number {index}: "{unknown[0][:100]}" is not supported; leave it out')
    content = given.get("content")
    if isinstance(content, list) and content:
        if not all(
            isinstance(p, dict) and p.get("type") == "text" and isinstance(p.get("text"), str)
            for p in content
        ):
            raise Malformed(f'"messages", number {index}: each part must be {{"type": "text", "text": "…"}}')
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise Malformed(f'"messages", number {index}: "content" must be a text or a list of text parts')
    role = "system" if given["role"] == "developer" else given["role"]
    return {"role": role, "content": content}


def prompts_of(prompt: Any, task: Task, most: int) -> list[Any]:
    """Return each prompt: a text or token ids. Raises Malformed with a sentence."""
    alone = isinstance(prompt, str) or (isinstance(prompt, list) and prompt and type(prompt[0]) is int)
    prompts = [prompt] if alone else prompt
    if not isinstance(prompts, list) or not 1 <= len(prompts) <= most:
        raise Malformed(f'"prompt" must be a text, token ids, or a list of 1 to {most} of either')
    for one in prompts:
        if isinstance(one, list):
            if not one or not all(type(token) is int and 0 <= token < task.vocabulary for token in one):
                raise Malformed(
                    f'token ids in "prompt" must be whole numbers from 0 to {task.vocabulary - 1}'
                )
        elif not isinstance(one, str) or not one:
            raise Malformed('"prompt" is empty or is not a text; send a text')
    return prompts


def token_ids(prompt: str | list[int], task: Task) -> list[int]:
    return prompt if isinstance(prompt, list) else task.tokens(prompt).ids


# --- from pieces to replies -------------------------------------------------------------------------------------------


class Completion:
    """How replies read at /v1/completions."""

    kind = stream_kind = "text_completion"
    id_prefix = "cmpl"

    def __init__(
        self,
        request: Request,
        generation: Generation,
        logprobs: bool,
        echoed: list[Any] = [],  # noqa: B006
    ) -> None:
        service: Service = request.state.service
        self.task, self.logprobs, self.echoed = generation.task, logprobs, echoed  # a prompt per choice
        self.head = {
            "id": f"{self.id_prefix}-{context_of(request.scope).request_id}",
            "created": int(time.time()),
            "model": service.settings.model_name,
        }
        self.begun = False

    def choice(self, index: int, piece: Piece) -> dict[str, Any]:
        """A whole choice."""
        return self.reply_part(index, self.echo(index) + piece.text, piece)

    def delta(self, piece: Piece) -> dict[str, Any]:
        """What is new of the one choice of a stream."""
        echoed = "" if self.begun else self.echo(0)
        self.begun = True
        return self.reply_part(0, echoed + piece.text, piece)

    def reply_part(self, index: int, text: str, piece: Piece) -> dict[str, Any]:
        logprobs = self.shown(piece.tokens) if self.logprobs else None
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": piece.reason or None}

    def echo(self, index: int) -> str:
        if not self.echoed:
            return ""
        prompt = self.echoed[index]
        return prompt if isinstance(prompt, str) else self.task.tokens.backend.decode(prompt)

    def shown(self, tokens: list[Token]) -> dict[str, Any]:
        texts, offsets, at = [], [], 0
        for token in tokens:
            texts.append(self.text_of(token.id))
            offsets.append(at)
            at += len(texts[-1])
        return {
            "tokens": texts,
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [
                {self.text_of(one): logprob for one, logprob in token.likeliest} for token in tokens
            ],
            "text_offset": offsets,
        }

    def text_of(self, token: int) -> str:
        return self.task.tokens.backend.decode([token], skip_special_tokens=False)


class Chat(Completion):
    """How replies read at /v1/chat/completions."""

    kind, stream_kind = "chat.completion", "chat.completion.chunk"
    id_prefix = "chatcmpl"

    def choice(self, index: int, piece: Piece) -> dict[str, Any]:
        message = {"role": "assistant", "content": piece.text, "refusal": None}
        return self.chat_part(index, {"message": message}, piece)

    def delta(self, piece: Piece) -> dict[str, Any]:
        delta = {} if self.begun else {"role": "assistant"}
        self.begun = True
        return self.chat_part(0, {"delta": delta | {"content": piece.text}}, piece)

    def chat_part(self, index: int, said: dict[str, Any], piece: Piece) -> dict[str, Any]:
        logprobs = {"content": list(map(self.shown_in_chat, piece.tokens))} if self.logprobs else None
        return {"index": index, **said, "logprobs": logprobs, "finish_reason": piece.reason or None}

    def shown_in_chat(self, token: Token) -> dict[str, Any]:
        top = [self.one(*one) for one in token.likeliest]
        return self.one(token.id, token.logprob) | {"top_logprobs": top}

    def one(self, token: int, logprob: float) -> dict[str, Any]:
        text = self.text_of(token)
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}


async def answer(
    request: Request, form: Completion, prompts: list[Prompt], content: dict[str, Any]
) -> Response:
    """Let the model write; return the reply, whole or as events."""
    if not content.get("stream"):
        if "stream_options" in content:
            raise Malformed('"stream_options" needs "stream": true')
        return await whole(request, form, prompts, content.get("n", 1))
    options = content.get("stream_options", {})
    if not isinstance(options, dict) or options.keys() - {"include_usage"}:
        raise Malformed('"stream_options" must be {"include_usage": true} or {"include_usage": false}')
    if len(prompts) > 1:
        raise Malformed('"stream" takes one prompt; send one per request')
    generation, (prompt,) = generating(request), prompts
    stream = generation.submit(prompt, context_of(request.scope).left_s)
    events = chunks(form, prompt, bool(options.get("include_usage")))
    return EventStream(
        stream, events, generation.stall_s, lambda failure: error_body(failure.status, failure.sentence)
    )


def chunks(form: Completion, prompt: Prompt, with_usage: bool) -> Callable[[Piece], bytes]:
    """Return what turns a stream's pieces into events."""
    tokens = 0
    head = form.head | {"object": form.stream_kind}

    def events(piece: Piece) -> bytes:
        nonlocal tokens
        tokens += len(piece.tokens)
        chunk = head | {"choices": [form.delta(piece)]} | ({"usage": None} if with_usage else {})
        if not piece.reason:
            return event(chunk)
        last = head | {"choices": [], "usage": usage([prompt], tokens)}
        return event(chunk) + (event(last) if with_usage else b"") + DONE

    return events


async def whole(request: Request, form: Completion, prompts: list[Prompt], n: int) -> Response:
    """Return the reply with `n` choices for each prompt. If one fails, all do."""
    service: Service = request.state.service
    generation, context = generating(request), context_of(request.scope)

    async def written() -> list[Piece]:
        streams: list[Stream] = []
        try:
            for prompt in prompts:
                for i in range(n):  # each choice has a seed of its own; the first has the client's
                    options = prompt.options._replace(seed=(prompt.options.seed + i) % (1 << 63))
                    streams.append(generation.submit(prompt._replace(options=options), context.left_s))
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(read(stream)) for stream in streams]
            return [task.result() for task in tasks]
        except ExceptionGroup as failed:
            raise failed.exceptions[0] from None
        finally:
            for stream in streams:
                stream.close()

    pieces = await service.in_flight.unless_left(request, written())
    choices = [form.choice(index, piece) for index, piece in enumerate(pieces)]
    used = usage(prompts, sum(len(piece.tokens) for piece in pieces))
    return JSONResponse(form.head | {"object": form.kind, "choices": choices, "usage": used})


async def read(stream: Stream) -> Piece:
    """Return all of it as one piece."""
    parts: list[tuple[str, Token]] = []
    async for piece in stream:
        parts += piece.parts
        if piece.reason:
            return Piece(parts, piece.rest, piece.reason)
    raise AssertionError("a stream ends with a reason")


def usage(prompts: list[Prompt], generated: int) -> dict[str, int]:
    n = sum(len(prompt.ids) for prompt in prompts)
    return {"prompt_tokens": n, "completion_tokens": generated, "total_tokens": n + generated}
