# gunicorn -c gunicorn.conf.py
"""The recommended deployment: one uvicorn worker, one model, one queue, one event loop that is never blocked."""

from workers.gunicorn.common import *  # noqa: F403  what all modes share, each with its why

wsgi_app = "server:app"
worker_class = "workers.gunicorn.uvicorn_worker.Worker"  # uvicorn, with a bound on the time for headers
workers = 1  # a second one would be a second model and a second queue; INSTANCES=2 shares one queue instead
max_requests = 0  # no restarts: each would load the model again, and nothing here is known to leak
