"""One request over HTTP for a Locust user, measured from when it was due, its answer checked, its outcome named."""

import json
import math
import random
import re
import ssl
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from http import HTTPStatus
from typing import Any, NamedTuple
from urllib.parse import SplitResult, urlsplit

import gevent
from gevent import socket
from gevent.ssl import create_default_context
from geventhttpclient.response import HTTPParseError, HTTPSocketResponse
from locust import User

from loadtests.load import texts
from loadtests.load.expected import Expected
from loadtests.load.request_forms import FORMS
from loadtests.load.rows import Row

IDLE_S = 1.0  # servers close idle connections (Gunicorn after 2 s): a younger one is safe to use again
SERVER_TIMING = re.compile(r'queue;dur=([\d.]+), model;dur=([\d.]+), batch;desc="size (\d+)')
NAN = math.nan


class Reply(NamedTuple):
    status: int
    headers: Any
    body: bytes


def url_problem(url: str) -> str:
    """Return what is wrong with the address of a server, in a sentence; empty when nothing is."""
    try:
        where = urlsplit(url)
        where.port  # noqa: B018 it raises
    except ValueError as exc:
        return f"{url} is not a URL: {exc}; use one such as http://127.0.0.1:8000"
    if where.scheme not in ("http", "https") or not where.hostname:
        return f"{url} is not a URL; use one such as http://127.0.0.1:8000 or https://example.com/prefix"
    if where.username is not None:
        return "the URL has a user name in it; use --api-key for a key"
    if where.query or where.fragment:
        return f"{url} has a query or a fragment; use the address of the server, with its prefix at most"
    return ""


class Http:
    """As many connections as requests are under way. A pool with a bound would hide an overload from the server."""

    def __init__(self, url: str, headers: dict[str, str] | None = None) -> None:
        where: SplitResult = urlsplit(url)
        self.tls = create_default_context() if where.scheme == "https" else None
        self.address = (where.hostname or "127.0.0.1", where.port or (443 if self.tls else 80))
        self.prefix = where.path.rstrip("/")
        lines = {"Host": where.netloc, **(headers or {})}
        self.headers = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
        self.idle: deque[tuple[float, Any]] = deque()

    def send(
        self,
        method: str,
        path: str,
        body: bytes,
        headers: dict[str, str],
        each_line: Callable[[bytes], None] | None = None,
    ) -> Reply:
        """Return the reply; `each_line` gets its lines as they come. Raises OSError or HTTPParseError when there is none.

        Closes the connection on any exception.
        """
        head = f"{method} {self.prefix}{path} HTTP/1.1\r\n{self.headers}Content-Length: {len(body)}\r\n"
        head += "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        connection = self._connect()
        try:
            connection.sendall(head.encode() + b"\r\n" + body)
            reply = HTTPSocketResponse(connection, method=method, block_size=16_384)
            content = b""
            while each_line and (line := bytes(reply.readline(b"\n"))):
                each_line(line)
                content += line
            content += bytes(reply.read())
            if not reply.message_complete:
                raise HTTPParseError("the reply ended early")
        except BaseException:
            connection.close()
            raise
        if reply.should_close():
            connection.close()
        else:
            self.idle.append((time.perf_counter(), connection))
        return Reply(reply.get_code(), reply, content)

    def _connect(self) -> Any:
        while self.idle:
            since, connection = self.idle.pop()
            if time.perf_counter() - since < IDLE_S:
                return connection
            connection.close()
        connection = socket.create_connection(self.address)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return self.tls.wrap_socket(connection, server_hostname=self.address[0]) if self.tls else connection


class Asker(User):
    """A Locust user who asks the model and checks the answer; the scenarios say when."""

    abstract = True
    texts_kind: str | None = None  # None: as --texts says

    def __init__(self, environment: Any) -> None:
        super().__init__(environment)
        self.options = environment.parsed_options
        self.timeout_s = self.options.timeout_s or 2 * self.options.limit_s
        self.began = environment.began = getattr(environment, "began", None) or time.perf_counter()
        # Users differ, runs do not; and no class changes what another does.
        numbers, name = environment.numbers, type(self).__name__
        numbers[name] = numbers.get(name, -1) + 1
        self.rng = random.Random(f"{self.options.seed} {name} {numbers[name]}")
        self.texts = texts.stream(self.texts_kind or self.options.texts, self.rng, environment.example)
        self.mask = environment.mask
        self.http = Http(self.host or "", authorization(self.options.api_key))
        self.form = FORMS[self.options.form]
        self.expected = Expected.read(self.options.expected) if self.options.expected else None

    def now_s(self) -> float:
        """Return seconds since the start of the test."""
        return time.perf_counter() - self.began

    def ask(self, due_s: float | None = None, *, leave_after_s: float | None = None, attempt: int = 0) -> Row:
        """Ask one question. The client hangs up after `leave_after_s`, where given."""
        question = next(self.texts)
        body, media_type = question.body, question.media_type
        if isinstance(question, texts.Text):
            body = self.form.body(question.text.replace(texts.MASK, self.mask))
            media_type = self.form.media_type
        return self._send(
            "model",
            "POST",
            self.form.path,
            body,
            {"Content-Type": media_type},
            partial(self.is_right, question),
            due_s,
            leave_after_s,
            attempt,
        )

    def is_right(self, question: "texts.Text | texts.Question", body: bytes) -> bool:
        """Return whether the reply answers the question, as the expected answers have it where there are any."""
        if isinstance(question, texts.Question):
            return question.is_answered_by(body)
        answer = self.form.answer(body)
        if self.expected:
            return self.expected.agrees(question.text, answer)
        return question.is_answered_with(answer)

    def check_health(self, due_s: float) -> Row:
        """Ask whether the server lives."""
        form = self.form
        return self._send("health", "GET", form.health, b"", {}, lambda body: form.health_says in body, due_s)

    def _send(
        self,
        kind: str,
        method: str,
        path: str,
        body: bytes,
        headers: dict[str, str],
        is_right: Any,
        due_s: float | None,
        leave_after_s: float | None = None,
        attempt: int = 0,
        each_line: Callable[[bytes], None] | None = None,
        judged_ms: Callable[[], float] | None = None,
    ) -> Row:
        """Send a request and note what came of it. `judged_ms`: what the client's limit is for, instead of the latency."""
        sent_s = self.now_s()
        due_s = sent_s if due_s is None else due_s
        give_up_s = due_s + (leave_after_s or self.timeout_s) - sent_s
        reply, failure = None, ""
        try:
            with gevent.Timeout(max(give_up_s, 0.001)):
                reply = self.http.send(method, path, body, headers, each_line)
            if reply.status == 429:
                reply = reply._replace(status=503)  # which is how others reject
            outcome = str(reply.status) if reply.status in (200, 503, 504) else "other"
        except gevent.Timeout:
            outcome = "left" if leave_after_s else "lost"
            failure = f"the client gave up after {self.timeout_s:g} s"
        except (OSError, HTTPParseError) as exc:
            outcome, failure = "lost", connection_failure(exc, self.http.address)
        latency_ms = (self.now_s() - due_s) * 1000
        if reply and outcome == "200" and not is_right(reply.body):
            outcome = "wrong"
        row = Row(due_s, sent_s, latency_ms, outcome, kind, *self._timing(reply), attempt)
        is_late = (
            outcome == "200" and (judged_ms() if judged_ms else latency_ms) > self.options.limit_s * 1000
        )
        self._report(method, path, row, reply, failure, is_late)
        return row

    @staticmethod
    def _timing(reply: Reply | None) -> tuple[float, float, float, float]:
        if reply is None:
            return NAN, NAN, NAN, NAN
        found = SERVER_TIMING.search(reply.headers.get("server-timing") or "")
        retry_after = reply.headers.get("retry-after") or ""
        return (
            *(map(float, found.groups()) if found else (NAN, NAN, NAN)),
            float(retry_after) if retry_after.isdecimal() else NAN,
        )

    def _report(
        self, method: str, path: str, row: Row, reply: Reply | None, failure: str, is_late: bool
    ) -> None:
        """Tell Locust; keep the row where a run wants rows. Only correct answers in time have the bare path as their name."""
        if (rows := getattr(self.environment, "rows", None)) is not None:
            rows.append(row)
        kind = "late" if is_late else KINDS[row.outcome]
        if row.outcome == "lost" and failure.startswith("the client gave up"):
            kind = "late"
        if is_late:
            failure = f"answered after the client's limit of {self.options.limit_s:g} s"
        elif reply:
            failure = status_failure(reply, row)
        self.environment.events.request.fire(
            request_type=method,
            name=f"{path} {kind}".rstrip(),
            response_time=row.latency_ms,
            response_length=len(reply.body) if reply else 0,
            exception=failure if kind not in ("", "left") else None,
            context={"row": row, "kind": kind},
        )


# What an outcome is called behind the path in Locust's tables: right and in time, nothing.
KINDS = {
    "200": "",
    "503": "rejected",
    "504": "late",
    "other": "failed",
    "wrong": "wrong",
    "lost": "failed",
    "left": "left",
}


def authorization(api_key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {api_key}"} if api_key else {}


def status_failure(reply: Reply, row: Row) -> str:
    """Return what a reply says, in words; those who sent something wrong get the server's own sentence."""
    if row.outcome == "wrong":
        return "200, but not an answer to what was asked"
    if row.outcome == "503":
        # Its numbers differ from one to the next, and Locust groups failures by their text.
        return f"503 rejected: {re.sub(r'[0-9][0-9.]*', '…', error_of(reply.body))}".rstrip(": ")
    if reply.status == 504:
        return "504 Gateway Timeout: too late for the server's own deadline"
    return client_failure(reply)


def client_failure(reply: Reply) -> str:
    """Return a status in words, with the server's own sentence where the client is to blame."""
    known = {status.value: status.phrase for status in HTTPStatus}
    words = f"{reply.status} {known.get(reply.status, '')}".strip()
    if reply.status == 401:
        return f"{words}: give the server's key with --api-key, or API_KEY in the environment"
    return (
        f"{words}: {sentence}" if 400 <= reply.status < 500 and (sentence := error_of(reply.body)) else words
    )


def error_of(body: bytes) -> str:
    """Return the sentence of {"error": "…"}; empty where there is none."""
    try:
        return str(json.loads(body)["error"])[:160]
    except (ValueError, LookupError, TypeError):
        return ""


def connection_failure(exc: Exception, address: tuple[str, int]) -> str:
    """Return why there was no reply, in words."""
    host, port = address
    if isinstance(exc, ConnectionRefusedError):
        return f"connection refused: is the server running on {host}:{port}?"
    if isinstance(exc, socket.gaierror):
        return f"host name {host} was not found"
    if isinstance(exc, ssl.SSLCertVerificationError):
        return f"certificate not trusted ({exc.verify_message}); SSL_CERT_FILE names one that is"
    if isinstance(exc, ssl.SSLError):
        return f"TLS failed ({exc.reason}); does the server speak https on port {port}?"
    if isinstance(exc, ConnectionError):
        return "the connection was closed before a reply came"
    if isinstance(exc, HTTPParseError):
        return "the reply ended early, or is not HTTP"
    return f"no connection: {exc.strerror or exc}" if isinstance(exc, OSError) else str(exc)


def ask_info(url: str, api_key: str, timeout_s: float = 10.0) -> dict[str, Any] | None:
    """Return what the server says of itself; None where it isn't this project's.

    Raises ConnectionError with a sentence when it can't be asked, or isn't ready.
    """
    http = Http(url, authorization(api_key))
    try:
        with gevent.Timeout(timeout_s):
            reply, ready = (http.send("GET", path, b"", {}) for path in ("/info", "/ready"))
    except gevent.Timeout:
        raise ConnectionError(f"{url} gave no answer to GET /info within {timeout_s:g} s") from None
    except (OSError, HTTPParseError) as exc:
        raise ConnectionError(connection_failure(exc, http.address)) from None
    if reply.status in (401, 403, 421):
        raise ConnectionError(client_failure(reply))
    try:
        info = json.loads(reply.body)
        if reply.status != 200 or not {"task", "example", "media"} <= info.keys():
            return None
    except (ValueError, AttributeError):
        return None
    if ready.status == 503:
        raise ConnectionError(
            f"the server is not ready ({error_of(ready.body) or 503}); try again in some seconds"
        )
    return dict(info)
