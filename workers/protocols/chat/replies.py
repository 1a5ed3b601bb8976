"""From a sequence's pieces to OpenAI's replies: whole, and as a stream of chunks."""

import time
from collections import Counter
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

import workers
from workers.context import context_of
from workers.errors import Malformed
from workers.generation.steps import Token
from workers.generation.stream import Piece, Stream
from workers.offload import in_thread
from workers.protocols.openai import error_body
from workers.service import Service
from workers.tasks.text_generation import Prompt
from workers.web.generation import Events, EventStream, Generation, event, times, written
from workers.web.replies import AnswerResponse

DONE = b"data: [DONE]\n\n"


class Completion:
    """How replies read at /v1/completions. `echoed`: of each choice the prompt that it begins with."""

    kind = stream_kind = "text_completion"
    id_prefix = "cmpl"

    def __init__(
        self, request: Request, generation: Generation, logprobs: bool, echoed: list[Any] | None = None
    ) -> None:
        service: Service = request.state.service
        self.task, self.logprobs, self.echoed = generation.task, logprobs, echoed
        self.head = {
            "id": f"{self.id_prefix}-{context_of(request.scope).request_id}",
            "created": int(time.time()),
            "model": service.settings.model_name,
            "system_fingerprint": workers.__version__,
        }
        self.begun: set[int] = set()  # choices of a stream that have a chunk already
        self.held: dict[int, str] = {}  # text that may turn out to be something else
        self.offsets: Counter[int] = Counter()  # of each choice's next token in its text

    def choice(self, index: int, piece: Piece) -> dict[str, Any]:
        """Return a whole choice."""
        return self.reply_part(index, self.echo(index) + piece.text, piece)

    def delta(self, index: int, piece: Piece) -> dict[str, Any]:
        """Return what is new of a choice of a stream."""
        echoed = "" if index in self.begun else self.echo(index)
        self.begun.add(index)
        return self.reply_part(index, echoed + piece.text, piece)

    def reply_part(self, index: int, text: str, piece: Piece) -> dict[str, Any]:
        logprobs = self.shown(index, piece.tokens) if self.logprobs else None
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": piece.reason or None}

    def echo(self, index: int) -> str:
        if not self.echoed:
            return ""
        prompt = self.echoed[index]
        return prompt if isinstance(prompt, str) else self.task.tokens.backend.decode(prompt)

    def shown(self, index: int, tokens: list[Token]) -> dict[str, Any]:
        texts, offsets = [], []
        for token in tokens:
            texts.append(self.task.token_text(token.id))
            offsets.append(self.offsets[index])
            self.offsets[index] += len(texts[-1])
        return {
            "tokens": texts,
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [
                {self.task.token_text(one): logprob for one, logprob in token.likeliest} for token in tokens
            ],
            "text_offset": offsets,
        }


class Chat(Completion):
    """How replies read at /v1/chat/completions."""

    kind, stream_kind = "chat.completion", "chat.completion.chunk"
    id_prefix = "chatcmpl"

    def choice(self, index: int, piece: Piece) -> dict[str, Any]:
        message = {"role": "assistant", "content": piece.text, "refusal": None}
        return self.chat_part(index, {"message": message}, piece)

    def delta(self, index: int, piece: Piece) -> dict[str, Any]:
        delta = {} if index in self.begun else {"role": "assistant"}
        self.begun.add(index)
        return self.chat_part(index, {"delta": delta | {"content": piece.text}}, piece)

    def chat_part(self, index: int, message: dict[str, Any], piece: Piece) -> dict[str, Any]:
        logprobs = {"content": list(map(self.shown_in_chat, piece.tokens))} if self.logprobs else None
        return {"index": index, **message, "logprobs": logprobs, "finish_reason": piece.reason or None}

    def shown_in_chat(self, token: Token) -> dict[str, Any]:
        top = [self.one(*one) for one in token.likeliest]
        return self.one(token.id, token.logprob) | {"top_logprobs": top}

    def one(self, token: int, logprob: float) -> dict[str, Any]:
        text = self.task.token_text(token)
        # A part of a character has no text of its own, and its bytes are not those of U+FFFD.
        return {"token": text, "logprob": logprob, "bytes": None if "\ufffd" in text else list(text.encode())}


async def answer(
    request: Request, form: Completion, prompts: list[Prompt], content: dict[str, Any]
) -> Response:
    """Let the model write; return the reply, whole or as events. Raises Malformed, and what `submit` raises."""
    service: Service = request.state.service
    generation = service.generating()
    n = content.get("n", 1)
    if not content.get("stream"):
        if "stream_options" in content:
            raise Malformed('"stream_options" needs "stream": true')
        return await whole(request, generation, form, prompts, n)
    options = content.get("stream_options", {})
    with_usage = options.get("include_usage", False) if isinstance(options, dict) else None
    if not isinstance(with_usage, bool) or options.keys() - {"include_usage"}:
        raise Malformed('"stream_options" must be {"include_usage": true} or {"include_usage": false}')
    streams = generation.submit(each_choice(prompts, n), context_of(request.scope).left_s)
    events = chunks(form, prompts, streams, with_usage)
    return EventStream(
        streams, events, generation.stall_s, lambda failure: error_body(failure.status, failure.sentence)
    )


def chunks(form: Completion, prompts: list[Prompt], streams: list[Stream], with_usage: bool) -> Events:
    """Return what turns the choices' pieces into events: each has text, so that the first one is the first text."""
    held: list[list[tuple[str, Token]]] = [[] for _ in streams]
    unfinished = set(range(len(streams)))
    head = form.head | {"object": form.stream_kind}

    def events(index: int, piece: Piece) -> bytes:
        held[index] += piece.parts
        if not piece.text and not piece.reason:
            return b""
        delta = form.delta(index, piece._replace(parts=held[index]))
        held[index] = []
        if not delta:
            return b""
        chunk = head | {"choices": [delta]} | ({"usage": None} if with_usage else {})
        if not piece.reason:
            return event(chunk)
        unfinished.discard(index)
        body = event(chunk | {"timings": times(streams[index])})
        if unfinished:
            return body
        last = head | {"choices": [], "usage": usage(prompts, streams)}
        return body + (event(last) if with_usage else b"") + DONE

    return events


def each_choice(prompts: list[Prompt], n: int) -> list[Prompt]:
    """Return the prompt of each choice. Each has a seed of its own; the first of a prompt has the client's."""
    return [
        prompt._replace(options=prompt.options._replace(seed=(prompt.options.seed + i) % (1 << 63)))
        for prompt in prompts
        for i in range(n)
    ]


async def whole(
    request: Request, generation: Generation, form: Completion, prompts: list[Prompt], n: int
) -> Response:
    """Return the reply with `n` choices for each prompt. If one fails, all do."""
    service: Service = request.state.service
    context = context_of(request.scope)
    work = written(generation, each_choice(prompts, n), context)
    streams, pieces = await service.in_flight.unless_left(request, work)

    def shown() -> list[dict[str, Any]]:
        return [form.choice(index, piece) for index, piece in enumerate(pieces)]

    # Logprobs are up to 20 objects per token. Not for the threads of checks: those reject work, and this is an answer.
    choices = await in_thread(shown) if form.logprobs else shown()
    content = form.head | {"object": form.kind, "choices": choices, "usage": usage(prompts, streams)}
    if len(streams) == 1:
        content["timings"] = times(streams[0])
    return AnswerResponse(context.answers, content)


def usage(prompts: list[Prompt], streams: list[Stream]) -> dict[str, Any]:
    """Return the tokens of each prompt, once, and of all that was generated.

    No times are in it: LangChain adds up what is, and takes whole numbers only.
    """
    n = sum(len(prompt.ids) for prompt in prompts)
    generated = sum(len(stream.sequence.tokens) for stream in streams)
    return {"prompt_tokens": n, "completion_tokens": generated, "total_tokens": n + generated}
