"""What who is on call sees: metrics that are there, alerts that fire and say what to do, a dashboard without holes."""

import asyncio
import contextlib
import math
import os
import re
import resource
import shutil
import subprocess
import sys
import threading
import time
import urllib.error
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from deploy.monitoring import draw_dashboard, grafana
from loadtests.modes import MODES, ROOT, free_port, start
from tests.support.client import PARIS, POISON, Crowd, post, until
from workers.metrics import Metrics
from workers.observability import process_metrics as machine
from workers.service import Service
from workers.settings import Settings

DEPLOY = ROOT / "deploy"
RULES = [
    rule
    for group in yaml.safe_load((DEPLOY / "monitoring" / "rules.yml").read_text())["groups"]
    for rule in group["rules"]
]
ALERTS = [rule for rule in RULES if "alert" in rule]
FAKE_NVML = str(ROOT / "tests" / "support" / "fake_nvml")
promtool = pytest.mark.skipif(not shutil.which("promtool"), reason="prometheus is not installed")
needs_proc = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="only Linux tells")


def check(*arguments: str, text: bytes = b"") -> None:
    """Let promtool judge; its complaint is the failure's."""
    judged = subprocess.run(["promtool", *arguments], input=text, capture_output=True, cwd=ROOT)
    assert judged.returncode == 0, (judged.stdout + judged.stderr).decode()


def samples(metrics: Metrics) -> dict[str, float]:
    lines = [line for line in metrics.text().decode().splitlines() if not line.startswith("#")]
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}


# --- metrics ----------------------------------------------------------------------------------------------------------


@promtool
def test_prometheus_own_linter_finds_nothing_in_the_metrics(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(FAKE_NVML)
    monkeypatch.delitem(sys.modules, "pynvml", raising=False)

    async def text() -> bytes:
        service = Service(Settings(), Metrics())
        service.metrics.batch(1, "full", 0.1, [0.1])
        await service.process_metrics.sleep(0)
        return service.metrics.text()

    check("check", "metrics", text=asyncio.run(text()))


@needs_proc
def test_process_metrics_count_the_models_own_processes() -> None:
    child = subprocess.Popen([sys.executable, "-c", "x = bytearray(50_000_000)\nwhile True: pass"])
    try:
        until(lambda: psutil.Process(child.pid).memory_info().rss > 50e6)
        alone, both = Metrics(), Metrics()
        asyncio.run(machine.ProcessMetrics(alone, list).sleep(0))
        together = machine.ProcessMetrics(both, lambda: [child.pid])
        asyncio.run(together.sleep(0))
        assert (
            samples(both)["process_resident_memory_bytes"]
            > samples(alone)["process_resident_memory_bytes"] + 40e6
        )
        assert 3 <= samples(both)["process_open_fds"] < samples(both)["process_max_fds"]
        assert samples(both)["process_start_time_seconds"] == pytest.approx(time.time(), abs=60)
        used_s = samples(both)["process_cpu_seconds_total"]
        its_own_s = sum(psutil.Process(child.pid).cpu_times()[:2])
        until(lambda: sum(psutil.Process(child.pid).cpu_times()[:2]) > its_own_s + 0.1)
        together.poll_processes()
        assert samples(both)["process_cpu_seconds_total"] > used_s
    finally:
        child.kill()
        child.wait()
    used_s = samples(both)["process_cpu_seconds_total"]
    together.poll_processes()
    assert samples(both)["process_cpu_seconds_total"] >= used_s, "a counter never falls"


@needs_proc
def test_to_look_while_no_more_files_can_be_opened_does_not_end_the_server() -> None:
    looker = machine.ProcessMetrics(Metrics(), list)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        looker.poll_processes()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_blocked_event_loop_shows_in_its_lag() -> None:
    metrics = Metrics()
    looker = machine.ProcessMetrics(metrics, list)

    async def run() -> None:
        asyncio.get_running_loop().call_later(0.01, time.sleep, 0.3)
        await looker.sleep(0.02)

    asyncio.run(run())
    assert samples(metrics)["model_event_loop_lag_seconds_sum"] > 0.25


def test_every_gpu_is_measured_and_one_without_some_values_shows_the_rest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(FAKE_NVML)
    monkeypatch.delitem(sys.modules, "pynvml", raising=False)
    metrics = Metrics()
    asyncio.run(machine.ProcessMetrics(metrics, list).sleep(0))
    told = samples(metrics)
    assert told['gpu_busy_ratio{device="0"}'] == 0.4
    assert 'gpu_busy_ratio{device="1"}' not in told
    assert told['gpu_memory_used_bytes{device="1"}'] == 20e9 + 1


# --- alerts -----------------------------------------------------------------------------------------------------------


@promtool
@pytest.mark.parametrize(
    "what",
    [
        "check config deploy/monitoring/prometheus.yml",
        "check rules deploy/monitoring/rules.yml",
        "test rules tests/rules_test.yml",
    ],
)
def test_promtool_is_content(what: str) -> None:
    check(*what.split())


def test_every_alert_has_its_heading_that_says_what_to_do() -> None:
    text = (ROOT / "docs" / "alerts.md").read_text()
    sections = dict(re.findall(r"^## (\w+)\n\n(.+?)(?=\n\n## |\Z)", text, re.MULTILINE | re.DOTALL))
    assert sections.keys() == {alert["alert"] for alert in ALERTS}
    for alert in ALERTS:
        assert alert["annotations"]["runbook_url"] == f"docs/alerts.md#{alert['alert'].lower()}"
        assert len(sections[alert["alert"]]) > 100


def test_what_the_alerts_page_calls_a_panel_is_one() -> None:
    text = re.sub(r"<[^>]+>", "", (ROOT / "docs" / "alerts.md").read_text())  # the picture's tags quote files
    quoted = set(re.findall(r'"([^"]+)"', text))
    assert quoted, "it names panels"
    assert quoted <= {panel.title for panel in grafana.PANELS}


@promtool
def test_every_alert_fires_in_promtools_test() -> None:
    told = yaml.safe_load((ROOT / "tests" / "rules_test.yml").read_text())
    fired = {
        one["alertname"] for test in told["tests"] for one in test["alert_rule_test"] if one.get("exp_alerts")
    }
    assert fired == {alert["alert"] for alert in ALERTS}


# --- the dashboard ----------------------------------------------------------------------------------------------------


def test_dashboard_is_what_its_code_makes() -> None:
    assert grafana.FILE.read_text() == grafana.text(), "it is stale: python -m deploy.monitoring.grafana"


async def names(settings: Settings) -> set[str]:
    """The metrics of a server with these settings."""
    service = Service(settings, Metrics())
    return {name for names in service.metrics.registry._collector_to_names.values() for name in names}


def test_dashboard_and_rules_know_the_metrics_of_generated_texts_by_their_names() -> None:
    known = asyncio.run(names(Settings(TASK="text-generation")))
    mine = known - asyncio.run(names(Settings()))
    assert "model_time_to_first_token_seconds_bucket" in mine
    about_text = [
        *(expr for row in ROWS_OF_TEXTS for panel in grafana.ROWS[row] for expr in panel.shows.values()),
        *(rule["expr"] for rule in RULES if "token" in rule.get("record", "")),
    ]
    assert len(about_text) > 10
    for expr in about_text:
        assert set(re.findall(r"model_\w+", expr)) <= known, expr


ROWS_OF_TEXTS = ("Text, token by token", "Sequences and the KV cache")


def expressions() -> dict[str, str]:
    """All of rules, dashboard and autoscaler, but what only generated texts have.

    An alert's comparisons say 0 or 1, instead of nothing where nothing is wrong.
    """
    panels = {
        f"{panel.title}: {legend}": expr.replace(grafana.RATE, "15s")
        for row, panels in grafana.ROWS.items()
        for panel in panels
        for legend, expr in panel.shows.items()
        if row not in ROWS_OF_TEXTS
    }
    alerts = {
        rule["alert"]: re.sub(r" (>|<|==) ", r" \1 bool ", rule["expr"])
        for rule in ALERTS
        if "token" not in rule["expr"]
    }
    (scaled,) = yaml.safe_load_all((DEPLOY / "kubernetes" / "autoscale.yaml").read_text())
    scales = {f"scale {i}": one["metadata"]["query"] for i, one in enumerate(scaled["spec"]["triggers"])}
    return {
        **panels,
        **scales,
        **alerts,
        **{
            rule["record"]: rule["record"]
            for rule in RULES
            if "record" in rule and "token" not in rule["record"]
        },
    }


@contextlib.contextmanager
def prometheus(folder: Path, model: str, haproxy: str) -> Iterator[str]:
    """A real one with the very configuration, but that it scrapes these, and every second."""
    config = re.sub(
        r"_interval: \d+s", "_interval: 1s", (DEPLOY / "monitoring" / "prometheus.yml").read_text()
    )
    config = config.replace("127.0.0.1:8000", model).replace("127.0.0.1:8404", haproxy)
    (folder / "prometheus.yml").write_text(config)
    shutil.copy(DEPLOY / "monitoring" / "rules.yml", folder)
    address = f"127.0.0.1:{free_port()}"
    arguments = {
        "config.file": folder / "prometheus.yml",
        "storage.tsdb.path": folder / "data",
        "web.listen-address": address,
    }
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            ["prometheus", *(f"--{name}={value}" for name, value in arguments.items())], stderr=log
        )
        try:
            yield f"http://{address}"
        finally:
            process.terminate()
            process.wait()


def holes(url: str, asked: dict[str, str]) -> dict[str, Any]:
    """Which expressions find nothing, or no number."""
    found: dict[str, Any] = {}
    for name, expr in asked.items():
        try:
            found[name] = [float(one["value"][1]) for one in draw_dashboard.ask(url, "query", query=expr)]
        except urllib.error.HTTPError as exc:
            found[name] = exc.read().decode()  # while it starts, no JSON
        except OSError as exc:
            found[name] = str(exc)  # it starts
    return {
        name: values
        for name, values in found.items()
        if not values or isinstance(values, str) or not all(map(math.isfinite, values))
    }


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("haproxy"), reason="haproxy is not installed")
@pytest.mark.skipif(not shutil.which("prometheus"), reason="prometheus is not installed")
def test_real_prometheus_finds_a_number_for_every_expression(
    tmp_path: Path, crowd: Crowd, monkeypatch: pytest.MonkeyPatch
) -> None:
    metrics_bind, over = f"127.0.0.1:{free_port()}", threading.Event()
    env = {
        "MODEL": "tests.support.fake_models:FillMask",
        "BATCH_SIZE": "8",
        "METRICS_BIND": metrics_bind,
        "PYTHONPATH": os.pathsep.join([FAKE_NVML, os.environ.get("PYTHONPATH", "")]),
    }
    with (
        start(MODES["haproxy-2"], env) as server,
        prometheus(tmp_path, server.url.split("/")[2], metrics_bind) as url,
    ):

        def ask() -> None:
            while not over.is_set():
                post(server, PARIS)

        askers = [crowd.submit(ask) for _ in range(8)]
        try:
            assert post(server, POISON).status == 500
            until(lambda: any(one.done() for one in askers) or not holes(url, expressions()))
        except AssertionError:
            pytest.fail(f"nothing, or no number: {holes(url, expressions())}")
        finally:
            over.set()
        for asker in askers:
            asker.result()
        monkeypatch.setattr(draw_dashboard, "PICTURE", tmp_path / "dashboard.png")
        draw_dashboard.main(url, "1m")
        assert draw_dashboard.PICTURE.stat().st_size > 20_000
