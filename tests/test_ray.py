"""unshare -rnpf --kill-child --mount-proc sh -c 'ip link set lo up; exec python -m pytest -m slow -s tests/test_ray.py'

Ray Serve: the contract's own tests, and what dies, restarts or comes under load, with counts. It needs
deploy/ray/requirements.txt, and a network of its own: Ray listens on all addresses.
"""

import contextlib
import json
import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from conftest import MODEL
from test_cluster import statuses, steady
from test_contract import (  # noqa: F401
    is_own,
    numbered,
    test_answer_says_where_the_time_went,
    test_chunked_body_is_read,
    test_client_may_shorten_its_deadline,
    test_client_that_leaves_frees_its_place,
    test_health_answers_while_the_model_runs,
    test_hugging_face_client_just_works,
    test_json_takes_top_k_and_targets,
    test_many_at_once_each_get_their_own_answer,
    test_metrics_count_requests_by_status,
    test_poison_fails_alone_and_its_neighbours_get_answers,
    test_raw_text_gets_what_the_plain_pipeline_answers,
    test_ready_once_the_model_is_loaded,
    test_request_id_is_taken_over_or_made,
    test_stalled_bodies_get_408_and_hold_nobody_up,
    test_too_much_work_gets_503_with_retry_after,
    test_two_masks_get_a_list_for_each,
    test_wrong_input_is_rejected_with_a_sentence,
)

from loadtests.modes import ROOT, Server
from loadtests.ray.cluster import Cluster, nodes, obstacle
from tests.support.client import PARIS, SLOW, Crowd, Reply, get, metric, post, post_json, request, say, until
from tests.support.gated_model import check_that_items_pass

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(obstacle()), reason=obstacle())]

# CLUSTER_MODEL=models/minilm-mlm takes the bundled model in its place.
STAND_IN = {
    "MODEL": os.environ.get("CLUSTER_MODEL", "tests.support.fake_models:FillMask"),
    "MAX_BODY_BYTES": "16384",
}
# What the contract's tests ask of the servers of these names.
APPS = {
    "real": {"MODEL": str(MODEL), "TORCH_THREADS": "1", "BODY_TIMEOUT_S": "1"},
    "server": {"MAX_QUEUE": "1", "BODY_TIMEOUT_S": "1"},
    "sick": {"BATCH_SIZE": "4", "FIXED_DELAY_MS": "500", "DEADLINE_S": "20"},
    "spawning": {"OFFLOAD": "process", "DEADLINE_S": "20", "BODY_TIMEOUT_S": "60", "HANG_S": "5"},
    "streaming": {"MODEL": "tests.support.gated_model:Gated"},
}


@pytest.fixture(scope="module")
def bare() -> Iterator[tuple[Cluster, Reply]]:
    """Two nodes behind HAProxy, and what it says before anything is served."""
    with nodes(2) as cluster:
        yield cluster, post(cluster, PARIS, X_Request_ID="mine-1")


@pytest.fixture(scope="module")
def cluster(bare: tuple[Cluster, Reply]) -> Cluster:
    """Two replicas at /."""
    bare[0].deploy(**STAND_IN, REPLICAS="2")
    return bare[0]


def app(name: str, prefix: str, env: dict[str, str], **model: int) -> dict[str, Any]:
    """What a config file of Serve says of it."""
    return {
        "name": name,
        "route_prefix": prefix,
        "import_path": "deploy.ray.serve:app",
        "runtime_env": {"env_vars": STAND_IN | env},
        "deployments": [{"name": "Model", **model}],
    }


def deploy(cluster: Cluster, folder: Path, *applications: dict[str, Any]) -> None:
    """Serve these, by a config file."""
    config = folder / "serve.yaml"
    config.write_text(json.dumps({"applications": applications}))
    cluster.call(f"serve run --non-blocking {config}")


@pytest.fixture(scope="module")
def apps(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Server]:
    """The servers that the contract's tests ask, beside each other."""
    folder = tmp_path_factory.mktemp("serve")
    deploy(cluster, folder, *(app(name, f"/{name}", {"REPLICAS": "1"} | env) for name, env in APPS.items()))
    servers = {name: replace(cluster, url=f"{cluster.url}{name}/") for name in APPS}
    for server in servers.values():
        until(lambda server=server: get(server, "/ready").status == 200, 120)
    return servers


@pytest.fixture
def mode() -> str:
    return "ray"


def served(name: str) -> Any:
    """The fixture of this name: its server."""

    @pytest.fixture(name=name)
    def one(apps: dict[str, Server]) -> Server:
        return apps[name]

    return one


real, server, sick, spawning, streaming = map(served, APPS)


# --- what it adds to the contract's own tests, and what it takes away ----------------------------------------------------


def test_each_reply_has_one_id(cluster: Cluster) -> None:
    for reply, status in (
        (post(cluster, PARIS, X_Request_ID="mine-1"), 200),
        (post(cluster, ""), 400),
        (get(cluster, "/nothing"), 404),
        (say(cluster, request("PUT", "/")), 405),
    ):
        assert reply.status == status
        assert len(reply.headers.get_all("X-Request-ID") or []) == 1, reply
        assert reply.error if status != 200 else reply.headers["X-Request-ID"] == "mine-1"


def test_haproxys_own_errors_are_in_the_contracts_form(bare: tuple[Cluster, Reply]) -> None:
    reply = bare[1]
    assert reply.status == 404
    assert reply.error
    assert reply.headers.get_all("X-Request-ID") == ["mine-1"]


def test_first_item_passes_ray_before_there_is_a_second(streaming: Server, tmp_path: Path) -> None:
    check_that_items_pass(streaming.url, tmp_path / "gate")


def test_each_replicas_own_numbers_can_be_scraped(cluster: Cluster, crowd: Crowd) -> None:
    for reply in crowd.post(cluster, *[PARIS] * 50):
        assert reply.result().status == 200
    told = cluster.call("python -m deploy.ray.targets")
    (group,) = (group for group in json.loads(told) if group["labels"]["application"] == "default")
    replicas = [replace(cluster, url=f"http://{target}/") for target in group["targets"]]
    assert group["labels"]["__metrics_path__"] == "/metrics"
    assert len(replicas) == 2
    counts = [metric(replica, 'model_requests_total{status="200"}') for replica in replicas]
    assert all(counts)
    assert sum(counts) >= 50


@pytest.fixture(scope="module")
def models(cluster: Cluster) -> dict[str, Server]:
    """The servers of deploy/ray/serve.yaml by name."""
    cluster.call("serve run --non-blocking deploy/ray/serve.yaml")
    names = ("iris", "fill-mask-1", "fill-mask-2", "fill-mask")
    servers = {name: replace(cluster, url=f"{cluster.url}m/{name}/") for name in names}
    for server in servers.values():
        until(lambda server=server: get(server, "/ready").status == 200, 120)
    return servers


def test_several_models_by_name(models: dict[str, Server]) -> None:
    flower = {"sepal_length": 5.1, "sepal_width": 3.5, "petal_length": 1.4, "petal_width": 0.2}
    assert post_json(models["iris"], {"inputs": flower}).json["species"] == "setosa"
    reply = say(models["iris"], request("POST", "/m/fill-mask-1", PARIS.encode()))
    assert reply.json[0]["token_str"] == "capital"


def test_new_version_gets_its_share(models: dict[str, Server], crowd: Crowd) -> None:
    def asked(name: str) -> float:
        return metric(models[name], 'model_requests_total{status="200"}')

    before = asked("fill-mask-2")
    replies = [reply.result() for reply in crowd.post(models["fill-mask"], *[PARIS] * 300)]
    assert {reply.json[0]["token_str"] for reply in replies if reply.status == 200} == {"capital"}
    assert 5 < asked("fill-mask-2") - before < 60, "a tenth; beyond that once in a million times"
    assert post(models["fill-mask"], "").error
    assert (reply := post(models["fill-mask"], PARIS, X_Request_ID="mine-1")).status == 200
    assert reply.headers.get_all("X-Request-ID") == ["mine-1"]
    assert reply.headers["Server-Timing"]


def test_shadow_traffic_is_answered_to_nobody(
    models: dict[str, Server], cluster: Cluster, tmp_path: Path
) -> None:
    """It understands none of them."""
    config = yaml.safe_load((ROOT / "deploy" / "ray" / "serve.yaml").read_text())
    config["applications"][0]["args"] = {"shares": {"fill-mask-1": 1}, "shadow": "iris"}
    deploy(cluster, tmp_path, *config["applications"])
    refused = metric(models["iris"], 'model_requests_total{status="422"}')

    def instances() -> float:
        assert post(models["fill-mask"], PARIS).json[0]["token_str"] == "capital"
        return metric(models["iris"], 'model_requests_total{status="422"}') - refused

    until(lambda: instances() > 20)


# --- what comes and goes -------------------------------------------------------------------------------------------------


def tell(what: str, replies: list[Reply]) -> None:
    """Say what came of the requests; fail unless each got its answer."""
    took_s = sorted(reply.took_s for reply in replies)
    answered = statuses(replies).get(200, 0)
    print(
        f"\n{what}: {answered} of {len(replies)} answered,"
        f" p99 {took_s[int(0.99 * len(took_s))]:.2f} s, slowest {took_s[-1]:.2f} s"
    )
    assert answered == len(replies), statuses(replies)


def until_running(cluster: Cluster, n: int, without: set[int]) -> set[int]:
    """Wait until so many run, none of those among them; return them."""
    return until(lambda: len(now := cluster.running()) == n and not now & without and now, 120)


def test_killed_replica_costs_nobody_an_answer_and_is_replaced(cluster: Cluster, crowd: Crowd) -> None:
    dead: set[int] = set()
    with steady(cluster, crowd) as replies:
        for _ in range(2):
            victim = min(until_running(cluster, 2, dead))
            os.kill(victim, signal.SIGKILL)
            dead.add(victim)
        until_running(cluster, 2, dead)
    tell("kill -9 of a replica, twice", replies)


def test_rolling_redeployment_costs_nobody_an_answer(cluster: Cluster, crowd: Crowd) -> None:
    old = cluster.running()
    with steady(cluster, crowd) as replies:
        cluster.deploy(**STAND_IN, REPLICAS="2", MAX_QUEUE="200")
        until_running(cluster, 2, old)
        until(lambda: not any(map(psutil.pid_exists, old)))
    tell("rolling redeployment", replies)


def test_replica_more_and_one_fewer_cost_nobody_an_answer(
    cluster: Cluster, crowd: Crowd, tmp_path: Path
) -> None:
    old = cluster.running()
    deploy(cluster, tmp_path, app("default", "/", {}, num_replicas=2))
    two = until_running(cluster, 2, old)
    with steady(cluster, crowd) as replies:
        deploy(cluster, tmp_path, app("default", "/", {}, num_replicas=3))
        three = until_running(cluster, 3, set())
        deploy(cluster, tmp_path, app("default", "/", {}, num_replicas=2))
        until(lambda: sum(map(psutil.pid_exists, three)) == 2)
    assert two < three, "those that ran went on"
    tell("from two replicas to three and back", replies)


def test_killed_node_costs_nobody_an_answer(cluster: Cluster, crowd: Crowd, tmp_path: Path) -> None:
    """All of its processes at once, as when its plug is pulled."""
    deploy(cluster, tmp_path, app("default", "/", {}, num_replicas=4))
    until_running(cluster, 4, set())
    raylets = [one for one in cluster.processes() if one.name() == "raylet"]
    second = max(raylets, key=psutil.Process.create_time)
    with steady(cluster, crowd) as replies:
        victims = [second, *second.children(recursive=True)]
        lost = {one.pid for one in victims} & cluster.running()
        assert lost, "it has some"
        for victim in victims:
            with contextlib.suppress(psutil.Error):
                victim.kill()
        until_running(cluster, 4, lost)
    tell("kill -9 of a node", replies)


def test_end_of_serve_answers_admitted_requests(cluster: Cluster, crowd: Crowd) -> None:
    """The last test."""
    texts = numbered(24, SLOW)
    replies = crowd.post(cluster, *texts)
    until(lambda: any(reply.done() for reply in replies))
    cluster.call("serve shutdown -y")
    for i, reply in enumerate(replies):
        assert reply.result().status == 200, reply.result()
        assert is_own(i, reply.result().json)
    print(f"\nserve shutdown: {len(replies)} of {len(replies)} answered")
