"""Gunicorn's uvicorn worker, with `workers/web/http_protocol.py`."""

import math
from typing import Any, ClassVar

from uvicorn_worker import UvicornWorker  # type: ignore[import-untyped]


class Worker(UvicornWorker):  # type: ignore[misc]
    """Gunicorn's uvicorn worker with it. It gives its heartbeat every second, whatever the wall clock says.

    uvicorn itself would be silent for as long as the clock is set back, and Gunicorn would kill it amid its work.
    """

    CONFIG_KWARGS: ClassVar[dict[str, Any]] = {
        "loop": "auto",
        "http": "workers.web.http_protocol:Protocol",
        "timeout_notify": -math.inf,
    }
