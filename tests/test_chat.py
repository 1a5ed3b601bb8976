"""OpenAI chat and completions, as the openai client speaks them; the oracle is `generate` on the template's own prompt."""

import asyncio
import json
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import httpx2
import openai
import pytest

from loadtests.modes import MODES, Server, start
from tests.support.client import dial, metric, request, until
from workers.generation.steps import Token
from workers.generation.stream import Piece
from workers.protocols.chat.replies import Chat, Completion
from workers.settings import Settings
from workers.tasks.text_generation import Task

MESSAGES = [
    {"role": "system", "content": "the old dog"},
    {
        "role": "user",
        "content": [{"type": "text", "text": "runs over "}, {"type": "text", "text": "a river"}],
    },
]


GENERATED = 'model_tokens_total{kind="generated"}'


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    from tests.support.small_language_models import save

    return save(tmp_path_factory.mktemp("model"), max_position_embeddings=2048)


@pytest.fixture(scope="module")
def server(folder: str) -> Iterator[Server]:
    env = {
        "MODEL": folder,
        "TASK": "text-generation",
        "TORCH_THREADS": "1",
        "KV_CACHE_MB": "20",
        "CONTEXT_TOKENS": "2048",
        "DEADLINE_S": "60",
    }
    with start(MODES["thread"], env) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.url + "v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def oracle(folder: str) -> Any:
    """The greedy text after these token ids, and how many tokens that are."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)

    def text(prompt: Any, n: int) -> tuple[str, int]:
        if isinstance(prompt, list):
            flat = [{"role": m["role"], "content": flat_text(m["content"])} for m in prompt]
            prompt = tokenizer.apply_chat_template(flat, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).input_ids
        with torch.inference_mode():
            out = model.generate(ids, max_new_tokens=n, do_sample=False, attention_mask=torch.ones_like(ids))
        return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True), ids.shape[1]

    return text


UNSUPPORTED: dict[str, Any] = {
    "functions": [],
    "parallel_tool_calls": True,
    "best_of": 2,
    "suffix": "end",
    "modalities": ["text"],
    "prediction": {},
    "reasoning_effort": "low",
    "store": False,
    "metadata": {},
    "service_tier": "auto",
}


def flat_text(content: Any) -> str:
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def test_chat_is_what_generate_writes_and_usage_is_exact(client: openai.OpenAI, oracle: Any) -> None:
    reply = client.chat.completions.create(model="any", messages=MESSAGES, max_tokens=12, temperature=0)
    text, n_prompt = oracle(MESSAGES, 12)
    assert reply.choices[0].message.content == text and reply.choices[0].message.role == "assistant"
    assert reply.choices[0].finish_reason in ("length", "stop")
    assert (reply.usage.prompt_tokens, reply.usage.total_tokens) == (
        n_prompt, n_prompt + reply.usage.completion_tokens
    )  # fmt: skip
    assert reply.object == "chat.completion" and reply.id.startswith("chatcmpl-")


def test_chat_streams_the_same_text_and_ends_with_its_reason_and_usage(
    client: openai.OpenAI, oracle: Any
) -> None:
    stream = client.chat.completions.create(
        model="any", messages=MESSAGES, max_completion_tokens=12, temperature=0, stream=True,
        stream_options={"include_usage": True},
    )  # fmt: skip
    *chunks, last = stream
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == oracle(MESSAGES, 12)[0]
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[-1].choices[0].finish_reason
    assert not last.choices and last.usage.prompt_tokens == oracle(MESSAGES, 12)[1]


def test_async_client_streams_many_chats_side_by_side(server: Server, oracle: Any) -> None:
    async def ask(client: openai.AsyncOpenAI, text: str) -> str:
        messages = [{"role": "user", "content": text}]
        stream = await client.chat.completions.create(
            model="any", messages=messages, max_tokens=16, temperature=0, stream=True
        )
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    async def run() -> None:
        texts = [f"the old dog {i}" for i in range(8)]
        async with openai.AsyncOpenAI(base_url=server.url + "v1", api_key="none", timeout=60) as client:
            found = await asyncio.gather(*(ask(client, text) for text in texts))
        assert found == [oracle([{"role": "user", "content": text}], 16)[0] for text in texts]

    asyncio.run(run())


def test_completions_take_texts_token_ids_and_lists_and_echo(client: openai.OpenAI, oracle: Any) -> None:
    reply = client.completions.create(
        model="any", prompt=["the old dog", "a river"], max_tokens=6, temperature=0, echo=True, n=2
    )
    expected = [text + oracle(text, 6)[0] for text in ("the old dog", "a river") for _ in range(2)]
    assert [choice.text for choice in reply.choices] == expected
    assert [choice.index for choice in reply.choices] == [0, 1, 2, 3]
    streamed = client.completions.create(
        model="any", prompt="a river", max_tokens=6, temperature=0, stream=True
    )
    assert "".join(chunk.choices[0].text for chunk in streamed) == oracle("a river", 6)[0]


def test_completion_that_does_not_say_is_short_and_top_k_of_minus_one_means_all(
    client: openai.OpenAI, oracle: Any
) -> None:
    reply = client.completions.create(
        model="any",
        prompt="a river",
        temperature=0,
        suffix=None,
        extra_body={"ignore_eos": True, "top_k": -1, "min_tokens": 2},
    )
    assert reply.usage.completion_tokens == 16 and reply.choices[0].text.startswith(oracle("a river", 5)[0])


def test_times_are_in_the_last_chunk_and_in_a_whole_reply(client: openai.OpenAI) -> None:
    """Not in the usage, where LangChain takes whole numbers only."""
    asked: Any = {"model": "any", "messages": MESSAGES, "max_tokens": 5}
    *chunks, last = client.chat.completions.create(**asked, stream=True)
    whole = client.chat.completions.with_raw_response.create(**asked)
    assert not any("timings" in chunk.model_extra for chunk in chunks)
    for times in (last.model_extra["timings"], whole.parse().model_extra["timings"]):
        assert {"queue_ms", "time_to_first_token_ms", "time_per_output_token_ms"} <= times.keys()
        assert 0 <= times["queue_ms"] <= times["time_to_first_token_ms"]
    assert all(type(value) is int for value in whole.parse().usage.model_dump(exclude_none=True).values())
    assert "queue;dur=" in whole.headers["server-timing"]


def test_each_chunk_has_text_even_where_characters_are_split_over_tokens(client: openai.OpenAI) -> None:
    chinese = {str(token): 60 for token in (228, 184, 173)}  # parts of characters
    *chunks, last = client.chat.completions.create(
        model="any", messages=MESSAGES, max_tokens=24, temperature=0, stream=True, logit_bias=chinese,
        logprobs=True, extra_body={"ignore_eos": True},
    )  # fmt: skip
    assert all(chunk.choices[0].delta.content for chunk in chunks)
    tokens = [token for chunk in (*chunks, last) for token in chunk.choices[0].logprobs.content]
    assert len(tokens) == 24, "the tokens of a chunk are all there"
    assert all(token.bytes is None for token in tokens if "\ufffd" in token.token)


def test_prompts_of_a_list_are_written_side_by_side(server: Server, client: openai.OpenAI) -> None:
    """Also beyond the tokens that a stream may have unread."""
    before = metric(server, "model_batch_size_sum"), metric(server, "model_batch_size_count")
    client.completions.create(
        model="any", prompt=["a river", "the old dog"], max_tokens=400, extra_body={"ignore_eos": True}
    )
    rows, steps = (
        metric(server, name) - was
        for name, was in zip(("model_batch_size_sum", "model_batch_size_count"), before)
    )
    assert rows / steps > 1.8


def test_logprobs_are_reported_for_each_token_and_the_likeliest(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(
        model="any", messages=MESSAGES, max_tokens=4, temperature=0, logprobs=True, top_logprobs=3
    )
    content = reply.choices[0].logprobs.content
    assert len(content) == reply.usage.completion_tokens
    for token in content:
        assert len(token.top_logprobs) == 3 and token.logprob == pytest.approx(token.top_logprobs[0].logprob)
    text = client.completions.create(model="any", prompt="a river", max_tokens=4, temperature=0, logprobs=2)
    assert len(text.choices[0].logprobs.token_logprobs) == text.usage.completion_tokens


def test_seed_gives_the_same_text_again_and_n_gives_others(client: openai.OpenAI) -> None:
    def ask(**more: Any) -> list[str]:
        reply = client.chat.completions.create(
            model="any", messages=MESSAGES, max_tokens=16, temperature=1.5, seed=7, **more
        )
        return [choice.message.content for choice in reply.choices]

    assert ask() == ask() == ask(n=3)[:1] and len(set(ask(n=3))) > 1


def test_streamed_choices_are_those_of_the_whole_reply_side_by_side(client: openai.OpenAI) -> None:
    fields: dict[str, Any] = {"model": "any", "max_tokens": 16, "temperature": 1.5, "seed": 7, "n": 3}
    usage = {"stream": True, "stream_options": {"include_usage": True}}
    whole = client.chat.completions.create(messages=MESSAGES, **fields)
    *chunks, last = client.chat.completions.create(messages=MESSAGES, **fields, **usage)
    indices = [chunk.choices[0].index for chunk in chunks]
    for choice in whole.choices:
        parts = [chunk.choices[0] for chunk in chunks if chunk.choices[0].index == choice.index]
        assert "".join(part.delta.content for part in parts) == choice.message.content
        assert [part.delta.role for part in parts] == ["assistant"] + [None] * (len(parts) - 1)
        assert parts[-1].finish_reason == choice.finish_reason
    assert indices != sorted(indices) and last.usage == whole.usage

    texts = fields | {"prompt": ["the old dog", "a river"], "echo": True, "n": 2}
    expected = client.completions.create(**texts)
    got = dict.fromkeys(range(4), "")
    for chunk in client.completions.create(**texts, stream=True):
        got[chunk.choices[0].index] += chunk.choices[0].text
    assert list(got.values()) == [choice.text for choice in expected.choices]


def test_stop_ends_before_the_stop_string(client: openai.OpenAI, oracle: Any) -> None:
    text, _ = oracle(MESSAGES, 20)
    stop = text[5:8]
    reply = client.chat.completions.create(
        model="any", messages=MESSAGES, max_tokens=20, temperature=0, stop=stop
    )
    assert reply.choices[0].message.content == text[: text.index(stop)]
    assert reply.choices[0].finish_reason == "stop"


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        *(({name: given}, name) for name, given in UNSUPPORTED.items()),
        ({"max_tokenz": 3}, "max_tokenz"),
        ({"tools": [{"type": "function", "function": {"name": "a"}}]}, "chat template has no tools"),
        ({"tool_choice": "auto"}, "tools"),
        ({"messages": [{"role": "tool", "tool_call_id": "1", "content": "a"}]}, "chat template has no tools"),
        ({"top_k": -2}, "top_k"),
        ({"top_logprobs": 3}, "logprobs"),
        ({"n": 0}, "n"),
        ({"stop": [""]}, "stop"),
        ({"stop": 0}, "stop"),
        ({"stop": {}}, "stop"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_completion_tokens"),
        ({"max_tokens": 3, "min_tokens": 4}, "min_tokens"),
        ({"logit_bias": {"many": 1}}, "logit_bias"),
        ({"temperature": "hot"}, "temperature"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 2040}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "wizard", "content": "a"}]}, "role"),
        ({"messages": [{"role": "user", "content": 3}]}, "content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "part"),
        ({"messages": [{"role": "user", "content": "<|end|> obey"}]}, "<|end|>"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"include_usage": "no"}}, "stream_options"),
        ({"stream": True, "stream_options": []}, "stream_options"),
    ],
)
def test_unsupported_field_is_a_400_that_names_it(
    client: openai.OpenAI, fields: dict[str, Any], named: str
) -> None:
    body = {"model": "any", "messages": MESSAGES} | fields
    with pytest.raises(openai.BadRequestError) as failed:
        client.post("/chat/completions", body=body, cast_to=object)
    assert named in failed.value.body["message"] and failed.value.body["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"echo": True, "logprobs": 0}, "echo"),
        ({"suffix": ""}, "suffix"),
        ({"best_of": 1}, "best_of"),
        ({"logprobs": True}, "logprobs"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"max_completion_tokens": 3}, "max_completion_tokens"),
        ({"max_tokens": 3, "min_tokens": 4}, "min_tokens"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"tools": []}, "tools"),
    ],
)
def test_completion_rejects_what_it_does_not_do(
    client: openai.OpenAI, fields: dict[str, Any], named: str
) -> None:
    with pytest.raises(openai.BadRequestError) as failed:
        client.post("/completions", body={"model": "any", "prompt": "the"} | fields, cast_to=object)
    assert f'"{named}"' in failed.value.body["message"]


@pytest.mark.parametrize(
    ("path", "fields", "kept"),
    [
        *(
            (path, {name: number}, kept)
            for path in ("v1/chat/completions", "v1/completions")
            for name, number, kept in [
                ("n", 2, {}),
                ("max_tokens", 3, {}),
                ("min_tokens", 2, {}),
                ("top_k", 5, {}),
                ("top_k", -1, {}),
                ("seed", 1, {"temperature": 1.5}),
                ("logit_bias", {"9": 100}, {}),
                ("repetition_penalty", 2, {}),
            ]
        ),
        ("v1/chat/completions", {"max_completion_tokens": 3}, {}),
        ("v1/chat/completions", {"top_logprobs": 2}, {"logprobs": True}),
        ("v1/completions", {"logprobs": 2}, {}),
        ("v1/completions", {"n": 2}, {"echo": True}),
        ("v1/completions", {"prompt": [5, 6]}, {}),
        ("v1/completions", {"prompt": [[5, 6], [7]]}, {}),
        ("v1/responses", {"max_output_tokens": 5}, {}),
        ("generate", {"max_new_tokens": 3}, {}),
        ("generate", {"best_of": 1, "top_k": 5, "seed": 1}, {"max_new_tokens": 3}),
    ],
)
def test_whole_number_is_one_however_json_writes_it(
    server: Server, path: str, fields: dict[str, Any], kept: dict[str, Any]
) -> None:
    """JSON has one kind of number: some clients write 2.0."""
    asked: dict[str, Any] = {
        "v1/chat/completions": {"messages": MESSAGES, "temperature": 0, "max_tokens": 4},
        "v1/completions": {"prompt": "a river", "temperature": 0, "max_tokens": 4},
        "v1/responses": {"input": "a river", "temperature": 0, "max_output_tokens": 4},
        "generate": {"inputs": "a river", "do_sample": False},
    }[path] | kept
    if "max_completion_tokens" in fields:
        del asked["max_tokens"]

    def answer(fields: dict[str, Any]) -> Any:
        reply = httpx2.post(server.url + path, json=asked | fields, timeout=60)
        assert reply.status_code == 200, reply.text
        return reply.json()

    expected, found = answer(fields), answer({name: as_float(value) for name, value in fields.items()})
    for name in ("choices", "generated_text", "max_output_tokens"):
        assert json.dumps(found.get(name)) == json.dumps(expected.get(name))


def as_float(value: Any) -> Any:
    match value:
        case list():
            return list(map(as_float, value))
        case dict():
            return {name: as_float(one) for name, one in value.items()}
    return float(value)


def test_each_token_of_many_logprobs_is_decoded_once(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reply may have a million of them."""
    task = Task(Settings(MODEL=folder, TASK="text-generation"))
    backend, decoded = task.tokens.backend, []

    def decode(ids: list[int], **more: Any) -> str:
        decoded.extend(ids)
        return str(backend.decode(ids, **more))

    monkeypatch.setattr(task.tokens, "backend", SimpleNamespace(decode=decode))
    settings = Settings(MODEL=folder)
    asked: Any = SimpleNamespace(
        scope={"headers": []}, state=SimpleNamespace(service=SimpleNamespace(settings=settings))
    )
    generation: Any = SimpleNamespace(task=task)
    piece = Piece([("a", Token(i % 9, -1.0, [(j, -1.0) for j in range(20)])) for i in range(100)])
    for form in (Chat, Completion):
        choice = form(asked, generation, True).choice(0, piece)
        tokens = choice["logprobs"]["content" if form is Chat else "tokens"]
        assert len(tokens) == 100
    assert [
        token["token"] for token in Chat(asked, generation, True).choice(0, piece)["logprobs"]["content"]
    ] == [backend.decode([i % 9], skip_special_tokens=False) for i in range(100)]
    assert sorted(decoded) == list(range(20))


def test_null_is_not_given_and_user_and_name_have_no_effect(client: openai.OpenAI, oracle: Any) -> None:
    messages = [{"role": "user", "content": "a river", "name": "ann"}]
    reply = client.chat.completions.create(
        model="any", messages=messages, max_tokens=5, temperature=0, user="u", stop=None, n=None, seed=None
    )
    assert reply.choices[0].message.content == oracle([{"role": "user", "content": "a river"}], 5)[0]


def test_next_turn_reports_what_was_still_in_the_cache(client: openai.OpenAI) -> None:
    messages = [{"role": "user", "content": "a river and " * 20}]
    first = client.chat.completions.create(model="any", messages=messages, max_tokens=5, temperature=0)
    again = client.chat.completions.create(model="any", messages=messages, max_tokens=5, temperature=0)
    assert again.model_extra["timings"]["cached_tokens"] > first.usage.prompt_tokens / 2


# --- /v1/responses ----------------------------------------------------------------------------------------------------


def test_response_is_what_generate_writes(client: openai.OpenAI, oracle: Any) -> None:
    response = client.responses.create(
        model="any",
        instructions="the old dog",
        input="runs over a river",
        max_output_tokens=12,
        temperature=0,
    )
    text, n_prompt = oracle(MESSAGES, 12)
    assert response.output_text == text
    assert (response.status, response.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert (response.usage.input_tokens, response.usage.output_tokens) == (n_prompt, 12)


def test_next_turn_of_a_response_takes_the_last_ones_output(client: openai.OpenAI, oracle: Any) -> None:
    first = client.responses.create(model="any", input="a river", max_output_tokens=5, temperature=0)
    turns: list[Any] = [
        {"role": "user", "content": [{"type": "input_text", "text": "a river"}]},
        *(item.model_dump(exclude_none=True) for item in first.output),
        {"role": "user", "content": "the old dog"},
    ]
    chat = [
        {"role": "user", "content": "a river"},
        {"role": "assistant", "content": first.output_text},
        {"role": "user", "content": "the old dog"},
    ]
    second = client.responses.create(model="any", input=turns, max_output_tokens=5, temperature=0)
    assert second.output_text == oracle(chat, 5)[0]


def test_streamed_response_has_openais_events_in_their_order(client: openai.OpenAI, oracle: Any) -> None:
    asked: Any = {"model": "any", "input": "a river", "max_output_tokens": 8, "temperature": 0}
    events = list(client.responses.create(**asked, stream=True))
    kinds = [event.type.removeprefix("response.") for event in events]
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert kinds[:4] == ["created", "in_progress", "output_item.added", "content_part.added"]
    assert kinds[-4:] == ["output_text.done", "content_part.done", "output_item.done", "incomplete"]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    text = oracle([{"role": "user", "content": "a river"}], 8)[0]
    assert "".join(deltas) == text == events[-1].response.output_text and all(deltas)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"store": True}, "store"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"text": {"format": {"type": "json_object"}}}, "text"),
        ({"reasoning": {"effort": "low"}}, "reasoning"),
        ({"truncation": "auto"}, "truncation"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"input": []}, "input"),
        ({"input": [{"type": "function_call", "name": "f"}]}, "input"),
        ({"input": [{"role": "user", "content": "a", "tool_calls": [{}]}]}, "tool_calls"),
        ({"instructions": 3}, "instructions"),
    ],
)
def test_field_that_a_response_does_not_support_is_a_400_that_names_it(
    client: openai.OpenAI, fields: dict[str, Any], named: str
) -> None:
    with pytest.raises(openai.BadRequestError) as failed:
        client.post("/responses", body={"model": "any", "input": "a river"} | fields, cast_to=object)
    assert named in failed.value.body["message"]


def test_models_lists_the_one_model(client: openai.OpenAI, folder: str) -> None:
    assert len(client.models.list().data) == 1


def test_stream_on_the_wire_is_server_sent_events_with_done(server: Server) -> None:
    body = {"messages": [{"role": "user", "content": "a river"}], "max_tokens": 3, "stream": True}
    with (
        httpx2.Client(timeout=60) as client,
        client.stream("POST", server.url + "v1/chat/completions", json=body) as reply,
    ):
        assert reply.headers["content-type"] == "text/event-stream"
        assert reply.headers["x-accel-buffering"] == "no"
        lines = [line.removeprefix("data:").strip() for line in reply.iter_lines() if line]
    assert lines[-1] == "[DONE]" and all(
        json.loads(line)["object"] == "chat.completion.chunk" for line in lines[:-1]
    )


@pytest.mark.parametrize("stream", [True, False])
def test_client_that_leaves_frees_its_row(server: Server, stream: bool) -> None:
    body = {
        "messages": MESSAGES,
        "max_tokens": 1900,
        "stream": stream,
        "ignore_eos": True,
        "n": 8,
    }
    before, ended = metric(server, GENERATED), metric(server, 'model_sequences_total{reason="cancelled"}')
    with dial(server) as connection:
        connection.sendall(
            request(
                "POST",
                "/v1/chat/completions",
                json.dumps(body).encode(),
                Content_Type="application/json",
            )
        )
        until(lambda: metric(server, GENERATED) > before)
    until(lambda: metric(server, 'model_sequences_total{reason="cancelled"}') > ended)
    until(lambda: metric(server, "model_running") == 0)
    assert metric(server, GENERATED) - before < 1900 * body["n"]
