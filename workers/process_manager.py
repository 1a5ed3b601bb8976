"""What started this process and replaces it when it ends: Gunicorn, `uvicorn --workers`, a container, or nothing."""

import multiprocessing
import os
import sys


def is_one_of_uvicorns_workers() -> bool:
    """Return whether `uvicorn --workers` started this process and starts another when it ends. (`uvicorn --reload` does not.)"""
    return bool(multiprocessing.parent_process()) and not any(
        word.startswith("--reload") for word in sys.argv
    )


def is_supervised() -> bool:
    """Return whether a process manager that never asks /health replaces this server: Gunicorn's, uvicorn's, a container's."""
    return bool(os.environ.get("SERVER_SOFTWARE")) or is_one_of_uvicorns_workers() or os.getpid() == 1


def is_relieved() -> bool:
    """Return whether another worker answers from now on: see `gunicorn/succession.py`."""
    return os.path.exists(f"{os.environ.get('PROMETHEUS_MULTIPROC_DIR', '')}/relieved-{os.getpid()}")
