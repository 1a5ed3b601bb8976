"""What is told of a request: a line of JSON, a span. Never what was asked; nothing where nobody asked for it."""

import asyncio
import json
import logging
import sys
from types import SimpleNamespace
from typing import Any

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF
from opentelemetry.semconv._incubating.attributes import gen_ai_attributes as conventions

from loadtests.modes import MODES, start
from tests.support.client import POISON, post, post_json, request, say
from workers.context import context_of
from workers.generation.steps import Options
from workers.generation.stream import Generated
from workers.jobs import Answer
from workers.observability import leave_out_polls
from workers.observability.request_log import REJECTIONS_PER_S, Json, RequestLog, logged
from workers.observability.tracing import Traces, traced
from workers.settings import Settings

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
ANSWERS = [Answer("a", 0.1, 0.2, 4, "empty"), Answer("b", 0.5, 0.25, 8, "full")]
TEXTS = [
    Answer("a", 0.1, 0.2, 4, "stop", Generated(30, 5, 0.15, "stop", Options(64, temperature=0.5))),
    Answer("b", 0.1, 0.9, 4, "length", Generated(40, 64, 0.25, "length", Options(64, temperature=0.5))),
]


class App:
    """Replies with `status`; the model has answered `ANSWERS` where that is 200."""

    status = 200
    answers = ANSWERS

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        context = context_of(scope)
        context.request_id = "an-id"
        context.route = "/" if scope["path"] == "/" else ""
        if self.status == 200:
            context.answers = self.answers
        if self.status:
            await send({"type": "http.response.start", "status": self.status, "headers": []})
            await send({"type": "http.response.body", "body": b"the answer"})


def ask(app: Any, path: str = "/", method: str = "POST", **headers: str) -> list[Any]:
    """What it sends."""
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "method": method,
        "path": path,
        "headers": [(k.encode(), v.encode()) for k, v in headers.items()],
        "state": {"service": SimpleNamespace(settings=Settings(MODEL="a-model"))},
    }
    asyncio.run(app(scope, None, send))
    return sent


def line(record: logging.LogRecord) -> Any:
    return json.loads(Json().format(record))


# --- nobody asked -----------------------------------------------------------------------------------------------------


def test_every_logger_writes_json(monkeypatch: pytest.MonkeyPatch) -> None:
    last = logging.StreamHandler()
    monkeypatch.setattr(logging, "lastResort", last)
    logged(App(), Settings(LOG_FORMAT="json"))
    assert isinstance(last.formatter, Json)


@pytest.mark.parametrize("name", ["uvicorn.access", "gunicorn.access"])
def test_polls_of_an_open_page_have_no_access_line(name: str) -> None:
    leave_out_polls()
    leave_out_polls()

    def has_line(method: str, path: str) -> bool:
        args: Any = ("127.0.0.1", method, path, "1.1", 200)
        if name == "gunicorn.access":
            args = ({"m": method, "U": path, "s": 200},)
        record = logging.LogRecord(name, logging.INFO, "", 0, "a line", args, None)
        return bool(logging.getLogger(name).filter(record))

    assert not has_line("GET", "/live") and not has_line("GET", "/prefix/live?a")
    assert has_line("POST", "/") and has_line("POST", "/live") and has_line("GET", "/health")


def test_by_default_the_app_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    app = App()
    assert logged(traced(app), Settings()) is app
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:4318")
    for name, value in (("OTEL_SDK_DISABLED", "true"), ("OTEL_TRACES_EXPORTER", "none")):
        with monkeypatch.context() as context:
            context.setenv(name, value)
            assert traced(app) is app


@pytest.mark.parametrize(
    ("env", "sentence"),
    [
        ({"OTEL_TRACES_EXPORTER": "zipkin"}, "otlp, console or none"),
        ({"OTEL_TRACES_EXPORTER": "otlp", "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, "http/protobuf"),
        ({"OTEL_TRACES_EXPORTER": "otlp"}, "pip install -r requirements-optional.txt"),
    ],
)
def test_traces_that_cannot_be_had_end_the_start_with_one_sentence(
    env: dict[str, str], sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)  # as if it were not installed
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit, match=sentence):
        traced(App())


# --- the log ----------------------------------------------------------------------------------------------------------


def test_request_is_a_line_that_says_where_its_time_went(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        sent = ask(RequestLog(App()))
    assert [message["type"] for message in sent] == ["http.response.start", "http.response.body"]
    (told,) = map(line, caplog.records)
    assert told.pop("ms") >= 0 and told.pop("time").endswith("+00:00")
    assert told == {
        "level": "INFO",
        "message": "request",
        "id": "an-id",
        "method": "POST",
        "path": "/",
        "status": 200,
        "inputs": 2,
        "queue_ms": 500.0,
        "model_ms": 250.0,
        "batch_size": 8,
        "dispatched_because": "full",
    }


def test_line_of_generated_texts_counts_tokens_and_says_why_they_ended(
    caplog: pytest.LogCaptureFixture,
) -> None:
    app = App()
    app.answers = TEXTS
    with caplog.at_level("INFO"):
        ask(RequestLog(app))
    (told,) = map(line, caplog.records)
    names = ("prompt_tokens", "generated_tokens", "first_token_ms", "finish_reason")
    assert [told[name] for name in names] == [70, 69, 250.0, "length"]


def test_probe_has_no_line_unless_it_fails(caplog: pytest.LogCaptureFixture) -> None:
    app = App()
    with caplog.at_level("INFO"):
        ask(RequestLog(app), "/ready", "GET")
        app.status = 503
        ask(RequestLog(app), "/ready", "GET")
    assert [line(record)["status"] for record in caplog.records] == [503]


def test_many_rejections_are_sampled_and_answers_are_not(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr("workers.observability.request_log.time.monotonic", lambda: now)
    app = App()
    log = RequestLog(app)
    with caplog.at_level("INFO"):
        app.status = 503
        for _ in range(50):
            ask(log)
        app.status = 200
        ask(log)
        app.status, now = 503, 101.0
        ask(log)
    told = [line(record) for record in caplog.records]
    assert [one["status"] for one in told] == [503] * REJECTIONS_PER_S + [200, 503]
    assert [one["unlogged"] for one in told if "unlogged" in one] == [50 - REJECTIONS_PER_S]


def test_line_is_one_line_whatever_the_client_puts_into_it(caplog: pytest.LogCaptureFixture) -> None:
    app = App()
    app.status = 404
    with caplog.at_level("INFO"):
        ask(RequestLog(app), '/\n{"level":"forged"}\u2028\x85\x9b31m')
    said = Json().format(caplog.records[0])
    assert said.isascii() and said.isprintable()


def test_failure_is_a_line_with_its_traceback() -> None:
    try:
        raise KeyError("why")
    except KeyError:
        record = logging.getLogger().makeRecord("x", 40, "f", 1, "request %s failed", ("7",), sys.exc_info())
    assert line(record)["message"] == "request 7 failed" and "KeyError: 'why'" in line(record)["exception"]


# --- the traces -------------------------------------------------------------------------------------------------------


def spans(app: Any, sampler: Any = None, path: str = "/", **headers: str) -> dict[str, Any]:
    """The spans of a request, by name."""
    kept = InMemorySpanExporter()
    provider = TracerProvider(sampler=sampler)
    provider.add_span_processor(SimpleSpanProcessor(kept))
    ask(Traces(app, provider), path, **headers)
    return {span.name: span for span in kept.get_finished_spans()}


def test_request_is_a_span_with_its_time_in_queue_and_model() -> None:
    found = spans(App())
    assert found.keys() == {"POST /", "queue", "model"}
    root, queue, model = found["POST /"], found["queue"], found["model"]
    assert root.attributes["http.response.status_code"] == 200
    assert root.attributes["request.id"] == "an-id" and root.attributes["model.inputs"] == 2
    assert model.attributes == {"model.batch_size": 8, "model.batch_dispatched_because": "full"}
    assert {span.parent.span_id for span in (queue, model)} == {root.context.span_id}
    assert queue.end_time == model.start_time
    assert (queue.end_time - queue.start_time, model.end_time - model.start_time) == (500e6, 250e6)


def test_span_of_generated_texts_has_the_attributes_of_the_conventions() -> None:
    app = App()
    app.answers = TEXTS
    found = spans(app)["POST /"].attributes
    assert {name: value for name, value in found.items() if name.startswith("gen_ai.")} == {
        conventions.GEN_AI_OPERATION_NAME: "text_completion",
        conventions.GEN_AI_REQUEST_MODEL: "a-model",
        conventions.GEN_AI_RESPONSE_MODEL: "a-model",
        conventions.GEN_AI_REQUEST_MAX_TOKENS: 64,
        conventions.GEN_AI_REQUEST_TEMPERATURE: 0.5,
        conventions.GEN_AI_REQUEST_TOP_P: 1.0,
        conventions.GEN_AI_USAGE_INPUT_TOKENS: 70,
        conventions.GEN_AI_USAGE_OUTPUT_TOKENS: 69,
        conventions.GEN_AI_RESPONSE_FINISH_REASONS: ("stop", "length"),
        conventions.GEN_AI_RESPONSE_TIME_TO_FIRST_CHUNK: 0.25,
    }


def test_clients_trace_goes_on() -> None:
    root = spans(App(), traceparent=PARENT)["POST /"]
    assert f"{root.context.trace_id:032x}" == PARENT.split("-")[1]
    assert f"{root.parent.span_id:016x}" == PARENT.split("-")[2]
    assert spans(App(), traceparent="nonsense")["POST /"].parent is None


def test_what_a_client_sends_for_a_trace_is_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    assert spans(App(), traceparent=PARENT, tracestate="secret = ?")["POST /"].parent
    assert spans(App(), traceparent="0" * 1000)["POST /"].parent is None
    assert not caplog.records


@pytest.mark.parametrize(("status", "failed"), [(503, True), (422, False), (404, False), (0, True)])
def test_request_without_an_answer_is_a_span_all_the_same(status: int, failed: bool) -> None:
    app = App()
    app.status = status
    found = spans(app)
    assert found.keys() == {"POST /"}
    assert found["POST /"].status.is_ok is not failed


def test_nobody_can_invent_names_of_spans() -> None:
    assert spans(App(), path="/" + "x" * 10_000).keys() == {"POST", "queue", "model"}


def test_what_is_not_in_the_sample_leaves_no_span() -> None:
    assert spans(App(), ALWAYS_OFF) == {}


# --- a server ---------------------------------------------------------------------------------------------------------


def test_server_tells_of_every_request_and_never_its_text() -> None:
    env = {
        "MODEL": "tests.support.fake_models:FillMask",
        "LOG_FORMAT": "json",
        "OTEL_TRACES_EXPORTER": "console",
        "OTEL_BSP_SCHEDULE_DELAY": "60000",
    }
    secret = "a secret [MASK]"
    with start(MODES["thread"], env) as server:
        assert post(server, secret, traceparent=PARENT, X_Request_ID="mine").status == 200
        assert post_json(server, {"inputs": [secret, secret]}).status == 200
        body = json.dumps({"inputs": [secret, secret]}).encode()
        said = request("POST", "/", body, Content_Type="application/json", Accept="application/x-ndjson")
        assert say(server, said).status == 200
        assert post(server, "no secret").status == 422
        assert post(server, f"secret {POISON}").status == 500
        server.process.terminate()
        server.process.wait()
        text = server.log()
    assert "secret" not in text
    told = [json.loads(one) for one in text.splitlines() if one.startswith('{"time"')]
    # On a slow machine `start` has asked /ready too early, and been told so.
    requests = [one for one in told if one["message"] == "request" and one["path"] != "/ready"]
    # A reply is there a little before its line.
    assert sorted(one["status"] for one in requests) == [200, 200, 200, 422, 500]
    assert sorted(one["inputs"] for one in requests if "inputs" in one) == [1, 2, 2]
    (mine,) = (one for one in requests if one["id"] == "mine")
    assert mine["trace_id"] == PARENT.split("-")[1]
    assert any("exception" in one for one in told) and any("Serving" in one["message"] for one in told)
    assert "POST / HTTP" not in text, "uvicorn's own line says the same"
    assert text.count('"name": "POST /"') == 5, "those of the last moment, too"
    assert text.count('"name": "queue"') == text.count('"name": "model"') == 3
