"""What deployments promise beyond the contract: consistent times, shared cores, shared metrics, no orphans."""

import os
import runpy
import signal
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from loadtests.modes import MODES, ROOT, Mode, Server, start
from tests.support.client import PARIS, SLOW, Crowd, metric, post, until
from workers import resources as memory
from workers.settings import Settings

CONFIGS = [ROOT / "gunicorn.conf.py", *sorted((ROOT / "workers" / "gunicorn").glob("*.conf.py"))]
STAND_IN = {"MODEL": "tests.support.fake_models:FillMask"}  # it starts at once
# WEB_CONCURRENCY is its --workers, too
UVICORN_2 = Mode("uvicorn", "uvicorn server:app", {"WEB_CONCURRENCY": "2", **STAND_IN})


def read(config: Path) -> dict[str, Any]:
    """A config's settings, under the defaults of ours."""
    return runpy.run_path(str(config))


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.name)
def test_config_is_short_and_starts_with_its_command(config: Path) -> None:
    lines = config.read_text().splitlines()
    assert len(lines) <= 20
    name = config.relative_to(ROOT)
    assert lines[0] == f"# gunicorn -c {name}"


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.name)
def test_times_of_a_config_agree_with_the_settings(config: Path) -> None:
    found, ours = read(config), Settings()
    assert found["timeout"] > ours.HANG_S, "inline, a call that is no hang must not be killed"
    assert found["timeout"] > ours.BODY_TIMEOUT_S + ours.DEADLINE_S, "sync: the deadline answers first"
    assert found["graceful_timeout"] > ours.GRACE_S, "the worker ends by itself first"
    assert found["keepalive"] < ours.GRACE_S, "an idle connection must not hold SIGTERM"
    assert not found.get("preload_app"), "torch hangs in a fork that comes after its first op"
    assert found.get("dirty_timeout", ours.HANG_S) == ours.HANG_S
    assert found["bind"].startswith("127.0.0.1:"), "nobody else's host by default"
    assert found.get("max_requests", 0) == 0, "a restart loads the model again"


def test_an_idle_connection_does_not_outlast_a_short_grace_time_either(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("GRACE_S", "2")
    assert read(ROOT / "workers" / "gunicorn" / "common.py")["keepalive"] < 2


def test_ctrl_c_ends_a_gthread_worker_that_is_just_handing_a_request_over() -> None:
    """There the interrupted code holds the lock of its threads. It would hang until the master kills it."""
    worker = object.__new__(read(ROOT / "workers" / "gunicorn" / "gthread.conf.py")["worker_class"])
    worker.cfg, worker.tpool = SimpleNamespace(worker_int=lambda _: None), ThreadPoolExecutor(1)
    ended = Future[None]()

    def stop() -> None:
        with pytest.raises(SystemExit):
            worker.handle_quit(signal.SIGINT, None)
        ended.set_result(None)

    with worker.tpool._shutdown_lock:
        threading.Thread(target=stop, daemon=True).start()
        ended.result(timeout=10)


def workers_of(server: Server) -> list[psutil.Process]:
    """The processes that hold a model, each in a thread of its own."""
    return [p for p in server.processes() if p.pid != server.process.pid and p.num_threads() > 2]


def test_uvicorns_workers_know_their_number_and_end_with_their_killed_master() -> None:
    with start(UVICORN_2) as server:
        until(lambda: server.log().count(", one of 2:") == 2)
        workers = workers_of(server)
        assert len(workers) == 2
        server.process.kill()
        _, alive = psutil.wait_procs(workers, timeout=30)
        for orphan in alive:
            orphan.kill()
        assert not alive


def test_a_shared_model_ends_with_its_killed_arbiter() -> None:
    """It would hold the server's port for ever."""
    with start(MODES["dirty"], STAND_IN) as server:
        arbiter = next(p for p in server.processes()[1:] if p.children())
        models = arbiter.children()
        arbiter.kill()
        _, alive = psutil.wait_procs(models, timeout=30)
        for orphan in alive:
            orphan.kill()
        assert models and not alive


def test_workers_share_the_cores_and_say_so(crowd: Crowd) -> None:
    cores = len(os.sched_getaffinity(0))
    mode = Mode("gthread 2x4", "gunicorn -c workers/gunicorn/gthread.conf.py --workers 2 --threads 4")
    with start(mode, STAND_IN) as server:
        until(lambda: server.log().count("one of 2: 1 instance of the model") == 2)
        assert f"{max(1, cores // 2)} thread" in server.log()
        assert metrics_add_up(server, crowd)


def metrics_add_up(server: Server, crowd: Crowd) -> bool:
    """Every scrape shows the requests of all workers, whichever answers it."""
    for reply in crowd.post(server, *[PARIS] * 20):
        assert reply.result().status == 200
    counts = {metric(server, "model_requests_total") for _ in range(8)}
    return counts == {20.0}


def test_counts_outlive_a_killed_worker_and_end_with_the_server(
    crowd: Crowd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with start(MODES["uvicorn-2"], STAND_IN) as server:
        until(lambda: server.log().count("Serving ") == 2)
        assert metrics_add_up(server, crowd)
        victim = workers_of(server)[0]
        victim.kill()
        until(lambda: server.log().count("Serving ") == 3)
        assert post(server, PARIS).status == 200
        assert metric(server, "model_requests_total") == 21
        until(lambda: metric(server, "model_queue_depth") == 0)  # a gauge is up to a second old
        gate = tmp_path / "gate"
        lost = crowd.post(server, *[f"{PARIS} until:{gate}"] * 40)
        until(lambda: metric(server, "model_queue_depth") > 0)
        for victim in workers_of(server):
            victim.kill()
        gate.touch()
        until(lambda: server.log().count("Serving ") == 5)
        ends = [reply.exception() for reply in lost]
        assert any(ends)  # the others waited for the kernel to deal them out: a new worker answered
        until(lambda: metric(server, "model_queue_depth") == 0)  # what waited has died with its worker
        assert [*tmp_path.glob("metrics-*")]
    assert not [*tmp_path.glob("metrics-*")]


def test_no_healthy_worker_is_killed_by_the_heartbeat(crowd: Crowd) -> None:
    """One call that takes longer than the heartbeat may."""
    mode = Mode("heartbeat", "gunicorn -c gunicorn.conf.py --timeout 5")
    batches = {"BATCH_SIZE": "60", "BATCH_WINDOW_MS": "20000", "DEADLINE_S": "60"}
    with start(mode, {**STAND_IN, **batches}) as server:
        replies = [reply.result() for reply in crowd.post(server, *[SLOW] * 60)]
        assert {reply.status for reply in replies} == {200}
        assert "TIMEOUT" not in server.log()


def test_a_worker_that_is_told_to_stop_before_it_has_begun_stops(tmp_path: Path) -> None:
    """As on a busy machine: after its fork it gets no core until the master has been told."""
    config, gate = tmp_path / "starved.conf.py", tmp_path / "gate"
    starved = f"""
import os, sys, time
sys.path.insert(0, {str(ROOT)!r})
from workers.gunicorn.common import *
wsgi_app, worker_class = "server:app", "workers.gunicorn.uvicorn_worker.Worker"
def wait():
    while not os.path.exists({str(gate)!r}):
        time.sleep(0.01)
os.register_at_fork(after_in_child=wait)
"""
    config.write_text(starved)
    with start(Mode("starved", f"gunicorn -c {config}"), {**STAND_IN, "GRACE_S": "50"}, wait=False) as server:
        until(lambda: len(server.processes()) == 2)
        server.process.terminate()
        until(lambda: "Handling signal: term" in server.log())
        gate.touch()
        server.process.wait(45)
        assert "was sent SIGTERM" in server.log()


def test_memory_that_will_not_fit_is_said_in_plain_words() -> None:
    assert memory.warning(workers=4, worker_bytes=3 * 10**9, limit=16 * 10**9) == ""
    assert memory.warning(workers=4, worker_bytes=5 * 10**9, limit=16 * 10**9) == (
        "4 workers need 20.0 GB with their instances of the model, but there are 16.0 GB: use fewer workers or INSTANCES"
    )
    assert 10**6 < memory.resident_bytes([os.getpid()]) < memory.limit_bytes()


def test_instances_get_disjoint_cores() -> None:
    cores = os.sched_getaffinity(0)
    if len(cores) < 2:
        pytest.skip("one core")
    with start(MODES["instances-2"], STAND_IN) as server:
        models = [p for p in server.processes() if "workers.isolation.process" in " ".join(p.cmdline())]
        first, second = (set(p.cpu_affinity()) for p in models)
        assert first
        assert second
        assert not first & second
        assert first | second <= cores
