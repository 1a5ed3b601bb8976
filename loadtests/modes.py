"""The deployment modes, each by its documented command, and a server started in one of them.

with start(MODES["thread"], {"BATCH_SIZE": "8"}) as server:
    httpx2.post(server.url, content="Paris is the [MASK] of France.")
"""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO

import psutil

from workers.resources import free_port as free_port

ROOT = Path(__file__).resolve().parent.parent
# What tells the modes apart, said to each, whatever the environment or `.env` says.
BASE = {"OFFLOAD": "thread", "BATCH_SIZE": "1", "INSTANCES": "1", "FAST": "1"}


@dataclass(frozen=True)
class Mode:
    """A documented command, its settings, and the name that tables and pictures use."""

    name: str
    command: str
    env: Mapping[str, str] = field(default_factory=dict)

    def argv(self, port: int) -> list[str]:
        """The command of this interpreter's environment, on `port` of the loopback interface."""
        program, *arguments = self.command.split()
        bind = ["--port", str(port)] if program == "uvicorn" else ["--bind", f"127.0.0.1:{port}"]
        return [str(Path(sys.executable).parent / program), *arguments, *bind]


MODES = {
    mode.name: mode
    for mode in (
        Mode("inline", "uvicorn server:app", {"OFFLOAD": "inline"}),
        Mode("inline-stock", "uvicorn server:app", {"OFFLOAD": "inline", "FAST": "0"}),
        Mode("thread", "uvicorn server:app"),
        Mode("batch", "uvicorn server:app", {"BATCH_SIZE": "32"}),
        Mode("batch-stock", "uvicorn server:app", {"BATCH_SIZE": "32", "FAST": "0"}),
        Mode("process", "uvicorn server:app", {"OFFLOAD": "process"}),
        Mode("instances-2", "uvicorn server:app", {"OFFLOAD": "process", "INSTANCES": "2"}),
        Mode("recommended", "gunicorn -c gunicorn.conf.py"),
        Mode("sync-2", "gunicorn -c workers/gunicorn/sync.conf.py"),
        Mode("gthread-1x8", "gunicorn -c workers/gunicorn/gthread.conf.py", {"BATCH_SIZE": "32"}),
        Mode(
            "gthread-2x4",
            "gunicorn -c workers/gunicorn/gthread.conf.py --workers 2 --threads 4",
            {"BATCH_SIZE": "32"},
        ),
        Mode("uvicorn-2", "gunicorn -c workers/gunicorn/uvicorn.conf.py"),
        Mode("asgi", "gunicorn -c workers/gunicorn/asgi.conf.py"),
        Mode("dirty", "gunicorn -c workers/gunicorn/dirty.conf.py"),
        # One generator is thousands of clients.
        Mode("haproxy-2", "python -m deploy.cluster 2", {"CLIENT_CONNECTIONS": "4096"}),
    )
}


def with_model(mode: Mode, name: str) -> Mode:
    """The same mode with one of the models of bench/apps.py."""
    checked = os.environ.get("MODEL", "")
    return replace(mode, env={**mode.env, "MODEL": f"loadtests.bench.apps:{name}", "CHECKED_MODEL": checked})


@dataclass
class Server:
    """A running server: where it answers, its processes, its log so far."""

    mode: Mode
    url: str
    process: subprocess.Popen[bytes]
    log_file: IO[bytes]

    def log(self) -> str:
        """Everything that it has printed."""
        return Path(self.log_file.name).read_text(errors="replace")

    def processes(self) -> list[psutil.Process]:
        """It and its descendants."""
        root = psutil.Process(self.process.pid)
        return [root, *root.children(recursive=True)]

    def memory_mb(self) -> float:
        """Memory of all its processes, shared pages counted once (PSS)."""
        return sum(process.memory_full_info().pss for process in self.processes()) / 1e6

    def cpu_s(self) -> float:
        """Processor seconds that its living processes have used."""
        return sum(sum(process.cpu_times()[:2]) for process in self.processes())

    def wait_until_ready(self, timeout_s: float = 120.0) -> None:
        """Poll /ready. Raises RuntimeError with the log when it ends or isn't ready in time."""
        began = time.monotonic()
        while time.monotonic() - began < timeout_s and self.process.poll() is None:
            try:
                with urllib.request.urlopen(self.url + "ready", timeout=5):
                    return
            except urllib.error.HTTPError as loading:
                loading.close()
            except OSError:
                pass
            time.sleep(0.05)
        raise RuntimeError(f"{self.mode.name} is not ready (exit code {self.process.poll()}):\n{self.log()}")

    def wait_until_idle(self, timeout_s: float = 60.0, window_s: float = 0.25) -> None:
        """Wait until its processes use no time: they may still load, or work for clients that have left.

        Raises RuntimeError when they go on for `timeout_s`.
        """
        until = time.monotonic() + timeout_s
        while time.monotonic() < until:
            before_s = self.cpu_s()
            time.sleep(window_s)
            if self.cpu_s() - before_s < 0.1 * window_s:
                return
        raise RuntimeError(f"{self.mode.name} is still busy after {timeout_s:g} s:\n{self.log()[-2000:]}")


def is_alive(process: psutil.Process) -> bool:
    """Not when it has ended, whether or not its parent has asked how."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Let Ctrl-C and SIGTERM wait for the end of a block: a process that is just being started would be left behind."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    usual = {
        one: signal.signal(one, lambda number, _: came.append(number))
        for one in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for one, handler in usual.items():
            signal.signal(one, handler)
    for number in came:
        signal.raise_signal(number)


def end(process: "subprocess.Popen[bytes]") -> None:
    """Stop a server, and kill what is left of its processes."""
    if process.poll() is None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(15)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@contextlib.contextmanager
def start(
    mode: Mode,
    env: Mapping[str, str] | None = None,
    *,
    cpus: set[int] | None = None,
    wait: bool = True,
    port: int = 0,
    folder: Path = ROOT,
    base: Mapping[str, str] = BASE,
) -> Iterator[Server]:
    """Start `mode` on a free port of the loopback interface with extra settings, on `cpus` only; stop it at the end.

    The app is that of `folder`; `base` are the settings that the environment doesn't change. With FIXED_DELAY_MS in `env`
    it holds each partial batch for so long, to compare.
    """
    port = port or free_port()
    environ = {**os.environ, "PYTHONUNBUFFERED": "1", **base, **mode.env, **(env or {})}
    if "FIXED_DELAY_MS" in environ:
        mode = replace(mode, command=mode.command.replace("server:app", "loadtests.plan.fixed_delay:app"))
    with tempfile.NamedTemporaryFile(prefix=f"{mode.name}-", suffix=".log") as log_file:
        process = None
        try:
            with uninterrupted():
                process = subprocess.Popen(
                    mode.argv(port),
                    cwd=folder,
                    env=environ,
                    stdout=log_file,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    preexec_fn=(lambda: os.sched_setaffinity(0, cpus)) if cpus else None,
                )
            server = Server(mode, f"http://127.0.0.1:{port}/", process, log_file)
            if wait:
                server.wait_until_ready()
            yield server
        finally:
            if process:
                end(process)
