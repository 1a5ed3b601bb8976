"""The HTTP protocol of uvicorn, with bounds on headers and on unread replies, and without lost replies when a connection closes.

    gunicorn -c gunicorn.conf.py                                 # has it
    uvicorn server:app --http workers.web.http_protocol:Protocol     # asks for it

uvicorn itself keeps a connection with half a request, or with a reply that nobody reads, open as long as the client does, and
any number of them per client; headers without an end freeze its event loop. And when it closes a connection while data is still
coming in, the system resets it, and the reply on its way is lost. That happens to a rejection before the end of a long body.
And when the server stops, to a client that has just connected.
"""

import asyncio
import json
import re
from collections import Counter
from collections.abc import Callable
from http import HTTPStatus
from typing import Any, ClassVar

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from workers.settings import Settings

settings = Settings.read()


def raw_error(status: int, sentence: str) -> bytes:
    """Return a whole reply, for a request that never reaches the app."""
    body = json.dumps({"error": sentence}).encode()
    head = (
        f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\ncontent-type: application/json\r\n"
        f"connection: close\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


END_OF_AUTHORITY = re.compile(rb"[/?#]")
TOO_SLOW = raw_error(408, "the headers did not arrive in time; send them faster")
MAX_HEAD_BYTES = 262_144  # of URL and headers, or between two parts of a body; the app itself takes 65,536
TOO_LONG = raw_error(431, "the headers are too long; send at most 65536 bytes")
LEAST_READ_BYTES = 16_384  # of a waiting reply per HEADERS_TIMEOUT_S: a client that reads less has stopped
LINGER_S = 2.0  # for the rest of a body that nobody wants any more
MOMENT_S = 0.3  # for the first request of a connection when the server stops


class Discard(asyncio.Protocol):
    """Reads on and drops it; closes when the client does."""

    def __init__(self, connection_lost: Callable[[Exception | None], None]) -> None:
        self.connection_lost = connection_lost  # type: ignore[assignment, method-assign]


class Lingering:
    """A transport that closes in two steps while the client is still sending: first it ends the reply, later the reading.

    It also sends a reply's head together with its body. uvloop would send them one by one. A server that is killed in
    between would leave half of a reply, and then no balancer can ask another server.
    """

    def __init__(self, transport: asyncio.Transport, protocol: HttpToolsProtocol) -> None:
        self.transport, self.protocol = transport, protocol
        self.is_closing = transport.is_closing  # often asked
        self.head = b""
        self.written = 0  # bytes

    def __getattr__(self, name: str) -> Any:
        return getattr(self.transport, name)

    def write(self, data: bytes) -> None:
        if self.head:
            data, self.head = self.head + data, b""
        elif data.startswith(b"HTTP/1.1 ") and not data.startswith(b"HTTP/1.1 100"):
            self.head = data
            self.protocol.loop.call_soon(self.flush)  # a stream's first line may come much later
            return
        self.written += len(data)
        self.transport.write(data)

    def flush(self) -> None:
        if self.head:
            self.write(b"")

    def close(self) -> None:
        cycle = self.protocol.cycle
        if cycle and cycle.response_complete and cycle.more_body:
            cycle.more_body = False  # closed again, it closes
            return self.linger()
        self.flush()
        self.transport.close()

    def linger(self) -> None:
        """End the reply now, and the reading LINGER_S later."""
        self.flush()
        if self.is_closing() or not self.transport.can_write_eof():  # TLS can't
            return self.transport.close()
        self.transport.write_eof()
        self.transport.set_protocol(Discard(self.protocol.connection_lost))
        self.protocol.loop.call_later(LINGER_S, self.transport.close)


class Protocol(HttpToolsProtocol):
    """Checks its connection every HEADERS_TIMEOUT_S, so half a request ends after one to two of these: no timer per request."""

    open_by_client: ClassVar[Counter[str]] = Counter()
    host = ""
    last_scope: Any = None
    had_unread, taken = False, 0  # of its replies, at the last check
    next_check: asyncio.TimerHandle | None = None
    stopping = False
    loose_bytes = 0  # received since headers or a part of a body were complete

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(Lingering(transport, self))  # type: ignore[arg-type]
        # There are no WebSockets here, and their protocol's class would not tell when a connection has ended.
        self.ws_protocol_class = None
        self.host = self.client[0] if self.client else ""
        self.open_by_client[self.host] += 1
        if 0 < settings.MAX_CONNECTIONS < self.open_by_client[self.host] and self.host:
            return transport.abort()
        self.next_check = self.loop.call_later(settings.HEADERS_TIMEOUT_S, self.check)

    def check(self) -> None:
        """Close the connection if its headers, or the unread body of an answered request, have made no progress since the last
        check; abort it if nobody reads its reply."""
        unread = self.transport.get_write_buffer_size()
        taken = self.transport.written - unread  # type: ignore[attr-defined]
        if unread and self.had_unread and taken < self.taken + LEAST_READ_BYTES:
            return self.transport.abort()
        self.had_unread, self.taken = unread > 0, taken
        self.next_check = self.loop.call_later(settings.HEADERS_TIMEOUT_S, self.check)
        if self.transport.is_closing():
            return
        answered = not self.cycle or self.cycle.response_complete
        unwanted = self.cycle and answered and self.cycle.more_body
        waits = unwanted or self.scope is None or "method" not in self.scope
        if waits and answered and self.last_scope is self.scope:
            if self.scope is not None and not unwanted:
                self.transport.write(TOO_SLOW)
            return self.transport.close()
        self.last_scope = self.scope

    def data_received(self, data: bytes) -> None:
        self.loose_bytes += len(data)
        super().data_received(data)
        if self.loose_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
            self.loose_bytes = 0
            if not self.cycle or self.cycle.response_complete:
                self.transport.write(TOO_LONG)
            self.transport.linger()  # type: ignore[attr-defined]

    def send_400_response(self, msg: str) -> None:
        self.transport.write(raw_error(400, "this is not valid HTTP/1.1; send a well-formed request"))
        self.transport.close()

    def on_body(self, body: bytes) -> None:
        self.loose_bytes = 0
        super().on_body(body)

    def shutdown(self) -> None:
        """If no answer is due wait MOMENT_S before closing: a request on its way is told that the server stops."""
        if self.stopping or (self.cycle and not self.cycle.response_complete):
            return super().shutdown()
        self.stopping = True
        self.loop.call_later(MOMENT_S, self.shutdown)

    def on_headers_complete(self) -> None:
        self.loose_bytes = 0
        if b"://" in self.url and not self.url.startswith(b"/"):
            # Absolute-form: its authority counts, whatever Host says (RFC 9112, 3.2.2), and uvicorn drops it.
            target = self.url.partition(b"://")[2]
            authority = END_OF_AUTHORITY.split(target)[0]
            rest = target[len(authority) :]
            self.url = rest if rest.startswith(b"/") else b"/" + rest
            self.headers[:] = [(name, value) for name, value in self.headers if name != b"host"]
            self.headers.append((b"host", authority))
        super().on_headers_complete()
        if self.stopping:
            self.cycle.keep_alive = False

    def connection_lost(self, exc: Exception | None) -> None:
        if self.next_check:
            self.next_check.cancel()
        self.open_by_client[self.host] -= 1
        if not self.open_by_client[self.host]:
            del self.open_by_client[self.host]
        super().connection_lost(exc)
