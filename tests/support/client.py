"""A client that shows what is on the wire."""

import contextlib
import http.client
import json
import math
import re
import socket
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from loadtests.modes import Server

PARIS = "Paris is the [MASK] of France."
POISON = "[POISON] is [MASK]."  # the stand-in raises on it
# a few hundred tokens: the slowest that is let in
SLOW = "the [MASK] " + "of the old house on the hill " * 70


@dataclass
class Reply:
    """What came back."""

    status: int
    headers: http.client.HTTPMessage
    body: bytes
    took_s: float = math.nan  # where it was measured

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> str:
        """The sentence; fails when the reply is no error in the contract's form."""
        assert self.headers.get_content_type() == "application/json", self
        assert self.json.keys() == {"error"}, self
        return self.json["error"]


def dial(server: Server) -> socket.socket:
    """A connection."""
    url = urlsplit(server.url)
    return socket.create_connection((url.hostname, url.port), 60)


def hear(connection: socket.socket) -> Reply:
    """The next reply on it. Raises ConnectionError or http.client.HTTPException when there is none."""
    with contextlib.closing(http.client.HTTPResponse(connection)) as response:
        response.begin()
        return Reply(response.status, response.headers, response.read())


def say(server: Server, raw: bytes) -> Reply:
    """Send exactly these bytes on a new connection; return the reply."""
    with dial(server) as connection:
        connection.sendall(raw)
        return hear(connection)


def request(method: str, path: str = "/", body: bytes = b"", **headers: str) -> bytes:
    """The bytes of a request; headers are written with _ for -."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    lines = [f"{method} {path} HTTP/1.1", "Host: localhost", *(f"{k}: {v}" for k, v in named.items())]
    if body and "Transfer-Encoding" not in named and "Content-Length" not in named:
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


def below(server: Server, path: str) -> str:
    """The server's own `path`: behind a proxy it may have others beside it."""
    return urlsplit(server.url).path.rstrip("/") + path


def post(server: Server, body: str | bytes, **headers: str) -> Reply:
    """POST / with this body."""
    body = body.encode() if isinstance(body, str) else body
    return say(server, request("POST", below(server, "/"), body, **headers))


def post_json(server: Server, content: Any, **headers: str) -> Reply:
    """POST / with this JSON."""
    return post(server, json.dumps(content), **{"Content_Type": "application/json", **headers})


def get(server: Server, path: str) -> Reply:
    return say(server, request("GET", below(server, path)))


def metric(server: Server, name: str) -> float:
    """The sum of a metric's samples of this name (labels as in the text narrow it down)."""
    lines = get(server, "/metrics").body.decode().splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith((name + " ", name + "{")))


def until(condition: Callable[[], Any], timeout_s: float = 60.0) -> Any:
    """Poll until it is true and return it; fails after `timeout_s`."""
    end = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)
    return value


def workers(server: Server) -> list[int]:
    """The ids of the processes that have said that they serve, in that order."""
    return [int(pid) for pid in re.findall(r"worker (\d+), one of", server.log())]


class Crowd(ThreadPoolExecutor):
    """Many clients at once."""

    def __init__(self) -> None:
        super().__init__(max_workers=64)

    def post(self, server: Server, *texts: str, **headers: str) -> list[Future[Reply]]:
        return [self.submit(post, server, text, **headers) for text in texts]
