"""One request over HTTP for a Locust user, measured from when it was due, its answer checked, its outcome named."""

import math
import random
import re
import time
from collections import deque
from functools import partial
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import gevent
from gevent import socket
from geventhttpclient.response import HTTPParseError, HTTPSocketResponse
from locust import User

from loadtests.load import texts
from loadtests.load.expected import Expected
from loadtests.load.request_forms import FORMS
from loadtests.load.rows import Row
from workers.settings import Settings

IDLE_S = 1.0  # servers close idle connections (Gunicorn after 2 s): a younger one is safe to use again
SERVER_TIMING = re.compile(r'queue;dur=([\d.]+), model;dur=([\d.]+), batch;desc="size (\d+)')
NAN = math.nan


class Reply(NamedTuple):
    status: int
    headers: Any
    body: bytes


class Http:
    """As many connections as requests are under way. A pool with a bound would hide an overload from the server."""

    def __init__(self, url: str) -> None:
        where = urlsplit(url)
        self.address = (where.hostname or "127.0.0.1", where.port or 80)
        self.host = where.netloc
        self.idle: deque[tuple[float, Any]] = deque()

    def send(self, method: str, path: str, body: bytes, headers: dict[str, str]) -> Reply:
        """Return the reply. Raises OSError or HTTPParseError when there is none; closes on any exception."""
        head = f"{method} {path} HTTP/1.1\r\nHost: {self.host}\r\nContent-Length: {len(body)}\r\n"
        head += "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        connection = self._connect()
        try:
            connection.sendall(head.encode() + b"\r\n" + body)
            reply = HTTPSocketResponse(connection, method=method, block_size=16_384)
            content = bytes(reply.read())
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
        return connection


class Asker(User):
    """A Locust user who asks the model and checks the answer; the scenarios say when."""

    abstract = True

    def __init__(self, environment: Any) -> None:
        super().__init__(environment)
        self.options = environment.parsed_options
        settings = Settings.read()
        # A class of one's own may take seconds to load: not on the schedule's time.
        texts.example_of(settings)
        self.began = environment.began = getattr(environment, "began", None) or time.perf_counter()
        environment.numbers = getattr(environment, "numbers", -1) + 1  # users differ, runs do not
        self.rng = random.Random(f"{self.options.seed} {type(self).__name__} {environment.numbers}")
        self.texts = texts.stream(self.options.texts, self.rng, settings)
        self.http = Http(self.host or "")
        self.form = FORMS[self.options.form]
        self.expected = Expected.read(self.options.expected) if self.options.expected else None

    def now_s(self) -> float:
        """Seconds since the start of the test."""
        return time.perf_counter() - self.began

    def ask(self, due_s: float | None = None, *, leave_after_s: float | None = None, attempt: int = 0) -> Row:
        """Ask one question. The client hangs up after `leave_after_s`, where given."""
        question = next(self.texts)
        body, media_type = question.body, question.media_type
        if isinstance(question, texts.Text):
            body, media_type = self.form.body(question.text), self.form.media_type
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
        """Whether the reply answers the question, as the expected answers have it where there are any."""
        if isinstance(question, texts.Question):
            return question.is_answered_by(body)
        answer = self.form.answer(body)
        if self.expected:
            return self.expected.agrees(question.text, answer)
        return question.is_answered_with(answer)

    def check_health(self, due_s: float) -> Row:
        """Ask whether it lives."""
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
    ) -> Row:
        sent_s = self.now_s()
        due_s = sent_s if due_s is None else due_s
        give_up_s = due_s + (leave_after_s or self.options.timeout_s) - sent_s
        reply, outcome = None, "left" if leave_after_s else "lost"
        try:
            with gevent.Timeout(max(give_up_s, 0.001)):
                reply = self.http.send(method, path, body, headers)
            if reply.status == 429:
                reply = reply._replace(status=503)  # which is how others refuse
            outcome = str(reply.status) if reply.status in (200, 503, 504) else "other"
        except gevent.Timeout:
            pass
        except (OSError, HTTPParseError):
            outcome = "lost"
        latency_ms = (self.now_s() - due_s) * 1000
        if reply and outcome == "200" and not is_right(reply.body):
            outcome = "wrong"
        row = Row(due_s, sent_s, latency_ms, outcome, kind, *self._timing(reply), attempt)
        self._report(method, path, row, reply)
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

    def _report(self, method: str, path: str, row: Row, reply: Reply | None) -> None:
        """Tell Locust, whose page lists the outcomes as failures; keep the row where a run wants rows."""
        if (rows := getattr(self.environment, "rows", None)) is not None:
            rows.append(row)
        if row.outcome == "200" and row.latency_ms > self.options.limit_s * 1000:
            problem: Exception | None = LoadTestFailure("200, but after the client's limit")
        else:
            problem = None if row.outcome == "200" else LoadTestFailure(MEANING[row.outcome])
        self.environment.events.request.fire(
            request_type=method,
            name=path,
            response_time=row.latency_ms,
            response_length=len(reply.body) if reply else 0,
            exception=problem,
            context={},
        )


class LoadTestFailure(Exception):
    """A request that did not end well; Locust groups them by their text."""


MEANING = {
    "503": "503, refused",
    "504": "504, too late",
    "other": "another status",
    "wrong": "200, but not an answer to what was asked",
    "lost": "no reply",
    "left": "the client left",
}
