"""The Open Inference Protocol, over HTTP and over gRPC, as Triton's own clients speak it."""

import asyncio
import contextlib
import gzip
import json
import math
import os
import queue
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import numpy as np
import pytest
import tritonclient.grpc.aio
import tritonclient.http.aio
from google.rpc.error_details_pb2 import RetryInfo
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from grpc_status import rpc_status
from hypothesis import given
from hypothesis import strategies as st
from tritonclient import grpc as over_grpc
from tritonclient import http as over_http
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc
from tritonclient.utils import InferenceServerException

from loadtests.modes import MODES, Server, free_port, start
from tests.support.client import POISON, Crowd, Reply, get, metric, post, request, say, until
from workers.errors import Malformed, ModelFailed, Unprocessable
from workers.jobs import Answer
from workers.metrics import Metrics
from workers.protocols import open_inference
from workers.protocols.open_inference import grpc_calls, grpc_server, grpc_stream, tensors
from workers.settings import Settings

FILL_MASK, ECHO, MOODY = (
    "tests.support.fake_models:FillMask",
    "tests.support.fake_models:Obedient",
    "tests.support.misbehaving_model:Model",
)
TEXT, OTHER = "Paris is the [MASK] of France.", "the [MASK] of the old house"
NOT_UTF8 = b"/\xff\xfe"


def both(mode: str, **settings: str) -> Any:
    """Start it with a port for gRPC."""
    return start(MODES[mode], {"MODEL": FILL_MASK, **settings, "GRPC_PORT": str(free_port())})


def grpc_of(server: Server) -> str:
    """Where it speaks gRPC."""
    return f"127.0.0.1:{server.processes()[0].environ()['GRPC_PORT']}"


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with both("thread", MAX_QUEUE="4", BATCH_SIZE="4", BODY_TIMEOUT_S="0.5", MAX_INPUTS="8") as server:
        yield server


@pytest.fixture(scope="module")
def address(server: Server) -> str:
    """Where it speaks gRPC; it does."""
    with grpc.insecure_channel(grpc_of(server)) as channel:
        grpc.channel_ready_future(channel).result(timeout=30)
    return grpc_of(server)


@pytest.fixture(scope="module")
def locked() -> Iterator[Server]:
    """One that gives any JSON back, behind keys; it speaks gRPC."""
    with both("thread", MODEL=ECHO, API_KEY="key-0,key-1") as server:
        with grpc.insecure_channel(grpc_of(server)) as channel:
            grpc.channel_ready_future(channel).result(timeout=30)
        yield server


@pytest.fixture(scope="module")
def stub(address: str) -> Iterator[Any]:
    with grpc.insecure_channel(address) as channel:
        yield service_pb2_grpc.GRPCInferenceServiceStub(channel)


@pytest.fixture
def clients(server: Server, address: str) -> Iterator[dict[str, Any]]:
    """Triton's, by protocol."""
    with (
        over_http.InferenceServerClient(server.url.split("/")[2]) as http,
        over_grpc.InferenceServerClient(address) as rpc,
    ):
        yield {"http": http, "grpc": rpc}


def tensor(*texts: str, name: str = "text", of: Any = over_http, **how: Any) -> Any:
    made = of.InferInput(name, [len(texts)], "BYTES")
    made.set_data_from_numpy(np.array([text.encode() for text in texts], object), **how)
    return made


def asked(text: str, request_id: str = "", model: str = FILL_MASK) -> Any:
    """As protobuf has it."""
    content = {
        "name": "text",
        "datatype": "BYTES",
        "shape": [1],
        "contents": {"bytes_contents": [text.encode()]},
    }
    return pb.ModelInferRequest(model_name=model, id=request_id, inputs=[content])


def infer(server: Server, content: Any, model: str = FILL_MASK, **headers: str) -> Reply:
    """POST it, as JSON or as these bytes."""
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    return say(server, request("POST", f"/v2/models/{model}/infer", body, **headers))


def a_tensor(**fields: Any) -> dict[str, Any]:
    return {"inputs": [{"name": "text", "datatype": "BYTES", "shape": [1], "data": [TEXT], **fields}]}


def error_of(call: Callable[[], Any]) -> grpc.RpcError:
    with pytest.raises(grpc.RpcError) as raised:
        call()
    return raised.value


def said(answer: Any) -> list[Any]:
    """The answers, read."""
    return [json.loads(text) for text in answer.as_numpy("answer")]


# --- what is served ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_clients_find_the_model(clients: dict[str, Any], protocol: str) -> None:
    client = clients[protocol]
    json_too = {"as_json": True} if protocol == "grpc" else {}
    assert client.is_server_live() and client.is_server_ready() and client.is_model_ready(FILL_MASK, "1")
    metadata = client.get_model_metadata(FILL_MASK, **json_too)
    assert [one["name"] for one in metadata["inputs"]] == ["text"]
    assert [one["datatype"] for one in metadata["outputs"]] == ["BYTES"]
    assert client.get_server_metadata(**json_too)["name"] == "one-queue"
    with pytest.raises(InferenceServerException, match="no such model here"):
        client.get_model_metadata("another")


def test_other_method_is_405_and_other_model_404(server: Server) -> None:
    reply = get(server, f"/v2/models/{FILL_MASK}/infer")
    assert (reply.status, reply.headers["Allow"]) == (405, "POST")
    reply = say(server, request("POST", "/v2/models/stats"))
    assert (reply.status, "GET" in reply.headers["Allow"]) == (405, True)
    for path in ("/v2/models/another", f"/v2/models/{FILL_MASK}/versions/2/ready", "/v2/models/another/"):
        assert (reply := get(server, path)).status == 404
        assert FILL_MASK in reply.error


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_extensions_that_perf_analyzer_asks_for(clients: dict[str, Any], protocol: str) -> None:
    client, of = clients[protocol], {"http": over_http, "grpc": over_grpc}[protocol]
    json_too = {"as_json": True} if protocol == "grpc" else {}
    config = client.get_model_config(FILL_MASK, **json_too)
    config = config["config"] if protocol == "grpc" else config
    assert config["input"] == [
        {"name": "text", "data_type": "TYPE_STRING", "dims": [*config["input"][0]["dims"]]}
    ]
    assert list(map(int, config["input"][0]["dims"])) == [-1]
    index = client.get_model_repository_index(**json_too)
    (model,) = index["models"] if protocol == "grpc" else index
    assert (model["name"], model["state"]) == (FILL_MASK, "READY")

    def counts() -> dict[str, int]:
        (stats,) = client.get_inference_statistics(FILL_MASK, **json_too)["model_stats"]
        times = stats["inference_stats"]
        found = {"inputs": stats["inference_count"], "requests": times["success"]["count"]}
        return {name: int(n) for name, n in found.items()} | {"ns": int(times["compute_infer"]["ns"])}

    client.infer(FILL_MASK, [tensor(TEXT, of=of)])
    before = counts()
    client.infer(FILL_MASK, [tensor(TEXT, OTHER, of=of)])
    after = counts()
    assert (after["inputs"], after["requests"]) == (before["inputs"] + 2, before["requests"] + 1)
    assert after["ns"] > before["ns"]
    assert not client.is_model_ready("another")
    with pytest.raises(InferenceServerException):
        client.load_model(FILL_MASK)


@pytest.mark.parametrize("protocol", ["http", "grpc"])
@pytest.mark.parametrize("algorithm", ["gzip", "deflate"])
def test_compressed_requests(clients: dict[str, Any], server: Server, protocol: str, algorithm: str) -> None:
    of = {"http": over_http, "grpc": over_grpc}[protocol]
    name = "request_compression_algorithm" if protocol == "http" else "compression_algorithm"
    answer = clients[protocol].infer(FILL_MASK, [tensor(TEXT, of=of)], **{name: algorithm})
    assert said(answer) == [post(server, TEXT).json]


@pytest.mark.parametrize(
    ("encoding", "body", "status"),
    [
        ("gzip", b"no gzip", 400),
        ("gzip", gzip.compress(b"{}", mtime=0)[:-4], 400),
        ("gzip", gzip.compress(b"{}", mtime=0) + b"more", 400),
        ("gzip", gzip.compress(b" " * 2**25, mtime=0), 413),
        ("br", b"{}", 415),
        ("gzip, gzip", b"{}", 415),
    ],
)
def test_broken_compression_gets_a_sentence(server: Server, encoding: str, body: bytes, status: int) -> None:
    reply = infer(server, body, Content_Encoding=encoding)
    assert (reply.status, "send" in reply.error) == (status, True)


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_options_of_a_request_are_honoured_or_rejected_by_name(
    clients: dict[str, Any], protocol: str
) -> None:
    of = {"http": over_http, "grpc": over_grpc}[protocol]

    def infer(**options: Any) -> Any:
        return clients[protocol].infer(FILL_MASK, [tensor(TEXT, of=of)], **options)

    assert infer(timeout=30_000_000, priority=0).as_numpy("answer").size == 1
    for options in ({"priority": 1}, {"sequence_id": 1}, {"sequence_id": 1, "sequence_start": True}):
        with pytest.raises(InferenceServerException, match=f'"{next(iter(options))}" is not supported'):
            infer(**options)
    with pytest.raises(InferenceServerException, match="class_count"):
        infer(outputs=[of.InferRequestedOutput("answer", class_count=2)])


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_timeout_of_a_request_is_its_deadline(
    server: Server, clients: dict[str, Any], crowd: Crowd, tmp_path: Path, protocol: str
) -> None:
    gate = tmp_path / "open"
    held = hold(server, crowd, gate)
    with pytest.raises(InferenceServerException, match="no answer within"):
        of = {"http": over_http, "grpc": over_grpc}[protocol]
        clients[protocol].infer(FILL_MASK, [tensor(TEXT, of=of)], timeout=1_000_000)
    gate.touch()
    assert held.result().status == 200


@pytest.mark.parametrize("value", [[1.0, math.nan], [1.0, 1e39]])
def test_vector_that_is_not_finite_is_a_failure(value: list[float]) -> None:
    """Also one that FP32 can't hold."""
    service: Any = SimpleNamespace(task=SimpleNamespace(embeds=True))
    answers = [Answer(np.array(vector), 0, 0, 1, "full") for vector in ([1.0, 2.0], value)]
    with pytest.raises(ModelFailed) as raised, np.errstate(over="ignore"):
        tensors.output(answers, service)
    assert raised.value.index == 1


# --- answers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_answers_are_those_of_the_core(server: Server, clients: dict[str, Any], protocol: str) -> None:
    of = {"http": over_http, "grpc": over_grpc}[protocol]
    answer = clients[protocol].infer(FILL_MASK, [tensor(TEXT, OTHER, of=of)], request_id="mine")
    assert said(answer) == [post(server, text).json for text in (TEXT, OTHER)]
    response = answer.get_response()
    assert (response["id"] if protocol == "http" else response.id) == "mine"


def test_answers_as_json(clients: dict[str, Any], server: Server) -> None:
    wanted = over_http.InferRequestedOutput("answer", binary_data=False)
    answer = clients["http"].infer(FILL_MASK, [tensor(TEXT, binary_data=False)], outputs=[wanted])
    assert said(answer) == [post(server, TEXT).json]
    reply = infer(server, a_tensor())
    assert json.loads(reply.json["outputs"][0]["data"][0]) == post(server, TEXT).json
    assert "queue;dur=" in reply.headers["Server-Timing"]


def test_asyncio_clients(server: Server, address: str) -> None:
    async def ask() -> list[Any]:
        async with (
            tritonclient.http.aio.InferenceServerClient(server.url.split("/")[2]) as http,
            tritonclient.grpc.aio.InferenceServerClient(address) as rpc,
        ):
            assert await http.is_server_ready() and await rpc.is_server_ready()
            return [
                said(await http.infer(FILL_MASK, [tensor(TEXT)])),
                said(await rpc.infer(FILL_MASK, [tensor(TEXT, of=over_grpc)])),
            ]

    assert asyncio.run(ask()) == [[post(server, TEXT).json]] * 2


def test_json_numbers_and_parameters_reach_the_model(locked: Server) -> None:
    """JSON, numbers and parameters reach a model as they are."""
    key = {"x-api-key": "key-1"}
    with over_grpc.InferenceServerClient(grpc_of(locked)) as rpc:
        given = [{"a": [1, None]}, "text"]
        texts = tensor(*map(json.dumps, given), name="json", of=over_grpc)
        assert said(rpc.infer(ECHO, [texts], headers=key)) == given
        with pytest.raises(InferenceServerException, match="the model failed"):
            rpc.infer(ECHO, [tensor('{"nan": 1}', name="json", of=over_grpc)], headers=key)
        rows = over_grpc.InferInput("numbers", [2, 2], "FP32")
        rows.set_data_from_numpy(np.array([[1.5, 2], [3, 4]], np.float32))
        assert said(rpc.infer(ECHO, [rows], headers=key)) == [[1.5, 2], [3, 4]]
    as_json = a_tensor(name="numbers", datatype="INT64", shape=[1, 2], data=[[1, 2]])
    reply = infer(locked, as_json, ECHO, x_api_key="key-1")
    assert json.loads(reply.json["outputs"][0]["data"][0]) == [1, 2]
    nan = infer(locked, a_tensor(name="json", data=['{"nan": 1}']), ECHO, x_api_key="key-1")
    assert nan.status == 500 and "the model failed" in nan.error


# --- errors -----------------------------------------------------------------------------------------------------------

WRONG: list[tuple[Any, int, str]] = [  # content, status, sentence
    (b"{", 400, "the JSON cannot be read"),
    (b"\xff", 400, "of the JSON is not UTF-8"),
    ([], 400, "must be an object"),
    ({}, 400, 'no "inputs"'),
    ({"inputs": []}, 400, "list of one tensor"),
    ({"inputs": [{"name": "text", "datatype": "BYTES", "data": [TEXT]}]}, 400, 'no "shape"'),
    (a_tensor() | {"input": 1}, 400, "not a known field"),
    (a_tensor(name="INPUT0"), 400, "no input 'INPUT0'"),
    (a_tensor(datatype="FP32"), 422, "not a tensor of FP32"),
    (a_tensor(name="bytes"), 422, "does not take bytes"),
    (a_tensor(shape=[2]), 422, "the shape says 2"),
    (a_tensor(shape=[-1]), 400, "whole numbers"),
    (a_tensor(data=[1]), 422, "must be texts"),
    (a_tensor(shape=[9], data=[TEXT] * 9), 422, "send 1 to 8"),
    (a_tensor(parameters={"shared_memory_region": "a"}), 400, "not a known parameter here"),
    (a_tensor(data=None, parameters={"binary_data_size": 5}), 422, "it says 5"),
    (a_tensor() | {"outputs": [{"name": "x"}]}, 422, "no output 'x'"),
    (a_tensor() | {"parameters": {"binary_data_output": 1}}, 400, "true or false"),
    (a_tensor() | {"parameters": {"timeout": 0.5}}, 400, "whole number of microseconds"),
    (a_tensor(name="numbers", datatype="FP32", shape=[2], data=[1, "2"]), 422, "of one shape"),
    (a_tensor(name="numbers", datatype="FP16", data=[1e30]), 422, "is not finite"),
    (a_tensor(name="numbers", datatype="FP32", shape=[2**31 - 1, 0], data=[]), 422, "has no numbers"),
    (a_tensor(shape=[2**31 - 1] * 50_000), 400, "50000 dimensions"),
    (a_tensor(data=["none"]), 422, "has no [MASK]"),
    (a_tensor(data=[POISON]), 500, "the model failed"),
]


@pytest.mark.parametrize(("content", "status", "sentence"), WRONG, ids=[wrong[2] for wrong in WRONG])
def test_wrong_requests_get_a_sentence(server: Server, content: Any, status: int, sentence: str) -> None:
    reply = infer(server, content)
    assert (reply.status, sentence in reply.error) == (status, True), reply


@pytest.mark.parametrize("timeout", [None, 0, 2e6, 10**400])
def test_timeouts_that_are_taken(server: Server, timeout: Any) -> None:
    """An integer of any length is JSON, and 2e6 is one."""
    assert infer(server, a_tensor() | {"parameters": {"timeout": timeout}}).status == 200


def test_null_is_not_given(server: Server) -> None:
    assert infer(server, a_tensor(parameters=None) | {"id": None, "unheard_of": None}).status == 200


@pytest.mark.parametrize("size", [0, 3, 6, 2**31])
def test_broken_binary_tensors(server: Server, size: int) -> None:
    """Whatever the lengths say."""
    content = a_tensor(data=None, parameters={"binary_data_size": 6})
    head = json.dumps(content).encode()
    body = head + size.to_bytes(4, "little") + b"ab"
    reply = infer(server, body, Inference_Header_Content_Length=str(len(head)))
    assert reply.status == 400 and "end too early" in reply.error
    reply = infer(server, body, Inference_Header_Content_Length=str(len(body) + 1))
    assert reply.status == 400 and "not the length" in reply.error


def test_grpcs_codes(stub: Any) -> None:
    for wrong, code in (
        (asked("none"), grpc.StatusCode.INVALID_ARGUMENT),
        (pb.ModelInferRequest(model_name=FILL_MASK), grpc.StatusCode.INVALID_ARGUMENT),
        (asked(TEXT, model="another"), grpc.StatusCode.NOT_FOUND),
        (asked(POISON), grpc.StatusCode.INTERNAL),
        (asked("a" * 2**21), grpc.StatusCode.RESOURCE_EXHAUSTED),
    ):
        error = error_of(lambda wrong=wrong: stub.ModelInfer(wrong))
        assert error.code() is code, error
        assert "IndexError" not in error.details() and "/" not in error.details().replace("x-api", "")


def test_request_ids_and_counts(server: Server, stub: Any) -> None:
    before = metric(server, "model_requests_total")
    answer, call = stub.ModelInfer.with_call(asked(TEXT), metadata=[("x-request-id", "mine")])
    assert dict(call.trailing_metadata())["x-request-id"] == "mine"
    assert answer.parameters["timing"].string_param.startswith("queue;dur=")
    error = error_of(lambda: stub.ModelInfer(asked("none"), metadata=[("x-request-id", "a b")]))
    assert len(dict(error.trailing_metadata())["x-request-id"]) == 32
    assert metric(server, "model_requests_total") == before + 2


def test_poison_input_fails_alone(server: Server, stub: Any, crowd: Crowd, tmp_path: Path) -> None:
    """It shares a batch with a good one."""
    gate = tmp_path / "open"
    first = hold(server, crowd, gate)
    poisoned, good = stub.ModelInfer.future(asked(POISON)), stub.ModelInfer.future(asked(TEXT))
    until(lambda: get(server, "/health").json["queue_depth"] == 2)
    gate.touch()
    assert first.result().status == 200
    assert good.result().model_name == FILL_MASK
    assert error_of(poisoned.result).code() is grpc.StatusCode.INTERNAL


def hold(server: Server, crowd: Crowd, gate: Path) -> Any:
    """Keep the model busy until the gate is open; return the request that does."""
    (held,) = crowd.post(server, f"[MASK] until:{gate}")
    until(lambda: get(server, "/health").json["running"] == 1)
    return held


ANYTHING = st.one_of(
    st.binary(max_size=64),
    st.lists(
        st.one_of(st.text(), st.integers(), st.floats(), st.booleans(), st.none(), st.lists(st.integers()))
    ),
)


@given(
    st.sampled_from([*tensors.NAMES, "x"]),
    st.sampled_from([*tensors.NUMPYS, "BYTES", "BF16"]),
    st.lists(st.integers(0, 2**31 - 1), max_size=4),
    ANYTHING,
)
def test_any_tensor_becomes_inputs_or_a_sentence(
    name: str, datatype: str, shape: list[int], data: Any
) -> None:
    """Of BYTES only texts and bytes get here."""
    if isinstance(data, list) and datatype == "BYTES":
        data = list(map(str, data))
    shape = [len(data)] if len(shape) == 1 else shape
    service: Any = SimpleNamespace(settings=Settings(), task=SimpleNamespace(media=("image/",)))
    with contextlib.suppress(Unprocessable, Malformed):
        assert len(tensors.inputs(tensors.Tensor(name, datatype, shape, data), service)) <= 64


# --- time -------------------------------------------------------------------------------------------------------------


def test_cancelled_and_late_calls_free_their_place(
    server: Server, stub: Any, crowd: Crowd, tmp_path: Path
) -> None:
    gate = tmp_path / "open"
    held = hold(server, crowd, gate)

    def depth() -> int:
        return get(server, "/health").json["queue_depth"]

    call = stub.ModelInfer.future(asked(TEXT))
    until(lambda: depth() == 1)
    call.cancel()
    until(lambda: depth() == 0)
    late = stub.ModelInfer.future(asked(TEXT), timeout=1.0)
    until(lambda: depth() == 1)
    assert error_of(late.result).code() is grpc.StatusCode.DEADLINE_EXCEEDED
    until(lambda: depth() == 0)
    gate.touch()
    assert held.result().status == 200


def test_rejection_says_when_to_retry(server: Server, stub: Any, crowd: Crowd, tmp_path: Path) -> None:
    gate = tmp_path / "open"
    held = hold(server, crowd, gate)
    waiting = [stub.ModelInfer.future(asked(TEXT)) for _ in range(4)]
    until(lambda: get(server, "/health").json["queue_depth"] == 4)
    error = error_of(lambda: stub.ModelInfer(asked(TEXT)))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert error.details().endswith("; retry after the time that comes with this error")
    retry = RetryInfo()
    assert rpc_status.from_call(error).details[0].Unpack(retry)
    assert retry.retry_delay.seconds >= 1
    refused = infer(server, a_tensor())
    assert (refused.status, int(refused.headers["Retry-After"]) >= 1) == (503, True)
    gate.touch()
    assert held.result().status == 200
    assert all(call.result().model_name == FILL_MASK for call in waiting)


def test_deadline_shorter_than_the_wait_is_rejected_at_once(
    server: Server, stub: Any, tmp_path: Path
) -> None:
    gate = tmp_path / "open"
    long = stub.ModelInfer.future(asked(f"until:{gate} {TEXT}" + " and so on" * 1500))
    until(lambda: get(server, "/health").json["running"] == 1)
    error = error_of(lambda: stub.ModelInfer(asked(TEXT), timeout=0.5))
    assert (error.code(), "would take" in error.details()) == (grpc.StatusCode.RESOURCE_EXHAUSTED, True)
    gate.touch()
    assert long.result().model_name == FILL_MASK


def test_message_that_never_comes(address: str) -> None:
    with grpc.insecure_channel(address) as channel:
        never = queue.Queue()
        call = channel.stream_unary("/inference.GRPCInferenceService/ModelInfer").future(
            iter(never.get, None)
        )
        assert "did not arrive in time" in error_of(call.result).details()
        never.put(None)


# --- streams ----------------------------------------------------------------------------------------------------------


def test_stream_gives_answers_as_they_come(server: Server, address: str) -> None:
    """The one that waits for a gate comes last; the one that is wrong says whose it is."""
    got: queue.Queue[Any] = queue.Queue()
    with over_grpc.InferenceServerClient(address) as client:
        client.start_stream(lambda result, error: got.put(error or result.get_response().id))
        for number, text in enumerate([TEXT, "none", OTHER, POISON]):
            client.async_stream_infer(FILL_MASK, [tensor(text, of=over_grpc)], request_id=str(number))
        found = [str(got.get(timeout=30)) for _ in range(4)]
        client.stop_stream()
    assert sorted(one for one in found if len(one) == 1) == ["0", "2"]
    assert any("request 1: the text has no [MASK]" in one for one in found)
    assert any("request 3: the model failed" in one for one in found)


def test_stream_does_not_wait_for_earlier_requests(
    server: Server, stub: Any, crowd: Crowd, tmp_path: Path
) -> None:
    """What is done is said though an earlier request of the stream still waits."""
    gate = tmp_path / "open"
    sent: queue.Queue[Any] = queue.Queue()
    answers = stub.ModelStreamInfer(iter(sent.get, None))
    sent.put(asked(f"[MASK] until:{gate}", "held"))
    until(lambda: get(server, "/health").json["running"] == 1)
    sent.put(asked("none", "wrong"))
    wrong = next(answers)
    assert wrong.infer_response.id == "wrong"
    assert wrong.infer_response.parameters["status"].string_param == "INVALID_ARGUMENT"
    for number in range(7):  # four of them wait, the others have no room
        sent.put(asked(TEXT, str(number)))
    refused = next(answers)
    assert refused.infer_response.parameters["status"].string_param == "RESOURCE_EXHAUSTED"
    assert refused.infer_response.parameters["retry_after_s"].int64_param >= 1
    gate.touch()
    sent.put(None)
    ids = [answer.infer_response.id for answer in answers]
    assert {"held", refused.infer_response.id, *ids} == {"held", *map(str, range(7))}


def test_asyncio_stream(address: str) -> None:
    async def ask() -> list[Any]:
        async def requests() -> Any:
            for number in range(3):
                yield {
                    "model_name": FILL_MASK,
                    "inputs": [tensor(TEXT, of=over_grpc)],
                    "request_id": str(number),
                }

        async with tritonclient.grpc.aio.InferenceServerClient(address) as client:
            answers = client.stream_infer(requests())
            return sorted([result.get_response().id async for result, error in answers])

    assert asyncio.run(ask()) == ["0", "1", "2"]


def test_cancelled_stream_frees_all_its_places(
    server: Server, stub: Any, crowd: Crowd, tmp_path: Path
) -> None:
    gate = tmp_path / "open"
    held = hold(server, crowd, gate)
    never: queue.Queue[Any] = queue.Queue()
    for _ in range(3):
        never.put(asked(TEXT))
    call = stub.ModelStreamInfer(iter(never.get, None))
    until(lambda: get(server, "/health").json["queue_depth"] == 3)
    call.cancel()
    until(lambda: get(server, "/health").json["queue_depth"] == 0)
    never.put(None)
    gate.touch()
    assert held.result().status == 200


def test_stream_that_is_not_read_ends(server: Server, address: str) -> None:
    """A stream whose answers nobody takes ends, and the others are served meanwhile."""
    ended = threading.Event()

    def requests() -> Iterator[Any]:
        for number in range(2000):
            if ended.is_set():
                return
            yield asked(f"[MASK] {'x' * 20_000}", str(number))

    options = [("grpc.http2.bdp_probe", 0), ("grpc.use_local_subchannel_pool", 1)]  # a small window
    before = metric(server, 'model_requests_total{status="408"}')
    with grpc.insecure_channel(address, options=options) as channel:
        call = service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelStreamInfer(requests())
        until(lambda: metric(server, 'model_requests_total{status="408"}') > before)
        ended.set()
        call.cancel()
    assert post(server, TEXT).status == 200


# --- around it --------------------------------------------------------------------------------------------------------


def test_reflection_and_health(address: str) -> None:
    with grpc.insecure_channel(address) as channel:
        database = ProtoReflectionDescriptorDatabase(channel)
        assert {"inference.GRPCInferenceService", "grpc.health.v1.Health"} <= set(database.get_services())
        assert database.FindFileContainingSymbol("inference.ModelInferRequest").package == "inference"
        v1 = channel.stream_stream(
            "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
            reflection_pb2.ServerReflectionRequest.SerializeToString,
            reflection_pb2.ServerReflectionResponse.FromString,
        )
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        assert len(next(v1(iter([request]))).list_services_response.service) == 3
        health = health_pb2_grpc.HealthStub(channel)
        for name in ("", "inference.GRPCInferenceService", "liveness"):
            assert health.Check(health_pb2.HealthCheckRequest(service=name)).status == 1
        unknown = error_of(lambda: health.Check(health_pb2.HealthCheckRequest(service="x")))
        assert unknown.code() is grpc.StatusCode.NOT_FOUND


def test_path_that_is_not_utf8_ends_its_own_call_only(
    server: Server, address: str, stub: Any, crowd: Crowd, tmp_path: Path
) -> None:
    """grpc's own asyncio server ends at such a path, for everybody. Nor does it take long."""
    gate, logged = tmp_path / "open", len(server.log())
    held = stub.ModelInfer.future(asked(f"[MASK] until:{gate}"))
    until(lambda: get(server, "/health").json["running"] == 1)
    with grpc.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
        for path in [NOT_UTF8, b"/inference.GRPCInferenceService/Unheard", b"nothing"] * 4:
            error = error_of(lambda path=path: channel.unary_unary(path)(b"", timeout=30))
            assert error.code() is grpc.StatusCode.CANCELLED
    gate.touch()
    assert held.result().model_name == FILL_MASK
    assert "Traceback" not in server.log()[logged:]


def test_watches_without_a_key_shut_nobody_out(locked: Server) -> None:
    """A connection may have 16, and further ones get the status of now."""
    request = health_pb2.HealthCheckRequest()
    with (
        grpc.insecure_channel(grpc_of(locked)) as strangers,
        grpc.insecure_channel(grpc_of(locked), options=[("grpc.use_local_subchannel_pool", 1)]) as ours,
    ):
        watch = health_pb2_grpc.HealthStub(strangers).Watch
        watches = [watch(request) for _ in range(1100)]
        assert [next(one).status for one in watches] == [1] * 1100
        assert list(watches[-1]) == [], "beyond the limit a watch ends"
        assert health_pb2_grpc.HealthStub(ours).Check(request).status == 1
        answer = service_pb2_grpc.GRPCInferenceServiceStub(ours).ModelInfer
        assert answer(asked(TEXT, model=ECHO), metadata=[("x-api-key", "key-1")]).model_name == ECHO
        for one in watches:
            one.cancel()


def test_idle_connection_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grpc_server, "IDLE_S", 0.1)

    async def connect() -> bytes:
        server = grpc_server.make_server(fake_service(), grpc_calls.InferenceServicer(fake_service()))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00")
        received = await asyncio.wait_for(reader.read(), 30)  # until it is closed
        writer.close()
        await server.stop(0)
        return received

    assert asyncio.run(connect())


def fake_service(**settings: Any) -> Any:
    """What gRPC needs of a service while it only listens."""
    in_flight = SimpleNamespace(most_bytes=2**20)
    parts = {"metrics": Metrics(), "in_flight": in_flight, "loop": None}
    reasons = {"unready": lambda: "", "trouble": lambda: ""}
    return SimpleNamespace(settings=Settings(**settings), **parts, **reasons)


def test_stream_is_not_read_while_streams_hold_too_much(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody reads the answers: two streams hold a message each, though MAX_INPUTS is 64."""
    monkeypatch.setattr(grpc_stream, "STREAM_BYTES", 100)
    n_read = 0

    async def read() -> bytes:
        nonlocal n_read
        n_read += 1
        return b"x" * 101

    async def run() -> None:
        servicer = grpc_calls.InferenceServicer(fake_service())
        waiting = asyncio.Event()

        async def replied(raw: bytes, context: Any) -> Any:
            await waiting.wait()
            yield

        monkeypatch.setattr(servicer, "replied", replied)
        context = SimpleNamespace(read=read)
        streams = [asyncio.create_task(servicer.stream(context)) for _ in range(2)]
        for _ in range(100):
            await asyncio.sleep(0)
        assert n_read == 2
        for stream in streams:
            stream.cancel()
        await asyncio.gather(*streams, return_exceptions=True)
        await asyncio.gather(*servicer.operations, return_exceptions=True)
        assert servicer.stream_bytes == 0
        servicer.stopped.cancel()

    asyncio.run(run())


@pytest.mark.parametrize("host", ["0.0.0.0", "[::]", "example.com", "10.0.0.1"])
def test_no_port_for_the_world_without_a_key(host: str) -> None:
    """grpc can't limit the connections of one address."""
    with pytest.raises(SystemExit, match="set API_KEY"):
        open_inference.routes(Settings(GRPC_PORT=f"{host}:50051"))
    with pytest.raises(SystemExit, match="set API_KEY"):
        open_inference.routes(Settings(GRPC_PORT=f"{host}:50051", API_KEY=","))
    assert open_inference.routes(Settings(GRPC_PORT=f"{host}:50051", API_KEY="key"))


@pytest.mark.parametrize("port", ["50051", "127.0.0.1:50051", "localhost:50051", "[::1]:50051"])
def test_port_on_loopback_needs_no_key(port: str) -> None:
    assert open_inference.routes(Settings(GRPC_PORT=port))


@pytest.mark.parametrize("manager", ["gunicorn/27", "cluster", ""])
def test_replicas_share_the_port(monkeypatch: pytest.MonkeyPatch, manager: str) -> None:
    """A cluster of one, too: at SIGHUP its new replica listens before the old one has ended."""
    monkeypatch.setenv("SERVER_SOFTWARE", manager)
    assert grpc_server.shares_port(fake_service()) == bool(manager)
    assert grpc_server.shares_port(fake_service(WEB_CONCURRENCY=2))


def test_key_is_required(locked: Server) -> None:
    with grpc.insecure_channel(grpc_of(locked)) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        assert stub.ServerReady(pb.ServerReadyRequest()).ready
        health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
        calls: list[Callable[[], Any]] = [
            lambda: stub.ModelInfer(asked(TEXT, model=ECHO), metadata=[("x-api-key", "key-2")]),
            lambda: next(stub.ModelStreamInfer(iter([asked(TEXT, model=ECHO)]))),
            lambda: stub.ModelMetadata(pb.ModelMetadataRequest(name=ECHO)),
            lambda: ProtoReflectionDescriptorDatabase(channel).get_services(),
        ]
        for call in calls:
            assert error_of(call).code() is grpc.StatusCode.UNAUTHENTICATED
        for metadata in (("x-api-key", "key-1"), ("authorization", "Bearer key-0")):
            assert stub.ModelInfer(asked(TEXT, model=ECHO), metadata=[metadata]).model_name == ECHO
    for path in ("/v2/health/live", "/v2/health/ready", f"/v2/models/{ECHO}/ready"):
        assert get(locked, path).status == 200
    assert get(locked, "/v2").status == infer(locked, a_tensor(), ECHO).status == 401


def test_stop_answers_all_admitted_calls(crowd: Crowd, tmp_path: Path) -> None:
    gate = tmp_path / "open"
    with both("thread") as server, grpc.insecure_channel(grpc_of(server)) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        until(lambda: stub.ServerReady(pb.ServerReadyRequest(), wait_for_ready=True).ready)
        sent: queue.Queue[Any] = queue.Queue()
        answers = stub.ModelStreamInfer(iter(sent.get, None))
        held = stub.ModelInfer.future(asked(f"[MASK] until:{gate}"))
        until(lambda: get(server, "/health").json["running"] == 1)
        sent.put(asked(TEXT, "mine"))
        until(lambda: get(server, "/health").json["queue_depth"] == 1)
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        assert next(watch).status == 1
        server.process.send_signal(signal.SIGTERM)
        assert next(watch).status == 2
        assert error_of(lambda: stub.ModelInfer(asked(TEXT))).code() is grpc.StatusCode.UNAVAILABLE
        gate.touch()
        assert held.result().model_name == FILL_MASK
        assert next(answers).infer_response.id == "mine"
        assert error_of(lambda: next(answers)).code() is grpc.StatusCode.UNAVAILABLE
        assert list(watch) == []
        sent.put(None)
        assert server.process.wait(10) in (0, -signal.SIGTERM)


@pytest.mark.slow
def test_each_of_several_workers_listens() -> None:
    found: set[int] = set()
    with both("uvicorn-2", MODEL=MOODY) as server:
        until(lambda: found.add(worker_of(grpc_of(server))) or len(found) == 2)


def worker_of(address: str) -> int:
    """Which process answers on a new connection."""
    options = [("grpc.use_local_subchannel_pool", 1)]
    with grpc.insecure_channel(address, options=options) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        answer = stub.ModelInfer(asked("a", model=MOODY), wait_for_ready=True, timeout=60)
    return json.loads(answer.raw_output_contents[0][4:])[1]


@pytest.mark.slow
def test_gunicorns_threads_serve_grpc() -> None:
    with both("gthread-1x8") as server, grpc.insecure_channel(grpc_of(server)) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        assert stub.ModelInfer(asked(TEXT), wait_for_ready=True, timeout=60).model_name == FILL_MASK
        assert infer(server, a_tensor()).status == 200


@pytest.mark.slow
def test_gunicorns_new_worker_listens_while_the_old_one_still_answers(tmp_path: Path) -> None:
    """At SIGHUP. Else it would end, as its port is taken, and the old one would have no successor."""
    gate = tmp_path / "gate"
    with both("recommended", GRACE_S="60") as server, grpc.insecure_channel(grpc_of(server)) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        held = stub.ModelInfer.future(asked(f"{TEXT} until:{gate}"), wait_for_ready=True, timeout=60)
        until(lambda: get(server, "/health").json["running"])
        os.kill(server.process.pid, signal.SIGHUP)
        until(lambda: server.log().count("gRPC on") == 2 or "cannot listen" in server.log())
        gate.touch()
        assert held.result().model_name == FILL_MASK
        assert "cannot listen" not in server.log()


@pytest.mark.slow
def test_port_that_is_taken_ends_the_start_with_a_sentence(server: Server, address: str) -> None:
    port = address.rpartition(":")[2]
    with start(MODES["thread"], {"MODEL": FILL_MASK, "GRPC_PORT": port}, wait=False) as second:
        assert second.process.wait(60) == 3
        assert f"cannot listen on GRPC_PORT={port}; is it taken?" in second.log()
        assert "Traceback" not in second.log()


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(open_inference, "NEEDED", ("grpc", "no_such_package.at_all"))
    with pytest.raises(SystemExit, match=r"pip install -r requirements-optional.txt"):
        open_inference.routes(Settings(GRPC_PORT="50051"))
    assert open_inference.routes(Settings())
