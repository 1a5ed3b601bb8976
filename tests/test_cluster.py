"""Replicas behind HAProxy: what dies, restarts or comes costs nobody an answer, and a no stays a no."""

import contextlib
import os
import re
import shutil
import signal
import socket
import socketserver
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from loadtests.modes import MODES, ROOT, Mode, Server, free_port, is_alive, start
from tests.support.client import (
    PARIS,
    SLOW,
    Crowd,
    Reply,
    below,
    dial,
    get,
    hear,
    metric,
    post,
    request,
    say,
    until,
)
from tests.support.fake_models import BROKEN
from tests.support.gated_model import check_that_items_pass

CLUSTER = MODES["haproxy-2"]
# CLUSTER_MODEL=models/minilm-mlm takes the bundled model in its place.
STAND_IN = {"MODEL": os.environ.get("CLUSTER_MODEL", "tests.support.fake_models:FillMask")}
haproxy = pytest.mark.skipif(not shutil.which("haproxy"), reason="haproxy is not installed")
pytestmark = [pytest.mark.slow, haproxy]


@pytest.fixture
def cluster() -> Iterator[Server]:
    """Two replicas that are ready."""
    with start(CLUSTER, STAND_IN) as server:
        until(lambda: len(ready(server)) == 2)
        yield server


def ready(server: Server) -> list[int]:
    """The ids of the replicas' processes that have been ready, in that order."""
    return [int(pid) for pid in re.findall(r"is ready, process (\d+)", server.log())]


def ended(server: Server) -> int:
    """How many replicas have ended in their own time."""
    return server.log().count("Finished server process")


@contextlib.contextmanager
def steady(server: Server, crowd: Crowd, text: str = PARIS, users: int = 16) -> Iterator[list[Reply]]:
    """So many users ask again and again while the block lasts; each reply is complete, or the block's end raises."""
    replies: list[Reply] = []
    over = threading.Event()

    def ask(user: int) -> None:
        while not over.is_set():
            with dial(server) as connection:
                while not over.is_set():
                    began = time.monotonic()
                    asked = request("POST", below(server, "/"), f"{user}. {text}".encode())
                    # Half of them send the body by itself, as most clients do.
                    head = asked.index(b"\r\n\r\n") + 4 if user % 2 else len(asked)
                    connection.sendall(asked[:head])
                    connection.sendall(asked[head:])
                    reply = hear(connection)
                    reply.took_s = time.monotonic() - began
                    replies.append(reply)
                    if reply.status == 200:
                        assert reply.json[0]["sequence"].startswith(f"{user}."), "it is another's"
                    if reply.headers["Connection"] == "close":
                        break

    askers = [crowd.submit(ask, user) for user in range(users)]
    try:
        until(lambda: len(replies) > 100 or any(asker.done() for asker in askers))
        yield replies
        n = len(replies)
        until(lambda: len(replies) > n + 100 or any(asker.done() for asker in askers))
    finally:
        over.set()
    for asker in askers:
        asker.result()


def statuses(replies: list[Reply]) -> dict[int, int]:
    return dict(Counter(reply.status for reply in replies))


def all_answered(replies: list[Reply]) -> None:
    """Say how many there were; fail unless each got its answer."""
    print(f"\n{statuses(replies).get(200, 0)} of {len(replies)} answered")
    assert statuses(replies) == {200: len(replies)}


# --- what comes and goes ----------------------------------------------------------------------------------------------


def test_killed_replica_costs_nobody_an_answer_and_is_replaced(cluster: Server, crowd: Crowd) -> None:
    with steady(cluster, crowd) as replies:
        for victim in range(3):
            os.kill(ready(cluster)[victim], signal.SIGKILL)
            until(lambda n=victim: len(ready(cluster)) == 3 + n)
    all_answered(replies)


def test_rolling_restart_costs_nobody_an_answer(cluster: Server, crowd: Crowd) -> None:
    old = ready(cluster)
    with steady(cluster, crowd) as replies:
        cluster.process.send_signal(signal.SIGHUP)
        until(lambda: len(ready(cluster)) == 4 and ended(cluster) == 2)
    all_answered(replies)
    assert not any(psutil.pid_exists(pid) for pid in old)
    assert all(psutil.pid_exists(pid) for pid in ready(cluster)[2:])


def test_replica_more_and_one_fewer_cost_nobody_an_answer(cluster: Server, crowd: Crowd) -> None:
    with steady(cluster, crowd) as replies:
        cluster.process.send_signal(signal.SIGTTIN)
        until(lambda: len(ready(cluster)) == 3)
        newest = psutil.Process(ready(cluster)[2])
        used_s = newest.cpu_times().user
        until(lambda: newest.cpu_times().user > used_s + 0.05)  # it gets its share
        cluster.process.send_signal(signal.SIGTTOU)
        until(lambda: ended(cluster) == 1)
    all_answered(replies)


def test_replacement_that_cannot_load_comes_once_it_can(crowd: Crowd, tmp_path: "os.PathLike[str]") -> None:
    broken = ROOT.joinpath(tmp_path, "broken")
    with start(CLUSTER, {"MODEL": "tests.support.fake_models:Obedient", BROKEN: str(broken)}) as server:
        until(lambda: len(ready(server)) == 2)
        broken.touch()
        os.kill(ready(server)[0], signal.SIGKILL)
        until(lambda: server.log().count("has ended with 3; starting another") == 2)
        assert post(server, "a text").status == 200
        broken.unlink()
        until(lambda: len(ready(server)) == 3)


MOODY = {"MODEL": "tests.support.misbehaving_model:Model", "GRACE_S": "2"}


def test_stuck_replicas_are_replaced(crowd: Crowd) -> None:
    """Two requests that hang must not end the cluster."""
    with start(CLUSTER, {**MOODY, "HANG_S": "1"}) as server:
        until(lambda: len(ready(server)) == 2)
        for reply in crowd.post(server, "hang", "hang"):
            assert reply.result().status == 503
        until(lambda: len(ready(server)) >= 4)
        assert post(server, "a text").status == 200


def test_frozen_replica_is_replaced_and_its_requests_are_answered_by_another(crowd: Crowd) -> None:
    with start(CLUSTER, {**STAND_IN, "GRACE_S": "2"}) as server:
        until(lambda: len(ready(server)) == 2)
        frozen = ready(server)[0]
        with steady(server, crowd) as replies:
            os.kill(frozen, signal.SIGSTOP)
            until(lambda: len(ready(server)) == 3)
        all_answered(replies)
        assert max(reply.took_s for reply in replies) < 12, (
            "as long as it takes to see that it is down, no DEADLINE_S"
        )
        assert f"process {frozen} is replaced" in server.log()
        assert not psutil.pid_exists(frozen)


def test_rolling_restart_with_a_release_that_cannot_start_leaves_the_old_replicas(
    tmp_path: "os.PathLike[str]",
) -> None:
    broken = ROOT.joinpath(tmp_path, "broken")
    with start(CLUSTER, {"MODEL": "tests.support.fake_models:Obedient", BROKEN: str(broken)}) as server:
        until(lambda: len(ready(server)) == 2)
        broken.touch()
        server.process.send_signal(signal.SIGHUP)
        until(lambda: "the new replica cannot start; the old ones stay" in server.log())
        assert all(map(psutil.pid_exists, ready(server)))
        broken.unlink()
        server.process.send_signal(signal.SIGTTIN)
        until(lambda: len(ready(server)) == 3)


def test_frozen_haproxy_does_not_keep_the_cluster_from_ending(cluster: Server) -> None:
    processes = cluster.processes()
    next(process for process in processes if process.name() == "haproxy").suspend()
    cluster.process.terminate()
    assert cluster.process.wait(60) == 0
    assert not any(map(is_alive, processes))


@pytest.mark.parametrize("how", ["SIGTERM", "HAProxy's end"])
def test_it_ends_as_a_whole(cluster: Server, how: str) -> None:
    processes = cluster.processes()
    balancer = next(process for process in processes if process.name() == "haproxy")
    (folder,) = {env["PROMETHEUS_MULTIPROC_DIR"] for env in (p.environ() for p in processes[1:])}
    if how == "SIGTERM":
        cluster.process.terminate()
    else:
        balancer.kill()
    assert cluster.process.wait(15) == (0 if how == "SIGTERM" else 1)
    assert not any(map(is_alive, processes))
    assert not os.path.exists(folder)


def test_first_item_passes_haproxy_before_there_is_a_second(tmp_path: Path) -> None:
    with start(CLUSTER, {"MODEL": "tests.support.gated_model:Gated"}) as server:
        check_that_items_pass(server.url, tmp_path / "gate")


# --- saying no --------------------------------------------------------------------------------------------------------


def test_overload_is_rejected_and_starts_no_retry_storm(crowd: Crowd) -> None:
    """Each rejection that is tried again costs the replicas one more: few are, while most are refused anyway."""
    with start(CLUSTER, {**STAND_IN, "MAX_QUEUE": "2"}) as server:
        until(lambda: len(ready(server)) == 2)
        with steady(server, crowd, SLOW, users=48) as replies:
            until(lambda: len(replies) > 2000)
        seen = statuses(replies)
        made = metric(server, 'model_requests_total{status="503"}')
        assert seen.keys() == {200, 503}
        assert made < 1.5 * seen[503], seen
        for reply in replies:
            if reply.status == 503:
                assert reply.error and reply.headers["X-Request-ID"]
                assert int(reply.headers["Retry-After"]) >= 1
        # A single one that is full is no reason to say no.
        assert post(server, PARIS).status == 200


@contextlib.contextmanager
def haproxy_alone(**env: str) -> Iterator[tuple[Server, str]]:
    """HAProxy with no replica, and its admin socket."""
    with tempfile.TemporaryDirectory() as folder, tempfile.NamedTemporaryFile() as log:
        port, admin = free_port(), f"{folder}/admin"
        settings = {
            "BIND": f"127.0.0.1:{port}",
            "ADMIN_SOCKET": admin,
            "METRICS_BIND": f"unix@{admin}-metrics",
            **env,
        }
        command = ["haproxy", "-db", "-f", str(ROOT / "deploy" / "haproxy.cfg")]
        process = subprocess.Popen(command, env=os.environ | settings, stderr=log)
        try:
            until(lambda: os.path.exists(admin))
            mode = Mode("haproxy", " ".join(command))
            yield Server(mode, f"http://127.0.0.1:{port}/", process, log), admin  # type: ignore[arg-type]
        finally:
            process.kill()
            process.wait()


def tell(admin: str, *commands: str) -> None:
    """Give HAProxy orders over its socket."""
    for command in commands:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(admin)
            connection.sendall(f"{command}\n".encode())
            connection.recv(1000)


class Silent(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        self.request.recv(10_000)
        self.request.recv(1)  # until the other side closes


class Talks(Silent):
    def handle(self) -> None:
        self.request.recv(10_000)
        self.request.sendall(b"this is no HTTP\r\n\r\n")


def own_errors() -> Iterator[tuple[int, Reply, Reply]]:
    """Each of HAProxy's own errors, to a request with an id of its own and to one without."""
    with haproxy_alone(SERVER_TIMEOUT="1s") as (server, admin):
        yield 503, post(server, PARIS, X_Request_ID="mine-1"), post(server, PARIS)
        for status, handler in ((502, Talks), (504, Silent)):
            with socketserver.ThreadingTCPServer(("127.0.0.1", 0), handler) as fake:
                threading.Thread(target=fake.serve_forever).start()
                tell(
                    admin,
                    "disable health replicas/replica1",
                    f"set server replicas/replica1 addr 127.0.0.1 port {fake.server_address[1]}",
                    "set server replicas/replica1 state ready",
                )
                yield status, post(server, PARIS, X_Request_ID="mine-1"), post(server, PARIS)
                fake.shutdown()


def test_haproxys_own_errors_are_in_the_contracts_form() -> None:
    statuses = []
    for status, named, nameless in own_errors():
        statuses.append(status)
        assert (named.status, nameless.status) == (status, status)
        assert named.error and nameless.error
        assert named.headers["X-Request-ID"] == "mine-1"
        assert re.fullmatch(r"[\w.-]{32,128}", nameless.headers["X-Request-ID"])
        assert (named.headers["Retry-After"] == "1") is (status in (502, 503))
    assert statuses == [503, 502, 504]


@pytest.mark.parametrize("sent", ['ok, "evil"><b>', '"evil"><b>, ok', "a b"])
def test_request_id_that_is_not_one_is_replaced_in_haproxys_own_replies(sent: str) -> None:
    with haproxy_alone() as (server, _):
        assert re.fullmatch(r"[\w.-]{32,128}", post(server, PARIS, X_Request_ID=sent).headers["X-Request-ID"])


def test_http_2_in_cleartext_does_not_go_round_the_bound_of_connections() -> None:
    with haproxy_alone() as (server, _), dial(server) as connection:
        connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(9))
        assert connection.recv(1000).startswith(b"HTTP/1.1 400")


def test_many_headers_are_not_answered_with_a_page() -> None:
    with haproxy_alone() as (server, _):
        reply = post(server, PARIS, **{f"X_Header_{i}": "a" for i in range(300)})
        assert (reply.status, reply.headers["Content-Type"]) == (503, "application/json")


def test_headers_that_are_half_sent_are_not_waited_for() -> None:
    with haproxy_alone() as (server, _), dial(server) as connection:
        connection.sendall(b"POST / HTTP/1.1\r\nHost: loc")
        while connection.recv(1000):  # raises after 30 s: uvicorn itself waits for ever
            pass


def test_nobody_reads_the_metrics_of_one_replica_however_the_path_is_written() -> None:
    with haproxy_alone(REPLICAS_AT="127.0.0.1:1") as (server, _):
        replies = [get(server, path) for path in ("/metrics", "/%6detrics", "/metrics?a", "/health")]
    assert [reply.status for reply in replies] == [404, 404, 404, 503]


def test_one_address_has_so_many_connections_and_no_more() -> None:
    with haproxy_alone(CLIENT_CONNECTIONS="4") as (server, _), contextlib.ExitStack() as stack:
        connections = [stack.enter_context(dial(server)) for _ in range(4)]
        assert post(server, PARIS).status == 429
        for _ in range(10):
            with contextlib.suppress(ConnectionError):
                connections.append(stack.enter_context(dial(server)))
        replies = []
        for connection in connections:
            with contextlib.suppress(ConnectionError):
                connection.sendall(request("POST", "/", PARIS.encode()))
                replies.append(hear(connection))
        assert statuses(replies).keys() == {429}
        assert all(reply.error and reply.headers["Retry-After"] for reply in replies)
        assert len(replies) <= 10, "beyond twice as many are closed without a word"
        for connection in connections:
            connection.close()
        until(lambda: has_room(server))


def has_room(server: Server) -> bool:
    """Whether one more connection gets as far as to hear that there are no replicas."""
    with contextlib.suppress(ConnectionError):
        return post(server, PARIS).status == 503
    return False


def test_smuggled_request_is_not_passed_on(cluster: Server) -> None:
    body = b"0\r\n\r\nPOST / HTTP/1.1\r\nHost: smuggled\r\nContent-Length: 8\r\n\r\na [MASK]"
    before = metric(cluster, "model_call_seconds_count")
    headers = {"Content_Length": str(len(body)), "Transfer_Encoding": "chunked"}
    assert say(cluster, request("POST", "/", body, **headers)).status == 400
    assert metric(cluster, "model_call_seconds_count") == before


# --- how it is started ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", ["0", "32"])
def test_number_of_replicas_beyond_the_places_is_rejected(n: str) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "deploy.cluster", n], cwd=ROOT, capture_output=True, text=True
    )
    assert ended.returncode == 2
    assert f"n={n} is not allowed: it must be 1 to 31" in ended.stderr


def test_without_haproxy_it_says_what_to_install() -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "deploy.cluster"],
        cwd=ROOT,
        env={**os.environ, "PATH": ""},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 2
    assert "apt-get install haproxy" in ended.stderr
