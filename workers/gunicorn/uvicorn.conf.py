# gunicorn -c workers/gunicorn/uvicorn.conf.py
"""Several uvicorn workers: each has its own model, queue and share of the cores; the kernel distributes connections."""

from workers.gunicorn.common import *  # noqa: F403  what all modes share, each with its why

wsgi_app = "server:app"
worker_class = "workers.gunicorn.uvicorn_worker.Worker"  # uvicorn, with a bound on the time for headers
workers = 2  # twice the memory; a batch can only gather what came to its own worker
