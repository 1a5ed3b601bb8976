# gunicorn -c workers/gunicorn/sync.conf.py
"""One request per worker: no batch, and no queue of this server. Other requests wait unseen in the accept backlog: they get no 503, and a
reset on SIGTERM. While all workers compute, /health waits, too.

A worker waits for the client that has connected: two silent ones take both for `timeout`. So a proxy that reads whole requests belongs in
front. The heartbeat comes between requests only. DEADLINE_S answers (504) long before `timeout` would kill the worker.
"""

from workers.gunicorn.common import *  # noqa: F403  what all modes share, each with its why

wsgi_app = "workers.gunicorn.wsgi:app"
worker_class = "sync"
workers = 2
