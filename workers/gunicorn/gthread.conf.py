# gunicorn -c workers/gunicorn/gthread.conf.py
"""Threads that wait: a batch is never larger than their number, and the queue does not see requests without a thread."""

from workers.gunicorn.common import *  # noqa: F403  what all modes share, each with its why

wsgi_app = "workers.gunicorn.wsgi:app"
worker_class = "workers.gunicorn.gthread_worker.Worker"
workers = 1
threads = 8  # each only waits for the model; 8 half-sent headers take them all, so put a proxy in front
keepalive = idle_s  # noqa: F405  idle connections hold up SIGTERM
