"""Tools in a chat: functions that the model may call, and its calls out of the text that it writes.

With "tool_choice": "required" or a function's name the text is a call by grammar: its arguments follow the function's JSON
Schema, whatever the model. With "auto" the model decides, and its calls are read in the form that its chat template teaches:
<tool_call>{"name": …, "arguments": …}</tool_call>. Text that is not a call of a function in "tools" stays text.
"""

import json
import re
from typing import Any, NamedTuple

from starlette.requests import Request

from workers.errors import Malformed
from workers.generation.stream import Piece
from workers.generation.text import nodes, overlap
from workers.protocols.chat.replies import Chat
from workers.tasks.text_generation import Task
from workers.web.generation import Generation

BEGIN, END = "<tool_call>", "</tool_call>"
MOST_TOOLS = 128  # as OpenAI has it
NAME = re.compile(r"[A-Za-z0-9_-]{1,64}", re.ASCII)
FORM = '{"type": "function", "function": {"name": "a_name", "parameters": {…}}}'
CALL_FORM = '{"id": "…", "type": "function", "function": {"name": "a_name", "arguments": "{…}"}}'
NO_TOOLS = "this model's chat template has no tools; describe them in a message and read the text"
DEFINITIONS = ("$defs", "definitions")


class Call(NamedTuple):
    """A function's name, and its arguments as JSON."""

    name: str
    arguments: str


class Tools(NamedTuple):
    """The functions that may be called: as they were sent, and each one's JSON Schema by name."""

    given: list[Any]
    parameters: dict[str, Any]
    must_call: bool

    def shown(self, text: str) -> int:
        """Return how many characters at the start of an unfinished text can't be part of a call."""
        if self.must_call:
            return 0
        at = text.find(BEGIN)
        return at if at >= 0 else len(text) - overlap(text, BEGIN)

    def read(self, text: str) -> tuple[str, list[Call]]:
        """Return what a text says beside its calls, and these; all of it and none where one can't be read."""
        if self.must_call:
            call = self.call(text)
            return ("", [call]) if call else (text, [])
        content, *blocks = text.split(BEGIN)
        calls = []
        for block in blocks:
            said, end, after = block.partition(END)
            call = self.call(said)
            if not end or not call:
                return text, []
            calls.append(call)
            content += after if after.strip() else ""
        return content, calls

    def call(self, text: str) -> Call | None:
        try:
            match json.loads(text, parse_constant=not_json):
                case {"name": str(name), "arguments": dict(arguments)} if name in self.parameters:
                    return Call(name, json.dumps(arguments, ensure_ascii=False))
        except (ValueError, RecursionError):
            pass
        return None

    def schema(self) -> dict[str, Any]:
        """Return the JSON Schema of a call. Raises Malformed where the functions' definitions can't stand side by side."""
        definitions: dict[str, dict[str, Any]] = {key: {} for key in DEFINITIONS}
        calls = []
        for name, parameters in self.parameters.items():
            own = {key: value for key, value in parameters.items() if key not in DEFINITIONS}
            for key in DEFINITIONS:
                for one, schema in dict(parameters.get(key, {})).items():
                    if definitions[key].setdefault(one, schema) != schema:
                        raise Malformed(f'"tools": two functions define "{one[:100]}"; rename one')
            properties = {"name": {"const": name}, "arguments": own}
            calls.append(
                {
                    "type": "object",
                    "properties": properties,
                    "required": list(properties),
                    "additionalProperties": False,
                }
            )
        return {"anyOf": calls} | {key: found for key, found in definitions.items() if found}


def not_json(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def tools_of(content: dict[str, Any], task: Task) -> Tools | None:
    """Return the tools that the model gets, None where it gets none. Raises Malformed with a sentence."""
    given, choice = content.get("tools"), content.get("tool_choice", "auto")
    if given is None:
        if "tool_choice" in content:
            raise Malformed('"tool_choice" needs "tools"')
        return None
    if not isinstance(given, list) or not 1 <= len(given) <= MOST_TOOLS:
        raise Malformed(f'"tools" must be a list of 1 to {MOST_TOOLS} functions such as {FORM}')
    parameters = dict(function_of(f'"tools", number {index}', tool) for index, tool in enumerate(given))
    if len(parameters) < len(given):
        raise Malformed('"tools": two functions have the same name; rename one')
    match choice:
        case "none":
            return None
        case "auto" | "required":
            pass
        case {"type": "function", "function": {"name": str(name), **more}, **beside} if (
            name in parameters and not more and not beside
        ):
            parameters = {name: parameters[name]}
        case _:
            raise Malformed(
                '"tool_choice" must be "none", "auto", "required" or {"type": "function", "function": '
                '{"name": "one of the tools"}}'
            )
    if not task.takes_tools:
        raise Malformed(NO_TOOLS)
    tools = Tools(given, parameters, choice != "auto")
    check_together(content, task, tools)
    return tools


def check_together(content: dict[str, Any], task: Task, tools: Tools) -> None:
    """Raise Malformed for what can't be had together with tools."""
    names = ["logprobs"] if not tools.must_call else ["logprobs", "ignore_eos", "min_tokens"]
    if content.get("response_format", {"type": "text"}) != {"type": "text"}:
        names.append("response_format")
    if other := next((name for name in names if content.get(name)), None):
        raise Malformed(f'"{other}" is not supported with "tools"; leave one out')
    if tools.must_call:
        return
    if not task.writes_tag(BEGIN):
        raise Malformed(
            '"tool_choice": "auto" is not supported: this model\'s chat template writes no <tool_call>; '
            'send "required", a function or "none"'
        )
    if any(tool["function"].get("strict") for tool in tools.given):
        raise Malformed('"strict" needs "tool_choice": "required" or a function; leave it out')


def function_of(where: str, tool: Any) -> tuple[str, dict[str, Any]]:
    """Return the name of a function and the JSON Schema of its arguments. Raises Malformed with a sentence."""
    function: dict[str, Any] = {}
    match tool:
        case {"type": "function", "function": {"name": str(name)} as function, **more} if (
            NAME.fullmatch(name) and not more
        ):
            pass
        case _:
            raise Malformed(
                f"{where}: send {FORM} and nothing else; a name has up to 64 letters, digits, _ and -"
            )
    if unknown := sorted(function.keys() - {"name", "description", "parameters", "strict"}):
        raise Malformed(f'{where}: "{unknown[0][:100]}" is not supported; leave it out')
    function = {key: value for key, value in function.items() if value is not None}
    if not isinstance(function.get("description", ""), str) or not isinstance(
        function.get("strict", True), bool
    ):
        raise Malformed(f'{where}: "description" must be a text and "strict" true or false')
    parameters = function.get("parameters", {})
    if parameters == {}:
        parameters = {"type": "object", "additionalProperties": False}
    if not isinstance(parameters, dict) or parameters.get("type") != "object":
        raise Malformed(f'{where}: "parameters" must be a JSON Schema with "type": "object"')
    if not all(isinstance(parameters.get(key, {}), dict) for key in DEFINITIONS):
        raise Malformed(f'{where}: "$defs" must be an object')
    for node in nodes(parameters):
        ref = node.get("$ref") if isinstance(node, dict) else None
        if isinstance(ref, str) and not ref.startswith(("#/$defs/", "#/definitions/")):
            raise Malformed(f'{where}: "$ref" must begin with "#/$defs/"')
    return name, parameters


def tool_fields(where: str, message: dict[str, Any]) -> dict[str, Any]:
    """Return what a message has of tools, as chat templates take it. Raises Malformed with a sentence."""
    if message["role"] == "tool":
        call_id = message.get("tool_call_id")
        if not isinstance(call_id, str) or not isinstance(message.get("name", ""), str):
            raise Malformed(f'{where}: a tool\'s message needs "tool_call_id", a text')
        return {key: message[key] for key in ("tool_call_id", "name") if key in message}
    calls = message.get("tool_calls")
    if message["role"] != "assistant" or not isinstance(calls, list) or not calls:
        raise Malformed(f'{where}: "tool_calls" must be a list of an assistant\'s calls such as {CALL_FORM}')
    return {"tool_calls": [call_of(where, call) for call in calls]}


def call_of(where: str, call: Any) -> dict[str, Any]:
    """Return a call of an earlier turn, its arguments as an object. Raises Malformed with a sentence."""
    match call:
        case {"type": "function", "function": {"name": str(name), "arguments": str(text)}}:
            try:
                arguments = json.loads(text, parse_constant=not_json)
            except (ValueError, RecursionError):
                arguments = None
            if isinstance(arguments, dict):
                function = {"name": name, "arguments": arguments}
                return {"type": "function", "id": str(call.get("id", "")), "function": function}
    raise Malformed(f'{where}: each of "tool_calls" must be such as {CALL_FORM}, its arguments a JSON object')


class ToolChat(Chat):
    """How replies read where tools may be called."""

    def __init__(self, request: Request, generation: Generation, tools: Tools) -> None:
        super().__init__(request, generation, logprobs=False)
        self.tools = tools

    def choice(self, index: int, piece: Piece) -> dict[str, Any]:
        content, calls = self.tools.read(piece.text)
        message = {"role": "assistant", "content": content or None, "refusal": None}
        called = {"tool_calls": self.shown_calls(index, calls)} if calls else {}
        return self.ended(self.chat_part(index, {"message": message | called}, piece), calls)

    def delta(self, index: int, piece: Piece) -> dict[str, Any]:
        """Return what is new and can't be part of a call that is not complete; nothing where that is nothing."""
        text = self.held.pop(index, "") + piece.text
        calls: list[Call] = []
        if piece.reason:
            content, calls = self.tools.read(text)
        else:
            at = self.tools.shown(text)
            content, self.held[index] = text[:at], text[at:]
        if not content and not piece.reason:
            return {}
        delta: dict[str, Any] = {} if index in self.begun else {"role": "assistant"}
        self.begun.add(index)
        if content:
            delta["content"] = content
        if calls:
            shown = self.shown_calls(index, calls)
            delta["tool_calls"] = [{"index": i, **call} for i, call in enumerate(shown)]
        return self.ended(self.chat_part(index, {"delta": delta}, piece), calls)

    def shown_calls(self, index: int, calls: list[Call]) -> list[dict[str, Any]]:
        start = str(self.head["id"]).replace(self.id_prefix, "call", 1)
        return [
            {"id": f"{start}-{index}-{i}", "type": "function", "function": call._asdict()}
            for i, call in enumerate(calls)
        ]

    def ended(self, choice: dict[str, Any], calls: list[Call]) -> dict[str, Any]:
        """Return the choice with OpenAI's reason where the model has ended with calls."""
        return choice | (
            {"finish_reason": "tool_calls"} if calls and choice["finish_reason"] == "stop" else {}
        )
