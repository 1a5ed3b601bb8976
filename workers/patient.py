"""uvicorn's HTTP, but not for ever patient: a client that does not finish its headers is let go.

    gunicorn -c gunicorn.conf.py                             # has it
    uvicorn server:app --http workers.patient:Protocol       # asks for it

uvicorn itself keeps a connection with half a request open as long as the client does, and any number of them from one.
"""

import asyncio
from collections import Counter
from typing import Any, ClassVar

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn_worker import UvicornWorker  # type: ignore[import-untyped]

from workers.settings import Settings

settings = Settings.read()
BODY = b'{"error":"the headers did not arrive in time; send them faster"}'
TOO_SLOW = (
    b"HTTP/1.1 408 Request Timeout\r\ncontent-type: application/json\r\nconnection: close\r\n"
    b"content-length: %d\r\n\r\n%s" % (len(BODY), BODY)
)


class Protocol(HttpToolsProtocol):
    """Looks at its connection every HEADERS_TIMEOUT_S, which costs a request nothing: it ends between one and two of them."""

    open_by_client: ClassVar[Counter[str]] = Counter()
    host = ""
    looked_at: Any = None
    next_look: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.host = self.client[0] if self.client else ""
        self.open_by_client[self.host] += 1
        if 0 < settings.MAX_CONNECTIONS < self.open_by_client[self.host] and self.host:
            return transport.abort()
        self.next_look = self.loop.call_later(settings.HEADERS_TIMEOUT_S, self.look)

    def look(self) -> None:
        """End the connection if it has waited for the end of the same headers since the last look."""
        waits = self.scope is None or "method" not in self.scope
        if waits and self.looked_at is self.scope:
            if self.scope is not None:
                self.transport.write(TOO_SLOW)
            return self.transport.close()
        self.looked_at = self.scope
        self.next_look = self.loop.call_later(settings.HEADERS_TIMEOUT_S, self.look)

    def connection_lost(self, exc: Exception | None) -> None:
        if self.next_look:
            self.next_look.cancel()
        self.open_by_client[self.host] -= 1
        if not self.open_by_client[self.host]:
            del self.open_by_client[self.host]
        super().connection_lost(exc)


class Worker(UvicornWorker):  # type: ignore[misc]
    """Gunicorn's uvicorn worker with it."""

    CONFIG_KWARGS: ClassVar[dict[str, Any]] = {"loop": "auto", "http": "workers.patient:Protocol"}
