# gunicorn -c workers/gunicorn/sync.conf.py
"""One request a worker: no batch, no queue of ours. Others wait in the kernel's backlog, unseen: they get no 503, and a
reset on SIGTERM. While all workers compute, /health waits too.

The heartbeat comes between requests only. DEADLINE_S answers (504) long before `timeout` would kill the worker.
"""

from workers.gunicorn.common import *  # noqa: F403  what all modes share, each with its why

wsgi_app = "workers.gunicorn.wsgi:app"
worker_class = "sync"
workers = 2
