"""What all Gunicorn configs share: times, and hooks that run around every worker. `from workers.gunicorn.common import *`."""

import contextlib
import errno
import logging
import os
import resource
import shutil
import signal
import socket
import sys
import threading
import time
from typing import Any

from workers.resources import temporary_folder
from workers.settings import Settings

__all__ = [
    "bind",
    "child_exit",
    "control_socket_disable",
    "graceful_timeout",
    "idle_s",
    "keepalive",
    "on_exit",
    "on_starting",
    "post_fork",
    "pre_fork",
    "timeout",
    "worker_connections",
    "worker_tmp_dir",
]

_settings = Settings.read()
STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT)

bind = "127.0.0.1:8000"  # put a proxy in front before you open it to the world
# A worker that gives no heartbeat for this long is killed in the middle of its work. No healthy one is silent for
# longer than a body (BODY_TIMEOUT_S) and an answer (DEADLINE_S) take in turn, or, inline, than a call of the model may
# take without being a hang (HANG_S).
timeout = int(max(_settings.HANG_S, _settings.BODY_TIMEOUT_S + _settings.DEADLINE_S)) + 10
# The worker ends itself within GRACE_S; this only catches one that can't.
graceful_timeout = int(_settings.GRACE_S) + 2
# Seconds that an idle connection stays open: longer than the 60 s of a proxy's pool, or the proxy would send a request into a
# connection that is just being closed. Where idle connections hold up SIGTERM a config says `keepalive = idle_s`.
keepalive = 75
idle_s = max(1, min(5, int(_settings.GRACE_S) - 1))
# One path in the home folder, the same for every server: two would fight for it.
control_socket_disable = True
# A heartbeat on a slow disk can block the worker. Some containers have it, but read-only.
worker_tmp_dir = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
# gthread: of the files that a process may open, half are for the model. Without any left the worker dies.
_files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
worker_connections = 1000 if _files == resource.RLIM_INFINITY else min(1000, _files // 2)


def heartbeat() -> None:
    """Tell the master that this worker lives: for what takes long. Each worker has its own."""


def on_starting(server: Any) -> None:
    """In the master, before any worker: say what will not work, make the metrics' folder; no new worker misses a signal."""
    check(server)
    cfg = server.cfg
    owner = (-1, -1) if cfg.uid == os.geteuid() else (cfg.uid, cfg.gid)
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = temporary_folder("metrics", *owner)
    if _settings.LOG_FORMAT == "json":
        from workers.observability.request_log import log_json

        log_json()
    from workers.gunicorn.succession import Succession  # Prometheus looks for the folder when it is imported

    server.manage_workers = Succession(server)
    master = os.getpid()

    def hold() -> None:
        if os.getpid() == master:
            signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)

    def release() -> None:
        if os.getpid() == master:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)

    def begin() -> None:
        if os.getppid() == master:
            for number in STOPS:
                signal.signal(number, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)

    # A new worker has the master's handlers until it sets its own. A SIGTERM in that moment, which is not rare on a busy
    # machine, would be lost: the worker would serve on, and the master would kill it after graceful_timeout.
    os.register_at_fork(before=hold, after_in_parent=release, after_in_child=begin)


def check(server: Any) -> None:
    """Exit with one sentence where this can't work, warn where a setting is not used."""
    cfg = server.cfg
    if cfg.preload_app:
        raise SystemExit(
            "--preload is not supported: a process that is forked after torch has run hangs; leave it out"
        )
    if not {"GUNICORN_PID", "LISTEN_PID"} & os.environ.keys():  # else the sockets are there already
        for host, port in (address for address in cfg.address if isinstance(address, tuple)):
            if reason := why_not_listen(host, port, cfg.reuse_port):
                raise SystemExit(
                    f"cannot listen on {host}:{port}: {reason}; end what has it, or choose another with --bind"
                )
    if _settings.WEB_CONCURRENCY not in (1, cfg.workers):
        server.log.warning(
            "WEB_CONCURRENCY=%d is not used: this configuration has workers = %d; --workers changes that",
            _settings.WEB_CONCURRENCY,
            cfg.workers,
        )
    if not cfg.accesslog and _settings.LOG_FORMAT != "json":
        server.log.info(
            "Requests are not logged; --access-logfile - or LOG_FORMAT=json gives one line per request"
        )


def why_not_listen(host: str, port: int, reuse_port: bool) -> str:
    """Return why this address can't be had, empty where it can. Gunicorn would try for 5 s."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if reuse_port:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        try:
            probe.bind((host, port))
        except OSError as exc:
            if exc.errno in (errno.EADDRINUSE, errno.EADDRNOTAVAIL, errno.EACCES):
                return os.strerror(exc.errno)
    return ""


def on_exit(server: Any) -> None:
    """In the master, at its end."""
    shutil.rmtree(os.environ["PROMETHEUS_MULTIPROC_DIR"], ignore_errors=True)


def pre_fork(server: Any, worker: Any) -> None:
    """In the master, before a new worker. One of the first that can't load ends the server; a later one must not."""
    if worker.age > server.cfg.workers:
        # Gunicorn ends when a worker ends with one of these codes. So make them codes that no process can end with.
        server.WORKER_BOOT_ERROR, server.APP_LOAD_ERROR = 256 + 3, 256 + 4
        time.sleep(1)  # nor take all of a core by one after the other


def post_fork(server: Any, worker: Any) -> None:
    """In a new worker, before it loads the app: how many it shares the cores with, and what its master is."""
    global heartbeat
    heartbeat = worker.notify
    os.environ["WEB_CONCURRENCY"] = str(server.cfg.workers)
    worker.max_requests = sys.maxsize  # the master counts: see succession.py
    os.environ["OTHERS_ANSWER"] = "1" if server.WORKERS else ""
    log = logging.getLogger("uvicorn.error")  # where the app writes; no worker but uvicorn's shows it
    log.handlers, log.propagate = server.log.error_log.handlers, False
    log.setLevel(server.log.error_log.level)
    threading.Thread(target=_follow, args=(os.getppid(),), daemon=True).start()


def child_exit(server: Any, worker: Any) -> None:
    """In the master, when a worker has ended: its gauges end with it, its counters stay."""
    from workers.metrics_folder import mark_ended

    folder = os.environ["PROMETHEUS_MULTIPROC_DIR"]
    mark_ended(worker.pid, folder)
    with contextlib.suppress(OSError):
        os.remove(f"{folder}/relieved-{worker.pid}")


def _follow(master: int) -> None:
    """End this worker when its master was killed: a uvicorn worker would go on serving."""
    while os.getppid() == master:
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)
