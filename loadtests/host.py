"""The machine that a result belongs to, without names or paths."""

import datetime
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

PACKAGES = ("torch", "transformers", "starlette", "uvicorn", "uvloop", "gunicorn", "uvicorn-worker", "locust")


def processor() -> str:
    """The processor's name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def describe() -> dict[str, Any]:
    """Date, processor, cores, memory, GPU, and the versions of what was measured."""
    import torch

    return {
        "date": datetime.date.today().isoformat(),
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(psutil.virtual_memory().total / 1e9),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": platform.system(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
    }


def one_line(about: dict[str, Any]) -> str:
    """For a caption."""
    return f"{about['processor']}, {about['pinning']}, {about['date']}"
