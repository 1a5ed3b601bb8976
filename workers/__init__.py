"""What runs inside a worker process. Read `minimal.py` first, then `loop.py`; each folder can be read alone.

    loop.py jobs.py       one queue, batches, every job answered exactly once
    offload.py            where inference runs: on the event loop or in a thread
    scheduling/           which jobs are admitted, and how large a batch may be
    service.py            the model's life: load, warm up, serve, stop
    settings.py           every setting, from the environment
    web/                  from bytes to inputs and back: limits, access, parsing, replies
    tasks/                one file per task: checks an input, runs the model
    generation/           text, token by token
    protocols/            one file per API
    isolation/            the model in a process that may crash; inputs that crash it
    observability/        request log, traces, process metrics
    gunicorn/             one config per mode

To use the loop in an app of your own: `from workers import ModelLoop, Thread, Rejected, Late, ModelFailed`; see docs/your-own-app.md.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from workers.errors import Late as Late
    from workers.errors import ModelFailed as ModelFailed
    from workers.errors import Rejected as Rejected
    from workers.loop import ModelLoop as ModelLoop
    from workers.offload import Thread as Thread

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
        return getattr(importlib.import_module(f"workers.{module}"), name)
    raise AttributeError(f"module 'workers' has no attribute {name!r}")
