"""Gunicorn's uvicorn worker, with `workers/web/http_protocol.py`."""

import math
import signal
from typing import Any, ClassVar

from uvicorn_worker import UvicornWorker  # type: ignore[import-untyped]


class Worker(UvicornWorker):  # type: ignore[misc]
    """Gives its heartbeat every second, reloads where `--reload` asks for it, and ends a clean stop with exit code 0."""

    CONFIG_KWARGS: ClassVar[dict[str, Any]] = {
        "loop": "auto",
        "http": "workers.web.http_protocol:Protocol",
        # Else uvicorn would be silent for as long as the wall clock is set back, and Gunicorn would kill it amid its work.
        "timeout_notify": -math.inf,
        "limit_max_requests": None,  # the master counts: see succession.py
    }

    def init_signals(self) -> None:
        super().init_signals()
        for number in (signal.SIGTERM, signal.SIGINT):
            # When it has stopped uvicorn sends itself the signal again: Gunicorn would log an error for a death by it.
            signal.signal(number, leave)

    async def _serve(self) -> None:
        # Plain sockets: uvloop can't count who uses Gunicorn's own kind, and closes it twice.
        self.sockets: list[Any] = [listener.sock for listener in self.sockets]
        await super()._serve()

    async def callback_notify(self) -> None:
        # Gunicorn's reloader has seen a change, and its `sys.exit` only ended its own thread.
        if not self.alive:
            signal.raise_signal(signal.SIGTERM)
        await super().callback_notify()


def leave(*_: Any) -> None:
    """End this process."""
    raise SystemExit(0)
