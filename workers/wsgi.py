"""The same app for Gunicorn's sync and gthread workers: one event loop in the background, threads that wait for it.

A worker's thread hands its request to the event loop, which runs `server.app` as uvicorn would, and sleeps until the
reply is whole. So the queue, the batches and the answers are those of `workers/loop.py`.
"""

import asyncio
import atexit
import contextlib
import socket
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from starlette.types import Message, Scope
from werkzeug.wrappers import Request, Response

import server


class Bridge:
    """A WSGI app that runs an ASGI app, lifespan included, on one event loop. Make it in the worker's main thread."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        # More than Gunicorn's threads, each of which may read a stalled body.
        self.loop.set_default_executor(ThreadPoolExecutor(64))
        threading.Thread(target=self.loop.run_forever, name="event loop", daemon=True).start()
        self.lifespan = server.lifespan(server.app)
        self.state = self.call(self.lifespan.__aenter__())
        self.state["service"].stop_on_signals()  # which only the main thread may catch
        atexit.register(lambda: self.call(self.lifespan.__aexit__(None, None, None)))

    def call(self, coroutine: Any) -> Any:
        """Run it on the event loop; wait for what it returns."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result()

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        response: Response = self.call(self.reply(Request(environ, populate_request=False)))
        if response.headers.get("Connection") == "close":
            start_response.__self__.force_close()  # Gunicorn ignores the header itself
        return response(environ, start_response)

    async def reply(self, request: Request) -> Response:
        """Run the app on a request; return its whole reply."""
        connection: socket.socket = request.environ["gunicorn.socket"]
        response, body, complete = Response(), bytearray(), False

        async def receive() -> Message:
            nonlocal complete
            if complete:
                await self.gone(connection)
                return {"type": "http.disconnect"}
            # In steps, as the body may be longer than is allowed; from a thread, as the client may stall.
            chunk = await asyncio.to_thread(request.environ["wsgi.input"].read, 8192)
            complete = len(chunk) < 8192
            return {"type": "http.request", "body": chunk, "more_body": not complete}

        async def send(message: Message) -> None:
            if message["type"] == "http.response.start":
                response.status_code = message["status"]
                response.headers.clear()
                for name, value in message["headers"]:
                    response.headers.add(name.decode("latin-1"), value.decode("latin-1"))
            body.extend(message.get("body", b""))

        await server.app(self.scope(request), receive, send)
        response.data = bytes(body)
        if not complete and (request.content_length or "HTTP_TRANSFER_ENCODING" in request.environ):
            response.headers["Connection"] = "close"
            connection.shutdown(socket.SHUT_RD)  # frees the thread that waits for a stalled body
        return response

    def scope(self, request: Request) -> Scope:
        """What ASGI says about a request."""
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
            "server": None,
            "state": dict(self.state),
        }

    async def gone(self, connection: socket.socket) -> None:
        """Return when the client has closed the connection."""
        readable = asyncio.Event()
        self.loop.add_reader(connection, readable.set)
        try:
            await readable.wait()
        finally:
            self.loop.remove_reader(connection)
        with contextlib.suppress(ConnectionError):  # it was reset
            if connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT):
                await self.loop.create_future()  # the next request already: it's there


app = Bridge()
