"""What operators see of the server: request log, traces, process metrics, and the access lines of uvicorn and Gunicorn."""

import logging

POLLED = "/live"  # by an open page, four times a second
MAX_PATH_CHARS = 200  # of a path in a log line or a span: a client may send 64 KB


def leave_out_polls() -> None:
    """Leave the page's polls out of the access lines of uvicorn and Gunicorn: a request to the model would drown in them."""
    for name in ("uvicorn.access", "gunicorn.access"):
        logger = logging.getLogger(name)
        if is_not_a_poll not in logger.filters:
            logger.addFilter(is_not_a_poll)


def is_not_a_poll(record: logging.LogRecord) -> bool:
    """Return whether an access line is about something else; uvicorn gives a tuple, Gunicorn a dict."""
    args = record.args
    if isinstance(args, tuple):
        method, path = args[1:3] if len(args) == 5 else ("", "")
    else:
        method, path = (args or {}).get("m"), (args or {}).get("U")
    return method != "GET" or not str(path).partition("?")[0].endswith(POLLED)
