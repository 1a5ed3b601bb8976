"""Text over the Open Inference Protocol, as tritonclient asks for it: whole over HTTP and gRPC, piece by piece in a gRPC stream."""

import json
import queue
from collections.abc import Iterator
from typing import Any

import grpc
import numpy as np
import pytest
from tritonclient import grpc as over_grpc
from tritonclient import http as over_http

from loadtests.modes import MODES, Server, free_port, start
from tests.support.client import get, metric, post_json, until

TEXT, NAME = "the old dog", "model"
CANCELLED = 'model_sequences_total{reason="cancelled"}'


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    from tests.support.small_language_models import save

    folder = tmp_path_factory.mktemp("models") / NAME
    env = {
        "MODEL": save(folder, max_position_embeddings=2048),
        "TASK": "text-generation",
        "TORCH_THREADS": "1",
        "KV_CACHE_MB": "20",
        "CONTEXT_TOKENS": "2048",
        "DEADLINE_S": "60",
        "GRPC_PORT": str(free_port()),
    }
    with start(MODES["thread"], env) as server:
        yield server


@pytest.fixture
def client(server: Server) -> Iterator[Any]:
    address = f"127.0.0.1:{server.processes()[0].environ()['GRPC_PORT']}"
    with grpc.insecure_channel(address) as channel:
        grpc.channel_ready_future(channel).result(timeout=30)
    with over_grpc.InferenceServerClient(address) as client:
        yield client


def tensor(of: Any, text: str = TEXT) -> Any:
    made = of.InferInput("text", [1], "BYTES")
    made.set_data_from_numpy(np.array([text.encode()], object))
    return made


def expected(server: Server, n: int) -> str:
    parameters = {"max_new_tokens": n, "return_full_text": False}
    return str(post_json(server, {"inputs": TEXT, "parameters": parameters}).json[0]["generated_text"])


def test_whole_text_over_http_and_grpc(server: Server, client: Any) -> None:
    http = over_http.InferenceServerClient(server.url.split("/")[2])
    for one, of in ((client, over_grpc), (http, over_http)):
        answer = one.infer(NAME, [tensor(of)], parameters={"max_new_tokens": 9, "return_full_text": False})
        assert json.loads(answer.as_numpy("answer")[0])[0]["generated_text"] == expected(server, 9)


def test_streamed_text_comes_piece_by_piece_and_the_last_message_says_so(server: Server, client: Any) -> None:
    got: queue.Queue[Any] = queue.Queue()
    client.start_stream(lambda result, error: got.put(error or result))
    asked = {"max_new_tokens": 30, "stream": True, "ignore_eos": True}
    client.async_stream_infer(NAME, [tensor(over_grpc)], request_id="one", parameters=asked)
    client.async_stream_infer(NAME, [tensor(over_grpc)], request_id="bad", parameters=asked | {"top_p": 7})
    events: list[Any] = []
    n_messages, is_last, errors = 0, False, []
    while not is_last or not errors:
        result = got.get(timeout=60)
        if isinstance(result, Exception):
            errors.append(str(result))
            continue
        assert result.get_response().id == "one"
        n_messages += 1
        events += [json.loads(text) for text in result.as_numpy("answer")]
        is_last = result.get_response().parameters["triton_final_response"].bool_param
    client.stop_stream()
    assert [event["index"] for event in events] == list(range(30)) and n_messages > 10
    assert "".join(event["token"]["text"] for event in events) == events[-1]["generated_text"]
    assert events[-1]["details"]["finish_reason"] == "length"
    assert "request bad" in errors[0] and "top_p" in errors[0]


def test_cancelled_stream_frees_its_row(server: Server, client: Any) -> None:
    before = metric(server, CANCELLED)
    got: queue.Queue[Any] = queue.Queue()
    client.start_stream(lambda result, error: got.put(result))
    asked = {"max_new_tokens": 2000, "stream": True, "ignore_eos": True}
    client.async_stream_infer(NAME, [tensor(over_grpc)], parameters=asked)
    assert got.get(timeout=60)
    client.stop_stream(cancel_requests=True)
    until(lambda: metric(server, CANCELLED) == before + 1)
    until(lambda: get(server, "/health").json["running"] == 0)
