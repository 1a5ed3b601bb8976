"""What deployments promise beyond the contract: consistent times, shared cores, shared metrics, no orphans."""

import asyncio
import contextlib
import os
import pickle
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from gunicorn.dirty.errors import DirtyConnectionError  # type: ignore[import-untyped]

from deploy import cluster
from loadtests.modes import MODES, ROOT, Mode, Server, start
from tests.support.client import PARIS, SLOW, Crowd, dial, hear, metric, post, request, until
from tests.support.fake_models import BROKEN
from workers import resources as memory
from workers.gunicorn import gthread_worker
from workers.gunicorn.succession import answered
from workers.isolation import dirty
from workers.metrics import Metrics
from workers.metrics_folder import KINDS, mark_ended
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
    if "uvicorn_worker" in str(found["worker_class"]):  # closes idle connections when it stops
        assert found["keepalive"] > 60, "a proxy's pool must close idle connections first"
    elif found["worker_class"] != "sync":  # which keeps none
        assert found["keepalive"] < ours.GRACE_S, "an idle connection must not hold SIGTERM"
    assert not found.get("preload_app"), "torch hangs in a fork that comes after its first op"
    assert found.get("dirty_timeout", ours.HANG_S) == ours.HANG_S
    assert found["bind"].startswith("127.0.0.1:"), "nobody else's host by default"
    assert found.get("max_requests", 0) == 0, "a restart loads the model again"


def test_idle_connection_does_not_outlast_a_short_grace_time_either(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("GRACE_S", "2")
    assert read(ROOT / "workers" / "gunicorn" / "common.py")["idle_s"] < 2


def test_ctrl_c_ends_a_gthread_worker_that_is_just_handing_a_request_over() -> None:
    """There the interrupted code holds the lock of its threads. It would hang until the master kills it."""
    worker = object.__new__(gthread_worker.Worker)
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


def test_shared_model_ends_with_its_killed_arbiter() -> None:
    """It would hold the server's port for ever."""
    with start(MODES["dirty"], STAND_IN) as server:
        arbiter = next(p for p in server.processes()[1:] if p.children())
        models = arbiter.children()
        arbiter.kill()
        _, alive = psutil.wait_procs(models, timeout=30)
        for orphan in alive:
            orphan.kill()
        assert models and not alive


def test_service_recovers_from_a_killed_arbiter_of_a_shared_model() -> None:
    """Gunicorn starts another one at another address, which only new workers learn."""
    with start(MODES["dirty"], STAND_IN) as server:
        next(p for p in server.processes()[1:] if p.children()).kill()
        until(lambda: [post_or_none(server) for _ in range(10)] == [200] * 10)


def test_worker_that_starts_outlives_a_killed_shared_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Were its example to fail, Gunicorn would stop the whole service: "Worker failed to boot"."""
    calls: list[str] = []

    class Client:
        async def execute_async(self, app: str, action: str, *args: object) -> object:
            calls.append(action)
            if action == "describe":
                return ["fill-mask", "of a test"]
            if calls == ["describe", "answer"]:
                raise DirtyConnectionError("killed")
            return pickle.dumps(["right"])

    monkeypatch.setattr(dirty, "get_dirty_socket_path", lambda: "somewhere")
    monkeypatch.setattr(dirty, "DirtyClient", lambda path, timeout: Client())

    async def started() -> list[str]:
        instance = dirty.Dirty(hang_s=60)
        await instance.start()
        return await instance.run(["example"])

    assert asyncio.run(started()) == ["right"]
    assert calls == ["describe", "answer", "describe", "answer"]


def post_or_none(server: Server) -> int | None:
    with contextlib.suppress(OSError):
        return post(server, PARIS).status
    return None


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


# --- SIGHUP, max_requests, stops --------------------------------------------------------------------------------------

ONE_WORKER = ["recommended", "asgi", "gthread-1x8"]


@contextlib.contextmanager
def steady(server: Server, crowd: Crowd) -> Iterator[Counter[int]]:
    """Eight users ask, each on a new connection, while the block lasts: the statuses; 0 where there is no reply."""
    statuses: Counter[int] = Counter()
    over = threading.Event()

    def ask() -> None:
        while not over.is_set():
            try:
                reply = post(server, PARIS)
                statuses[reply.status] += 1
            except OSError:
                statuses[0] += 1

    users = [crowd.submit(ask) for _ in range(8)]
    try:
        until(lambda: statuses.total() > 20)
        yield statuses
    finally:
        over.set()
    for user in users:
        user.result()


@pytest.mark.parametrize("mode", ONE_WORKER)
def test_reload_serves_with_the_old_worker_until_the_new_one_has_loaded(
    mode: str, crowd: Crowd, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    gate.touch()
    slow = {"MODEL": "tests.support.fake_models:SlowToLoad", "GATE": str(gate)}
    with start(MODES[mode], slow) as server, steady(server, crowd) as statuses:
        gate.unlink()
        server.process.send_signal(signal.SIGHUP)
        until(lambda: server.log().count("loading") == 2)
        n = statuses.total()
        until(lambda: statuses.total() > n + 50)
        assert "Worker exiting" not in server.log()
        gate.touch()
        until(lambda: "Worker exiting" in server.log())
    assert statuses.keys() == {200}


def test_reload_with_a_release_that_cannot_load_leaves_the_old_worker(crowd: Crowd, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    env = {"MODEL": "tests.support.fake_models:Obedient", BROKEN: str(broken)}
    with start(MODES["recommended"], env) as server:
        broken.touch()
        server.process.send_signal(signal.SIGHUP)
        until(lambda: "Too many open files" in server.log())
        until(lambda: len(server.processes()) == 2)
        assert post(server, "a text").status == 200


def test_worker_that_has_answered_max_requests_serves_until_another_has_loaded(crowd: Crowd) -> None:
    mode = Mode("worn", "gunicorn -c gunicorn.conf.py --max-requests 50")
    with start(mode, STAND_IN) as server, steady(server, crowd) as statuses:
        until(lambda: server.log().count("has answered max_requests") == 2)
        until(lambda: server.log().count("Worker exiting") == 2)
    assert statuses.keys() == {200}


def test_rejected_requests_do_not_count_as_answered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = (
        "from workers.metrics import Metrics; m = Metrics(); import os; print(os.getpid())\n"
        "for status in (200, 200, 503, 504): m.requests_with(status).inc()"
    )
    env = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    ended = subprocess.run([sys.executable, "-c", code], env=env, cwd=ROOT, capture_output=True, text=True)
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    assert answered(int(ended.stdout)) == 3
    assert answered(1) == 0, "one that has not begun"


@pytest.mark.parametrize("mode", ONE_WORKER)
def test_client_that_connects_while_the_server_stops_is_refused_or_answered_but_not_reset(
    mode: str, crowd: Crowd, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    with start(MODES[mode], STAND_IN) as server:
        admitted = crowd.post(server, *[f"{PARIS} until:{gate}"] * 2)
        until(lambda: metric(server, "model_running") > 0)
        server.process.terminate()
        until(lambda: "Handling signal: term" in server.log())
        ends = Counter(how_it_ends(server) for _ in range(20))
        gate.touch()
        assert {reply.result().status for reply in admitted} == {200}
        server.process.wait(30)
        assert ends.keys() <= {"refused", "503"}, ends


def how_it_ends(server: Server) -> str:
    """What a client gets that connects now."""
    try:
        return str(post(server, PARIS).status)
    except ConnectionRefusedError:
        return "refused"
    except OSError as exc:
        return type(exc).__name__


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_clean_stop_logs_no_error_and_waits_for_no_idle_connection(number: signal.Signals) -> None:
    with start(MODES["recommended"], {**STAND_IN, "GRACE_S": "50"}) as server, dial(server) as idle:
        idle.sendall(request("GET", "/health"))
        assert hear(idle).status == 200
        server.process.send_signal(number)
        assert server.process.wait(40) == 0
        log = server.log()
        assert "Error" not in log and "was sent" not in log and "SIGKILL" not in log


@pytest.mark.slow
def test_change_of_a_file_reloads_where_reload_is_asked_for(tmp_path: Path) -> None:
    module = tmp_path / "my_reloaded_model.py"
    source = "class Model:\n    example = 'a'\n    def __call__(self, inputs): return [%d for _ in inputs]\n"
    module.write_text(source % 1)
    mode = Mode("reload", "gunicorn -c gunicorn.conf.py --reload --reload-engine poll")
    env = {"MODEL": "my_reloaded_model:Model", "PYTHONPATH": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}
    changed_at = 0.0

    def serves(server: Server, answer: int) -> bool:
        """Whether the model of this source is served; changes the file again every 3 s until it is: Gunicorn has to have seen
        it once before it can notice a change."""
        nonlocal changed_at
        if time.monotonic() > changed_at + 3:
            changed_at = time.monotonic()
            module.write_text(source % answer)
            os.utime(module, (time.time() + changed_at,) * 2)
        return answers(server) == answer

    with start(mode, env) as server:
        for answer in (1, 2, 3):
            until(lambda n=answer: serves(server, n), 180)


def answers(server: Server) -> Any:
    with contextlib.suppress(OSError):
        return post(server, "a").json


# --- what ends the start ----------------------------------------------------------------------------------------------


def test_port_that_is_taken_ends_the_start_at_once_with_a_sentence() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with start(MODES["recommended"], STAND_IN, wait=False, port=port) as server:
            assert server.process.wait(30) == 1
            assert f"cannot listen on 127.0.0.1:{port}: Address already in use" in server.log()
            assert "Traceback" not in server.log() and "Retrying" not in server.log()


@pytest.mark.parametrize("config", ["gunicorn.conf.py", "workers/gunicorn/gthread.conf.py"])
def test_preload_is_rejected(config: str) -> None:
    with start(Mode("preload", f"gunicorn -c {config} --preload"), STAND_IN, wait=False) as server:
        assert server.process.wait(30) == 1
        assert "--preload is not supported" in server.log() and "Traceback" not in server.log()


def test_log_begins_with_what_is_not_used_and_how_to_see_requests() -> None:
    with start(MODES["recommended"], {**STAND_IN, "WEB_CONCURRENCY": "2"}) as server:
        assert "WEB_CONCURRENCY=2 is not used" in server.log()
        assert "--access-logfile -" in server.log()
    mode = Mode("logged", "gunicorn -c gunicorn.conf.py --access-logfile -")
    with start(mode, STAND_IN) as server:
        post(server, PARIS)
        assert "--access-logfile -" not in server.log()
        until(lambda: '"POST / HTTP/1.1" 200' in server.log())


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may become another user")
def test_folder_of_metrics_is_the_users_that_workers_run_as(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert Path(memory.temporary_folder("metrics", 65534, 65534)).stat().st_uid == 65534


@pytest.mark.parametrize("name", ["sync", "gthread", "asgi", "uvicorn", "dirty"])
def test_config_at_its_old_path_works_for_one_release(name: str) -> None:
    old, new = (read(ROOT / "workers" / folder / f"{name}.conf.py") for folder in ("", "gunicorn"))
    for setting in ("wsgi_app", "worker_class", "workers", "keepalive", "bind"):
        assert old[setting] == new[setting]


@pytest.mark.slow
def test_no_healthy_worker_is_killed_by_the_heartbeat(crowd: Crowd) -> None:
    """One call that takes longer than the heartbeat may."""
    mode = Mode("heartbeat", "gunicorn -c gunicorn.conf.py --timeout 5")
    batches = {"BATCH_SIZE": "60", "FIXED_DELAY_MS": "20000", "DEADLINE_S": "60"}
    with start(mode, {**STAND_IN, **batches}) as server:
        replies = [reply.result() for reply in crowd.post(server, *[SLOW] * 60)]
        assert {reply.status for reply in replies} == {200}
        assert "TIMEOUT" not in server.log()


def test_worker_that_gets_sigterm_before_it_has_begun_stops(tmp_path: Path) -> None:
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


# --- make cluster, without HAProxy ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bind", "guarded"),
    [
        ("127.0.0.1:8000", True),
        ("localhost:8000", True),
        ("[::1]:8000", True),
        ("ipv6@[::1]:8000", True),
        ("no-such-name.invalid:8000", True),
        ("10.0.0.5:8000,127.0.0.1:8000", True),
        (":8000", False),
        ("*:8000", False),
        ("0.0.0.0:8000", False),
        ("10.0.0.5:8000", False),
        ("unix@/run/model.sock", False),
    ],
)
def test_access_control_against_dns_rebinding_stays_on_wherever_the_cluster_listens_on_loopback(
    bind: str, guarded: bool
) -> None:
    assert cluster.replica_env(2, bind, Settings())["ALLOWED_HOSTS"] == ("" if guarded else "*")
    assert cluster.replica_env(2, bind, Settings(ALLOWED_HOSTS="a.example"))["ALLOWED_HOSTS"] == "a.example"


def test_haproxys_bounds_follow_the_settings() -> None:
    slow = Settings(BODY_TIMEOUT_S=60, HEADERS_TIMEOUT_S=20, DEADLINE_S=30, MAX_CONNECTIONS=4)
    env = cluster.replica_env(2, "127.0.0.1:8000", slow)
    assert (env["BODY_TIMEOUT"], env["CLIENT_TIMEOUT"]) == ("60000ms", "65s")
    assert (env["HEADERS_TIMEOUT"], env["SERVER_TIMEOUT"]) == ("20000ms", "35s")
    assert env["CLIENT_CONNECTIONS"] == "4"


def with_cluster(scenario: Callable[[cluster.Cluster], Awaitable[None]], folder: Path) -> None:
    async def run() -> None:
        async with asyncio.timeout(60):
            await scenario(cluster.Cluster(1, "127.0.0.1:8000", Settings(), str(folder)))

    asyncio.run(run())


def test_replica_that_cannot_be_started_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No descriptors, no memory, no more processes: just when one was killed for want of them."""
    causes = iter([OSError(24, "Too many open files"), RuntimeError("can't start new thread")])
    tried_enough = asyncio.Event()

    async def scenario(its: cluster.Cluster) -> None:
        async def start(*command: str) -> Any:
            if cause := next(causes, None):
                raise cause
            tried_enough.set()
            await asyncio.Event().wait()

        its.served = True
        monkeypatch.setattr(its, "start", start)
        its.add()
        await tried_enough.wait()
        assert not its.end.done()
        its.keepers[1].cancel()

    monkeypatch.setattr(cluster, "PAUSE_S", 0.001)
    with_cluster(scenario, tmp_path)
    assert (
        "replica 1 cannot be started: [Errno 24] Too many open files; starting another"
        in capsys.readouterr().out
    )


def test_cluster_ends_when_a_keeper_ends_by_a_bug(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(its: cluster.Cluster) -> None:
        async def serve(place: int) -> None:
            raise KeyError("a bug")

        monkeypatch.setattr(its, "serve", serve)
        its.add()
        assert await its.end == 1

    with_cluster(scenario, tmp_path)


def test_rolling_restart_without_a_free_place_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async def scenario(its: cluster.Cluster) -> None:
        taken: Any = dict.fromkeys(range(1, 33))
        its.keepers = taken
        await its.restart()

    with_cluster(scenario, tmp_path)
    assert "all 32 places" in capsys.readouterr().out


def test_haproxy_that_does_not_answer_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(its: cluster.Cluster) -> None:
        with socket.socket(socket.AF_UNIX) as frozen:
            frozen.bind(its.socket)
            frozen.listen()
            assert not await its.tell("show version")

    monkeypatch.setattr(cluster, "TELL_S", 0.05)
    with_cluster(scenario, tmp_path)


def test_replica_is_not_replaced_for_want_of_our_own_files(monkeypatch: pytest.MonkeyPatch) -> None:
    async def full(*_: Any) -> None:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(asyncio, "open_connection", full)
    assert asyncio.run(cluster.ask(1, "/health", 1))[0] is None


# --- files ------------------------------------------------------------------------------------------------------------


def test_folders_of_killed_servers_are_removed_and_those_of_living_ones_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    code = (
        f"import tempfile; tempfile.tempdir = {str(tmp_path)!r}\n"
        "from workers.resources import temporary_folder as f; print(f('metrics'), flush=True); input()"
    )
    command = [sys.executable, "-c", code]
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": ROOT}
    with subprocess.Popen(command, **pipes) as killed, subprocess.Popen(command, **pipes) as living:
        left, used = (Path(one.stdout.readline().strip()) for one in (killed, living))  # type: ignore[union-attr]
        assert left.exists() and used.exists()
        killed.kill()
        killed.wait()
        memory.temporary_folder("metrics")
        assert used.exists() and not left.exists()
        living.kill()


def test_counts_of_ended_workers_are_kept_in_one_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = (
        "from workers.metrics import Metrics; m = Metrics(); m.requests_with(200).inc(2)\n"
        "m.batch(4, 'full', 0.1, [0.1]); m.sample(); import os; print(os.getpid())"
    )
    env = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    for _ in range(3):
        ended = subprocess.run(
            [sys.executable, "-c", code], env=env, cwd=ROOT, capture_output=True, text=True
        )
        its = {file.name for file in tmp_path.glob(f"*_{int(ended.stdout)}.db")}
        assert its == {f"{kind}_{int(ended.stdout)}.db" for kind in KINDS}, "those that were reserved"
        mark_ended(int(ended.stdout), str(tmp_path))
    assert {file.name for file in tmp_path.glob("*.db")} == {"counter_ended.db", "histogram_ended.db"}
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    text = Metrics().text().decode()
    assert 'model_requests_total{status="200"} 6.0' in text
    assert "model_batch_size_sum 12.0" in text


def test_worker_serves_with_metrics_of_its_own_where_the_disk_is_full(tmp_path: Path) -> None:
    """A write to a file that is mapped into memory would kill it, and all that come after it."""
    code = (
        "import os, errno\n"
        "def full(*_): raise OSError(errno.ENOSPC, 'No space left on device')\n"
        "os.posix_fallocate = full\n"
        "from workers.metrics import Metrics; m = Metrics(); m.requests_with(200).inc(2); print(m.text().decode())"
    )
    env = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    worker = subprocess.run([sys.executable, "-c", code], env=env, cwd=ROOT, capture_output=True, text=True)
    assert 'model_requests_total{status="200"} 2.0' in worker.stdout
    assert "has no space left" in worker.stderr
    assert not [*tmp_path.glob("*.db")]


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
