"""What runs inside a worker process. Read `minimal.py` first, then `loop.py`; each folder can be read alone.

The pattern, which needs nothing but Python:

    loop.py jobs.py       one queue, batches, every job answered exactly once
    scheduling/           which jobs are admitted, when a batch is due, how large it may be
    offload.py            where inference runs: on the event loop or in a thread
    errors.py             every exception, and its HTTP status

The server around it:

    service.py            the model's life: load, warm up, serve, stop
    settings.py           every setting, from the environment
    context.py            what is known of a request: `web/`, `tasks/`, `protocols/` and `observability/` share it
    web/                  from bytes to inputs and back: limits, access, parsing, replies
    tasks/                one file per task: checks an input, runs the model
    generation/           text, token by token: its own scheduler and loop
    protocols/ apis.py    one file per API, and what finds them
    isolation/            the model in a process that may crash; inputs that crash it
    observability/        request log, traces, process metrics
    metrics.py            counters in Prometheus text format; metrics_folder.py adds up those of several workers
    resources.py          memory and cores of this machine; process_manager.py: what restarts this process
    gunicorn/             one config per mode; the *.conf.py and patient.py beside it are its old paths

The pattern's files import each other by relative paths, so that the loop works in an app of your own under any name: with
`pip install` it is `from model_loop import ModelLoop, Thread, Rejected, Late, ModelFailed`. See docs/your-own-app.md.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .errors import Late as Late
    from .errors import ModelFailed as ModelFailed
    from .errors import Rejected as Rejected
    from .loop import ModelLoop as ModelLoop
    from .offload import Thread as Thread

__version__ = "1.0.0"
EXPORTS = {
    "ModelLoop": "loop",
    "Thread": "offload",
    "Rejected": "errors",
    "Late": "errors",
    "ModelFailed": "errors",
}


def __getattr__(name: str) -> Any:
    """Import on first use: Gunicorn's master must set prometheus-client's folder before anything imports that."""
    if module := EXPORTS.get(name):
        return getattr(importlib.import_module(f".{module}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
