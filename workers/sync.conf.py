# Moved to workers/gunicorn/sync.conf.py; this path goes with the next release.
globals().update(__import__("runpy").run_path(__file__.rpartition("/")[0] + "/gunicorn/sync.conf.py"))
