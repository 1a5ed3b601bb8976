"""What a request to the OpenAI APIs may have in it: each field by name, checked, as the task takes it."""

import re
from typing import Any

from workers.errors import Malformed, Unprocessable
from workers.protocols import whole
from workers.protocols.chat.tools import NO_TOOLS, tool_fields
from workers.protocols.openapi import an_object
from workers.tasks.common.text import BOOLEAN_RULE, Rule, check_parameters, number_rule, schemas
from workers.tasks.text_generation import MOST_BIASES, MOST_LOGPROBS, MOST_STOPS, Prompt, Task

MOST_CHOICES = 8
# As OpenAI has it, and vLLM: a completion that does not say is short. A chat message has all the room there is.
COMPLETION_TOKENS = 16
ROLES = ("system", "developer", "user", "assistant")

# What is sent, and what it does. A default that is not said is the model's own, in its generation_config.json.
SAMPLED = {
    "model": "any name: there is one model",
    "temperature": "0: always the likeliest token",
    "top_p": "as OpenAI has it",
    "seed": "the same seed gives the same text, alone and in any batch",
    "stop": f"a text or up to {MOST_STOPS}; the answer ends before it",
    "presence_penalty": "as OpenAI has it; 0 by default",
    "frequency_penalty": "as OpenAI has it; 0 by default",
    "logit_bias": f"up to {MOST_BIASES} token ids, each with a number from -100 to 100",
    "n": f"how many choices, up to {MOST_CHOICES}; in a stream each chunk has the index of its own",
    "stream": "the answer as events",
    "stream_options": '{"include_usage": true}: a last chunk with the usage',
    "user": "no effect",
    "safety_identifier": "no effect",
    "top_k": "vLLM's: only the likeliest so many; -1 and 0: all",
    "min_p": "vLLM's: only tokens with this part of the likeliest one's probability",
    "repetition_penalty": "vLLM's and Transformers'",
    "min_tokens": "vLLM's: no end before",
    "ignore_eos": "vLLM's: no end before max_tokens",
}
CHAT_FIELDS = {
    "messages": "roles system, developer, user, assistant and tool, assistant's with tool_calls; content: a text or text parts; name: no effect",
    "max_tokens": "by default as many as there is room for: CONTEXT_TOKENS less the prompt",
    "max_completion_tokens": "the same",
    "logprobs": "true: the logarithm of each token's probability",
    "top_logprobs": f"beside it the likeliest so many, up to {MOST_LOGPROBS}",
    "tools": "functions that the model may call, where its chat template has tools",
    "tool_choice": "none; required or a function: a call by grammar, needs llguidance; auto, the default: where the template has <tool_call>",
    "response_format": "text, json_object or json_schema, whose schema the text then follows; needs llguidance",
    **SAMPLED,
}
COMPLETION_FIELDS = {
    "prompt": "a text, token ids, or a list of either",
    "max_tokens": f"{COMPLETION_TOKENS} by default",
    "logprobs": f"of each token, and of the likeliest so many, up to {MOST_LOGPROBS}",
    "echo": "the answer begins with the prompt; not with logprobs, which a prompt has none of",
    **SAMPLED,
}
# Fields of OpenAI's references that would change the answer, and what to do without them.
UNSUPPORTED = {
    **dict.fromkeys(
        ("functions", "function_call", "parallel_tool_calls"),
        'send "tools" and "tool_choice" at /v1/chat/completions',
    ),
    "best_of": 'send "n" with "logprobs" and choose',
    "suffix": "the model continues a text, it fills no gap",
    "modalities": "the model gives text",
    "audio": "the model gives text",
    "prediction": "leave it out",
    "reasoning_effort": "say it in a message",
    "verbosity": "say it in a message",
    "web_search_options": "leave it out",
    "store": "nothing is stored; leave it out",
    "metadata": "nothing is stored; leave it out",
    "service_tier": "send Prefer: wait=SECONDS for a time limit of your own",
}
# OpenAI's name of each sampling parameter, and the task's.
SAMPLING = {
    **{name: name for name in ("temperature", "top_p", "min_p", "seed", "repetition_penalty", "ignore_eos")},
    **{name: name for name in ("presence_penalty", "frequency_penalty", "top_k")},
    "min_tokens": "min_new_tokens",
    "max_tokens": "max_new_tokens",
    "max_completion_tokens": "max_new_tokens",
}
PARTS = {
    "type": "array",
    "items": an_object({"type": {"const": "text"}, "text": {"type": "string"}}, {}),
    "minItems": 1,
}


def rules(task: Task, known: dict[str, str]) -> dict[str, Rule]:
    """Return the rule of each of these fields that is a parameter, by OpenAI's name."""
    found = {name: task.rules[SAMPLING[name]] for name in known if name in SAMPLING}
    found["stream"], found["n"] = BOOLEAN_RULE, number_rule(1, MOST_CHOICES)
    found["logit_bias"], found["top_k"] = bias_rule(task.vocabulary), number_rule(-1, task.vocabulary)
    is_chat = "messages" in known
    found["logprobs"] = BOOLEAN_RULE if is_chat else number_rule(0, MOST_LOGPROBS)
    if is_chat:
        found["top_logprobs"] = number_rule(0, MOST_LOGPROBS)
    else:
        found["echo"] = BOOLEAN_RULE
    return found


def bias_rule(vocabulary: int) -> Rule:
    """Return the rule of `logit_bias`."""

    def is_id(key: str) -> bool:
        return key.isascii() and key.isdigit() and len(key) < 10 and int(key) < vocabulary

    def is_allowed(value: Any) -> bool:
        return (
            isinstance(value, dict)
            and len(value) <= MOST_BIASES
            and all(map(is_id, value))
            and all(type(bias) in (int, float) and -100 <= bias <= 100 for bias in value.values())
        )

    words = (
        f"an object of up to {MOST_BIASES} token ids below {vocabulary}, each with a number from -100 to 100"
    )
    return Rule(words, is_allowed, {"type": "object", "maxProperties": MOST_BIASES})


def described(task: Task, known: dict[str, str]) -> dict[str, Any]:
    """Return what may be sent beside the messages or the prompt, as JSON Schemas."""
    return {name: {} for name in list(known)[1:]} | schemas(rules(task, known))


def sampling(content: dict[str, Any], task: Task, known: dict[str, str]) -> dict[str, Any]:
    """Return the parameters by the task's names. Raises Malformed with a sentence that has OpenAI's.

    `content` gets what was checked: 2 where 2.0 was sent for a whole number.
    """
    if unsupported := next((name for name in content if name in UNSUPPORTED), None):
        raise Malformed(f'"{unsupported}" is not supported: {UNSUPPORTED[unsupported]}')
    by_name = rules(task, known)
    given = check_parameters({name: value for name, value in content.items() if name in by_name}, by_name)
    content |= given
    if len({given[name] for name in ("max_tokens", "max_completion_tokens") if name in given}) > 1:
        raise Malformed('"max_tokens" and "max_completion_tokens" differ; send one of them')
    if "logit_bias" in given:
        given["logit_bias"] = {int(key): float(bias) for key, bias in given["logit_bias"].items()}
    if "top_k" in given:
        given["top_k"] = max(0, given["top_k"])
    return {SAMPLING.get(name, name): value for name, value in given.items() if name not in ("stream", "n")}


def schema_of(content: dict[str, Any]) -> dict[str, Any] | None:
    """Return the JSON Schema that the text must follow, None where it is free. Raises Malformed with a sentence."""
    match content.get("response_format"):
        case None:
            return None
        case {"type": "text", **more} if not more:
            return None
        case {"type": "json_object", **more} if not more:
            schema: Any = {"type": "object"}
        case {"type": "json_schema", "json_schema": {"schema": dict() as schema, **more}, **beside} if (
            not beside and more.keys() <= {"name", "description", "strict"}
        ):
            pass
        case _:
            raise Malformed(
                '"response_format" must be {"type": "text"}, {"type": "json_object"} or '
                '{"type": "json_schema", "json_schema": {"name": "a name", "schema": {…}}}, and nothing else'
            )
    if other := next((name for name in ("ignore_eos", "min_tokens") if content.get(name)), None):
        raise Malformed(
            f'"{other}" is not supported with "response_format": the text ends where the JSON does'
        )
    return schema


def prompt_of(task: Task, ids: list[int], given: dict[str, Any], stop: Any) -> Prompt:
    """Return the checked prompt. Raises Malformed where it does not fit: OpenAI has no 422."""
    stops = [stop] if isinstance(stop, str) else [] if stop is None else stop
    if (
        not isinstance(stops, list)
        or len(stops) > MOST_STOPS
        or not all(isinstance(one, str) and one for one in stops)
    ):
        raise Malformed(f'"stop" must be a text or a list of up to {MOST_STOPS} texts, none of them empty')
    room = {"max_new_tokens": max(1, task.capacity - len(ids))}
    prompt = Prompt(ids, task.options(room | given), tuple(stops), full_text=False)
    try:
        task.checked(prompt)
    except Unprocessable as exc:
        raise Malformed(re.sub(r"(max|min)_new_tokens", r'"\1_tokens"', str(exc))) from exc
    return prompt


def messages_of(messages: Any, takes_tools: bool) -> list[dict[str, Any]]:
    """Return the messages as a chat template takes them, which may have tools. Raises Malformed with a sentence."""
    if not isinstance(messages, list) or not messages:
        raise Malformed('"messages" must be a list such as [{"role": "user", "content": "a text"}]')
    return [
        message_of(f'"messages", number {index}', message, takes_tools)
        for index, message in enumerate(messages)
    ]


def message_of(where: str, message: Any, takes_tools: bool) -> dict[str, Any]:
    """Return a message as a chat template takes it. Raises Malformed with a sentence that says `where` it is."""
    if not isinstance(message, dict) or message.get("role") not in (*ROLES, "tool"):
        raise Malformed(f'{where}: "role" must be {", ".join(ROLES)} or tool')
    given = {name: value for name, value in message.items() if value is not None}
    more: dict[str, Any] = {}
    if given["role"] == "tool" or "tool_calls" in given:
        if not takes_tools:
            raise Malformed(f"{where}: {NO_TOOLS}")
        more = tool_fields(where, given)
    if unknown := sorted(given.keys() - {"role", "content", "name", *more}):
        raise Malformed(f'{where}: "{unknown[0][:100]}" is not supported; leave it out')
    role = "system" if given["role"] == "developer" else given["role"]
    content = given.get("content", "" if "tool_calls" in more else None)
    return {"role": role, "content": text_of(where, content, ("text",)), **more}


def text_of(where: str, content: Any, kinds: tuple[str, ...]) -> str:
    """Return a message's text, which may be in parts of these types. Raises Malformed with a sentence."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        raise Malformed(f'{where}: "content" must be a text or a list of text parts')
    for part in content:
        if (
            not isinstance(part, dict)
            or part.get("type") not in kinds
            or not isinstance(part.get("text"), str)
        ):
            raise Malformed(f'{where}: each part must be {{"type": "{kinds[0]}", "text": "…"}}')
    return "".join(part["text"] for part in content)


def prompts_of(prompt: Any, task: Task, most: int) -> list[Any]:
    """Return each prompt: a text or token ids. Raises Malformed with a sentence."""
    alone = isinstance(prompt, str) or (isinstance(prompt, list) and prompt and type(whole(prompt[0])) is int)
    prompts = [prompt] if alone else prompt
    if not isinstance(prompts, list) or not 1 <= len(prompts) <= most:
        raise Malformed(f'"prompt" must be a text, token ids, or a list of 1 to {most} of either')
    prompts = [list(map(whole, one)) if isinstance(one, list) else one for one in prompts]
    for one in prompts:
        if isinstance(one, list):
            if not one or not all(type(token) is int and 0 <= token < task.vocabulary for token in one):
                raise Malformed(
                    f'token ids in "prompt" must be whole numbers from 0 to {task.vocabulary - 1}'
                )
        elif not isinstance(one, str) or not one:
            raise Malformed('"prompt" is empty or is not a text; send a text')
    return prompts
