# gunicorn -c workers/gunicorn/gthread.conf.py
"""Threads that wait: a batch is never larger than their number, and the queue doesn't see requests that no thread has."""

from typing import Any

from gunicorn.workers.gthread import ThreadWorker  # type: ignore[import-untyped]

from workers.gunicorn.common import *  # noqa: F403  what all modes share, each with its why


class Gthread(ThreadWorker):  # type: ignore[misc]
    def handle_quit(self, *signal: Any) -> None:
        # Not Gunicorn's own: it waits for a lock that the code it interrupts may hold.
        super(ThreadWorker, self).handle_quit(*signal)


wsgi_app = "workers.gunicorn.wsgi:app"
worker_class = Gthread
workers = 1
threads = 8  # each only waits for the model; 8 half-sent headers take them all, so put a proxy in front
