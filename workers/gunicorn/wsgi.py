"""The same app for Gunicorn's sync and gthread workers: one event loop in the background, threads that wait for it.

A worker's thread hands its request to the event loop, which runs the app as uvicorn would, and sleeps until the reply is
whole, or, where its length is not known, hands out each part as it comes. So the queue, the batches and the answers are
those of `workers/loop.py`.
"""

import asyncio
import atexit
import contextlib
import errno
import socket
import threading
from collections.abc import Callable, Coroutine, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager
from queue import SimpleQueue
from typing import Any

from gunicorn.http.errors import ParseException  # type: ignore[import-untyped]
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Scope
from werkzeug.wrappers import Request, Response

import server
from workers.gunicorn import common
from workers.web.replies import CLIENT_GONE, CLOSE

STEP_BYTES = 65_536
DISCONNECTED: Message = {"type": "http.disconnect"}


class WSGIAdapter:
    """A WSGI app that runs an ASGI app and its lifespan on one event loop. Make it in the worker's main thread."""

    def __init__(
        self, app: ASGIApp, lifespan: Callable[[Any], AbstractAsyncContextManager[dict[str, Any]]]
    ) -> None:
        self.app = app
        self.loop = asyncio.new_event_loop()
        # More than Gunicorn's threads, each of which may read a stalled body.
        self.loop.set_default_executor(ThreadPoolExecutor(64))
        threading.Thread(target=self.loop.run_forever, name="event loop", daemon=True).start()
        self.lifespan = lifespan(app)
        self.state = self.call(self.lifespan.__aenter__())
        self.state["service"].stop_on_signals()  # which only the main thread may catch
        atexit.register(lambda: self.call(self.lifespan.__aexit__(None, None, None)))

    def call(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        """Run it on the event loop; return what it returns."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result()

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        wsgi_request = WSGIRequest(environ)
        running = asyncio.run_coroutine_threadsafe(wsgi_request.run(self.app, self.state), self.loop)
        running.add_done_callback(lambda _: wsgi_request.stream.put(None))
        first = wsgi_request.stream.get()
        if first is None:
            running.result()
        if wsgi_request.reply.status_code == CLIENT_GONE:
            raise ConnectionResetError(errno.ECONNRESET, "so Gunicorn closes without a word")
        gunicorn = start_response.__self__
        if wsgi_request.is_unread() or wsgi_request.reply.headers.get("Connection") == "close":
            gunicorn.force_close()  # it ignores the header itself
        if first is not None:
            wsgi_request.reply.response = self.parts(wsgi_request, first, running)
        body = wsgi_request.reply(environ, start_response)
        if gunicorn.should_close():
            # Nothing more is read. Frees the thread that waits for the rest of a body, and Gunicorn, which would wait
            # 2 s for the client to close its side, gthread all the while in the thread that accepts the others.
            # Of a stream only at its end: until then the connection tells when its client leaves.
            wsgi_request.stop_reading() if first is None else wsgi_request.reply.call_on_close(
                wsgi_request.stop_reading
            )
        return body

    def parts(self, wsgi_request: "WSGIRequest", first: bytes, running: "Future[None]") -> Iterator[bytes]:
        """Yield the parts of a reply as they come. The next one is asked for when Gunicorn has sent the last one."""
        part: bytes | None = first
        try:
            while part is not None:
                yield part
                common.heartbeat()  # a sync worker's own come between requests only
                self.loop.call_soon_threadsafe(wsgi_request.is_taken.set)
                part = wsgi_request.stream.get()
            with contextlib.suppress(ClientDisconnect):
                running.result()
            if not wsgi_request.is_whole:
                raise ConnectionResetError(errno.ECONNRESET, "so Gunicorn closes, and the client sees no end")
        finally:
            running.cancel()


class WSGIRequest:
    """One request and its reply: Gunicorn's WSGI on one side, ASGI on the other."""

    def __init__(self, environ: dict[str, Any]) -> None:
        self.request = Request(environ, populate_request=False)
        self.connection: socket.socket = environ["gunicorn.socket"]
        self.chunked = "HTTP_TRANSFER_ENCODING" in environ
        # Bytes of the body that are still to come, if it has a length.
        self.missing = self.request.content_length or 0
        self.is_read = False
        self.parts: list[bytes] = []
        self.reply = Response(self.parts)
        # The parts of a reply without a length, then None: it has ended.
        self.stream: SimpleQueue[bytes | None] = SimpleQueue()
        self.is_taken = asyncio.Event()  # Gunicorn has sent the last part
        self.is_streamed = self.is_whole = False

    async def run(self, app: ASGIApp, state: dict[str, Any]) -> None:
        """Let `app` answer it."""
        await app(self.scope(state), self.receive, self.send)

    async def receive(self) -> Message:
        """Return the next part of the body; that the client has disconnected, as soon as it has."""
        if self.is_read:
            await self.left()
            return DISCONNECTED
        try:
            # In steps, as the body may be longer than is allowed; from a thread, as the client may stall.
            part = await asyncio.to_thread(self.request.environ["wsgi.input"].read, STEP_BYTES)
        except OSError:  # NoMoreData, for one
            return DISCONNECTED
        except ParseException:
            if has_left(self.connection):
                return DISCONNECTED
            raise HTTPException(
                400, "the chunks of the body can't be read; send it with a length", CLOSE
            ) from None
        self.missing -= len(part)
        ended = len(part) < STEP_BYTES
        self.is_read = ended if self.chunked else self.missing == 0
        if (ended and not self.is_read) or (self.is_read and has_left(self.connection)):
            return DISCONNECTED
        return {"type": "http.request", "body": part, "more_body": not self.is_read}

    async def send(self, message: Message) -> None:
        """Keep a part of the reply; one of a stream is sent before this returns."""
        if message["type"] == "http.response.start":
            self.reply.status_code = message["status"]
            self.reply.headers.clear()
            for name, value in message["headers"]:
                self.reply.headers.add(name.decode("latin-1"), value.decode("latin-1"))
            return
        part, more = message.get("body", b""), message.get("more_body", False)
        self.is_whole = not more
        if "Content-Length" in self.reply.headers or not (more or self.is_streamed):
            self.parts.append(part)
        elif part:
            self.is_streamed = True
            self.is_taken.clear()
            self.stream.put(part)
            try:
                await self.is_taken.wait()
            except asyncio.CancelledError:  # its client takes nothing: free the thread that sends
                with contextlib.suppress(OSError):  # it has left
                    self.connection.shutdown(socket.SHUT_RDWR)
                raise

    def stop_reading(self) -> None:
        """Make every read find the end of the connection."""
        with contextlib.suppress(OSError):  # it is closed already
            socket.socket.shutdown(self.connection, socket.SHUT_RD)

    def is_unread(self) -> bool:
        """Return whether there is more of the body than the app has read: it must not be taken for the next request."""
        return (self.chunked or self.missing > 0) and not self.is_read

    async def left(self) -> None:
        """Return when the client has left."""
        loop, readable = asyncio.get_running_loop(), asyncio.Event()
        loop.add_reader(self.connection, readable.set)
        try:
            await readable.wait()
        finally:
            loop.remove_reader(self.connection)
        if not has_left(self.connection):
            await loop.create_future()  # that is its next request already: it's there

    def scope(self, state: dict[str, Any]) -> Scope:
        """Return the request as ASGI describes it."""
        request = self.request
        return {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": request.environ["SERVER_PROTOCOL"].removeprefix("HTTP/"),
            "method": request.method,
            "scheme": request.scheme,
            "path": request.path,
            "raw_path": request.environ["RAW_URI"].partition("?")[0].encode("latin-1"),
            "root_path": "",
            "query_string": request.query_string,
            "headers": [(k.lower().encode("latin-1"), v.encode("latin-1")) for k, v in request.headers],
            "client": (request.remote_addr, 0),
            "server": address if isinstance(address := self.connection.getsockname(), tuple) else None,
            "state": dict(state),
        }


def has_left(connection: socket.socket) -> bool:
    """Return whether the client has closed the connection, or its side of it. Peeks below TLS, which can't peek."""
    try:
        return not socket.socket.recv(connection, 1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except BlockingIOError:
        return False
    except OSError:
        return True


app = WSGIAdapter(server.app, server.lifespan)
