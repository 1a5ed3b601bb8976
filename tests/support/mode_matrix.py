"""Mode x guarantee: what every deployment mode guarantees, and what it can't by its nature.

The tests read it: what holds is asserted, and so is what does not. `make docs` writes it to docs/guarantees.md.
"""

TESTED = ["thread", "recommended", "uvicorn-2", "asgi", "gthread-1x8", "sync-2", "dirty", "haproxy-2"]

# How a guarantee does not hold, where a test asserts just that.
GUNICORNS_PAGE = "Gunicorn's own page"
ITS_REPLICAS = "its replica's share"
ITS_SHARE = "its worker's share"
ITS_THREADS = "8 at most, its threads"
NEVER = "never"
WHILE_A_THREAD_IS_FREE = "while a thread is free"
WHILE_A_WORKER_IS_FREE = "while a worker is free"

# What the tests assert for every mode alike, then what differs: guarantee -> the modes that can't, and why.
EXCEPTIONS: dict[str, dict[str, str]] = {
    "answers are the plain pipeline's, raw and JSON": {},
    "any task: results do not depend on the other inputs in the batch": {},
    "wrong input is rejected at once, in one JSON form": {},
    "a body far too large gets its 413": dict.fromkeys(
        ("asgi", "gthread-1x8", "sync-2"), "or a reset, if it goes on sending"
    ),
    "a stalled body gets 408, and 503 on SIGTERM": {"haproxy-2": "on SIGTERM a close"},
    "a poison input fails alone": {},
    "a client that disconnects frees its place": {"sync-2": "it stays in the accept backlog"},
    "with `OFFLOAD=process`, a killed model process costs its own batch": {
        "dirty": "and all requests until it has restarted"
    },
    "keeps connections open": {"sync-2": "one request each"},
    "over-long headers are rejected in JSON": {
        "asgi": GUNICORNS_PAGE,
        "gthread-1x8": GUNICORNS_PAGE,
        "sync-2": GUNICORNS_PAGE,
    },
    "batches span all connections": {
        "uvicorn-2": ITS_SHARE,
        "dirty": ITS_SHARE,
        "gthread-1x8": ITS_THREADS,
        "sync-2": NEVER,
        "haproxy-2": ITS_REPLICAS,
    },
    "text that is generated streams, token by token": {"dirty": "generates no text"},
    "too much work is rejected (503)": {"sync-2": "stays in the accept backlog"},
    "/health answers while the model runs": {
        "gthread-1x8": WHILE_A_THREAD_IS_FREE,
        "sync-2": WHILE_A_WORKER_IS_FREE,
    },
    "SIGTERM lets admitted work finish": {"dirty": "500: its model ends first"},
    "SIGTERM resets no connection": {"sync-2": "resets those in the accept backlog"},
    "a dead worker is replaced": {"thread": "by your process manager"},
    "an invalid setting stops the start with one line": {
        "uvicorn-2": "and a Gunicorn traceback",
        "sync-2": "and a Gunicorn traceback",
        "dirty": "and a Gunicorn traceback",
    },
    "a model that fails on its example ends the start": {
        "dirty": "Gunicorn loads it again and again, and no request is answered"
    },
}


def kept(promise: str, mode: str) -> bool:
    """Whether `mode` keeps it."""
    return mode not in EXCEPTIONS[promise]


def exception(promise: str, mode: str) -> str | None:
    """How `mode` does not keep it, None where it does."""
    return EXCEPTIONS[promise].get(mode)


def table() -> str:
    """All of it in Markdown."""
    rows = [
        ["guarantee", *TESTED],
        ["---", *[":---:"] * len(TESTED)],
        *([promise, *(why.get(mode, "✓") for mode in TESTED)] for promise, why in EXCEPTIONS.items()),
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
