"""make cluster N=2: HAProxy and replicas of the very same app, each `uvicorn server:app` with the same settings.

    $ python -m deploy.cluster 2 --bind 127.0.0.1:8000

SIGHUP            replace the replicas one by one; each new one is ready before its old one leaves
SIGTTIN, SIGTTOU  one replica more, one fewer (as Gunicorn's)
SIGTERM, Ctrl-C   answer what is admitted, then end; a second Ctrl-C ends at once

A replica that ends, or whose /health says 503 or nothing, is replaced. `/metrics` shows all replicas together;
METRICS_BIND=127.0.0.1:8404 shows HAProxy's own there. No replica outlives this process (on Linux).
"""

import argparse
import asyncio
import contextlib
import ctypes
import errno
import json
import math
import os
import shutil
import signal
import socket
import sys
import time
from pathlib import Path

from workers.metrics_folder import mark_ended
from workers.resources import free_port, temporary_folder
from workers.settings import Settings
from workers.web.access import is_loopback

ROOT = Path(__file__).resolve().parent.parent
PLACES = 32  # in haproxy.cfg
START_S = 60.0  # until a replica's first reply to /health: it answers while the model loads
ASK_S = 5.0  # for any later one; as Kubernetes' livenessProbe in kubernetes/server.yaml
UNWELL = 3  # replies in a row that are not 200, or missing, before a replica is replaced
PAUSE_S = 1.0  # before another try
TELL_S = 2.0  # for HAProxy to obey
OUT_OF_FILES = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}  # our own trouble, not the replica's
LIBC = ctypes.CDLL(None)

Process = asyncio.subprocess.Process


class Cluster:
    """`n` replicas behind HAProxy, which keeps its socket and the replicas' metrics in `folder`."""

    def __init__(self, n: int, bind: str, settings: Settings, folder: str) -> None:
        self.n, self.grace_s = n, settings.GRACE_S
        self.socket, self.metrics = f"{folder}/haproxy.sock", f"{folder}/metrics"
        os.mkdir(self.metrics)
        self.env = replica_env(n, bind, settings) | {
            "ADMIN_SOCKET": self.socket,
            # HAProxy's own metrics are on a socket of its own unless METRICS_BIND says where.
            "METRICS_BIND": os.environ.get("METRICS_BIND", f"unix@{folder}/haproxy-metrics.sock"),
            "PROMETHEUS_MULTIPROC_DIR": self.metrics,
        }
        # Inline, the event loop is silent for as long as a call of the model may take.
        self.ask_s = ASK_S + (settings.HANG_S if settings.OFFLOAD == "inline" else 0)
        self.processes: set[Process] = set()
        self.keepers: dict[int, asyncio.Task[None]] = {}  # by their places in haproxy.cfg
        self.tasks: set[asyncio.Task[None]] = set()  # and those that leave
        self.started: dict[int, asyncio.Future[bool]] = {}  # whether the first replica there became ready
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
        obedience.add_done_callback(self.note_end)
        try:
            return await self.end
        finally:
            obedience.cancel()
            for keeper in self.keepers.values():
                keeper.cancel()
            await asyncio.wait(self.tasks)
            with contextlib.suppress(ProcessLookupError):
                haproxy.send_signal(signal.SIGUSR1)  # lets what it has under way finish: SIGTERM would not
            await asyncio.wait([watch], timeout=TELL_S + 1)  # hard-stop-after is 1 s
            with contextlib.suppress(ProcessLookupError):
                haproxy.kill()  # it was frozen

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

    def note_end(self, task: asyncio.Task[None]) -> None:
        """End the cluster where a task ended by a bug: nobody would do its work."""
        if not task.cancelled() and (exc := task.exception()):
            say(f"the cluster ends by a bug of its own: {exc!r}")
            self.fail(1)

    async def obey(self) -> None:
        """Do what signals ask, one after the other."""
        while True:
            match await self.orders.get():
                case signal.SIGHUP:
                    await self.restart()
                case signal.SIGTTIN:
                    self.add()
                case signal.SIGTTOU if len(self.keepers) > 1:
                    await self.remove(max(self.keepers))

    async def restart(self) -> None:
        """Replace the replicas one by one; stop at the first new one that can't start."""
        for place in list(self.keepers):
            if not (new := self.add()):
                return
            if not await self.started[new]:
                say("the new replica cannot start; the old ones stay")
                return await self.remove(new)
            await self.remove(place)

    # --- one replica --------------------------------------------------------------------------------------------------

    def add(self) -> int | None:
        """Let there be a replica in the first free place; return that, None where all are taken."""
        place = next((place for place in range(1, PLACES + 1) if place not in self.keepers), None)
        if not place:
            say(f"all {PLACES} places of deploy/haproxy.cfg are taken: send SIGTTOU first")
            return None
        self.started[place] = asyncio.get_running_loop().create_future()
        self.keepers[place] = keeper = asyncio.create_task(self.keep(place))
        self.tasks.add(keeper)
        keeper.add_done_callback(self.note_end)
        return place

    async def remove(self, place: int) -> None:
        """Let it answer what it has admitted, and no more."""
        keeper = self.keepers.pop(place)
        keeper.cancel()
        await asyncio.wait([keeper])
        self.tasks.discard(keeper)

    async def keep(self, place: int) -> None:
        """Keep a replica in this place until cancelled: when one has ended or is unwell, another comes."""
        while True:
            code = None
            try:
                code = await self.serve(place)
                ended = f"has ended with {code}"
            except (OSError, RuntimeError) as exc:  # no files, no memory, no more processes: it may pass
                ended = f"cannot be started: {exc}"
            if not self.started[place].done():
                self.started[place].set_result(False)
            if not self.served:
                self.fail(code or 1)  # nor could another one start
            say(f"replica {place} {ended}; starting another")
            await asyncio.sleep(PAUSE_S)

    async def serve(self, place: int) -> int | None:
        """Serve in this place until the replica ends or is unwell; return its exit code. Raises OSError."""
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
        try:
            if await self.become_ready(place, process, port):
                await self.until_unwell(place, process, port)
        finally:
            # Also when cancelled. Those under way stay with it, all others go elsewhere. (Checks would find it unready, and
            # HAProxy ends the requests of a server that is down.)
            await self.tell(f"disable health replicas/replica{place}")
            await self.tell(f"set server replicas/replica{place} state drain")
            await self.finish(process)
            await self.tell(f"set server replicas/replica{place} state maint")
        return process.returncode

    async def become_ready(self, place: int, process: Process, port: int) -> bool:
        """Return whether it became ready; not where it ended before, or did not even answer."""
        late_at, server = time.monotonic() + START_S, f"replicas/replica{place}"
        while process.returncode is None:
            status, _ = await ask(port, "/ready", self.ask_s)
            if status:
                late_at = math.inf
            if status == 200 and await self.tell(
                f"set server {server} addr 127.0.0.1 port {port}",
                f"enable health {server}",
                f"set server {server} state ready",
            ):
                self.served = True
                say(f"replica {place} is ready, process {process.pid}")
                if not self.started[place].done():
                    self.started[place].set_result(True)
                return True
            if time.monotonic() > late_at:
                say(
                    f"replica {place} does not answer {START_S:.0f} s after its start; process {process.pid} is replaced"
                )
                return False
            await wait_for_end(process, 0.1)
        return False

    async def until_unwell(self, place: int, process: Process, port: int) -> None:
        """Return when the replica has ended, or when /health has not been 200 for UNWELL times in a row."""
        failures = 0
        while process.returncode is None and failures < UNWELL:
            await wait_for_end(process, 1)
            status, reason = await ask(port, "/health", self.ask_s)
            failures = 0 if status in (200, None) else failures + 1
        if process.returncode is None:
            say(f"replica {place} is unwell, process {process.pid} is replaced: {reason}")

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
        mark_ended(process.pid, self.metrics)

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

    async def tell(self, *commands: str) -> bool:
        """Give HAProxy orders over its socket; return whether it has taken them."""
        with contextlib.suppress(OSError):  # TimeoutError is one
            async with asyncio.timeout(TELL_S):
                reader, writer = await asyncio.open_unix_connection(self.socket)
                with contextlib.closing(writer):
                    writer.write(f"{'; '.join(commands)}\n".encode())
                    await reader.read()
                return True
        return False


def replica_env(n: int, bind: str, settings: Settings) -> dict[str, str]:
    """Return what the replicas and HAProxy are told, so that what each allows agrees with the settings."""
    return {
        "BIND": bind,
        "BODY_TIMEOUT": f"{math.ceil(settings.BODY_TIMEOUT_S * 1000)}ms",
        "CLIENT_TIMEOUT": f"{max(30, math.ceil(settings.BODY_TIMEOUT_S) + 5)}s",
        "HEADERS_TIMEOUT": f"{math.ceil(settings.HEADERS_TIMEOUT_S * 1000)}ms",
        "SERVER_TIMEOUT": f"{int(settings.DEADLINE_S) + 5}s",
        "WEB_CONCURRENCY": str(n),  # so many share the cores
        "SERVER_SOFTWARE": "cluster",  # a replica that ends has a successor
        # All connections are HAProxy's, which counts those of each client.
        "MAX_CONNECTIONS": "0",
        "CLIENT_CONNECTIONS": os.environ.get("CLIENT_CONNECTIONS") or str(settings.MAX_CONNECTIONS or 100),
        # They are on loopback, but known by HAProxy's names.
        "ALLOWED_HOSTS": settings.ALLOWED_HOSTS or ("" if is_on_loopback(bind) else "*"),
        # HAProxy takes a second more than they do.
        "GRACE_S": f"{max(settings.GRACE_S - 1, settings.GRACE_S / 2):g}",
    }


def is_on_loopback(bind: str) -> bool:
    """Return whether HAProxy listens on loopback only: then the guard against DNS rebinding stays on. In doubt it does."""
    hosts = [address.rpartition("@")[2].rpartition(":")[0].strip("[]") for address in bind.split(",")]
    return any(map(is_name_of_loopback, hosts)) and not any(host in ("", "*") for host in hosts)


def is_name_of_loopback(host: str) -> bool:
    """Return whether a host's name or address is loopback's, or unknown."""
    try:
        found = socket.getaddrinfo(host, None) if host not in ("", "*") else []
    except OSError:
        return True
    return bool(found) and all(is_loopback(str(address[0])) for *_, address in found)


def end_with_parent() -> None:
    """In a new process: let the kernel send it SIGTERM when the one that started it has been killed."""
    LIBC.prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


async def wait_for_end(process: Process, timeout_s: float) -> None:
    """Wait so long, or until the process has ended."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(timeout_s):
            await process.wait()


async def ask(port: int, path: str, timeout_s: float) -> tuple[int | None, str]:
    """Return the status and the error of a replica's reply; 0 where there is none, None where we can't even ask."""
    try:
        async with asyncio.timeout(timeout_s):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            with contextlib.closing(writer):
                writer.write(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
                head, _, body = (await reader.read()).partition(b"\r\n\r\n")
        return int(head.split()[1]), json.loads(body).get("error", "")
    except OSError as exc:  # TimeoutError is one
        return (None if exc.errno in OUT_OF_FILES else 0), "it does not answer /health"
    except (ValueError, IndexError):
        return 0, "its reply cannot be read"


def say(sentence: str) -> None:
    """Print it, if anybody reads that."""
    with contextlib.suppress(OSError):
        print(sentence, flush=True)


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

    folder = temporary_folder("cluster")
    try:
        sys.exit(asyncio.run(serve(options.n, options.bind, settings, folder)))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


async def serve(n: int, bind: str, settings: Settings, folder: str) -> int:
    """Run a cluster; return its exit code."""
    return await Cluster(n, bind, settings, folder).run()


if __name__ == "__main__":
    main()
