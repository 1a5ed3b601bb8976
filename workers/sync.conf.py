# Moved to workers/gunicorn/sync.conf.py; this path goes with the next release.
exec(open(__file__.replace("workers/", "workers/gunicorn/")).read())  # noqa: SIM115
