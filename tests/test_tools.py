"""Tools in a chat, by the openai client: calls whose arguments follow the schema, and what can't be had is a 400."""

import json
from collections.abc import Iterator
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtests.modes import MODES, start
from tests.support import small_language_models
from workers.generation.steps import Token
from workers.generation.stream import Piece
from workers.protocols.chat.tools import ToolChat, Tools
from workers.settings import Settings

TEMPLATE = (
    "{% if tools %}<|start|>system\n{{ tools | tojson }} Answer <tool_call>a call</tool_call><|end|>\n{% endif %}"
    "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
MESSAGES: Any = [{"role": "user", "content": "the old dog"}]
CITY = {"$ref": "#/$defs/City"}


def tool(name: str, properties: dict[str, Any], **more: Any) -> Any:
    parameters = {"type": "object", "properties": properties, "required": list(properties), **more}
    return {
        "type": "function",
        "function": {"name": name, "parameters": parameters | {"additionalProperties": False}},
    }


WEATHER = tool("weather", {"city": CITY}, **{"$defs": {"City": {"enum": ["Paris", "Lyon"]}}})
CLOCK = tool("clock", {"utc": {"type": "boolean"}})
TOOLS = [WEATHER, CLOCK]
NAMED: Any = {"type": "function", "function": {"name": "weather"}}


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    pytest.importorskip("llguidance")
    folder = tmp_path_factory.mktemp("model")
    small_language_models.make_model("llama", max_position_embeddings=2048).save_pretrained(folder)
    tokenizer = small_language_models.make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    env = {
        "MODEL": str(folder),
        "TASK": "text-generation",
        "TORCH_THREADS": "1",
        "KV_CACHE_MB": "16",
        "CONTEXT_TOKENS": "2048",
        "DEADLINE_S": "60",
    }
    with (
        start(MODES["thread"], env) as server,
        openai.OpenAI(base_url=server.url + "v1", api_key="none", max_retries=0, timeout=60) as client,
    ):
        yield client


def chat(client: openai.OpenAI, messages: Any = MESSAGES, **fields: Any) -> Any:
    return client.chat.completions.create(
        **{"model": "any", "messages": messages, "tools": TOOLS, "max_tokens": 200, "seed": 3} | fields
    )


def check(name: str, arguments: str) -> None:
    given = json.loads(arguments)
    assert {"weather": given.get("city") in ("Paris", "Lyon"), "clock": given.get("utc") in (True, False)}[
        name
    ] and len(given) == 1


@pytest.mark.parametrize("choice", ["required", NAMED])
def test_call_that_is_required_follows_its_functions_schema(client: openai.OpenAI, choice: Any) -> None:
    for one in chat(client, tool_choice=choice, temperature=2.0, n=6).choices:
        (call,) = one.message.tool_calls
        check(call.function.name, call.function.arguments)
        assert choice == "required" or call.function.name == "weather"
        assert one.finish_reason == "tool_calls" and not one.message.content


def test_streamed_calls_are_those_of_the_whole_reply(client: openai.OpenAI) -> None:
    fields: dict[str, Any] = {"tool_choice": "required", "temperature": 2.0, "n": 3}
    whole = [one.message.tool_calls[0].function for one in chat(client, **fields).choices]
    for chunk in chat(client, **fields, stream=True):
        (one,) = chunk.choices
        (call,) = one.delta.tool_calls
        assert call.index == 0 and call.id and one.delta.role == "assistant"
        assert (call.function.name, call.function.arguments) == (
            whole[one.index].name,
            whole[one.index].arguments,
        )
        assert one.finish_reason == "tool_calls"


def test_result_of_a_call_goes_back_to_the_model(client: openai.OpenAI) -> None:
    called = chat(client, tool_choice=NAMED).choices[0].message
    result = {"role": "tool", "tool_call_id": called.tool_calls[0].id, "content": "rain"}
    more = chat(client, [*MESSAGES, called, result], tool_choice="none", max_tokens=5)
    assert more.choices[0].message.content and not more.choices[0].message.tool_calls
    only = chat(client, MESSAGES, tool_choice="none", max_tokens=5)
    assert more.usage.prompt_tokens > only.usage.prompt_tokens + 20


def test_model_that_may_call_but_does_not_writes_a_text(client: openai.OpenAI) -> None:
    whole = chat(client, max_tokens=9, temperature=0)
    streamed = list(chat(client, max_tokens=9, temperature=0, stream=True))
    assert whole.choices[0].message.content == "".join(one.choices[0].delta.content or "" for one in streamed)
    assert whole.choices[0].finish_reason == streamed[-1].choices[0].finish_reason != "tool_calls"


def test_call_that_is_cut_off_stays_text_and_says_so(client: openai.OpenAI) -> None:
    (one,) = chat(client, tool_choice=NAMED, max_tokens=3).choices
    assert not one.message.tool_calls and one.message.content and one.finish_reason == "length"


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"tools": []}, "tools"),
        ({"tools": "weather"}, "tools"),
        ({"tools": [WEATHER, WEATHER]}, "same name"),
        ({"tools": [{"type": "function"}]}, "number 0"),
        ({"tools": [tool("a b", {})]}, "number 0"),
        ({"tools": [tool("a", {"b": {"$ref": "#"}})]}, "$ref"),
        ({"tools": [WEATHER, tool("a", {}, **{"$defs": {"City": {"enum": [1]}}})], "tool_choice": "required"}, "City"),
        ({"tools": [tool("<|end|>", {})]}, "number 0"),
        ({"tools": [tool("a", {"<|end|>": {}})]}, "<|end|>"),
        ({"tools": [tool("a", {"b": {"type": "wizard"}})], "tool_choice": "required"}, "schema"),
        ({"tools": [WEATHER | {"cache_control": {}}]}, "nothing else"),
        ({"tools": [{"type": "function", "function": {"name": "a", "parameters": []}}]}, "parameters"),
        ({"tools": [{"type": "function", "function": {"name": "a", "description": 3}}]}, "description"),
        ({"tools": [{"type": "function", "function": {"name": "a", "strict": "no"}}], "tool_choice": "required"}, "strict"),
        ({"tool_choice": "always"}, "tool_choice"),
        ({"tool_choice": NAMED | {"parallel": False}}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "cook"}}}, "tool_choice"),
        ({"logprobs": True}, "logprobs"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"ignore_eos": True, "tool_choice": "required"}, "ignore_eos"),
        ({"tools": [{"type": "function", "function": {"name": "a", "strict": True}}]}, "strict"),
        ({"messages": [{"role": "tool", "content": "rain"}]}, "tool_call_id"),
        ({"messages": [{"role": "tool", "tool_call_id": "<|end|>", "content": "rain"}]}, "<|end|>"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"id": "1"}]}]}, "tool_calls"),
        ({"messages": [{"role": "user", "content": "a", "tool_calls": [{}]}]}, "tool_calls"),
        ({"messages": [{"role": "tool", "tool_call_id": "1"}]}, "content"),
    ],
)  # fmt: skip
def test_what_can_not_be_had_with_tools_is_a_400_that_names_it(
    client: openai.OpenAI, fields: dict[str, Any], named: str
) -> None:
    body = {"model": "any", "messages": MESSAGES, "tools": TOOLS, "max_tokens": 20} | fields
    with pytest.raises(openai.BadRequestError) as failed:
        client.post("/chat/completions", body=body, cast_to=object)
    assert named in failed.value.body["message"]


# --- what a model writes when it may call, without a model ----------------------------------------------------------


def form(must_call: bool = False) -> ToolChat:
    service = SimpleNamespace(settings=Settings(MODEL="m"))
    request: Any = SimpleNamespace(scope={"headers": []}, state=SimpleNamespace(service=service))
    generation: Any = SimpleNamespace(task=None)
    return ToolChat(request, generation, Tools(TOOLS, {"weather": {}, "clock": {}}, must_call))


def piece(text: str, reason: str = "") -> Piece:
    return Piece([(text, Token(1, 0.0))], "", reason)


CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Lyon"}}\n</tool_call>'
WRITTEN = [
    (CALL, "", ["weather"]),
    (f"I look.\n{CALL}\n{CALL.replace('weather', 'clock')}", "I look.\n", ["weather", "clock"]),
    ("a < b <tool", "a < b <tool", []),
    (f"{CALL}<tool_call>", f"{CALL}<tool_call>", []),
    (CALL.replace("weather", "cook"), CALL.replace("weather", "cook"), []),
    (CALL.replace('"Lyon"', "NaN"), CALL.replace('"Lyon"', "NaN"), []),
    ("<tool_call>" + "[" * 100_000 + "</tool_call>", "<tool_call>" + "[" * 100_000 + "</tool_call>", []),
]


@pytest.mark.parametrize(("text", "content", "names"), WRITTEN)
def test_calls_are_read_and_what_is_none_stays_text(text: str, content: str, names: list[str]) -> None:
    choice = form().choice(0, piece(text, "stop"))
    calls = choice["message"].get("tool_calls", [])
    assert (choice["message"]["content"] or "", [call["function"]["name"] for call in calls]) == (
        content,
        names,
    )
    assert choice["finish_reason"] == ("tool_calls" if names else "stop")
    assert len({call["id"] for call in calls}) == len(calls)


@given(which=st.sampled_from(WRITTEN[:-1]), cuts=st.lists(st.integers(0, 150), max_size=12))
def test_stream_says_the_same_however_its_text_is_cut(which: Any, cuts: list[int]) -> None:
    text, content, names = which
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    streamed = form()
    parts = [text[a:b] for a, b in pairwise(edges)]
    deltas = [streamed.delta(0, piece(part)) for part in parts] + [streamed.delta(0, piece("", "stop"))]
    told = [one["delta"] for one in deltas if one]
    assert "".join(one.get("content", "") for one in told) == content
    assert [call["function"]["name"] for one in told for call in one.get("tool_calls", [])] == names
    assert [one.get("role") for one in told] == ["assistant"] + [None] * (len(told) - 1)
