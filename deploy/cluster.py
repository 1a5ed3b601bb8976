"""make cluster N=2: HAProxy and replicas of the very same app, each `uvicorn server:app` with the same settings.

    $ python -m deploy.cluster 2 --bind 127.0.0.1:8000

SIGHUP            one by one the replicas give way to new ones, each ready before its old one leaves
SIGTTIN, SIGTTOU  one replica more, one fewer (as Gunicorn's)
SIGTERM, Ctrl-C   answer what is admitted, then end; a second Ctrl-C ends at once

A replica that dies is replaced. `/metrics` tells of all of them together; METRICS_BIND=127.0.0.1:8404 shows HAProxy's own
there. None outlives this process (on Linux).
"""

import argparse
import asyncio
import contextlib
import ctypes
import math
import os
import shutil
import signal
import socket
import sys
import tempfile
from pathlib import Path

from prometheus_client import multiprocess

from workers.settings import Settings
from workers.web.access import is_loopback

ROOT = Path(__file__).resolve().parent.parent
PLACES = 32  # in haproxy.cfg
LIBC = ctypes.CDLL(None)

Process = asyncio.subprocess.Process


class Cluster:
    """`n` replicas behind HAProxy, which keeps its socket and the replicas' metrics in `folder`."""

    def __init__(self, n: int, bind: str, settings: Settings, folder: str) -> None:
        self.n, self.grace_s = n, settings.GRACE_S
        self.socket, self.metrics = f"{folder}/haproxy.sock", f"{folder}/metrics"
        os.mkdir(self.metrics)
        self.env = {
            "BIND": bind,
            "ADMIN_SOCKET": self.socket,
            # HAProxy's own metrics are for nobody, unless somebody says where.
            "METRICS_BIND": os.environ.get("METRICS_BIND", f"unix@{folder}/haproxy-metrics.sock"),
            "BODY_TIMEOUT": f"{math.ceil(settings.BODY_TIMEOUT_S * 1000)}ms",
            "SERVER_TIMEOUT": f"{int(settings.DEADLINE_S) + 5}s",
            "PROMETHEUS_MULTIPROC_DIR": self.metrics,
            "WEB_CONCURRENCY": str(n),  # so many share the cores
            "MAX_CONNECTIONS": "0",  # all are HAProxy's, which counts each client's
            # They are on loopback, but known by HAProxy's names.
            "ALLOWED_HOSTS": settings.ALLOWED_HOSTS or ("" if is_loopback(bind.rpartition(":")[0]) else "*"),
            # HAProxy takes a second more than they do.
            "GRACE_S": f"{max(self.grace_s - 1, self.grace_s / 2):g}",
        }
        self.processes: set[Process] = set()
        self.keepers: dict[int, asyncio.Task[None]] = {}  # by their places in haproxy.cfg
        self.tasks: set[asyncio.Task[None]] = set()  # and those that leave
        self.ready = {place: asyncio.Event() for place in range(1, PLACES + 1)}
        self.orders: asyncio.Queue[signal.Signals] = asyncio.Queue()
        self.served = False  # a replica has been ready
        self.end: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    async def run(self) -> int:
        """Serve until told to stop, or until HAProxy or a first replica can't start; return the exit code."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGHUP, signal.SIGTTIN, signal.SIGTTOU):
            loop.add_signal_handler(number, self.orders.put_nowait, number)
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.stop, number)
        haproxy = await self.start("haproxy", "-db", "-f", str(ROOT / "deploy" / "haproxy.cfg"))
        watch = asyncio.create_task(haproxy.wait())
        watch.add_done_callback(lambda _: self.fail(1))
        while not await self.tell("show version") and not watch.done():
            await asyncio.sleep(0.01)
        for _ in range(self.n):
            self.add()
        obedience = asyncio.create_task(self.obey())
        try:
            return await self.end
        finally:
            obedience.cancel()
            for keeper in self.keepers.values():
                keeper.cancel()
            await asyncio.wait(self.tasks)
            with contextlib.suppress(ProcessLookupError):
                haproxy.send_signal(signal.SIGUSR1)  # lets what it has under way finish: SIGTERM would not
            await watch

    def stop(self, number: signal.Signals) -> None:
        """End; the second time, on Ctrl-C, at once."""
        if not self.end.done():
            self.end.set_result(0)
        elif number == signal.SIGINT:
            for process in self.processes:
                process.kill()

    def fail(self, code: int) -> None:
        """End with this exit code, if it does not end anyway."""
        if not self.end.done():
            self.end.set_result(code)

    async def obey(self) -> None:
        """Do what signals ask, one after the other."""
        while True:
            match await self.orders.get():
                case signal.SIGHUP:
                    for place in list(self.keepers):
                        if new := self.add():
                            await self.ready[new].wait()
                            await self.remove(place)
                case signal.SIGTTIN:
                    self.add()
                case signal.SIGTTOU if len(self.keepers) > 1:
                    await self.remove(max(self.keepers))

    # --- one replica --------------------------------------------------------------------------------------------------

    def add(self) -> int | None:
        """Let there be a replica in the first free place; return that, None where all are taken."""
        place = next((place for place in self.ready if place not in self.keepers), None)
        if place:
            self.keepers[place] = asyncio.create_task(self.keep(place))
            self.tasks.add(self.keepers[place])
        return place

    async def remove(self, place: int) -> None:
        """Let it answer what it has admitted, and no more."""
        keeper = self.keepers.pop(place)
        keeper.cancel()
        await asyncio.wait([keeper])
        self.tasks.discard(keeper)

    async def keep(self, place: int) -> None:
        """Keep a replica in this place until cancelled: when one has ended, another comes."""
        while True:
            port = free_port()
            process = await self.start(
                sys.executable,
                *f"-m uvicorn server:app --workers 1 --port {port}".split(),
                # A replica that is killed amid a reply has sent none of it: HAProxy can ask another.
                "--http",
                "workers.web.http_protocol:Protocol",
                # Let HAProxy close idle connections. If uvicorn did, a request could already be on its way.
                "--timeout-keep-alive",
                "75",
            )
            waiting = asyncio.create_task(process.wait())
            try:
                while not waiting.done() and not await is_ready(port):
                    await asyncio.wait([waiting], timeout=0.1)
                if not waiting.done():
                    await self.tell(f"set server replicas/replica{place} addr 127.0.0.1 port {port}")
                    await self.tell(f"set server replicas/replica{place} state ready")
                    self.ready[place].set()
                    self.served = True
                    print(f"replica {place} is ready, process {process.pid}", flush=True)
                await asyncio.shield(waiting)
            finally:
                # Also when cancelled. Those under way stay with it, all others go elsewhere.
                await self.tell(f"set server replicas/replica{place} state maint")
                await self.finish(process)
                self.ready[place].clear()
            if not self.served:
                self.fail(process.returncode or 1)  # nor could another one start
            print(f"replica {place} has ended with {process.returncode}; starting another", flush=True)
            await asyncio.sleep(1)

    async def finish(self, process: Process) -> None:
        """End it within the grace time."""
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        try:
            async with asyncio.timeout(self.grace_s + 2):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()
        self.processes.discard(process)
        multiprocess.mark_process_dead(process.pid, self.metrics)  # type: ignore[no-untyped-call]

    async def start(self, *command: str) -> Process:
        """A process that Ctrl-C in the terminal does not reach, and that ends when this one is killed."""
        process = await asyncio.create_subprocess_exec(
            *command,
            cwd=ROOT,
            env=os.environ | self.env,
            start_new_session=True,
            preexec_fn=end_with_parent if sys.platform == "linux" else None,
        )
        self.processes.add(process)
        return process

    async def tell(self, command: str) -> bool:
        """Give HAProxy an order over its socket; return whether it is there."""
        with contextlib.suppress(OSError):
            reader, writer = await asyncio.open_unix_connection(self.socket)
            with contextlib.closing(writer):
                writer.write(f"{command}\n".encode())
                await reader.read()
            return True
        return False


def end_with_parent() -> None:
    """In a new process: let the kernel send it SIGTERM when the one that started it has been killed."""
    LIBC.prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


async def is_ready(port: int) -> bool:
    """Whether a replica there says so."""
    with contextlib.suppress(OSError):  # TimeoutError is one
        async with asyncio.timeout(1):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            with contextlib.closing(writer):
                writer.write(b"GET /ready HTTP/1.1\r\nHost: replica\r\nConnection: close\r\n\r\n")
                return b" 200 " in await reader.readline()
    return False


def free_port() -> int:
    """A port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("n", type=int, nargs="?", default=2, help="how many replicas; default 2")
    parser.add_argument(
        "--bind", default="127.0.0.1:8000", help="where HAProxy listens; default 127.0.0.1:8000"
    )
    options = parser.parse_args()
    if not 1 <= options.n < PLACES:  # one is for the new one of a rolling restart
        parser.error(
            f"n={options.n} is not allowed: it must be 1 to {PLACES - 1}; deploy/haproxy.cfg has so many places"
        )
    if not shutil.which("haproxy"):
        parser.error("haproxy is not installed; apt-get install haproxy, or brew install haproxy")
    settings = Settings.read()

    async def run(folder: str) -> int:
        return await Cluster(options.n, options.bind, settings, folder).run()

    with tempfile.TemporaryDirectory(prefix="cluster-") as folder:
        sys.exit(asyncio.run(run(folder)))


if __name__ == "__main__":
    main()
