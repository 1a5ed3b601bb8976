"""Mode x promise: what every deployment mode keeps, and what it can't by its nature. `python tests/promises.py` prints it.

The tests read it: a promise that is kept is asserted, and so is one that is not.
"""

TESTED = ["thread", "process", "recommended", "uvicorn-2", "asgi", "gthread-1x8", "sync-2"]

EXCEPTIONS: dict[str, dict[str, str]] = {
    "keeps connections": {"sync-2": "one request each"},
    "over-long headers are refused in JSON": {},
    "batches gather all connections": {},
    "too much work is refused": {},
    "nobody is reset by SIGTERM": {},
}


def kept(promise: str, mode: str) -> bool:
    """Whether `mode` keeps it."""
    return mode not in EXCEPTIONS[promise]
