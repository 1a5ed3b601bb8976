"""One visit of one server: it is started, measured with one model, and ended. Every number becomes a row."""

import asyncio
import contextlib
import http.client
import math
import random
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import psutil
import uvloop

from loadtests.bench import overhead
from loadtests.load import generator
from loadtests.load.raw_client import http as http_bytes
from loadtests.load.request_forms import Form
from loadtests.modes import Server, start
from loadtests.peers.catalogue import Peer

TEXT = "Paris is the [MASK] of France."
# Overload: an answer after the first is worth nothing; after the second the client hangs up.
LIMIT_S, TIMEOUT_S = 1.0, 1.5
START_S = 120.0
RECOVERY_S = 10.0  # longer is told as "> 10"
HEALTH_PER_S = 10.0
USERS = (1, 8, 32, 64)
CAPACITY_S = {"short": 1.2, "mixed": 1.5}
LAW_USERS, LAW_S = (2, 8, 32, 64), 2.5
LATENCY_S, OVERLOAD_S, OVERHEAD_S = 3.0, 4.5, 1.2


class Row(NamedTuple):
    """A number of a peer, and how many cores something else took meanwhile."""

    peer: str
    model: str
    repeat: int
    what: str
    metric: str
    value: float
    others: float


@dataclass
class Visit:
    """What is the same for all parts of a visit, and the rows that it found."""

    peer: Peer
    model: str  # float32, bfloat16, instant or embeddings
    repeat: int
    server: Server
    locust: generator.Generator
    cpus: set[int]  # the server's and the client's
    expected: str
    scale: float
    rows: list[Row] = field(default_factory=list)

    def note(self, what: str, others: float = 0.0, **values: float) -> None:
        for metric, value in values.items():
            self.rows.append(Row(self.peer.name, self.model, self.repeat, what, metric, value, others))

    def load(self, kind: str, **options: Any) -> pd.DataFrame:
        return self.locust.run(
            self.server.url, kind, form=self.peer.form, expected=self.expected, seed=self.repeat, **options
        )

    @contextlib.contextmanager
    def watch(self) -> Iterator[list[float]]:
        """The list gets how many cores were taken by what is neither the server nor the load."""

        def mine() -> float:
            return tree_s(psutil.Process(self.server.process.pid)) + tree_s(psutil.Process())

        others: list[float] = []
        began, busy, own = time.perf_counter(), busy_s(self.cpus), mine()
        yield others
        seconds = time.perf_counter() - began
        others.append(max(0.0, (busy_s(self.cpus) - busy - (mine() - own)) / seconds))

    def capacity(self, users: tuple[int, ...] = USERS, kinds: tuple[str, ...] = ("short", "mixed")) -> float:
        """Answers a second of so many users in a closed loop, until the last has come; returns the best with short texts."""
        best = 0.0
        for texts in kinds:
            for n in users:
                with self.watch() as others:
                    seconds = CAPACITY_S[texts] * self.scale
                    df = self.load(
                        "closed", users=n, duration_s=seconds, texts=texts, limit_s=10.0, timeout_s=20.0
                    )
                done_s = (df["due_s"] + df["latency_ms"] / 1000)[df["outcome"] == "200"]
                per_s = len(done_s) / done_s.max() if len(done_s) else 0.0
                self.note(f"{texts} {n}", others[0], per_s=per_s, **counts(df))
                if texts == "short":
                    best = max(best, per_s)
        if not best:
            raise RuntimeError("it gave no correct answer under load")
        return best

    def latency(self, capacity: float) -> None:
        """Percentiles at parts of its capacity."""
        for share in (0.5, 0.8):
            with self.watch() as others:
                options = {"rate_per_s": max(1.0, share * capacity), "duration_s": LATENCY_S * self.scale}
                df = self.load("open", limit_s=5.0, timeout_s=5.0, **options)
            found = generator.summary(df, LIMIT_S)
            names = ("offered_per_s", "goodput_per_s", "p50_ms", "p99_ms", "lateness_p99_ms")
            keep = {name: found[name] for name in names}
            self.note(f"at {share:.0%}", others[0], **keep, **counts(df))

    def overload(self, capacity: float, times: int) -> None:
        """What arrives in time when it is asked for more than it can, what the others get, how long it lasts."""
        seconds = OVERLOAD_S * self.scale
        recovery: list[float] = []
        prober = threading.Thread(target=lambda: recovery.append(self.recovery_s(seconds)))
        with self.watch() as others:
            prober.start()
            rate_per_s = min(times * capacity, generator.MOST_PER_S)
            options = {"rate_per_s": rate_per_s, "duration_s": seconds, "health_per_s": HEALTH_PER_S}
            df = self.load("open", limit_s=LIMIT_S, timeout_s=TIMEOUT_S, **options)
            prober.join()
        found, health = generator.summary(df, LIMIT_S), df[df["kind"] == "health"]
        in_time = generator.good(health, LIMIT_S)
        # At 2x capacity a queue without a bound answers in time until the second second: that is not a speed.
        skip_s = min(2 * LIMIT_S, seconds / 2)
        model = df[(df["kind"] == "model") & generator.good(df, LIMIT_S)]
        done_s = model["due_s"] + model["latency_ms"] / 1000
        goodput_per_s = float(((done_s >= skip_s) & (done_s < seconds)).sum()) / (seconds - skip_s)
        self.note(
            f"at {times} x",
            others[0],
            offered_per_s=found["offered_per_s"],
            goodput_per_s=goodput_per_s,
            good_share=found["good_share"],
            lateness_p99_ms=found["lateness_p99_ms"],
            health_share=float(in_time.mean()),
            health_p99_ms=float(health["latency_ms"].quantile(0.99)),
            recovery_s=recovery[0],
            requests=len(df) - len(health),
            **counts(df),
        )

    def recovery_s(self, after_s: float) -> float:
        """From `after_s` on, when the load ends: until a request is answered within LIMIT_S; inf after RECOVERY_S."""
        time.sleep(after_s)
        began = time.perf_counter()
        while (asked_s := time.perf_counter() - began) < RECOVERY_S:
            if ask(self.server.url, self.peer.asked, TEXT, LIMIT_S).outcome == "200":
                return asked_s
            time.sleep(0.1)
        return math.inf

    def overhead(self) -> None:
        """Requests a second of a no-op model, from raw connections: Locust's client would be the slower side."""
        form = self.peer.asked
        for users in (1, 32):
            with self.watch() as others:
                requests = [
                    http_bytes(self.server.url, form.body(text).decode(), form.path, form.media_type)
                    for text in overhead.texts(users)
                ]
                seconds = OVERHEAD_S * self.scale
                rate = uvloop.run(overhead.ask(self.server.url, requests, seconds, Reconnecting))
            self.note(f"instant {users}", others[0], per_s=rate, ms=1000 * users / rate if rate else math.inf)

    def batches(self) -> None:
        """Requests a second of a stub model whose batches cost no more than one text, or little more: do batches fill?"""
        form = self.peer.asked
        for users in LAW_USERS:
            requests = [
                http_bytes(self.server.url, form.body(text).decode(), form.path, form.media_type)
                for text in overhead.texts(users)
            ]
            with self.watch() as others:
                rate = uvloop.run(overhead.ask(self.server.url, requests, LAW_S * self.scale, Reconnecting))
            self.note(f"users {users}", others[0], per_s=rate)


class Reconnecting(overhead.Client):
    """Opens a new connection when the server closes one, as Gunicorn's sync workers do after each reply."""

    def connection_lost(self, exc: Exception | None) -> None:
        if self.ended:
            return
        loop = asyncio.get_running_loop()
        host, port = self.transport.get_extra_info("peername")[:2]
        self.buffer = b""
        self.connecting = loop.create_task(loop.create_connection(lambda: self, host, port))


# --- what a visit needs -----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def running(peer: Peer, model: str, cpus: set[int], calls: Path | None = None) -> Iterator[Server]:
    """The server, answering; at the end all of its processes are killed. Raises RuntimeError when it does not start."""
    with start(peer, peer.settings(model, calls), cpus=cpus, wait=False, port=free_ports()) as server:
        family: list[psutil.Process] = []
        try:
            wait_for_first_answer(server, peer.asked)
            family = server.processes()
            yield server
        finally:
            with contextlib.suppress(psutil.Error):
                family = list({*family, *server.processes()})
            for process in reversed(family):
                with contextlib.suppress(psutil.Error):
                    process.kill()


def free_ports(count: int = 6) -> int:
    """The first of some ports in a row that are free now; Multi Model Server takes none above 32767."""
    while True:
        first = random.randrange(20_000, 32_000)
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            for port in range(first, first + count):
                stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
            return first


def wait_for_first_answer(server: Server, form: Form) -> None:
    until = time.monotonic() + START_S
    while time.monotonic() < until and server.process.poll() is None:
        if ask(server.url, form, TEXT, START_S).outcome == "200":
            return
        time.sleep(0.05)
    state = "did not answer" if server.process.poll() is None else f"ended with code {server.process.poll()}"
    raise RuntimeError(f"it {state}: {reason(server.log())}")


def reason(log: str) -> str:
    """The line of a log that most likely says why."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line or "Exception" in line]
    return (errors or lines or ["it printed nothing"])[-1][:200]


class Reply(NamedTuple):
    """A status as text, or `refused`, `reset`, `timeout`; and the seconds that it took."""

    outcome: str
    seconds: float


def ask(url: str, form: Form, text: str, timeout_s: float) -> Reply:
    """One request over a connection of its own."""
    host, port = url.split("/")[2].split(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=timeout_s)
    began = time.perf_counter()
    try:
        connection.request("POST", form.path, form.body(text), {"Content-Type": form.media_type})
        reply = connection.getresponse()
        reply.read()
        outcome = str(reply.status)
    except ConnectionRefusedError:
        outcome = "refused"
    except TimeoutError:
        outcome = "timeout"
    except (OSError, http.client.HTTPException, socket.gaierror):
        outcome = "reset"
    finally:
        connection.close()
    return Reply(outcome, time.perf_counter() - began)


def counts(df: pd.DataFrame) -> dict[str, float]:
    """How many requests to the model had each outcome that some had."""
    found = df[df["kind"] == "model"]["outcome"].value_counts()
    return {f"n_{outcome}": float(n) for outcome, n in found.items()}


def tree_s(root: psutil.Process) -> float:
    """Processor seconds of a process and its descendants, those that have ended and were waited for included."""
    total = 0.0
    with contextlib.suppress(psutil.Error):
        for process in [root, *root.children(recursive=True)]:
            with contextlib.suppress(psutil.Error):
                total += sum(process.cpu_times()[:4])
    return total


def busy_s(cpus: set[int]) -> float:
    """Seconds that these cores were not idle: what a virtual machine's neighbours took is included."""
    times = psutil.cpu_times(percpu=True)
    return sum(sum(t[:8]) - t.idle - t.iowait for i, t in enumerate(times) if i in cpus)
