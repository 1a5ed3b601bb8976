"""Text generation through the real server: POST / whole and streamed, admission, clients that leave, stopping, keys."""

import contextlib
import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from huggingface_hub import InferenceClient

from loadtests.modes import MODES, Server, start
from tests.support.client import Crowd, get, metric, post, post_json, until
from workers.errors import Unprocessable
from workers.settings import Settings
from workers.tasks import text_generation

PARIS = "the old dog runs over"
SHORT = "e"  # a prompt whose text ends by itself
FORM = ("return_full_text", "details", "stream")  # change the answer's form, not its text
LONG = {"ignore_eos": True, "max_new_tokens": 40}
# Of drawn tokens only one is left to draw, as no two programs draw alike.
DRAWN = {"do_sample": True, "seed": 5}
# What a client may set; the first of each is what changes the text, or its form.
PARAMETERS: list[dict[str, Any]] = [
    {"max_new_tokens": 5},
    {"min_new_tokens": 20, "max_new_tokens": 20},
    {"ignore_eos": True, "max_new_tokens": 20},
    {"repetition_penalty": 1.5, **LONG},
    {"frequency_penalty": 2.0, **LONG},
    {"presence_penalty": 2.0, **LONG},
    {"stop": ["q", "x"]},
    {"stop_sequences": ["x", "q"]},
    {"return_full_text": False},
    {"details": True},
    {"stream": True},
    {"top_k": 1, **DRAWN},
    {"top_p": 1e-6, **DRAWN},
    {"min_p": 1.0, **DRAWN},
    {"temperature": 1e-6, **DRAWN},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    from tests.support.small_language_models import save

    return save(tmp_path_factory.mktemp("model"), max_position_embeddings=2048)


def served(folder: str, **settings: str) -> dict[str, str]:
    return {
        "MODEL": folder,
        "TASK": "text-generation",
        "TORCH_THREADS": "1",
        "KV_CACHE_MB": "20",
        "DEADLINE_S": "60",
        "BODY_TIMEOUT_S": "2",
        **settings,
    }


@pytest.fixture(scope="module", params=["thread", "process"])
def server(request: pytest.FixtureRequest, folder: str) -> Iterator[Server]:
    with start(MODES[request.param], served(folder)) as server:
        yield server


@pytest.fixture(scope="module")
def oracle(folder: str) -> Any:
    """The text that `generate` gives."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)

    def text(prompt: str, n: int) -> str:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        with torch.inference_mode():
            out = model.generate(ids, max_new_tokens=n, do_sample=False, attention_mask=torch.ones_like(ids))
        return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)

    return text


def events(server: Server, prompt: Any, **parameters: Any) -> list[dict[str, Any]]:
    body = {"inputs": prompt, "parameters": parameters, "stream": True}
    with httpx2.Client(timeout=60) as client, client.stream("POST", server.url, json=body) as reply:
        assert reply.status_code == 200, reply.read()
        assert reply.headers["content-type"] == "text/event-stream"
        return [json.loads(line[5:]) for line in reply.iter_lines() if line]


def test_answer_is_that_of_generate_and_has_the_form_of_the_pipeline(server: Server, oracle: Any) -> None:
    reply = post_json(server, {"inputs": PARIS, "parameters": {"max_new_tokens": 12}})
    assert reply.status == 200
    assert reply.json == [{"generated_text": PARIS + oracle(PARIS, 12)}]
    assert "queue;dur=" in reply.headers["server-timing"]
    raw = post(server, PARIS)
    assert raw.json[0]["generated_text"].startswith(reply.json[0]["generated_text"])


class Penalties:
    """OpenAI's frequency and presence penalties as a logits processor of Transformers, which has none."""

    def __init__(self, prompt: int, frequency: float, presence: float) -> None:
        self.prompt, self.frequency, self.presence = prompt, frequency, presence

    def __call__(self, ids: Any, scores: Any) -> Any:
        counts = ids[0, self.prompt :].bincount(minlength=scores.shape[-1])
        return scores - self.frequency * counts - self.presence * (counts > 0)


@pytest.fixture(scope="module")
def generate(folder: str) -> Any:
    """The text that `generate` gives with these parameters, its tokens and their logprobs."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)

    def answer(
        prompt: str,
        stop: list[str],
        ignore_eos: bool = False,
        seed: int = 0,
        frequency_penalty: float = 0.0,
        presence_penalty: float = 0.0,
        **parameters: Any,
    ) -> tuple[str, list[int], list[float]]:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        parameters = {"do_sample": False, "max_new_tokens": 256, **parameters}
        if stop:
            parameters |= {"stop_strings": stop, "tokenizer": tokenizer}
        if ignore_eos:
            parameters["eos_token_id"] = -1
        penalties = [Penalties(ids.shape[1], frequency_penalty, presence_penalty)]
        with torch.inference_mode():
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                logits_processor=penalties,
                output_logits=True,
                return_dict_in_generate=True,
                **parameters,
            )
        new = out.sequences[0, ids.shape[1] :].tolist()
        logprobs = [
            logits[0].log_softmax(-1)[token].item() for logits, token in zip(out.logits, new, strict=True)
        ]
        text = tokenizer.decode(new, skip_special_tokens=True)
        return min((text.partition(one)[0] for one in stop), key=len, default=text), new, logprobs

    return answer


def text_of(generate: Any, parameters: dict[str, Any]) -> Any:
    """What `generate` gives for the short prompt with what of these it knows."""
    known = {name: value for name, value in parameters.items() if name not in FORM}
    stop = known.pop("stop", None) or known.pop("stop_sequences", [])
    return generate(SHORT, stop, **known)


@pytest.mark.filterwarnings("ignore")  # Transformers' own
@pytest.mark.parametrize("parameters", PARAMETERS, ids=lambda parameters: next(iter(parameters)))
def test_parameter_changes_the_text_to_that_of_generate(
    server: Server, generate: Any, parameters: dict[str, Any]
) -> None:
    name, *others = parameters
    text, tokens, logprobs = text_of(generate, parameters)
    if name not in FORM and "do_sample" not in parameters:
        assert text != text_of(generate, {other: parameters[other] for other in others})[0]
    if name == "stream":
        found = events(server, SHORT)
        assert found[-1]["generated_text"] == text
        assert [event["token"]["id"] for event in found] == tokens
        return
    (answer,) = post_json(server, {"inputs": SHORT, "parameters": parameters}).json
    assert answer["generated_text"] == (text if name in FORM else SHORT + text)
    if name == "details":
        shown = answer["details"]["tokens"]
        assert [token["id"] for token in shown] == tokens
        assert [token["logprob"] for token in shown] == pytest.approx(logprobs, abs=1e-3)


def test_list_of_prompts_gets_a_list_of_answers(server: Server, oracle: Any) -> None:
    asked = [PARIS, "a river", "Caf\u00e9 \u4e2d"]
    reply = post_json(
        server, {"inputs": asked, "parameters": {"max_new_tokens": 9, "return_full_text": False}}
    )
    assert reply.json == [[{"generated_text": oracle(prompt, 9)}] for prompt in asked]


def test_chat_is_one_input_and_gets_what_the_pipeline_gives(server: Server, folder: str) -> None:
    import transformers

    pipe = transformers.pipeline("text-generation", model=folder, device="cpu", dtype="float32")
    chat = [{"role": "system", "content": "a river"}, {"role": "user", "content": PARIS}]
    for more in ({}, {"return_full_text": False}):
        expected = pipe(chat, max_new_tokens=9, do_sample=False, **more)
        parameters = {"max_new_tokens": 9, **more}
        assert post_json(server, {"inputs": chat, "parameters": parameters}).json == expected
        both = post_json(server, {"inputs": [chat, chat[1:]], "parameters": parameters}).json
        assert both[0] == expected and len(both) == 2 and both[1] != expected
    streamed = events(server, chat, max_new_tokens=9)
    assert streamed[-1]["generated_text"] == expected[0]["generated_text"]


@pytest.mark.parametrize(
    ("inputs", "sentence"),
    [
        ([{"role": "user"}], 'each message of a chat must be {"role"'),
        (
            [{"role": "user", "content": [{"type": "text", "text": "a"}]}],
            '"content" of a message must be a text',
        ),
        ([{"role": "user<|end|>", "content": "a"}], "roles are system, user, assistant"),
        ([{"role": [], "content": "a"}], "roles are system, user, assistant"),
        ([{"role": "assistant", "content": "a"}], "must be one to answer"),
        ([[]], "must be one to answer"),
        ([[{"role": "user", "content": "a"}, "b"]], "each message of a chat must be"),
    ],
)
def test_what_is_not_a_chat_is_malformed(server: Server, inputs: Any, sentence: str) -> None:
    reply = post_json(server, {"inputs": inputs})
    assert reply.status == 400 and sentence in reply.json["error"]


class Seen:
    """A tokenizer that knows how long the texts were that it was given."""

    def __init__(self, backend: Any) -> None:
        self.backend, self.lengths = backend, []

    def __getattr__(self, name: str) -> Any:
        method = getattr(self.backend, name)
        if not name.startswith("encode"):
            return method

        def encode(texts: Any, **more: Any) -> Any:
            self.lengths += map(len, [texts] if isinstance(texts, str) else texts)
            return method(texts, **more)

        return encode


@pytest.mark.parametrize("text", ["." * 900_000, "the old dog " * 75_000], ids=["dots", "words"])
def test_long_prompt_is_rejected_before_all_of_it_is_tokenised(folder: str, text: str) -> None:
    """Tokenising a megabyte takes seconds, and a chat's kept the interpreter meanwhile: nobody else had an answer."""
    task = text_generation.Task(Settings(MODEL=folder, TASK="text-generation"))
    task.read_chat_template()
    task.tokens.backend = seen = Seen(task.tokens.backend)
    for inputs in (text, [{"role": "user", "content": text}]):
        with pytest.raises(Unprocessable, match="the prompt has more than 1024 tokens"):
            task.check(inputs, {})
    assert 0 < max(seen.lengths) < 40_000


def test_openai_forms_reject_long_prompts_with_400(server: Server) -> None:
    text = "the old dog " * 75_000
    for path, content in (
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": text}]}),
        ("/v1/completions", {"prompt": text}),
    ):
        reply = httpx2.post(server.url.rstrip("/") + path, json=content, timeout=60)
        assert reply.status_code == 400 and "more than 1024 tokens" in reply.json()["error"]["message"]


def test_stream_has_the_same_text_token_by_token(server: Server, oracle: Any) -> None:
    found = events(server, PARIS, max_new_tokens=12)
    assert "".join(event["token"]["text"] for event in found) == oracle(PARIS, 12)
    assert [event["index"] for event in found] == list(range(len(found)))
    assert [event["generated_text"] for event in found[:-1]] == [None] * (len(found) - 1)
    assert found[-1]["generated_text"] == oracle(PARIS, 12)
    assert found[-1]["details"]["generated_tokens"] == len(found)


@pytest.mark.parametrize("path", ["", "/hf-inference"])
def test_real_client_gets_text_details_and_stream(server: Server, oracle: Any, path: str) -> None:
    client = InferenceClient(server.url.rstrip("/") + path)
    assert client.text_generation(PARIS, max_new_tokens=8) == PARIS + oracle(PARIS, 8)
    whole = client.text_generation(PARIS, max_new_tokens=8, details=True)
    assert whole.generated_text == oracle(PARIS, 8)
    assert whole.details.finish_reason in ("length", "eos_token")
    assert whole.details.generated_tokens == len(whole.details.tokens)
    assert "".join(client.text_generation(PARIS, max_new_tokens=8, stream=True)) == oracle(PARIS, 8)


@pytest.mark.parametrize("path", ["", "/hf-inference"])
def test_real_client_chats_whole_and_streamed(server: Server, path: str) -> None:
    client = InferenceClient(server.url.rstrip("/") + path)
    messages = [{"role": "user", "content": "a river"}]
    whole = client.chat_completion(messages, max_tokens=6, temperature=0).choices[0].message.content
    stream = client.chat_completion(messages, max_tokens=6, temperature=0, stream=True)
    assert whole and "".join(chunk.choices[0].delta.content or "" for chunk in stream) == whole


def test_generate_and_generate_stream_answer_as_text_generation_inference_does(
    server: Server, oracle: Any
) -> None:
    nothing = {"watermark": False, "decoder_input_details": False, "best_of": 1, "stop": []}
    body = {"inputs": PARIS, "parameters": {"max_new_tokens": 8, "details": True, **nothing}}
    with httpx2.Client(timeout=60, base_url=server.url) as client:
        reply = client.post("/generate", json=body).json()
        assert reply["generated_text"] == oracle(PARIS, 8) and reply["details"]["generated_tokens"] == 8
        stream = client.post("/generate_stream", json=body)
        found = [json.loads(line[5:]) for line in stream.text.splitlines() if line]
        assert found[-1]["generated_text"] == oracle(PARIS, 8) and len(found) == 8
        for wrong, named in (({"watermark": True}, "watermark"), ({"stream": True}, "stream")):
            refused = client.post("/generate", json={"inputs": PARIS, "parameters": wrong})
            assert refused.status_code in (400, 422) and named in refused.json()["error"]
            assert refused.json()["error_type"] == "validation"


def test_stop_string_ends_the_text_before_it(server: Server, oracle: Any) -> None:
    text = oracle(PARIS, 40)
    stop = text[10:13]
    (answer,) = post_json(
        server, {"inputs": PARIS, "parameters": {"max_new_tokens": 40, "stop": [stop], "details": True}}
    ).json
    assert answer["generated_text"] == text[: text.index(stop)]
    assert answer["details"]["finish_reason"] == "stop_sequence"


def test_many_at_once_get_their_own_texts(server: Server, oracle: Any, crowd: Crowd) -> None:
    asked = [f"{PARIS} {n} river" for n in range(40)]
    bodies = [json.dumps({"inputs": one, "parameters": {"max_new_tokens": 10}}) for one in asked]
    replies = crowd.post(server, *bodies, Content_Type="application/json")
    for one, reply in zip(asked, replies, strict=True):
        assert reply.result().json == [{"generated_text": one + oracle(one, 10)}]


@pytest.mark.parametrize(
    ("parameters", "status", "sentence"),
    [
        ({"max_new_tokens": 0}, 400, "max_new_tokens"),
        ({"max_new_tokens": 1020}, 422, "of at most 1024 together"),
        ({"temperature": -1}, 400, "temperature"),
        ({"top_p": 0}, 400, "top_p"),
        ({"stop": [""]}, 400, "stop"),
        ({"custom_generate": "somebody/code"}, 400, "not a known field"),
    ],
)
def test_parameter_that_cannot_be_is_named(
    server: Server, parameters: dict[str, Any], status: int, sentence: str
) -> None:
    reply = post_json(server, {"inputs": PARIS, "parameters": parameters})
    assert (reply.status, sentence in reply.error) == (status, True), reply


def test_prompt_that_never_fits_is_rejected_with_the_limit(server: Server) -> None:
    reply = post(server, "river " * 20_000)
    assert reply.status == 422
    assert "at most 1024" in reply.error


@pytest.mark.parametrize("text", ["", " \n", "half a character: \ud83d", 7, None])
def test_prompt_without_a_text_is_rejected_before_the_queue(server: Server, text: Any) -> None:
    reply = post_json(server, {"inputs": text})
    assert reply.status == 400 and reply.error, reply
    assert "server-timing" not in reply.headers


def test_client_that_leaves_frees_its_slot(server: Server) -> None:
    for body in ({"stream": True}, {}):
        cancelled = metric(server, 'model_sequences_total{reason="cancelled"}')
        asked = {"inputs": PARIS, "parameters": {"max_new_tokens": 1000, "ignore_eos": True}, **body}
        with contextlib.suppress(httpx2.TimeoutException), httpx2.Client(timeout=1) as client:
            if body:
                with client.stream("POST", server.url, json=asked) as reply:
                    next(reply.iter_lines())
            else:
                client.post(server.url, json=asked)
        until(lambda: get(server, "/health").json["running"] == 0, 10)
        assert metric(server, 'model_sequences_total{reason="cancelled"}') in (cancelled, cancelled + 1)


def test_metrics_count_tokens_and_why_sequences_ended(server: Server) -> None:
    before = metric(server, 'model_tokens_total{kind="generated"}')
    events(server, PARIS, max_new_tokens=7, ignore_eos=True)
    assert metric(server, 'model_tokens_total{kind="generated"}') == before + 7
    assert metric(server, 'model_sequences_total{reason="length"}') >= 1
    assert metric(server, "model_time_to_first_token_seconds_count") >= 1
    assert get(server, "/live").status == 200


STOPPING = [
    "thread",
    *(
        pytest.param(name, marks=pytest.mark.slow)
        for name in ("process", "recommended", "asgi", "gthread-1x8", "haproxy-2")
    ),
]


@pytest.mark.parametrize("mode", STOPPING)
def test_stopping_ends_a_stream_with_its_end_or_an_error_event(folder: str, mode: str) -> None:
    with start(MODES[mode], served(folder, GRACE_S="3")) as server:
        body = {"inputs": PARIS, "parameters": {"max_new_tokens": 1000, "ignore_eos": True}, "stream": True}
        with httpx2.Client(timeout=60) as client, client.stream("POST", server.url, json=body) as reply:
            lines = reply.iter_lines()
            next(lines)
            server.process.send_signal(signal.SIGTERM)
            began = time.monotonic()
            found = [json.loads(line[5:]) for line in lines if line]
        assert time.monotonic() - began < 30
        assert "error" in found[-1] or found[-1]["details"]


def test_model_process_that_is_killed_ends_its_texts_with_an_error_and_those_that_wait_are_answered(
    folder: str, oracle: Any, crowd: Crowd
) -> None:
    with start(MODES["process"], served(folder, MAX_SEQUENCES="1")) as server:
        long = {"inputs": PARIS, "parameters": {"max_new_tokens": 1000, "ignore_eos": True}, "stream": True}
        short = json.dumps({"inputs": PARIS, "parameters": {"max_new_tokens": 8}})
        with httpx2.Client(timeout=60) as client, client.stream("POST", server.url, json=long) as reply:
            lines = reply.iter_lines()
            next(lines)
            (waiting,) = crowd.post(server, short, Content_Type="application/json")
            until(lambda: metric(server, "model_queue_depth") == 1)
            (model,) = (p for p in server.processes() if "workers.isolation.process" in " ".join(p.cmdline()))
            model.kill()
            found = [json.loads(line[5:]) for line in lines if line]
        assert "error" in found[-1]
        assert waiting.result().json == [{"generated_text": PARIS + oracle(PARIS, 8)}]
        assert metric(server, 'model_sequences_total{reason="failed"}') == 1
        assert metric(server, "model_process_restarts_total") == 1


@pytest.mark.slow
def test_next_turn_after_the_model_process_was_killed_idle_reads_its_prompt_again(folder: str) -> None:
    with start(MODES["process"], served(folder)) as server:
        first = {"inputs": PARIS + " a river" * 20, "parameters": {"max_new_tokens": 5}}
        (answer,) = post_json(server, first).json
        second = {**first, "inputs": answer["generated_text"] + " and then"}
        (model,) = (p for p in server.processes() if "workers.isolation.process" in " ".join(p.cmdline()))
        model.kill()
        until(lambda: metric(server, "model_process_restarts_total") == 1)
        (cold,) = post_json(server, second).json
        assert metric(server, 'model_tokens_total{kind="reused"}') == 0
        (warm,) = post_json(server, second).json
        assert metric(server, 'model_tokens_total{kind="reused"}') > 20
        assert cold == warm


def test_chat_does_not_begin_in_what_another_key_left(folder: str) -> None:
    with start(MODES["thread"], served(folder, API_KEY="one,two", METRICS_OPEN="1")) as server:
        first = {"inputs": PARIS + " a river" * 20, "parameters": {"max_new_tokens": 5}}

        def reused() -> float:
            return metric(server, 'model_tokens_total{kind="reused"}')

        (answer,) = post_json(server, first, Authorization="Bearer one").json
        second = {**first, "inputs": answer["generated_text"] + " and then"}
        post_json(server, second, Authorization="Bearer two")
        assert reused() == 0
        (warm,) = post_json(server, second, Authorization="Bearer one").json
        assert reused() > 20
        (cold,) = post_json(server, second, X_API_Key="two").json
        assert warm == cold


@pytest.mark.parametrize(("family", "sentence"), [("mamba", "FAST=0"), ("t5", "encoder")])
def test_model_that_the_token_loop_cannot_serve_is_rejected_at_the_start(
    tmp_path: Path, family: str, sentence: str
) -> None:
    from tests.support.small_language_models import make_tokenizer
    from workers import tasks
    from workers.settings import Settings

    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": family, "is_encoder_decoder": family == "t5"})
    )
    make_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=sentence):
        tasks.make(Settings(MODEL=str(tmp_path), TASK="text-generation"))
