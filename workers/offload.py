"""Where inference runs: on the event loop, in a thread, in a process. Each is `start()`, `run(queries)`, `stop()`."""

import asyncio
import contextlib
import logging
import multiprocessing
import os
import pickle
import queue
import signal
import socket
import threading
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from multiprocessing.context import SpawnProcess
from typing import Any, Protocol

from workers import tasks
from workers.loop import ModelDied, ModelFailed
from workers.metrics import Metrics
from workers.settings import Settings

log = logging.getLogger("uvicorn.error")


class CannotLoad(RuntimeError):
    """The model can't be loaded: the message says why."""


class Offload(Protocol):
    """One copy of the model, somewhere."""

    async def start(self) -> str:
        """Load the model; return what was loaded, in one line. Raises CannotLoad."""

    async def ready(self) -> None:
        """Return when `run` would not have to wait for another one to load."""
        return

    async def run(self, queries: list[Any]) -> list[Any]:
        """Answer the queries, one call at a time. Raises ModelFailed whatever the model raised."""

    def stop(self) -> None:
        """Let go of it, without waiting for a call in progress."""


class Inline(Offload):
    """On the event loop, which is blocked meanwhile: nothing else is answered. Here to be measured against."""

    def __init__(self, load: Callable[[], Any]) -> None:
        self.load = load

    async def start(self) -> str:
        self.model = attempt_load(self.load)
        return self.model.description

    async def run(self, queries: list[Any]) -> list[Any]:
        try:
            return self.model(queries)
        except BaseException as exc:
            raise ModelFailed(repr(exc)) from exc

    def stop(self) -> None:
        pass


class Thread(Offload):
    """In a dedicated thread, so that calls can't overlap. A daemon: a hung call can't hold the interpreter at exit."""

    def __init__(self, load: Callable[[], Any]) -> None:
        self.load = load
        self.todo: queue.SimpleQueue[tuple[asyncio.Future[Any], Callable[[], Any]] | None] = (
            queue.SimpleQueue()
        )

    async def start(self) -> str:
        threading.Thread(target=self._work, name="model", daemon=True).start()
        self.model = await self._call(lambda: attempt_load(self.load))
        return self.model.description

    async def run(self, queries: list[Any]) -> list[Any]:
        return await self._call(lambda: self.model(queries))

    def stop(self) -> None:
        self.todo.put(None)

    async def _call(self, call: Callable[[], Any]) -> Any:
        future = asyncio.get_running_loop().create_future()
        self.todo.put((future, call))
        result, exc = await future
        if isinstance(exc, CannotLoad):
            raise exc
        if exc is not None:
            raise ModelFailed(repr(exc)) from exc
        return result

    def _work(self) -> None:
        while item := self.todo.get():
            future, call = item
            outcome: tuple[Any, BaseException | None]
            try:
                outcome = call(), None
            except BaseException as exc:  # StopIteration set on a future would never arrive: hand over a pair
                outcome = None, exc
            try:
                future.get_loop().call_soon_threadsafe(settle, future, outcome)
            except RuntimeError:
                return  # the event loop is closed: the server has stopped without us


class Process(Offload):
    """In a spawned process that loads the model itself (a fork after torch has run hangs at its first op).

    A crash or a hang costs its own batch; the process is killed, replaced, and the reason logged.
    """

    def __init__(
        self, load: Callable[[], Any], hang_s: float, metrics: Metrics, cores: set[int] | None = None
    ) -> None:
        self.load, self.hang_s, self.metrics, self.cores = load, hang_s, metrics, cores
        self.process: SpawnProcess
        self.from_model: asyncio.StreamReader
        self.to_model: asyncio.StreamWriter
        self.spawning: asyncio.Task[str]

    async def start(self) -> str:
        self.spawning = asyncio.create_task(self._spawn())
        return await asyncio.shield(self.spawning)

    async def ready(self) -> None:
        if not self.spawning.done():  # asyncio.wait takes a turn of the event loop even then
            await asyncio.wait([self.spawning])

    async def run(self, queries: list[Any]) -> list[Any]:
        try:
            await self.spawning
        except CannotLoad as exc:
            self._replace(f"was not replaced: {exc}")
            raise ModelDied(str(exc)) from exc
        loop = asyncio.get_running_loop()
        loop.remove_reader(self.process.sentinel)  # while it works its end shows in the stream
        try:
            self.to_model.write(packed(queries))
            async with asyncio.timeout(self.hang_s):
                answers, error = await unpacked(self.from_model)
        except TimeoutError:
            reason = f"did not return within {self.hang_s:g} s"
        except (EOFError, OSError):
            reason = how_ended(self.process)
        else:
            loop.add_reader(self.process.sentinel, self._died_idle)
            if error is not None:
                raise ModelFailed(error)
            return answers
        self._replace(reason)
        raise ModelDied(f"the model process {reason}")

    def stop(self) -> None:
        if hasattr(self, "spawning"):  # else it was never started
            self.spawning.cancel()
        if hasattr(self, "process"):
            asyncio.get_running_loop().remove_reader(self.process.sentinel)
            self.process.kill()
            self.to_model.transport.abort()

    async def _spawn(self) -> str:
        try:
            ours, theirs = socket.socketpair()
            with theirs:  # closed here, or its death would not close the stream
                # No multiprocessing.Pipe: uvloop makes what it watches non-blocking, and a reply in pieces an error.
                self.from_model, self.to_model = await asyncio.open_unix_connection(sock=ours)
                process = multiprocessing.get_context("spawn").Process(
                    target=serve_socket, args=(theirs, self.load, self.cores), name="model", daemon=True
                )
                process.start()
        except OSError as exc:
            raise CannotLoad(f"no process can be started: {exc}") from exc
        self.process = process
        try:
            description, error = await unpacked(self.from_model)
        except (EOFError, OSError):
            error = f"the model process {how_ended(process)}"
        if error is not None:
            self.to_model.transport.abort()
            raise CannotLoad(error)
        asyncio.get_running_loop().add_reader(process.sentinel, self._died_idle)
        return f"{description}, process {process.pid}"

    def _died_idle(self) -> None:
        """Its sentinel is readable, though nothing was asked: it has ended."""
        self._replace(how_ended(self.process))

    def _replace(self, reason: str) -> None:
        log.error("model process %s %s; starting another", self.process.pid, reason)
        self.metrics.restarts.inc()
        self.stop()
        self.spawning = asyncio.create_task(self._spawn())


def how_ended(process: SpawnProcess) -> str:
    """Collect a process that has ended; say how, as part of a sentence."""
    process.join(1)
    return f"ended with exit code {process.exitcode}"


def packed(message: Any) -> bytes:
    """A message on its way to the model process or back: its length, then its pickle."""
    body = pickle.dumps(message)
    return len(body).to_bytes(8) + body


async def unpacked(reader: asyncio.StreamReader) -> Any:
    """The next message. Raises EOFError or OSError where the process has ended."""
    return pickle.loads(await reader.readexactly(int.from_bytes(await reader.readexactly(8))))


def serve_socket(sock: socket.socket, load: Callable[[], Any], cores: set[int] | None = None) -> None:
    """The model process: answer lists of queries from the socket until the parent is gone."""
    if cores:
        os.sched_setaffinity(0, cores)  # before torch makes its threads: they inherit it
    for stop in (signal.SIGINT, signal.SIGTERM):  # a terminal and systemd signal us too; the parent decides
        signal.signal(stop, signal.SIG_IGN)
    stream = sock.makefile("rb")
    # What is raised when the parent is gone, the last one in the middle of its message.
    with contextlib.suppress(BrokenPipeError, ConnectionResetError, pickle.UnpicklingError):
        try:
            model = attempt_load(load)
        except CannotLoad as exc:
            return sock.sendall(packed((None, str(exc))))
        sock.sendall(packed((model.description, None)))
        while length := stream.read(8):
            queries = pickle.loads(stream.read(int.from_bytes(length)))
            try:
                reply = packed((model(queries), None))
            except BaseException as exc:
                reply = packed((None, repr(exc)))
            sock.sendall(reply)


def attempt_load(load: Callable[[], Any]) -> Any:
    """Load; raises CannotLoad with one line, whatever the library raised."""
    try:
        return load()
    except BaseException as exc:
        lines = str(exc).strip().splitlines() or [repr(exc)]
        # Transformers wraps a whole traceback into its message: the cause is its last line.
        reason = lines[-1] if any(line.startswith("Traceback") for line in lines) else lines[0]
        raise CannotLoad(f"{type(exc).__name__}: {reason}") from exc


def settle(future: asyncio.Future[Any], outcome: Any) -> None:
    """Give a future its result unless it was cancelled meanwhile."""
    if not future.done():
        future.set_result(outcome)


def make(settings: Settings, metrics: Metrics, load: Callable[[int], Any]) -> list[Offload]:
    """Return the `INSTANCES` places where `OFFLOAD` says that inference runs."""
    settings = replace(settings, TORCH_THREADS=settings.threads_per_instance)  # counted before any is pinned
    instances = range(settings.INSTANCES)
    if settings.OFFLOAD == "dirty":
        from workers.dirty import Dirty  # only there is Gunicorn needed

        return [Dirty(settings.HANG_S) for _ in instances]
    if settings.OFFLOAD == "process":
        shares = core_shares(settings)
        return [
            Process(partial(tasks.load, settings, i), settings.HANG_S, metrics, share)
            for i, share in zip(instances, shares)
        ]
    kind = Inline if settings.OFFLOAD == "inline" else Thread
    return [kind(partial(load, i)) for i in instances]


def core_shares(settings: Settings) -> list[set[int] | None]:
    """Each model process's own cores, so that their threads don't chase each other; None: wherever there is room.

    None, too, where their threads are more than the cores, or another worker would pin its own to the same ones.
    """
    n, threads = settings.INSTANCES, settings.threads_per_instance
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_setaffinity") else []
    if n == 1 or settings.WEB_CONCURRENCY > 1 or n * threads > len(cores):
        return [None] * n
    return [set(cores[i * len(cores) // n : (i + 1) * len(cores) // n]) for i in range(n)]
