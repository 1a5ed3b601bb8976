"""What the server says of itself: the request log, traces, process metrics, and servers' own access lines."""

import logging

POLLED = "/live"  # by an open page, four times a second


def leave_out_polls() -> None:
    """Leave the page's polls out of the access lines of uvicorn and Gunicorn: a request to the model would drown in them."""
    for name in ("uvicorn.access", "gunicorn.access"):
        logger = logging.getLogger(name)
        if is_no_poll not in logger.filters:
            logger.addFilter(is_no_poll)


def is_no_poll(record: logging.LogRecord) -> bool:
    """Return whether an access line is about something else; uvicorn gives a tuple, Gunicorn a dict."""
    args = record.args
    if isinstance(args, tuple):
        method, path = args[1:3] if len(args) == 5 else ("", "")
    else:
        method, path = (args or {}).get("m"), (args or {}).get("U")
    return method != "GET" or not str(path).partition("?")[0].endswith(POLLED)
