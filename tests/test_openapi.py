"""The contract that machines read, put to the test by schemathesis: all that it allows and forbids is so."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import MODEL

import workers
from loadtests.modes import MODES, ROOT, Server, start
from tests.support.client import get, post_json, request, say
from tests.support.embedding_models import sentence_model, small_bert

ECHO = "tests.support.fake_models:Obedient"  # it takes any JSON
CONFIG = ROOT / "tests" / "schemathesis.toml"
KEY = """
[auth.openapi.header]
api_key = "a-key-0123"
"""
EMBEDDED = pytest.param(str(MODEL), 30, marks=pytest.mark.slow)


@pytest.mark.parametrize(("model", "examples"), [(ECHO, 15), EMBEDDED], ids=["echo", "embedded"])
@pytest.mark.parametrize("mode", ["thread", pytest.param("gthread-1x8", marks=pytest.mark.slow)])
def test_schemathesis_finds_nothing(mode: str, model: str, examples: int) -> None:
    with start(MODES[mode], {"MODEL": model}) as server:
        find_nothing(examples, server.url + "openapi.json")


@pytest.mark.slow
@pytest.mark.parametrize(("task", "paths"), [("feature-extraction", "embed"), ("text-ranking", "rerank$")])
def test_schemathesis_finds_nothing_in_the_other_protocols(tmp_path: Path, task: str, paths: str) -> None:
    """Embeddings, reranking."""
    model = tmp_path / "model"
    if task == "text-ranking":
        small_bert(model, "ForSequenceClassification", num_labels=1)
    else:
        sentence_model(tmp_path)
    with start(MODES["thread"], {"MODEL": str(model), "TASK": task}) as server:
        find_nothing(15, server.url + "openapi.json", "--include-path-regex", paths)


def test_schemathesis_finds_nothing_behind_a_key(tmp_path: Path) -> None:
    config, contract = tmp_path / "schemathesis.toml", tmp_path / "openapi.json"
    config.write_text(CONFIG.read_text() + KEY)
    with start(MODES["thread"], {"MODEL": ECHO, "API_KEY": "a-key-0123"}) as server:
        contract.write_bytes(say(server, request("GET", "/openapi.json", x_api_key="a-key-0123")).body)
        find_nothing(15, str(contract), "--url", server.url, config=config)


def find_nothing(examples: int, *where: str, config: Path = CONFIG) -> None:
    program = [str(Path(sys.executable).parent / "st"), "--config-file", str(config)]
    options = ["--checks", "all", "--max-examples", str(examples), "--seed", "1", "--no-color"]
    found = subprocess.run([*program, "run", *where, *options], capture_output=True, text=True, timeout=300)
    assert found.returncode == 0, found.stdout


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with start(MODES["thread"], {"MODEL": ECHO, "PAGE": "0"}) as server:
        yield server


def test_info_says_what_is_served_and_no_path() -> None:
    with start(MODES["thread"], {"MODEL": str(MODEL), "MAX_TOKENS": "100"}) as server:
        reply = get(server, "/info")
        said = reply.json
        assert post_json(server, said["example"]).status == 200
    assert said["version"] == workers.__version__
    assert (said["task"], said["model"]) == ("fill-mask", {"name": "minilm-mlm", "revision": None})
    assert (said["dtype"], said["device"]) == ("float32", "cpu")
    assert said["limits"]["MAX_TOKENS"] == 100
    assert said["settings"]["BATCH_SIZE"] == 1
    assert "/" not in reply.body.decode()


def test_every_status_is_said_and_every_error_has_the_one_form(server: Server) -> None:
    asked = get(server, "/openapi.json").json["paths"]["/"]["post"]["responses"]
    assert {int(s) for s in asked} == {200, 400, 403, 408, 413, 415, 422, 431, 500, 503, 504}
    schemas = {
        status: said["content"]["application/json"] for status, said in asked.items() if status != "200"
    }
    assert all(schema == {"schema": {"$ref": "#/components/schemas/Error"}} for schema in schemas.values())


def test_without_the_page_there_is_none(server: Server) -> None:
    assert get(server, "/").status == 405
    assert get(server, "/").headers["Allow"] == "POST"
    assert get(server, "/live").status == get(server, "/docs").status == 404
    assert "/docs" not in get(server, "/openapi.json").json["paths"]
