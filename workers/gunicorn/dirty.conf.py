# gunicorn -c workers/gunicorn/dirty.conf.py
"""Two web workers share one model in Gunicorn's pool of stateful processes (beta). Where it breaks the contract:

SIGTERM ends the model first: 11 of 12 admitted requests got a 500. While a killed model process loads again,
each web worker answers one 500, then 503. A call beyond dirty_timeout goes on in its thread. A web worker still takes 270 MB.
"""

import os

from workers.gunicorn.common import *  # noqa: F403  what all modes share, each with its why

wsgi_app = "server:app"
worker_class = "workers.gunicorn.uvicorn_worker.Worker"  # uvicorn, with a bound on the time for headers
workers = 2
raw_env = ["OFFLOAD=dirty"]  # each keeps its own queue; calls meet in Gunicorn's, which is unbounded
dirty_apps = ["workers.isolation.dirty:DirtyModel"]
dirty_workers = 1  # instances of the model
dirty_timeout = 60  # as HANG_S
proc_name = f"dirty-{os.getpid()}"  # under one name, a second server kills the first one's model as an orphan
