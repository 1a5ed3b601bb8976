"""The other doors, as bytes on the wire: OpenAI's embeddings, reranking. Real clients are in test_real_clients.py."""

import asyncio
import base64
import json
import signal
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from types import SimpleNamespace
from typing import Any

import httpx2
import numpy as np
import psutil
import pytest
import tritonclient.http
from starlette.requests import Request

from loadtests.modes import MODES, Server, start
from tests.support.client import metric, until
from tests.support.embedding_models import sentence_model, small_bert
from workers.errors import ModelFailed
from workers.jobs import Answer
from workers.protocols import embed as embed_api
from workers.protocols import openai, rerank
from workers.settings import Settings
from workers.tasks import text_ranking
from workers.web.replies import AnswerResponse

TEXTS = ["A man is eating food.", "Zürich", "東京 is the capital of Japan."]
LONG = "of the old house on the hill " * 100


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Server]]:
    """An embedder whose model is in a process of its own, a reranker, and a model of token vectors."""
    folder = tmp_path_factory.mktemp("models")
    reranker = small_bert(folder / "reranker", "ForSequenceClassification", num_labels=1)
    sentence_model(folder, prompts={"query": "find: ", "document": ""})
    shared = {"MAX_QUEUE": "8", "MAX_INPUTS": "4", "BATCH_SIZE": "4"}
    with (
        start(
            MODES["process"],
            shared | {"MODEL": str(folder / "model"), "TASK": "feature-extraction"},
            wait=False,
        ) as embedder,
        start(
            MODES["thread"], shared | {"MODEL": reranker, "TASK": "text-ranking"}, wait=False
        ) as reranker_server,
        start(
            MODES["thread"], {"MODEL": small_bert(folder / "bert"), "TASK": "feature-extraction"}, wait=False
        ) as token_vectors,
    ):
        servers = {"embedder": embedder, "reranker": reranker_server, "token vectors": token_vectors}
        for server in servers.values():
            server.wait_until_ready()
        yield servers


@pytest.fixture(scope="module")
def client(servers: dict[str, Server]) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=servers["embedder"].url, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def rank(servers: dict[str, Server]) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=servers["reranker"].url, timeout=60) as client:
        yield client


def embed(client: httpx2.Client, content: Any, **headers: str) -> httpx2.Response:
    return client.post("/v1/embeddings", json=content, headers=headers)


def openai_error(reply: httpx2.Response) -> str:
    """The sentence; fails where the error is not in OpenAI's form."""
    error = reply.json()["error"]
    kind = "invalid_request_error" if reply.status_code < 500 else "server_error"
    assert error == {"message": error["message"], "type": kind, "param": None, "code": None}
    assert reply.headers["x-request-id"]
    return error["message"]


def test_texts_get_the_vectors_of_post_with_their_index_and_their_tokens(client: httpx2.Client) -> None:
    reply = embed(client, {"input": TEXTS, "model": "text-embedding-3-small"})
    found = reply.json()
    assert reply.status_code == 200 and found.keys() == {"object", "data", "model", "usage"}
    assert (found["object"], found["model"]) == ("list", "model")
    assert found["usage"] == {"prompt_tokens": 21, "total_tokens": 21}
    expected = client.post("/", json={"inputs": TEXTS, "normalize": True}).json()
    for index, (one, vector) in enumerate(zip(found["data"], expected, strict=True)):
        assert (one["object"], one["index"]) == ("embedding", index)
        np.testing.assert_allclose(one["embedding"], vector, atol=1e-6)
    assert "model;dur=" in reply.headers["server-timing"]


@pytest.mark.parametrize("binary", [True, False], ids=["binary", "JSON"])
def test_vectors_are_a_tensor_of_the_open_inference_protocol(
    servers: dict[str, Server], client: httpx2.Client, binary: bool
) -> None:
    texts = tritonclient.http.InferInput("text", [len(TEXTS)], "BYTES")
    texts.set_data_from_numpy(np.array([text.encode() for text in TEXTS], object), binary)
    wanted = [tritonclient.http.InferRequestedOutput("answer", binary)]
    with tritonclient.http.InferenceServerClient(servers["embedder"].url.split("/")[2]) as triton:
        assert triton.get_model_metadata("model")["outputs"][0]["datatype"] == "FP32"
        answer = triton.infer("model", [texts], outputs=wanted, parameters={"normalize": True})
    expected = client.post("/", json={"inputs": TEXTS, "normalize": True}).json()
    assert answer.as_numpy("answer").dtype == np.float32
    np.testing.assert_allclose(answer.as_numpy("answer"), expected, atol=1e-6)


def test_text_alone_is_a_list_of_one(client: httpx2.Client) -> None:
    data = embed(client, {"input": TEXTS[0]}).json()["data"]
    assert [len(one["embedding"]) for one in data] == [32]


def test_base64_holds_the_very_float32(client: httpx2.Client) -> None:
    as_text = embed(client, {"input": TEXTS[0], "encoding_format": "base64"}).json()["data"][0]["embedding"]
    numbers = embed(client, {"input": TEXTS[0], "encoding_format": "float"}).json()["data"][0]["embedding"]
    assert np.array_equal(np.frombuffer(base64.b64decode(as_text), "<f4"), np.array(numbers, "f4"))


def test_token_ids_stand_for_a_text(client: httpx2.Client) -> None:
    ids = [101, 1037, 2158, 2003, 5983, 2833, 1012, 102]
    expected = embed(client, {"input": TEXTS[0]}).json()["data"][0]["embedding"]
    for given in (ids, [ids]):
        found = embed(client, {"input": given}).json()
        assert np.allclose(found["data"][0]["embedding"], expected, atol=1e-6)
        assert found["usage"]["prompt_tokens"] == len(ids)


def test_fewer_dimensions_are_the_first_ones_at_length_1(client: httpx2.Client) -> None:
    whole = np.array(embed(client, {"input": TEXTS[0]}).json()["data"][0]["embedding"])
    few = embed(client, {"input": TEXTS[0], "dimensions": 8}).json()["data"][0]["embedding"]
    np.testing.assert_allclose(few, whole[:8] / np.linalg.norm(whole[:8]), atol=1e-6)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ({}, '"input" must be a text, a list of 1 to 4 texts'),
        ({"input": []}, '"input" must be a text, a list of 1 to 4 texts'),
        ({"input": ["a"] * 5}, '"input" must be a text, a list of 1 to 4 texts'),
        ({"input": ["a", ""]}, 'input 1: "input" is empty'),
        ({"input": ["a", 1]}, 'input 1: "input" must be a text'),
        ({"input": [99999]}, "99999 is not a token of this model"),
        ({"input": "a", "encoding_format": "hex"}, '"encoding_format" must be "float" or "base64"'),
        ({"input": "a", "dimensions": 1536}, '"dimensions" must be a whole number from 1 to 32'),
        ({"input": "a", "temperature": 1}, '"temperature" is not a known field'),
        (["a"], "the JSON is not an object"),
    ],
)
def test_what_makes_no_sense_is_a_400_in_openais_form(
    client: httpx2.Client, content: Any, sentence: str
) -> None:
    reply = embed(client, content)
    assert reply.status_code == 400 and sentence in openai_error(reply)


def test_too_many_tokens_are_rejected_in_openais_terms(client: httpx2.Client) -> None:
    reply = embed(client, {"input": ["a", LONG]})
    assert reply.status_code == 400
    assert openai_error(reply) == "input 1: the text has 702 tokens; send at most 512"


@pytest.mark.parametrize(
    ("body", "headers", "status"),
    [
        (b"{", {}, 400),
        (b"\xff", {}, 400),
        (b'{"input": "\\ud800"}', {}, 400),
        (b"x" * 2_000_000, {}, 413),
        (b"{}", {"Content-Encoding": "gzip"}, 415),
    ],
)
def test_body_that_cannot_be_read_is_rejected_in_openais_form(
    client: httpx2.Client, body: bytes, headers: dict[str, str], status: int
) -> None:
    reply = client.post("/v1/embeddings", content=body, headers=headers)
    assert reply.status_code == status and openai_error(reply)
    reply = client.get("/v1/embeddings")
    assert reply.status_code == 405 and openai_error(reply)


@pytest.mark.parametrize("ids", [[15339, 1917], [102, 101], [7592]])
def test_token_ids_of_another_tokenizer_are_rejected(client: httpx2.Client, ids: list[int]) -> None:
    """LangChain sends those of OpenAI unless told not to. Each is a word here, too, but another one."""
    reply = embed(client, {"input": ids})
    assert reply.status_code == 400 and "don't begin with [101]" in openai_error(reply)
    reply = client.post("/embed", json={"inputs": [ids]})
    assert reply.status_code == 422 and "don't begin with [101]" in reply.json()["error"]


def test_text_embeddings_inference_embeds(client: httpx2.Client) -> None:
    expected = client.post("/", json={"inputs": TEXTS, "normalize": True}).json()
    for inputs in (TEXTS, TEXTS[0], [101, 1037, 2158, 2003, 5983, 2833, 1012, 102]):
        reply = client.post("/embed", json={"inputs": inputs})
        assert np.allclose(reply.json(), expected[: len(reply.json())], atol=1e-6)
        assert len(reply.json()) == (3 if inputs is TEXTS else 1)
    assert "model;dur=" in reply.headers["server-timing"]
    raw = client.post("/embed", json={"inputs": TEXTS, "normalize": False}).json()
    assert np.allclose(raw, client.post("/", json={"inputs": TEXTS}).json(), atol=1e-6)
    assert not np.allclose(raw, expected, atol=1e-2)


@pytest.mark.parametrize("path", ["/", "/embed"])
def test_directions_of_truncation_may_be_capitalised(client: httpx2.Client, path: str) -> None:
    def cut(direction: str) -> Any:
        content = {"inputs": [LONG], "truncate": True, "truncation_direction": direction}
        return client.post(path, json=content).json()

    assert cut("Left") == cut("left") != cut("right") == cut("Right")


@pytest.mark.parametrize("version", ["1", "2"])
def test_cohere_embeds(client: httpx2.Client, version: str) -> None:
    expected = client.post("/embed", json={"inputs": TEXTS}).json()

    def ask(**more: Any) -> Any:
        reply = client.post(f"/v{version}/embed", json={"texts": TEXTS, "model": "embed-v4.0", **more})
        assert reply.status_code == 200, reply.text
        return reply.json()

    found = ask(input_type="search_document", embedding_types=["float", "base64"])
    np.testing.assert_allclose(found["embeddings"]["float"], expected, atol=1e-6)
    as_bytes = [np.frombuffer(base64.b64decode(one), "<f4") for one in found["embeddings"]["base64"]]
    np.testing.assert_allclose(as_bytes, expected, atol=1e-6)
    assert found["response_type"] == "embeddings_by_type" and found["texts"] == TEXTS
    assert found["meta"] == {"api_version": {"version": version}, "billed_units": {"input_tokens": 21}}
    plain = ask()
    assert plain["response_type"] == ("embeddings_floats" if version == "1" else "embeddings_by_type")
    vectors = plain["embeddings"] if version == "1" else plain["embeddings"]["float"]
    np.testing.assert_allclose(vectors, expected, atol=1e-6)
    asked = client.post("/embed", json={"inputs": TEXTS, "prompt_name": "query"}).json()
    assert ask(embedding_types=["float", "float"])["embeddings"].keys() == {"float"}
    found = ask(input_type="search_query", embedding_types=["float"])["embeddings"]["float"]
    np.testing.assert_allclose(found, asked, atol=1e-6)
    assert not np.allclose(found, expected, atol=1e-2)
    few = ask(output_dimension=8, embedding_types=["float"])["embeddings"]["float"]
    assert np.shape(few) == (3, 8)
    parts = [{"content": [{"type": "text", "text": text}]} for text in TEXTS]
    reply = client.post("/v2/embed", json={"inputs": parts, "model": "any"}).json()
    np.testing.assert_allclose(reply["embeddings"]["float"], expected, atol=1e-6)


def test_cohere_cuts_long_texts_as_told(client: httpx2.Client) -> None:
    def ask(**more: Any) -> Any:
        return client.post("/v2/embed", json={"texts": [LONG + "end"], "model": "any", **more})

    def cut(direction: str) -> Any:
        content = {"inputs": LONG + "end", "truncate": True, "truncation_direction": direction}
        return client.post("/embed", json=content).json()

    assert ask().json()["embeddings"]["float"] == cut("right")
    assert ask(truncate="END").json()["embeddings"]["float"] == cut("right")
    assert ask(truncate="START").json()["embeddings"]["float"] == cut("left") != cut("right")
    reply = ask(truncate="NONE")
    assert reply.status_code == 422 and "send at most 512" in reply.json()["error"]


@pytest.mark.parametrize(
    ("path", "content", "sentence"),
    [
        ("/embed", {}, '"inputs" must be a text'),
        ("/embed", {"inputs": []}, '"inputs" must be a text or a list of 1 to 4 texts'),
        ("/embed", {"inputs": ["a"] * 5}, '"inputs" must be a text or a list of 1 to 4 texts'),
        ("/embed", {"inputs": "a", "normalize": 1}, '"normalize" must be true or false'),
        ("/embed", {"inputs": "a", "encoding_format": "float"}, '"encoding_format" is not a known field'),
        ("/v2/embed", {}, '"texts" is missing'),
        ("/v2/embed", {"texts": ["a"], "inputs": []}, "send one of them"),
        ("/v2/embed", {"texts": "a"}, '"texts" must be a list of 1 to 4 texts'),
        ("/v2/embed", {"texts": ["a", 1]}, 'input 1: "inputs" must be a text'),
        ("/v2/embed", {"inputs": [{"content": []}]}, 'each of "inputs" must be {"content"'),
        ("/v2/embed", {"texts": ["a"], "embedding_types": ["int8"]}, '"embedding_types" must be a list of'),
        ("/v2/embed", {"texts": ["a"], "embedding_types": [[]]}, '"embedding_types" must be a list of'),
        ("/v2/embed", {"texts": ["a"], "embedding_types": ["float"] * 3}, '"embedding_types" must be a list'),
        ("/v2/embed", {"texts": ["a"], "input_type": "image"}, '"input_type" must be one of search_query'),
        ("/v2/embed", {"texts": ["a"], "input_type": []}, '"input_type" must be one of search_query'),
        ("/v2/embed", {"texts": ["a"], "truncate": "MIDDLE"}, '"truncate" must be one of NONE, START, END'),
        ("/v2/embed", {"texts": ["a"], "output_dimension": 33}, '"dimensions" must be a whole number'),
        ("/v1/embed", {"images": ["data:image/png;base64,"]}, '"images" is not supported'),
        ("/v2/embed", {"texts": ["a"], "max_tokens": 8}, '"max_tokens" is not supported'),
    ],
)
def test_embedding_request_that_makes_no_sense_is_a_400(
    client: httpx2.Client, path: str, content: Any, sentence: str
) -> None:
    reply = client.post(path, json=content)
    assert reply.status_code == 400 and sentence in reply.json()["error"], reply.text


@pytest.mark.parametrize(
    ("path", "content", "known"),
    [
        ("/v1/embeddings", {"input": "a"}, openai.FIELDS),
        ("/embed", {"inputs": "a"}, embed_api.TEI_FIELDS),
        ("/v1/embed", {"texts": ["a"]}, embed_api.COHERE_FIELDS),
        ("/v2/embed", {"texts": ["a"]}, embed_api.COHERE_FIELDS),
        ("/rerank", {"query": "a", "texts": ["b"]}, rerank.FIELDS),
        ("/v2/rerank", {"query": "a", "documents": ["b"]}, rerank.FIELDS),
    ],
)
def test_every_field_may_be_null(
    client: httpx2.Client, rank: httpx2.Client, path: str, content: Any, known: dict[str, str]
) -> None:
    server = rank if "rank" in path else client
    reply = server.post(path, json=dict.fromkeys(known) | {"another": None} | content)
    assert reply.status_code == 200, reply.text


def test_its_requests_have_ids_and_are_counted(client: httpx2.Client, servers: dict[str, Server]) -> None:
    name = 'model_requests_total{status="200"}'
    before = float(metric(servers["embedder"], "model_requests_total"))
    assert embed(client, {"input": "a"}, **{"X-Request-ID": "mine"}).headers["x-request-id"] == "mine"
    assert metric(servers["embedder"], "model_requests_total") == before + 1
    assert name in client.get("/metrics").text


def test_model_is_listed_by_its_name(client: httpx2.Client) -> None:
    (model,) = client.get("/v1/models").json()["data"]
    assert (model["id"], model["object"]) == ("model", "model") and model["created"] > 1.7e9


def test_model_of_token_vectors_has_no_embeddings(servers: dict[str, Server]) -> None:
    with httpx2.Client(base_url=servers["token vectors"].url) as client:
        for reply in (embed(client, {"input": "a"}), client.get("/v1/models")):
            assert reply.status_code == 404
            assert "serve a sentence-transformers model" in openai_error(reply)
        assert client.post("/rerank", json={}).status_code == 404


def test_web_process_of_an_embedder_has_no_torch(servers: dict[str, Server]) -> None:
    web, *others = servers["embedder"].processes()
    for process, expected in ((web, False), (max(others, key=lambda one: one.memory_info().rss), True)):
        assert any("libtorch" in file.path for file in process.memory_maps()) == expected


@pytest.fixture
def stopped(client: httpx2.Client, servers: dict[str, Server]) -> Iterator[Future[httpx2.Response]]:
    """The embedder's model does nothing any more; what 8 texts get that wait for it, once it goes on."""
    children = psutil.Process(servers["embedder"].process.pid).children()
    for child in children:
        child.send_signal(signal.SIGSTOP)
    with ThreadPoolExecutor(3) as crowd:
        try:
            for _ in range(2):
                waiting = crowd.submit(embed, client, {"input": ["a"] * 4})
            waiting = crowd.submit(embed, client, {"input": ["a"] * 4})
            until(lambda: client.get("/health").json()["queue_depth"] == 8)
            yield waiting
        finally:
            for child in children:
                child.send_signal(signal.SIGCONT)


def test_no_room_is_a_503_with_the_time_to_wait(client: httpx2.Client, stopped: Any) -> None:
    reply = embed(client, {"input": ["a", "b"]})
    assert reply.status_code == 503 and "retry after the time that comes with this error" in openai_error(
        reply
    )
    assert int(reply.headers["retry-after"]) >= 1


def test_too_late_is_a_504(client: httpx2.Client, servers: dict[str, Server]) -> None:
    reply = embed(client, {"input": "a"}, Prefer="wait=0")
    assert reply.status_code == 504 and "allow more time" in openai_error(reply)


def test_texts_are_ranked_as_text_embeddings_inference_does(rank: httpx2.Client) -> None:
    content = {"query": "Where is Zürich?", "texts": TEXTS}
    scores = rank.post("/", json={"inputs": [{"query": content["query"], "text": text} for text in TEXTS]})
    best = sorted(enumerate(scores.json()), key=lambda one: -one[1])
    reply = rank.post("/rerank", json=content)
    assert reply.json() == [{"index": index, "score": pytest.approx(score)} for index, score in best]
    assert "model;dur=" in reply.headers["server-timing"]
    reply = rank.post("/rerank", json=content | {"return_text": True, "raw_scores": True})
    found = reply.json()
    assert [one["text"] for one in found] == [TEXTS[index] for index, _ in best]
    sigmoids = [1 / (1 + np.exp(-one["score"])) for one in found]
    np.testing.assert_allclose(sigmoids, [score for _, score in best], atol=1e-6)


@pytest.mark.parametrize("path", ["/rerank", "/v1/rerank", "/v2/rerank"])
def test_documents_are_ranked_as_cohere_and_jina_do(rank: httpx2.Client, path: str) -> None:
    content = {"model": "rerank-v3.5", "query": "Where is Zürich?", "documents": TEXTS}
    best = rank.post("/rerank", json={"query": content["query"], "texts": TEXTS}).json()
    found = rank.post(path, json=content).json()
    expected = [{"index": one["index"], "relevance_score": pytest.approx(one["score"])} for one in best]
    assert found["results"] == expected and found["model"] == "reranker"
    assert found["usage"]["total_tokens"] == found["usage"]["prompt_tokens"] > 20
    documents = [{"text": text} for text in TEXTS]
    found = rank.post(path, json=content | {"documents": documents, "top_n": 2, "return_documents": True})
    assert [one["document"] for one in found.json()["results"]] == [
        documents[one["index"]] for one in best[:2]
    ]


def test_long_documents_are_cut_and_long_texts_only_where_asked_for(rank: httpx2.Client) -> None:
    reply = rank.post("/rerank", json={"query": "a", "texts": ["b", LONG]})
    assert (reply.status_code, reply.json().keys()) == (422, {"error"})
    assert reply.json()["error"].startswith("input 1: the text has 704 tokens; send at most 512")
    cut = rank.post("/rerank", json={"query": "a", "texts": ["b", LONG], "truncate": True}).json()
    found = rank.post("/rerank", json={"query": "a", "documents": ["b", LONG]}).json()["results"]
    assert [one["relevance_score"] for one in found] == pytest.approx([one["score"] for one in cut])


# What clients send: their own fields, and null for what they leave open.
COHERE = {"model": "rerank-v3.5", "query": "Where is Zürich?", "documents": TEXTS}
RANKINGS = {
    "cohere v2": COHERE | {"top_n": 3, "max_tokens_per_doc": 4096, "priority": 0},
    "cohere v1": COHERE | {"return_documents": False, "max_chunks_per_doc": 10, "rank_fields": ["text"]},
    "LangChain's CohereRerank": COHERE | {"top_n": 3, "max_tokens_per_doc": None},
    "LlamaIndex's CohereRerank": COHERE | {"top_n": 3},
    "Haystack's CohereRanker": COHERE | {"top_n": 3, "max_tokens_per_doc": 4096},
    "LiteLLM cohere/": COHERE
    | {"top_n": None, "rank_fields": None, "return_documents": True, "max_chunks_per_doc": None},
    "LiteLLM jina_ai/": COHERE | {"top_n": 3, "return_documents": True},
    "an unknown field that is not given": COHERE | {"foo": None},
}


@pytest.mark.parametrize("content", RANKINGS.values(), ids=RANKINGS)
def test_every_field_that_cohere_clients_send_is_taken(rank: httpx2.Client, content: Any) -> None:
    best = [
        one["index"] for one in rank.post("/rerank", json={"query": content["query"], "texts": TEXTS}).json()
    ]
    reply = rank.post("/v2/rerank", json=content)
    assert reply.status_code == 200, reply.text
    assert [one["index"] for one in reply.json()["results"]] == best


@pytest.mark.parametrize("direction", ["Left", "Right", "left", "right", None])
def test_every_field_of_text_embeddings_inference_is_taken(rank: httpx2.Client, direction: Any) -> None:
    """As LiteLLM's huggingface/ sends it: capitalised, as that server knows it only."""
    content = {
        "query": "a",
        "texts": ["b", LONG],
        "raw_scores": False,
        "return_text": False,
        "truncate": True,
    }
    reply = rank.post("/rerank", json=content | {"truncation_direction": direction})
    assert reply.status_code == 200 and len(reply.json()) == 2


def test_documents_are_cut_to_so_many_tokens(rank: httpx2.Client) -> None:
    def scores(**content: Any) -> list[float]:
        found = rank.post("/rerank", json={"query": "a", **content}).json()["results"]
        return [one["relevance_score"] for one in sorted(found, key=lambda one: one["index"])]

    expected = scores(documents=["of the old house", TEXTS[1]])
    assert scores(documents=[LONG, TEXTS[1]], max_tokens_per_doc=4) == pytest.approx(expected)


def test_documents_with_fields_are_ranked_by_those_named(rank: httpx2.Client) -> None:
    documents = [{"title": TEXTS[0], "body": TEXTS[1], "id": "1"}, {"title": TEXTS[2]}]
    found = rank.post(
        "/rerank", json={"query": "a", "documents": documents, "rank_fields": ["body", "title"]}
    )
    plain = [f"{TEXTS[1]}\n{TEXTS[0]}", TEXTS[2]]
    assert (
        found.json()["results"]
        == rank.post("/rerank", json={"query": "a", "documents": plain}).json()["results"]
    )


@pytest.mark.parametrize("document", [{}, {"title": "a"}, {"text": 1}])
def test_document_without_a_text_in_its_fields_is_a_422_that_names_them(
    rank: httpx2.Client, document: Any
) -> None:
    reply = rank.post("/v1/rerank", json={"query": "a", "documents": ["b", document]})
    assert reply.status_code == 422 and 'no text in the field "text" of a document' in reply.json()["error"]


def test_scores_that_all_round_to_1_or_0_are_still_in_order() -> None:
    """The answers are raw scores: as float32, all that are above 17 would be 1.0."""
    raw = [23.43, 25.51, 23.5, 25.1, -200.0, 24.2, -110.0]

    async def ask(*_: Any) -> Any:
        return [Answer(one, 0, 0, 1, "full") for one in raw], 7

    async def run(context: Any, n_bytes: int, work: Any, *_: Any) -> Any:
        return work()

    async def read(request: Any) -> bytes:
        return json.dumps({"query": "a", "documents": ["b"] * 7, "top_n": 5}).encode()

    score = text_ranking.Task.score
    task = SimpleNamespace(activation=text_ranking.SIGMOID)
    task.score = partial(score, task)
    service = SimpleNamespace(
        settings=Settings(),
        task=task,
        ask=ask,
        checks=SimpleNamespace(run=run),
        in_flight=SimpleNamespace(read=read),
    )
    request = Request({"type": "http", "headers": [], "state": {"service": service}})
    reply = json.loads(bytes(asyncio.run(rerank.rerank(request)).body))
    assert [one["index"] for one in reply["results"]] == [1, 3, 5, 2, 0]


def test_vector_that_is_not_finite_is_rejected_in_every_form() -> None:
    for value in (np.nan, np.inf):
        vector = np.array([1, value], "f4")
        for form in ("float", "base64"):
            with pytest.raises(ModelFailed):
                AnswerResponse([], openai.encoded(vector, form))


@pytest.mark.parametrize("extra", [{"user": "me"}, {"user": None, "dimensions": None}, {"foo": None}])
def test_every_field_that_openai_clients_send_is_taken(client: httpx2.Client, extra: dict[str, Any]) -> None:
    reply = embed(client, {"input": TEXTS, "model": "any", "encoding_format": "base64", **extra})
    assert reply.status_code == 200, reply.text


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ({"query": "a"}, '"documents" must be a list of 1 to 4 texts'),
        ({"query": "a", "texts": []}, '"texts" must be a list of 1 to 4 texts'),
        ({"query": "a", "texts": ["b"] * 5}, '"texts" must be a list of 1 to 4 texts'),
        ({"texts": ["b"]}, '"query" must be a text'),
        ({"query": "a", "texts": ["b"], "documents": ["c"]}, 'there are "texts" and "documents"; send one'),
        ({"query": "a", "texts": ["b", 1]}, 'input 1: "text" must be a text'),
        ({"query": "a", "texts": ["b"], "top_n": 0}, '"top_n" must be a whole number of at least 1'),
        (
            {"query": "a", "texts": ["b"], "max_tokens_per_doc": 0},
            '"max_tokens_per_doc" must be a whole number',
        ),
        (
            {"query": "a", "documents": [{"a": "b"}], "rank_fields": "a"},
            '"rank_fields" must be a list of names',
        ),
        ({"query": "a", "texts": ["b"], "raw_scores": 1}, '"raw_scores" must be true or false'),
        ({"query": "a", "texts": ["b"], "top_k": 1}, '"top_k" is not a known field'),
    ],
)
def test_invalid_ranking_is_a_400(rank: httpx2.Client, content: Any, sentence: str) -> None:
    reply = rank.post("/rerank", json=content)
    assert reply.status_code == 400 and sentence in reply.json()["error"]
