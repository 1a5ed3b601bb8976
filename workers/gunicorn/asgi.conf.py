# gunicorn -c workers/gunicorn/asgi.conf.py
"""Gunicorn's native ASGI worker: as gunicorn.conf.py, with Gunicorn's own HTTP parser and no uvicorn."""

from workers.gunicorn.common import *  # noqa: F403  what all modes share, each with its why

wsgi_app = "server:app"
worker_class = "asgi"
workers = 1
keepalive = idle_s  # noqa: F405  idle connections hold up SIGTERM
