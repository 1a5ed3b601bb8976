# Moved to workers/gunicorn/uvicorn.conf.py; this path goes with the next release.
globals().update(__import__("runpy").run_path(__file__.rpartition("/")[0] + "/gunicorn/uvicorn.conf.py"))
