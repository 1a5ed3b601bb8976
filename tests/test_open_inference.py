"""The Open Inference Protocol, over HTTP and over gRPC, as Triton's own clients speak it."""

import asyncio
import contextlib
import json
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
from workers.errors import Malformed, Unprocessable
from workers.protocols import open_inference
from workers.protocols.open_inference import tensors
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
def test_the_clients_find_the_model(clients: dict[str, Any], protocol: str) -> None:
    client = clients[protocol]
    json_too = {"as_json": True} if protocol == "grpc" else {}
    assert client.is_server_live() and client.is_server_ready() and client.is_model_ready(FILL_MASK, "1")
    metadata = client.get_model_metadata(FILL_MASK, **json_too)
    assert [one["name"] for one in metadata["inputs"]] == ["text"]
    assert [one["datatype"] for one in metadata["outputs"]] == ["BYTES"]
    assert client.get_server_metadata(**json_too)["name"] == "one-queue"
    with pytest.raises(InferenceServerException, match="no such model here"):
        client.get_model_metadata("another")


def test_another_method_is_405_and_another_model_404(server: Server) -> None:
    reply = get(server, f"/v2/models/{FILL_MASK}/infer")
    assert (reply.status, reply.headers["Allow"]) == (405, "POST")
    for path in ("/v2/models/another", f"/v2/models/{FILL_MASK}/versions/2/ready", "/v2/models/another/"):
        assert (reply := get(server, path)).status == 404
        assert FILL_MASK in reply.error


# --- answers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_answers_are_those_of_the_core(server: Server, clients: dict[str, Any], protocol: str) -> None:
    of = {"http": over_http, "grpc": over_grpc}[protocol]
    answer = clients[protocol].infer(FILL_MASK, [tensor(TEXT, OTHER, of=of)], request_id="mine")
    assert said(answer) == [post(server, text).json for text in (TEXT, OTHER)]
    response = answer.get_response()
    assert (response["id"] if protocol == "http" else response.id) == "mine"


def test_answers_as_json_too(clients: dict[str, Any], server: Server) -> None:
    wanted = over_http.InferRequestedOutput("answer", binary_data=False)
    answer = clients["http"].infer(FILL_MASK, [tensor(TEXT, binary_data=False)], outputs=[wanted])
    assert said(answer) == [post(server, TEXT).json]
    reply = infer(server, a_tensor())
    assert json.loads(reply.json["outputs"][0]["data"][0]) == post(server, TEXT).json
    assert "queue;dur=" in reply.headers["Server-Timing"]


def test_the_asyncio_clients(server: Server, address: str) -> None:
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


def test_what_else_a_tensor_may_hold(locked: Server) -> None:
    """JSON, numbers and parameters reach a model as they are."""
    key = {"x-api-key": "key-1"}
    with over_grpc.InferenceServerClient(grpc_of(locked)) as rpc:
        given = [{"a": [1, None]}, "text"]
        texts = tensor(*map(json.dumps, given), name="json", of=over_grpc)
        assert said(rpc.infer(ECHO, [texts], headers=key)) == given
        rows = over_grpc.InferInput("numbers", [2, 2], "FP32")
        rows.set_data_from_numpy(np.array([[1.5, 2], [3, 4]], np.float32))
        assert said(rpc.infer(ECHO, [rows], headers=key)) == [[1.5, 2], [3, 4]]
    as_json = a_tensor(name="numbers", datatype="INT64", shape=[1, 2], data=[[1, 2]])
    reply = infer(locked, as_json, ECHO, x_api_key="key-1")
    assert json.loads(reply.json["outputs"][0]["data"][0]) == [1, 2]
    nan = infer(locked, a_tensor(name="json", data=['{"nan": 1}']), ECHO, x_api_key="key-1")
    assert nan.status == 500 and "the model failed" in nan.error


# --- errors -----------------------------------------------------------------------------------------------------------

WRONG = {
    "the JSON cannot be read": (b"{", 400),
    "the JSON is no": (b"\xff", 400),
    "no object": ([], 400),
    'no "inputs"': ({}, 400),
    "list of one tensor": ({"inputs": []}, 400),
    'no "shape"': ({"inputs": [{"name": "text", "datatype": "BYTES", "data": [TEXT]}]}, 400),
    "not a known field": (a_tensor() | {"input": 1}, 400),
    "no input 'INPUT0'": (a_tensor(name="INPUT0"), 400),
    "no tensor of FP32": (a_tensor(datatype="FP32"), 422),
    "takes no bytes": (a_tensor(name="bytes"), 422),
    "the shape says 2": (a_tensor(shape=[2]), 422),
    "whole numbers": (a_tensor(shape=[-1]), 400),
    "must be texts": (a_tensor(data=[1]), 422),
    "send 1 to 8": (a_tensor(shape=[9], data=[TEXT] * 9), 422),
    "not a known parameter here": (a_tensor(parameters={"shared_memory_region": "a"}), 400),
    "it says 5": (a_tensor(data=None, parameters={"binary_data_size": 5}), 422),
    "no output 'x'": (a_tensor() | {"outputs": [{"name": "x"}]}, 422),
    "true or false": (a_tensor() | {"parameters": {"binary_data_output": 1}}, 400),
    "are not of one": (a_tensor(name="numbers", datatype="FP32", shape=[2], data=[1, "2"]), 422),
    "is not finite": (a_tensor(name="numbers", datatype="FP16", data=[1e30]), 422),
    "are no numbers": (a_tensor(name="numbers", datatype="FP32", shape=[2**31 - 1, 0], data=[]), 422),
    "50000 dimensions": (a_tensor(shape=[2**31 - 1] * 50_000), 400),
    "has no [MASK]": (a_tensor(data=["none"]), 422),
    "the model failed": (a_tensor(data=[POISON]), 500),
}


@pytest.mark.parametrize("sentence", WRONG)
def test_what_is_wrong_is_said(server: Server, sentence: str) -> None:
    content, status = WRONG[sentence]
    reply = infer(server, content)
    assert reply.status == status, reply
    assert (
        sentence.replace("are not of one", "or not of one").replace("JSON is no", "JSON is not UTF-8")
        in reply.error
    )


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


def test_who_was_asked_and_counted(server: Server, stub: Any) -> None:
    before = metric(server, "model_requests_total")
    answer, call = stub.ModelInfer.with_call(asked(TEXT), metadata=[("x-request-id", "mine")])
    assert dict(call.trailing_metadata())["x-request-id"] == "mine"
    assert answer.parameters["timing"].string_param.startswith("queue;dur=")
    error = error_of(lambda: stub.ModelInfer(asked("none"), metadata=[("x-request-id", "a b")]))
    assert len(dict(error.trailing_metadata())["x-request-id"]) == 32
    assert metric(server, "model_requests_total") == before + 2


def test_poison_spoils_nobodys_answer(server: Server, stub: Any, crowd: Crowd, tmp_path: Path) -> None:
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
    """Of BYTES the doors let only texts and bytes through."""
    if isinstance(data, list) and datatype == "BYTES":
        data = list(map(str, data))
    shape = [len(data)] if len(shape) == 1 else shape
    service: Any = SimpleNamespace(settings=Settings(), task=SimpleNamespace(media=("image/",)))
    with contextlib.suppress(Unprocessable, Malformed):
        assert len(tensors.inputs(tensors.Tensor(name, datatype, shape, data), service)) <= 64


# --- time -------------------------------------------------------------------------------------------------------------


def test_a_call_that_is_cancelled_or_late_frees_its_place(
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


def test_a_refusal_says_when_to_ask_again(server: Server, stub: Any, crowd: Crowd, tmp_path: Path) -> None:
    gate = tmp_path / "open"
    held = hold(server, crowd, gate)
    waiting = [stub.ModelInfer.future(asked(TEXT)) for _ in range(4)]
    until(lambda: get(server, "/health").json["queue_depth"] == 4)
    error = error_of(lambda: stub.ModelInfer(asked(TEXT)))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    retry = RetryInfo()
    assert rpc_status.from_call(error).details[0].Unpack(retry)
    assert retry.retry_delay.seconds >= 1
    refused = infer(server, a_tensor())
    assert (refused.status, int(refused.headers["Retry-After"]) >= 1) == (503, True)
    gate.touch()
    assert held.result().status == 200
    assert all(call.result().model_name == FILL_MASK for call in waiting)


def test_who_allows_less_time_than_it_would_take_is_told_so_at_once(
    server: Server, stub: Any, tmp_path: Path
) -> None:
    gate = tmp_path / "open"
    long = stub.ModelInfer.future(asked(f"until:{gate} {TEXT}" + " and so on" * 1500))
    until(lambda: get(server, "/health").json["running"] == 1)
    error = error_of(lambda: stub.ModelInfer(asked(TEXT), timeout=0.5))
    assert (error.code(), "it would take" in error.details()) == (grpc.StatusCode.RESOURCE_EXHAUSTED, True)
    gate.touch()
    assert long.result().model_name == FILL_MASK


def test_a_message_that_never_comes(address: str) -> None:
    with grpc.insecure_channel(address) as channel:
        never = queue.Queue()
        call = channel.stream_unary("/inference.GRPCInferenceService/ModelInfer").future(
            iter(never.get, None)
        )
        assert "did not arrive in time" in error_of(call.result).details()
        never.put(None)


# --- streams ----------------------------------------------------------------------------------------------------------


def test_a_stream_gives_answers_as_they_come(server: Server, address: str) -> None:
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


def test_a_stream_is_no_slower_than_its_answers(
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


def test_an_asyncio_stream(address: str) -> None:
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


def test_who_leaves_a_stream_frees_all_its_places(
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


def test_who_stops_reading_is_left(server: Server, address: str) -> None:
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
        health = health_pb2_grpc.HealthStub(channel)
        for name in ("", "inference.GRPCInferenceService", "liveness"):
            assert health.Check(health_pb2.HealthCheckRequest(service=name)).status == 1
        unknown = error_of(lambda: health.Check(health_pb2.HealthCheckRequest(service="x")))
        assert unknown.code() is grpc.StatusCode.NOT_FOUND


def test_a_path_that_ends_grpcs_server_ends_it_for_a_moment_only(server: Server, address: str) -> None:
    """grpc's asyncio server dies of a path that is no UTF-8."""
    with grpc.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
        error_of(lambda: channel.unary_unary(NOT_UTF8)(b""))
        again = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        until(lambda: is_answered(again))


def is_answered(stub: Any) -> bool:
    try:
        return stub.ModelInfer(asked(TEXT), wait_for_ready=True, timeout=60).model_name == FILL_MASK
    except grpc.RpcError:
        return False


def test_a_key_is_asked_for(locked: Server) -> None:
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


def test_a_stop_answers_all_that_was_let_in(crowd: Crowd, tmp_path: Path) -> None:
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
def test_behind_gunicorns_threads() -> None:
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
def test_a_port_that_is_taken_ends_the_start_with_a_sentence(server: Server, address: str) -> None:
    port = address.rpartition(":")[2]
    with start(MODES["thread"], {"MODEL": FILL_MASK, "GRPC_PORT": port}, wait=False) as second:
        assert second.process.wait(60) == 3
        assert f"cannot listen on GRPC_PORT={port}; is it taken?" in second.log()
        assert "Traceback" not in second.log()


def test_without_its_packages_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(open_inference, "NEEDED", ("grpc", "no_such_package.at_all"))
    with pytest.raises(SystemExit, match=r"pip install -r requirements-optional.txt"):
        open_inference.routes(Settings(GRPC_PORT="50051"))
    assert open_inference.routes(Settings())
