"""The contract, for any task, in every deployment mode: answers, lists, refusals.

A mode knows no task. So every one is served in a process, to which queries and answers are sent (in a thread it is by
test_real_clients.py), and in the other modes a text's label, a vector and a class of one's own.
"""

import contextlib
import json
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import jsonschema
import pytest
from test_real_clients import MADE, alike

from loadtests.modes import MODES, Server, start
from tests.support.client import Crowd, get, post_json
from tests.support.mode_matrix import TESTED
from workers import tasks
from workers.settings import Settings
from workers.web.replies import rendered

pytestmark = pytest.mark.slow
MADE = {**MADE, "own class": lambda _: "models.iris:Iris"}
SOME = ["text-classification", "feature-extraction", "own class"]
SERVED = {mode: list(MADE) if mode == "process" else SOME for mode in (*TESTED, "process")}
NO_HAPROXY = pytest.mark.skipif(not shutil.which("haproxy"), reason="haproxy is not installed")


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """What each task's server is told."""
    made = {task: make(tmp_path_factory.mktemp("model")) for task, make in MADE.items()}
    return {
        task: {"MODEL": model, "TASK": "fill-mask" if task == "own class" else task, "TORCH_THREADS": "1"}
        for task, model in made.items()
    }


@pytest.fixture(
    scope="module",
    params=[pytest.param(mode, marks=NO_HAPROXY if mode == "haproxy-2" else ()) for mode in SERVED],
)
def servers(
    request: pytest.FixtureRequest, settings: dict[str, dict[str, str]]
) -> Iterator[dict[str, Server]]:
    with contextlib.ExitStack() as running, ThreadPoolExecutor() as crowd:
        found = {
            task: running.enter_context(
                start(MODES[request.param], {**settings[task], "BATCH_SIZE": "4"}, wait=False)
            )
            for task in SERVED[request.param]
        }
        list(crowd.map(Server.wait_until_ready, found.values()))
        yield found


@pytest.fixture(scope="module")
def alone(settings: dict[str, dict[str, str]]) -> Any:
    """What a task's model, which the other tests compare with its oracle, answers to an input alone."""

    @cache
    def load(task: str) -> Any:
        its = Settings(**settings[task] | {"TORCH_THREADS": 1})  # type: ignore[arg-type]
        made = tasks.make(its)
        return made, tasks.load(made, its)

    def answer(task: str, inputs: Any, parameters: dict[str, Any]) -> Any:
        made, model = load(task)
        (found,) = model([made.check(inputs, parameters).content])
        return json.loads(rendered(found))

    return answer, lambda task: load(task)[0].describe().example


def test_what_machines_read_allows_its_example_and_nothing_else(
    servers: dict[str, Server], alone: Any
) -> None:
    for task, server in servers.items():
        example = alone[1](task)
        asked = get(server, "/openapi.json").json["paths"]["/"]["post"]["requestBody"]["content"]
        schema = asked["application/json"]["schema"]
        for body in (example, {**example, "inputs": [example["inputs"]] * 3}):
            jsonschema.validate(body, schema)
        wrongs: list[Any] = [{}, {**example, "inputs": None}, {**example, "colour": "red"}]
        for wrong in wrongs[:1] if task == "own class" else wrongs:  # what else that takes only it knows
            with pytest.raises(jsonschema.ValidationError):
                jsonschema.validate(wrong, schema)
            assert post_json(server, wrong).status == 400


def test_answers_are_those_of_the_input_alone_singly_in_lists_and_under_concurrency(
    servers: dict[str, Server], alone: Any, crowd: Crowd
) -> None:
    answer, example_of = alone
    for task, server in servers.items():
        example = example_of(task)
        expected = answer(task, example["inputs"], example.get("parameters", {}))
        alike(post_json(server, example).json, expected)
        three = {**example, "inputs": [example["inputs"]] * 3}
        for reply in [crowd.submit(post_json, server, three) for _ in range(4)]:
            alike(reply.result().json, [expected] * 3)


def test_invalid_input_is_rejected_and_named(servers: dict[str, Server], alone: Any) -> None:
    for task, server in servers.items():
        example = alone[1](task)
        reply = post_json(server, {**example, "inputs": [example["inputs"], {"no such": "field"}]})
        assert reply.status in (400, 422) and reply.error.startswith("input 1: ")
        assert reply.headers["X-Request-ID"]
        reply = post_json(server, {**example, "parameters": {"no_such_parameter": 1}})
        assert reply.status in (400, 422) and reply.error
        assert get(server, "/health").json["status"] == "ok"
