"""Container, compose and Kubernetes agree with each other and with the app: images, ports, paths, settings, times."""

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from starlette.routing import Route

import server
from loadtests.modes import ROOT
from workers.settings import Settings

DEPLOY = ROOT / "deploy"
DOCKERFILE = (DEPLOY / "Dockerfile").read_text()
CORE = DEPLOY / "kubernetes" / "server.yaml"
COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
NOT_OURS = {"OMP_NUM_THREADS"}  # read by torch's own libraries
PATHS = {route.path for route in server.routes if isinstance(route, Route)}


def documents(path: Path) -> list[Any]:
    return list(yaml.safe_load_all(path.read_text()))


def tools(name: str) -> str:
    return str(Path(sys.executable).parent / name)


DEPLOYMENT, SERVICE, BUDGET, NETWORK = documents(CORE)
POD = DEPLOYMENT["spec"]["template"]["spec"]
(CONTAINER,) = POD["containers"]
ENV = {one["name"]: one.get("value", "a-key") for one in CONTAINER["env"]}
PORT = CONTAINER["ports"][0]["containerPort"]
IN_COMPOSE = COMPOSE["services"]["model"]


def told(env: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Settings:
    """The settings with this environment; fails at a name that is none of them, or a value that isn't allowed."""
    assert env.keys() <= Settings.__annotations__.keys() | NOT_OURS
    for name, value in env.items():
        monkeypatch.setenv(name, re.sub(r"\$\{\w+:-(.*)\}", r"\1", value))
    return Settings.read()


def test_kubernetes_knows_every_field() -> None:
    ended = subprocess.run(
        [tools("kubernetes-validate"), "--strict", str(CORE)], capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr


def test_hadolint_finds_nothing() -> None:
    if not shutil.which(tools("hadolint")):
        pytest.skip("hadolint has no wheel for this machine")
    ended = subprocess.run([tools("hadolint"), str(DEPLOY / "Dockerfile")], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout


def test_all_use_the_images_that_the_dockerfile_makes() -> None:
    made = re.findall(r"^# .*-t (\S+)", DOCKERFILE, re.MULTILINE)
    (ray,) = documents(DEPLOY / "kubernetes" / "ray.yaml")
    cluster = ray["spec"]["rayClusterConfig"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    images = {one["image"] for group in groups for one in group["template"]["spec"]["containers"]}
    assert made == [CONTAINER["image"], *images]
    assert IN_COMPOSE["image"] == CONTAINER["image"]
    build = IN_COMPOSE["build"]
    assert (DEPLOY / build["context"] / build["dockerfile"]).read_text() == DOCKERFILE
    pinned = (DEPLOY / "ray" / "requirements.txt").read_text()
    assert f"ray[serve]=={cluster['rayVersion']}" in pinned
    assert cluster["authOptions"] == {"mode": "token"}, "Ray's dashboard runs whatever it is sent"
    assert "import_path: deploy.ray.serve:app" in ray["spec"]["serveConfigV2"]


def test_ports_and_paths_are_the_apps() -> None:
    assert f"EXPOSE {PORT}\n" in DOCKERFILE and f'"--port", "{PORT}"' in DOCKERFILE
    assert re.findall(r"urlopen\('http://127\.0\.0\.1:(\d+)(.*?)'", DOCKERFILE) == [(str(PORT), "/health")]
    probes = [CONTAINER[f"{kind}Probe"]["httpGet"] for kind in ("startup", "readiness", "liveness")]
    assert [probe["path"] for probe in probes] == ["/ready", "/ready", "/health"]
    assert {probe["path"] for probe in probes} <= PATHS
    name = CONTAINER["ports"][0]["name"]
    ports = [probe["port"] for probe in probes] + [SERVICE["spec"]["ports"][0]["targetPort"]]
    assert {*ports, NETWORK["spec"]["ingress"][0]["ports"][0]["port"]} == {name}
    assert COMPOSE["services"]["haproxy"]["environment"]["REPLICAS_AT"] == f"model:{PORT}"
    (monitor,) = documents(DEPLOY / "kubernetes" / "prometheus.yaml")
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    assert endpoint["port"] == name and endpoint["path"] in PATHS


def test_who_selects_pods_selects_these() -> None:
    labels = DEPLOYMENT["spec"]["template"]["metadata"]["labels"]
    selectors = [
        DEPLOYMENT["spec"]["selector"]["matchLabels"],
        SERVICE["spec"]["selector"],
        BUDGET["spec"]["selector"]["matchLabels"],
        NETWORK["spec"]["podSelector"]["matchLabels"],
        POD["topologySpreadConstraints"][0]["labelSelector"]["matchLabels"],
        documents(DEPLOY / "kubernetes" / "prometheus.yaml")[0]["spec"]["selector"]["matchLabels"],
    ]
    assert all(selector == labels for selector in selectors)
    (scaled,) = documents(DEPLOY / "kubernetes" / "autoscale.yaml")
    assert scaled["spec"]["scaleTargetRef"]["name"] == DEPLOYMENT["metadata"]["name"]


def test_settings_are_known_and_leave_the_time_to_answer_what_is_admitted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = told(ENV, monkeypatch)
    pause_s = CONTAINER["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert settings.GRACE_S >= settings.DEADLINE_S
    assert POD["terminationGracePeriodSeconds"] > pause_s + settings.GRACE_S
    assert settings.API_KEY and settings.METRICS_OPEN
    # Cores are asked for as they are used: one an instance.
    assert CONTAINER["resources"]["requests"]["cpu"] == str(settings.INSTANCES * settings.TORCH_THREADS)
    assert ENV["OMP_NUM_THREADS"] == ENV["TORCH_THREADS"]


def test_composes_settings_are_known_and_leave_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = told(IN_COMPOSE["environment"], monkeypatch)
    assert int(IN_COMPOSE["stop_grace_period"].removesuffix("s")) > settings.GRACE_S
    assert settings.ALLOWED_HOSTS == "localhost,127.0.0.1" and settings.METRICS_OPEN


def test_compose_mounts_what_is_there_and_haproxy_reads_what_it_sets() -> None:
    for service in COMPOSE["services"].values():
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            assert (DEPLOY / source).exists() or source in COMPOSE["volumes"]
        assert {one["source"] for one in service.get("configs", [])} <= COMPOSE["configs"].keys()
    asked = set(re.findall(r"\$\{(\w+)|defined\((\w+)\)", (DEPLOY / "haproxy.cfg").read_text()))
    assert COMPOSE["services"]["haproxy"]["environment"].keys() <= {one or two for one, two in asked}
    published = [port for service in COMPOSE["services"].values() for port in service.get("ports", [])]
    assert published and all(port.startswith("127.0.0.1:") for port in published)


@pytest.mark.skipif(not shutil.which("haproxy"), reason="haproxy is not installed")
def test_haproxy_understands_its_configuration_as_compose_sets_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in COMPOSE["services"]["haproxy"]["environment"].items():
        monkeypatch.setenv(name, value)
    ended = subprocess.run(["haproxy", "-c", "-f", str(DEPLOY / "haproxy.cfg")], capture_output=True)
    assert ended.returncode == 0, ended.stderr


@pytest.mark.skipif(not shutil.which("promtool"), reason="prometheus is not installed")
def test_composes_prometheus_understands_its_configuration(tmp_path: Path) -> None:
    shutil.copy(DEPLOY / "monitoring" / "rules.yml", tmp_path)
    (tmp_path / "prometheus.yml").write_text(COMPOSE["configs"]["prometheus"]["content"])
    ended = subprocess.run(
        ["promtool", "check", "config", str(tmp_path / "prometheus.yml")], capture_output=True
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr


def test_image_has_all_that_git_has_of_the_app_and_nothing_else() -> None:
    ignored = (ROOT / ".dockerignore").read_text().split()
    sent = {line.removeprefix("!") for line in ignored if line.startswith("!")}
    copied = {
        source.removeprefix("./")
        for line in re.findall(r"^COPY (?!--from)(.*)", DOCKERFILE, re.MULTILINE)
        for source in line.split()[:-1]
    }
    assert ignored[ignored.index("*") :][0] == "*" and sent == copied
    assert all((ROOT / name).exists() for name in copied)


def test_last_stage_is_nobody_and_builds_nothing() -> None:
    last = DOCKERFILE.split("\nFROM ")[-1]
    assert re.search(r"^USER [1-9]\d+:", last, re.MULTILINE)
    assert POD["securityContext"]["runAsUser"] == int(re.findall(r"USER (\d+)", last)[0])
    assert not re.search(r"^RUN|pip|apt", last, re.MULTILINE)
    assert re.search(r"^CMD \[", last, re.MULTILINE), "a shell in between would keep SIGTERM for itself"
