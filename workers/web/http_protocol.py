"""uvicorn's HTTP, with a limit on the time for headers, and without lost replies when a connection closes.

    gunicorn -c gunicorn.conf.py                             # has it
    uvicorn server:app --http workers.web.http_protocol:Protocol       # asks for it

uvicorn itself keeps a connection with half a request open as long as the client does, and any number of them for one client.
And when it closes a connection while data is still coming in, the system resets it, and the reply on its way is lost. That
happens to a rejection before the end of a long body. And when the server stops, to a client that has just connected.
"""

import asyncio
from collections import Counter
from collections.abc import Callable
from typing import Any, ClassVar

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from workers.settings import Settings

settings = Settings.read()
BODY = b'{"error":"the headers did not arrive in time; send them faster"}'
TOO_SLOW = (
    b"HTTP/1.1 408 Request Timeout\r\ncontent-type: application/json\r\nconnection: close\r\n"
    b"content-length: %d\r\n\r\n%s" % (len(BODY), BODY)
)
LINGER_S = 2.0  # for the rest of a body that nobody wants any more
MOMENT_S = 0.3  # for the first request of a connection when the server stops


class Discard(asyncio.Protocol):
    """Reads on, and forgets it; closes when the client does."""

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

    def __getattr__(self, name: str) -> Any:
        return getattr(self.transport, name)

    def write(self, data: bytes) -> None:
        if self.head:
            data, self.head = self.head + data, b""
        elif data.startswith(b"HTTP/1.1 ") and not data.startswith(b"HTTP/1.1 100"):
            self.head = data
            self.protocol.loop.call_soon(self.flush)  # a stream's first line may come much later
            return
        self.transport.write(data)

    def flush(self) -> None:
        if self.head:
            self.write(b"")

    def close(self) -> None:
        self.flush()
        cycle = self.protocol.cycle
        still_comes = cycle and cycle.response_complete and cycle.more_body
        if self.is_closing() or not still_comes or not self.transport.can_write_eof():  # TLS can't
            return self.transport.close()
        cycle.more_body = False  # closed again, it closes
        self.transport.write_eof()
        self.transport.set_protocol(Discard(self.protocol.connection_lost))
        self.protocol.loop.call_later(LINGER_S, self.transport.close)


class Protocol(HttpToolsProtocol):
    """Looks at its connection every HEADERS_TIMEOUT_S, so half a request ends after one to two of these: no timer a request."""

    open_by_client: ClassVar[Counter[str]] = Counter()
    host = ""
    polled_at: Any = None
    next_look: asyncio.TimerHandle | None = None
    stopping = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(Lingering(transport, self))  # type: ignore[arg-type]
        # There are no WebSockets here, and their protocol's class would not tell when a connection has ended.
        self.ws_protocol_class = None
        self.host = self.client[0] if self.client else ""
        self.open_by_client[self.host] += 1
        if 0 < settings.MAX_CONNECTIONS < self.open_by_client[self.host] and self.host:
            return transport.abort()
        self.next_look = self.loop.call_later(settings.HEADERS_TIMEOUT_S, self.look)

    def look(self) -> None:
        """End the connection if it has waited since the last look for the end of the same headers, or of a body that
        nobody wants: its reply is sent."""
        answered = not self.cycle or self.cycle.response_complete
        unwanted = self.cycle and answered and self.cycle.more_body
        waits = unwanted or self.scope is None or "method" not in self.scope
        if waits and answered and self.polled_at is self.scope:
            if self.scope is not None and not unwanted:
                self.transport.write(TOO_SLOW)
            return self.transport.close()
        self.polled_at = self.scope
        self.next_look = self.loop.call_later(settings.HEADERS_TIMEOUT_S, self.look)

    def shutdown(self) -> None:
        """If no answer is due wait MOMENT_S before closing: a request on its way is told that the server stops."""
        if self.stopping or (self.cycle and not self.cycle.response_complete):
            return super().shutdown()
        self.stopping = True
        self.loop.call_later(MOMENT_S, self.shutdown)

    def on_headers_complete(self) -> None:
        super().on_headers_complete()
        if self.stopping:
            self.cycle.keep_alive = False

    def connection_lost(self, exc: Exception | None) -> None:
        if self.next_look:
            self.next_look.cancel()
        self.open_by_client[self.host] -= 1
        if not self.open_by_client[self.host]:
            del self.open_by_client[self.host]
        super().connection_lost(exc)
