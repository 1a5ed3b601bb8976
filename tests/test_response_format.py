"""Text that follows a JSON Schema: what comes back is JSON of that form, whatever the model would rather write."""

import json
import sys
from collections.abc import Iterator
from typing import Any

import openai
import pydantic
import pytest

from loadtests.modes import MODES, start
from workers.generation import grammar
from workers.generation.scheduler import NO_WAY_ON, Scheduler, Sequence
from workers.generation.step_cost import StepCost
from workers.generation.steps import Options, Token

SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Lyon"]}, "old": {"type": "boolean"}},
    "required": ["city", "old"],
    "additionalProperties": False,
}
TOO_DEEP = {"type": "string", "pattern": "^(((a{200}){200}){200}){200}$"}
ENDLESS = [{"type": "string", "pattern": f"[a-z]*{letter}.*"} for letter in "abcdefghijklmnop"]
CHAIN = {
    "$ref": "#/$defs/0",
    "$defs": {str(i): one | {"$ref": f"#/$defs/{i + 1}"} for i, one in enumerate(ENDLESS[:-1])}
    | {str(len(ENDLESS) - 1): ENDLESS[-1]},
}
CIRCLE = {
    "type": "object",
    "properties": {"next": {"$ref": "#/$defs/a"}},
    "required": ["next"],
    "$defs": {"a": {"$ref": "#/$defs/a"}},
}
MESSAGES: Any = [{"role": "user", "content": "the old dog"}]
needs_llguidance = pytest.mark.usefixtures("llguidance")


@pytest.fixture(scope="module")
def llguidance() -> Any:
    return pytest.importorskip("llguidance")


@pytest.fixture(scope="module", params=["thread", pytest.param("process", marks=pytest.mark.slow)])
def client(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[openai.OpenAI]:
    from tests.support.small_language_models import save

    env = {
        "MODEL": save(tmp_path_factory.mktemp("model"), max_position_embeddings=512),
        "TASK": "text-generation",
        "TORCH_THREADS": "1",
        "KV_CACHE_MB": "8",
        "DEADLINE_S": "60",
    }
    with (
        start(MODES[request.param], env) as server,
        openai.OpenAI(base_url=server.url + "v1", api_key="none", max_retries=0, timeout=60) as client,
    ):
        yield client


def of_schema(schema: Any) -> Any:
    return {"type": "json_schema", "json_schema": {"name": "a_city", "schema": schema, "strict": True}}


class City(pydantic.BaseModel):
    city: str = pydantic.Field(max_length=8)
    old: bool


@needs_llguidance
@pytest.mark.parametrize("temperature", [0, 1.5])
def test_text_follows_the_schema_and_each_choice_has_a_place_of_its_own(
    client: openai.OpenAI, temperature: float
) -> None:
    reply = client.chat.completions.create(
        model="any",
        messages=MESSAGES,
        response_format=of_schema(SCHEMA),
        temperature=temperature,
        n=4,
        seed=1,
    )
    for choice in reply.choices:
        found = json.loads(choice.message.content or "")
        assert found.keys() == {"city", "old"} and found["city"] in ("Paris", "Lyon")
        assert isinstance(found["old"], bool) and choice.finish_reason == "stop"


@needs_llguidance
def test_openais_parse_and_streams_work_beside_free_text(client: openai.OpenAI) -> None:
    parsed = client.chat.completions.parse(
        model="any", messages=MESSAGES, response_format=City, temperature=0
    )
    assert isinstance(parsed.choices[0].message.parsed, City)
    asked: Any = {"model": "any", "messages": MESSAGES, "max_tokens": 9, "temperature": 0}
    free = client.chat.completions.create(**asked).choices[0].message.content
    held = client.chat.completions.create(**asked, stream=True)
    stream = client.chat.completions.create(
        model="any", messages=MESSAGES, response_format=of_schema(SCHEMA), stream=True
    )
    assert json.loads("".join(chunk.choices[0].delta.content or "" for chunk in stream))["city"]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in held) == free


@needs_llguidance
def test_json_object_begins_as_one_and_length_is_told(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(
        model="any", messages=MESSAGES, response_format={"type": "json_object"}, max_tokens=5, temperature=0
    )
    assert (reply.choices[0].message.content or "").startswith("{")
    assert reply.choices[0].finish_reason in ("length", "stop")


@needs_llguidance
@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"response_format": of_schema({"type": "a city"})}, "Invalid type"),
        ({"response_format": of_schema({"type": "string", "pattern": "(?=a)"})}, "schema"),
        # 1 s for the first mask of it, if it had no limits; a constructor that does not end
        ({"response_format": of_schema(TOO_DEEP)}, "too many expressions"),
        ({"response_format": of_schema({"allOf": ENDLESS})}, "8 patterns"),
        ({"response_format": of_schema(CHAIN)}, "8 patterns"),
        ({"response_format": of_schema("text")}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"response_format": {"type": "regex"}}, "response_format"),
        ({"response_format": {"type": "json_object", "schema": SCHEMA}}, "nothing else"),
        ({"response_format": {"type": "text", "schema": SCHEMA}}, "nothing else"),
        ({"response_format": of_schema(SCHEMA) | {"schema": SCHEMA}}, "nothing else"),
        # found out as late as after the text's first tokens
        ({"response_format": of_schema(CIRCLE)}, "allows no end"),
        ({"response_format": of_schema(SCHEMA), "ignore_eos": True}, "ignore_eos"),
    ],
)
def test_schema_that_can_not_be_followed_is_a_400(
    client: openai.OpenAI, fields: dict[str, Any], named: str
) -> None:
    with pytest.raises(openai.BadRequestError) as failed:
        client.post("/chat/completions", body={"model": "any", "messages": MESSAGES} | fields, cast_to=object)
    assert named in failed.value.body["message"]


@needs_llguidance
def test_schema_that_is_too_complex_to_follow_fails_its_text_instead_of_ending_it() -> None:
    from tests.support.small_language_models import make_tokenizer

    tokenizer = make_tokenizer()
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    matcher = grammar.Grammars(tokenizer.backend_tokenizer, end).matcher(SCHEMA)
    scheduler = Scheduler(1, StepCost(1.0))
    sequence = Sequence([5, 6], Options(end_ids=frozenset([end])), grammar=matcher)
    scheduler.add(sequence)
    matcher.matcher.consume_token(5)  # not JSON: its library gives up, and from then on allows the end alone
    assert matcher.matcher.is_error()
    step = scheduler.plan()
    assert step
    ((_, outcome, reason),) = scheduler.advance(step, [Token(end, 0.0)])
    assert (outcome, reason) == (NO_WAY_ON, "failed")


@needs_llguidance
def test_text_that_is_complete_ends_without_an_error() -> None:
    from tests.support.small_language_models import make_tokenizer

    tokenizer = make_tokenizer()
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    matcher = grammar.Grammars(tokenizer.backend_tokenizer, end).matcher({"enum": ["a"]})
    assert all(matcher.accept(token) for token in [*tokenizer.encode('"a"'), end])


def test_without_llguidance_the_error_has_the_line_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(grammar.GrammarError, match="pip install -r requirements-optional"):
        grammar.Grammars(None, 1)


@pytest.mark.parametrize(
    ("schema", "n"),
    [
        ({"type": "object", "properties": {str(i): one for i, one in enumerate(ENDLESS)}}, 1),
        ({"type": "object", "properties": {"pattern": {"$ref": "#/$defs/a"}, "allOf": ENDLESS[0]}}, 1),
        ({"allOf": ENDLESS[:3] * 5}, 3),
        ({"allOf": [{"$ref": "#/$defs/a"}], "$defs": {"a": {"allOf": ENDLESS}}}, 16),
        (CHAIN, 16),
    ],
)
def test_patterns_count_where_one_text_may_have_to_match_them_all(schema: Any, n: int) -> None:
    assert grammar.patterns_at_once(schema) == n
