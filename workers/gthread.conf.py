# gunicorn -c workers/gthread.conf.py
"""Threads that wait: a batch can never be larger than their number, and whom no thread has taken no queue knows of."""

from workers.deployment import *  # noqa: F403  what all modes share, each with its why

wsgi_app = "workers.wsgi:app"
worker_class = "gthread"
workers = 1
threads = 8  # each only waits for the model; 8 half-sent headers take them all, so put a proxy in front
