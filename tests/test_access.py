"""Who is let in: keys, this server's names, web pages from elsewhere; and who is let go: half-sent headers."""

import asyncio
import contextlib
import http.client
import json
import socket
import ssl
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import uvicorn
from uvicorn.server import ServerState

from loadtests.modes import MODES, ROOT, Mode, Server, start
from tests.support.client import Reply, dial, get, hear, post, request, say, until
from workers.gunicorn.uvicorn_worker import Worker
from workers.settings import Settings
from workers.web import http_protocol
from workers.web.access import AccessControl, is_loopback

TEXT = "a [MASK]"
KEYS = "first-key-0123, second-key-4567"
FILL_MASK = {"MODEL": "tests.support.fake_models:FillMask"}


@pytest.fixture(scope="module", params=["thread", "gthread-1x8", "asgi"])
def mode(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def locked(mode: str) -> Iterator[Server]:
    with start(MODES[mode], {**FILL_MASK, "API_KEY": KEYS}) as server:
        yield server


@pytest.fixture(scope="module")
def server(mode: str) -> Iterator[Server]:
    """Without any setting of these."""
    with start(MODES[mode], FILL_MASK) as server:
        yield server


def posted(server: Server, host: str = "localhost", **headers: str) -> Reply:
    """The reply to a text, asked for by this name."""
    raw = request("POST", "/", TEXT.encode(), **headers)
    return say(server, raw.replace(b"Host: localhost", f"Host: {host}".encode()))


# --- keys -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "headers",
    [
        {"x_api_key": "first-key-0123"},
        {"Authorization": "Bearer second-key-4567"},
        {"Authorization": "bearer first-key-0123"},
        {"Authorization": "Basic eDp5", "x_api_key": "second-key-4567"},
    ],
)
def test_who_has_a_key_is_answered(locked: Server, headers: dict[str, str]) -> None:
    assert post(locked, TEXT, **headers).status == 200


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"x_api_key": ""},
        {"x_api_key": "first-key-012"},
        {"x_api_key": KEYS},
        {"Authorization": "Bearer "},
        {"Authorization": "first-key-0123"},
        {"Authorization": "Basic first-key-0123"},
    ],
)
def test_request_without_a_key_learns_how_to_send_one(locked: Server, headers: dict[str, str]) -> None:
    reply = post(locked, TEXT, **headers)
    assert reply.status == 401
    assert reply.headers["WWW-Authenticate"] == 'Bearer realm="model"'
    assert "Authorization: Bearer KEY" in reply.error


def test_probes_and_the_page_stay_open_and_all_else_is_locked(locked: Server) -> None:
    for path in ("/health", "/ready", "/", "/docs"):
        assert get(locked, path).status == 200, path
    for path in ("/metrics", "/info", "/live", "/openapi.json", "/nothing"):
        assert get(locked, path).status == 401, path


def test_no_key_is_ever_shown(locked: Server) -> None:
    post(locked, TEXT, x_api_key="first-key-0123")
    post(locked, TEXT, x_api_key="guess-89")
    for secret in ("first-key", "second-key", "guess-89"):
        assert secret not in locked.log()
    assert "key-0123" not in repr(Settings(API_KEY=KEYS))


def test_wrong_key_setting_ends_with_a_sentence_that_hides_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("API_KEY", "two words")
    with pytest.raises(SystemExit, match="API_KEY=… is not allowed"):
        Settings.read()


def test_metrics_may_be_opened(mode: str) -> None:
    with start(MODES[mode], {**FILL_MASK, "API_KEY": KEYS, "METRICS_OPEN": "1"}) as server:
        assert get(server, "/metrics").status == 200
        assert get(server, "/info").status == 401


def test_browser_and_openapi_know_of_the_key(locked: Server) -> None:
    with_key = request("GET", "/openapi.json", x_api_key="first-key-0123")
    said = say(locked, with_key).json["paths"]
    assert "security" in said["/"]["post"] and "401" in said["/"]["post"]["responses"]
    assert "security" not in said["/health"]["get"] and "security" not in said["/"]["get"]


# --- names and pages --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "host", ["localhost", "localhost:8000", "127.0.0.1:1", "LOCALHOST.", "[::1]:80", "127.1.2.3"]
)
def test_on_loopback_its_own_names_are_known(server: Server, host: str) -> None:
    assert posted(server, host).status == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8000", "localhost.evil.example", "10.0.0.1", "[", "0"]
)
def test_on_loopback_a_foreign_name_is_rejected(server: Server, host: str) -> None:
    reply = posted(server, host)
    assert reply.status == 403
    assert "ALLOWED_HOSTS" in reply.error


def test_page_from_elsewhere_may_not_ask_but_its_own_may(server: Server) -> None:
    for origin in ("http://evil.example", "null", "http://localhost:3000", ""):
        reply = posted(server, "localhost:8000", Origin=origin)
        assert reply.status == 403 and "CORS_ORIGINS" in reply.error
    assert posted(server, "localhost:8000", Origin="http://localhost:8000").status == 200


def test_rejected_request_is_counted_and_has_an_id(server: Server) -> None:
    reply = posted(server, "evil.example", X_Request_ID="mine")
    assert reply.headers["X-Request-ID"] == "mine"
    assert b'model_requests_total{status="403"}' in get(server, "/metrics").body


def test_probes_may_use_any_name(server: Server) -> None:
    raw = request("GET", "/ready").replace(b"localhost", b"10.1.2.3:8000")
    assert say(server, raw).status == 200


def test_allowed_names_and_pages(mode: str) -> None:
    allowed = {"ALLOWED_HOSTS": "model.example, *.inside.example", "CORS_ORIGINS": "https://page.example"}
    with start(MODES[mode], {**FILL_MASK, **allowed}) as server:
        assert posted(server, "model.example:8000").status == 200
        assert posted(server, "a.inside.example").status == 200
        assert posted(server, "localhost").status == posted(server, "inside.example").status == 403
        reply = posted(server, "model.example", Origin="https://page.example")
        assert reply.status == 200
        assert reply.headers["Access-Control-Allow-Origin"] == "https://page.example"
        assert "Server-Timing" in reply.headers["Access-Control-Expose-Headers"]
        assert posted(server, "model.example", Origin="https://evil.example").status == 403
        asks = {"Origin": "https://page.example", "Access_Control_Request_Method": "POST"}
        # OpenAI's JavaScript client sends such headers always, browsers' tracing the last one.
        asks["Access_Control_Request_Headers"] = "content-type,x-api-key,x-stainless-os,traceparent"
        asks["Access_Control_Request_Private_Network"] = "true"
        preflight = request("OPTIONS", "/", **asks).replace(b"localhost", b"model.example")
        assert say(server, preflight).status == 200


@pytest.mark.parametrize("header", ["Host: evil.example", "Content-Type: text/plain"])
def test_header_given_twice_is_a_400_whichever_is_last(server: Server, header: str) -> None:
    """Of two Hosts one is foreign; of two Content-Types one would be read as text, the other as JSON."""
    raw = request("POST", "/", b'{"inputs": "a [MASK]"}', Content_Type="application/json").decode()
    first, last = (
        raw.replace("Host", f"{header}\r\nHost", 1),
        raw.replace("\r\n\r\n", f"\r\n{header}\r\n\r\n", 1),
    )
    assert say(server, first.encode()).status == say(server, last.encode()).status == 400


def test_list_header_given_twice_is_joined(server: Server) -> None:
    raw = request("POST", "/", TEXT.encode()).decode()
    waits = raw.replace("Host", "Prefer: respond-async\r\nPrefer: wait=0\r\nPrefer: foo\r\nHost", 1)
    assert say(server, waits.encode()).status == 504


def test_host_header_is_needed_from_http_1_1_on(server: Server) -> None:
    raw = request("POST", "/", TEXT.encode()).replace(b"Host: localhost\r\n", b"")
    assert say(server, raw).status == 400
    assert say(server, raw.replace(b"HTTP/1.1", b"HTTP/1.0")).status == 200


@pytest.mark.parametrize(
    "host", ["localhost#.evil.example", "localhost?.evil.example", "x@localhost", "localhost/"]
)
def test_host_that_is_not_a_name_is_foreign(host: str) -> None:
    assert not AccessControl(Settings()).is_ours(host, "127.0.0.1")


def test_allowed_hosts_in_capitals_are_the_same_names() -> None:
    access = AccessControl(Settings(ALLOWED_HOSTS="Example.COM, *.Example.org"))
    assert access.is_ours("example.com", "10.0.0.1") and access.is_ours("a.example.org:80", "10.0.0.1")


def test_origin_is_compared_with_the_host_and_needs_one() -> None:
    access = AccessControl(Settings())
    assert not access.foreign(b"localhost:8000", b"HTTP://LOCALHOST:8000", "127.0.0.1")
    assert not access.foreign(b"LOCALHOST:8000", b"http://localhost:8000", "127.0.0.1")
    assert access.foreign(b"", b"x://", "127.0.0.1")
    assert access.foreign(None, b"x://", "127.0.0.1")


@pytest.mark.parametrize(
    "address", ["localhost", "LOCALHOST.", "127.0.0.1", "::1", "[::1]", "::ffff:127.0.0.1"]
)
def test_every_spelling_of_loopback_is_loopback(address: str) -> None:
    """Where one is not, a server bound to it answers to any name."""
    assert is_loopback(address)
    assert not is_loopback("localhost.example") and not is_loopback("") and not is_loopback("10.0.0.1")


def test_long_names_of_strangers_are_not_kept() -> None:
    access = AccessControl(Settings())
    for host in (b"x" * 60_000, b"localhost"):
        access({"method": "POST", "server": ("127.0.0.1", 1), "headers": [(b"host", host)]})
    assert access.cached_foreign.cache_info().currsize == 1


def test_target_in_absolute_form_is_served_by_its_authority(server: Server, mode: str) -> None:
    """RFC 9112, 3.2.2: it must be accepted, and its authority counts, not the Host. Plain uvicorn does not show it."""
    raw = request("POST", "http://localhost/", TEXT.encode())
    assert say(server, raw).status == 200
    if mode == "asgi":
        assert say(server, raw.replace(b"http://localhost/", b"http://evil.example/")).status == 403


def test_slash_at_the_end_is_the_same_endpoint(server: Server) -> None:
    """A redirect would name http:// behind a proxy with TLS, and clients would drop their key."""
    assert say(server, request("POST", "/hf-inference/", TEXT.encode())).status == 200
    for path in ("/health/", "/ready/", "/metrics/", "/v2/"):
        assert get(server, path).status == 200, path
    assert get(server, "/nothing/").status == get(server, "/health//").status == 404


def test_key_and_probes_work_behind_a_prefix() -> None:
    with start(
        Mode("prefix", "uvicorn server:app --root-path /api"), {**FILL_MASK, "API_KEY": KEYS}
    ) as server:
        for path in ("/health", "/ready", "/", "/docs"):
            assert get(server, path).status == get(server, f"/api{path}").status == 200, path
        assert (
            get(server, "/info").status == get(server, "/api/info").status == post(server, TEXT).status == 401
        )
        assert post(server, TEXT, x_api_key="first-key-0123").status == 200
        reply = say(server, request("POST", "/health", x_api_key="first-key-0123"))
        assert (reply.status, reply.headers["Allow"]) == (405, "GET, HEAD")


def test_only_loopback_is_picky_by_default() -> None:
    guard = AccessControl(Settings())
    for address, status in (("127.0.0.1", 403), ("::1", 403), ("::ffff:127.0.0.1", 403), ("10.0.0.1", None)):
        scope: dict[str, Any] = {"method": "POST", "server": (address, 8000)}
        refused = guard(scope | {"headers": [(b"host", b"model.example")]})
        assert (refused.status_code if refused else None) == status
        assert guard(scope | {"headers": []}) is None  # HTTP/1.0: no browser
    unix_socket = {"method": "POST", "server": None, "headers": [(b"host", b"any")]}
    assert guard(unix_socket) is None


# --- connections ------------------------------------------------------------------------------------------------------

PATIENT = Mode("patient", "uvicorn server:app --http workers.web.http_protocol:Protocol")


@pytest.fixture(scope="module", params=[PATIENT, MODES["recommended"]], ids=lambda mode: mode.name)
def patient(request: pytest.FixtureRequest) -> Iterator[Server]:
    settings = {"HEADERS_TIMEOUT_S": "0.3", "MAX_CONNECTIONS": "20"}
    with start(request.param, {**FILL_MASK, **settings}) as server:
        yield server


@pytest.mark.parametrize("endless", [b"x" * 65_536, b"a:b\r\n" * 13_000, b"a" * 60_000 + b": b\r\n"])
def test_headers_without_an_end_are_a_431(patient: Server, endless: bytes) -> None:
    with dial(patient) as connection:
        with contextlib.suppress(ConnectionError):
            connection.sendall(
                b"POST / HTTP/1.1\r\nHost: localhost\r\n" + b"X-A: " * endless.startswith(b"x")
            )
            for _ in range(10):
                connection.sendall(endless)
        assert hear(connection).status == 431


def test_trailers_without_an_end_close_the_connection(patient: Server) -> None:
    with dial(patient) as connection, contextlib.suppress(ConnectionError):
        connection.sendall(request("POST", "/", b"1\r\na\r\n0\r\n", Transfer_Encoding="chunked"))
        for _ in range(20):
            connection.sendall(b"a" * 60_000 + b": b\r\n")
        assert connection.recv(1) == b""


def test_target_with_a_foreign_authority_is_foreign(patient: Server) -> None:
    raw = request("POST", "http://evil.example/", TEXT.encode())
    assert say(patient, raw).status == 403
    assert say(patient, raw.replace(b"evil.example", b"localhost:1")).status == 200
    for target in (b"http://localhost", b"http://localhost?a=/b"):
        assert say(patient, raw.replace(b"http://evil.example/", target)).status == 200


def test_what_is_not_http_gets_an_error_in_the_form_of_all_others(patient: Server) -> None:
    reply = say(patient, b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: x\r\n\r\n")
    assert (reply.status, reply.headers["Connection"]) == (400, "close") and "well-formed" in reply.error


@pytest.mark.parametrize("accept", ["*/*", "application/x-ndjson"])
def test_replies_that_nobody_reads_are_given_up(accept: str) -> None:
    settings = {"MODEL": "tests.support.fake_models:Obedient", "MAX_BODY_BYTES": "9000000"}
    times = {"HEADERS_TIMEOUT_S": "0.5", "BODY_TIMEOUT_S": "0.5", "MAX_CONNECTIONS": "1"}
    with start(PATIENT, settings | times, wait=False) as server, dial_until_ready(server) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        body = json.dumps({"inputs": ["x" * 8_000_000]}).encode()
        connection.sendall(request("POST", "/", body, Accept=accept, Content_Type="application/json"))
        until(lambda: is_free(server))


@contextlib.contextmanager
def dial_until_ready(server: Server) -> Iterator[socket.socket]:
    """A connection, once the server is ready: the only one of its client."""
    server.wait_until_ready()
    until(lambda: is_free(server))
    with dial(server) as connection:
        yield connection


def test_half_sent_headers_end_in_408_and_silence_in_a_close(patient: Server) -> None:
    with dial(patient) as half, dial(patient) as silent:
        half.sendall(b"POST / HTTP/1.1\r\nHost: localhost\r\nX-A: ")
        assert (reply := hear(half)).status == 408
        assert "headers did not arrive in time" in reply.error
        assert half.recv(1) == silent.recv(1) == b""


def test_so_do_those_of_a_second_request(patient: Server) -> None:
    with dial(patient) as connection:
        connection.sendall(request("POST", "/", TEXT.encode()))
        assert hear(connection).status == 200
        connection.sendall(b"POST / HT")
        assert hear(connection).status == 408


def test_body_that_nobody_wants_is_not_waited_for_either(patient: Server) -> None:
    with dial(patient) as connection:
        connection.sendall(b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 999999999\r\n\r\n")
        assert hear(connection).status == 413
        connection.sendall(b"x")  # so that it is no idle connection for uvicorn
        assert connection.recv(1) == b""


def test_request_that_takes_longer_than_its_headers_may_is_answered(patient: Server) -> None:
    words = "word " * 3000 + "[MASK]"  # 0.9 s
    assert post(patient, words).status == 200


def test_one_client_has_so_many_connections_and_no_more(patient: Server) -> None:
    with contextlib.ExitStack() as opened:
        connections = [opened.enter_context(dial(patient)) for _ in range(25)]
        for connection in connections:
            with contextlib.suppress(OSError):
                connection.sendall(request("GET", "/ready"))
        answered = [is_answered(connection) for connection in connections]
        assert answered.count(True) == 20
    until(lambda: is_free(patient))


def test_who_asks_for_a_websocket_keeps_no_connection(patient: Server) -> None:
    upgrade = b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: MTIzNDU2Nzg5MDEyMzQ1Ng==\r\n"
    for _ in range(30):  # more than one client may have
        with dial(patient) as connection:
            connection.sendall(b"GET /ready HTTP/1.1\r\nHost: localhost\r\n" + upgrade + b"\r\n")
            assert hear(connection).status == 200
    until(lambda: is_free(patient))


def test_half_a_request_behind_one_that_runs_does_not_end_it(patient: Server) -> None:
    words = "word " * 3000 + "[MASK]"  # 0.9 s
    with dial(patient) as connection:
        connection.sendall(request("POST", "/", words.encode()) + b"POST / HT")
        assert hear(connection).status == 200


def test_reply_before_the_end_of_a_long_body_arrives_though_the_connection_is_closed(
    patient: Server,
) -> None:
    """As behind a proxy that closes each connection: without more ado the system would reset it."""
    with dial(patient) as connection:
        body = b"x" * 2**23
        connection.sendall(request("POST", "/", body, Connection="close", Origin="http://elsewhere"))
        assert hear(connection).status == 403
        assert connection.recv(1) == b""


class Connected:
    """A connection as uvicorn's server has it, without a network."""

    def __init__(self) -> None:
        config = uvicorn.Config(answers, http=http_protocol.Protocol, log_config=None)
        config.load()
        self.transport, self.said = Mock(spec=asyncio.Transport), bytearray()
        self.transport.get_extra_info.return_value = None
        self.transport.is_closing = lambda: self.transport.close.called
        self.transport.write = self.said.extend
        self.protocol = http_protocol.Protocol(config, ServerState(), {})
        self.protocol.connection_made(self.transport)

    async def is_closed(self) -> bool:
        async with asyncio.timeout(30):
            while not self.transport.close.called:
                await asyncio.sleep(0)
        return True


async def answers(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
    await send({"type": "http.response.body", "body": b""})


def test_new_connection_is_answered_when_the_server_stops_and_a_silent_one_is_closed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def asks() -> None:
        connected = Connected()
        connected.protocol.shutdown()
        connected.protocol.data_received(request("GET", "/ready"))
        assert await connected.is_closed()
        assert connected.said.startswith(b"HTTP/1.1 200 OK") and b"connection: close" in connected.said

    async def is_silent() -> None:
        connected = Connected()
        connected.protocol.shutdown()
        assert not connected.transport.close.called
        assert await connected.is_closed()
        assert not connected.said

    monkeypatch.setattr(http_protocol, "MOMENT_S", 60)
    asyncio.run(asks())
    monkeypatch.setattr(http_protocol, "MOMENT_S", 0)
    asyncio.run(is_silent())


def test_worker_gives_its_heartbeat_though_the_clock_is_set_back(monkeypatch: pytest.MonkeyPatch) -> None:
    beats: list[float] = []

    async def notify() -> None:
        beats.append(time.monotonic())

    async def run() -> None:
        config = uvicorn.Config(answers, callback_notify=notify, **Worker.CONFIG_KWARGS)
        server, now = uvicorn.Server(config), time.time()
        for passed_s in (0, -86_400, -86_399):
            monkeypatch.setattr("time.time", lambda passed_s=passed_s: now + passed_s)
            await server.on_tick(0)

    asyncio.run(run())
    assert len(beats) == 3


def is_answered(connection: socket.socket) -> bool:
    with contextlib.suppress(OSError, http.client.HTTPException):
        return hear(connection).status == 200
    return False


def is_free(server: Server) -> bool:
    with dial(server) as connection:
        connection.sendall(request("GET", "/ready"))
        return is_answered(connection)


def test_tls_by_the_servers_own_flags(tmp_path: Path) -> None:
    """As SECURITY.md shows it."""
    key, certificate = str(tmp_path / "key.pem"), str(tmp_path / "cert.pem")
    made = f"openssl req -x509 -newkey rsa:2048 -nodes -keyout {key} -out {certificate} -days 1 -subj /CN=localhost"
    subprocess.run(
        [*made.split(), "-addext", "subjectAltName=DNS:localhost"], check=True, capture_output=True
    )
    command = f"uvicorn server:app --ssl-keyfile {key} --ssl-certfile {certificate}"
    assert "--ssl-keyfile" in (ROOT / "SECURITY.md").read_text()
    trusted = ssl.create_default_context(cafile=certificate)
    with start(Mode("tls", command), FILL_MASK, wait=False) as server:
        url = server.url.replace("http://127.0.0.1", "https://localhost")
        asked = urllib.request.Request(url, TEXT.encode(), {"Content-Type": "text/plain"})

        def answer() -> bytes:
            try:
                with urllib.request.urlopen(asked, context=trusted) as reply:
                    return reply.read()
            except urllib.error.HTTPError as loading:
                loading.close()
            except OSError:
                pass
            return b""

        assert b"thing" in until(answer)


def test_reply_leaves_in_one_piece_and_a_streams_head_at_once() -> None:
    sent: list[bytes] = []
    transport = Mock(write=sent.append)
    loop = Mock()
    held = http_protocol.Lingering(transport, Mock(loop=loop))
    held.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    assert sent == [b"HTTP/1.1 100 Continue\r\n\r\n"]
    held.write(b"HTTP/1.1 200 OK\r\n\r\n")
    held.write(b"all of it")
    assert sent[1:] == [b"HTTP/1.1 200 OK\r\n\r\nall of it"]
    held.write(b"HTTP/1.1 200 OK\r\n\r\n")
    assert len(sent) == 2
    loop.call_soon.call_args.args[0]()
    held.write(b"a line")
    assert sent[2:] == [b"HTTP/1.1 200 OK\r\n\r\n", b"a line"]
