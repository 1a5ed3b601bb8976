"""OFFLOAD=process: inference in a process that loads the model itself. A crash or a hang costs only its own batch.

    server                                     model process
    Process.run   -- length, pickled queries ->   main
                  <- length, pickled answers --

A new interpreter, not a fork: after torch has run, a fork hangs at its first op. Not multiprocessing.Process either: the model
could then have no processes of its own (a DataLoader has), and a second helper process would come with it.
"""

import asyncio
import contextlib
import ctypes
import gc
import io
import logging
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

from workers.errors import CannotLoad, ModelDied, ModelFailed
from workers.metrics import Metrics
from workers.offload import Offload, attempt_load, close, in_words
from workers.tasks import ModelInfo

log = logging.getLogger("uvicorn.error")

TRIES = 4  # replacements in a row, before that counts as trouble
PAUSE_S = 1.0  # after the first of them; twice as long after each further one
LONGEST_PAUSE_S = 60.0


class Process(Offload):
    """One model process; when it dies or hangs it is killed, with all that it has started, and replaced.

    Start it from a thread that lives as long as the server: the kernel kills the model with that thread.
    """

    def __init__(
        self, load: Callable[[], Any], hang_s: float, metrics: Metrics, cores: set[int] | None = None
    ) -> None:
        """`load` must be picklable; `cores`: the only ones it may run on."""
        self.hello = packed((pickle.dumps(load), cores))
        self.hang_s, self.metrics, self.cores = hang_s, metrics, cores
        self.loaded = asyncio.Event()
        self.busy = self.closing = False
        self.tries = 0  # how many replacements were started since one last got queries
        self.process: subprocess.Popen[bytes]
        self.replacing: asyncio.Task[None] | None = None
        self.from_model: asyncio.StreamReader
        self.to_model: asyncio.StreamWriter

    async def start(self) -> Any:
        began = time.monotonic()
        description = await self._spawn()
        # For replacements: one that takes five times as long as this load counts as hung.
        self.load_limit_s = max(self.hang_s, 5 * (time.monotonic() - began))
        return description

    async def run(self, queries: list[Any]) -> list[Any]:
        await self.loaded.wait()
        self.tries = 0
        try:
            self.busy = True
            async with asyncio.timeout(self.hang_s):
                self.to_model.write(packed(queries))
                answers, error = await unpacked(self.from_model)
        except TimeoutError:
            reason = f"did not return within {self.hang_s:g} s"
        except (EOFError, OSError):
            reason = await how_ended(self.process)
        except asyncio.CancelledError:
            self.stop()  # the next call would get this one's answers
            raise
        else:
            if self.process.returncode is not None:
                self._replace(await how_ended(self.process))
            if error is not None:
                sentence, trace = error
                failed = ModelFailed(sentence)
                failed.add_note(trace)
                raise failed
            return answers
        finally:
            self.busy = False
        self._replace(reason)
        raise ModelDied(f"the model process {reason}")

    async def close(self) -> None:
        if not self.loaded.is_set():
            return  # it is being replaced
        self.loaded.clear()
        self.closing = True  # its end is not a reason to start another
        with contextlib.suppress(OSError):
            self.to_model.write(framed(b""))
        while self.process.returncode is None:  # its watch asks
            await asyncio.sleep(0.01)

    def stop(self) -> None:
        self.loaded.clear()
        if self.replacing:
            self.replacing.cancel()
        self._kill()

    def _kill(self) -> None:
        """The process and whatever it has started."""
        if hasattr(self, "process"):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.to_model.transport.abort()

    async def _spawn(self) -> Any:
        """Start a process and wait until it has loaded the model; return what it is. Raises CannotLoad."""
        try:
            ours, theirs = socket.socketpair()
            with theirs:  # closed here, or its death would not close the stream
                self.from_model, self.to_model = await asyncio.open_unix_connection(sock=ours)
                try:
                    self.process = process = popen(theirs)
                    self.pid = process.pid
                except OSError:
                    self.to_model.transport.abort()
                    raise
        except OSError as exc:
            raise CannotLoad(f"no process can be started: {exc}") from exc
        watch = (process, self.from_model, asyncio.get_running_loop())
        threading.Thread(target=self._watch, args=watch, name="watch", daemon=True).start()
        try:
            self.to_model.write(self.hello)
            description, error = await unpacked(self.from_model)
        except (EOFError, OSError):
            error = f"the model process {await how_ended(process)}"
        if error is None and process.returncode is not None:
            error = f"the model process {await how_ended(process)}"
        if error is not None:
            self._kill()
            raise CannotLoad(error)
        self.loaded.set()
        if isinstance(description, ModelInfo):
            return description._replace(process_id=process.pid)
        return f"{description}, process {process.pid}"

    def _watch(
        self,
        process: subprocess.Popen[bytes],
        from_model: asyncio.StreamReader,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        """In a thread: wait until the process ends. Its socket doesn't tell: that stays open while a fork of it lives."""
        process.wait()
        with contextlib.suppress(RuntimeError):  # the event loop is closed
            loop.call_soon_threadsafe(self._ended, process, from_model)

    def _ended(self, process: subprocess.Popen[bytes], from_model: asyncio.StreamReader) -> None:
        if self.busy or not self.loaded.is_set():
            # `run` or `_spawn` is reading: let it have what was still sent, then the end.
            asyncio.get_running_loop().call_later(1, from_model.feed_eof)
        elif process is self.process:
            self._replace(f"ended with exit code {process.returncode}")

    def _replace(self, reason: str) -> None:
        if self.closing:
            return
        log.error("model process %s %s; starting another", self.process.pid, reason)
        self.stop()
        self.replacing = asyncio.create_task(self._respawn(reason))

    async def _respawn(self, reason: str) -> None:
        """Try again and again: what was short, memory or files, may be there later."""
        while True:
            if self.tries >= TRIES:
                failed = f"{self.tries} model processes in a row have failed"
                self.trouble = f"{failed}, the last one with: {reason}"
            await asyncio.sleep(pause_s(self.tries))
            self.tries += 1
            self.metrics.restarts.inc()
            try:
                async with asyncio.timeout(self.load_limit_s):
                    log.info("Serving %s", await self._spawn())
            except Exception as exc:  # whatever it is: nobody else would try again
                reason = str(exc) or f"it did not load within {self.load_limit_s:.0f} s"
                self._kill()
                log.error("the model process was not replaced: %s", reason)
            else:
                self.trouble = ""
                return


def pause_s(tries: int) -> float:
    """How long to wait after so many tries: 0, 1, 2, 4, 8 ... seconds."""
    return min(PAUSE_S * 2 ** (tries - 1), LONGEST_PAUSE_S) if tries else 0.0


def popen(connection: socket.socket) -> subprocess.Popen[bytes]:
    """Start a model process at the other end of a connection."""
    fd = connection.fileno()
    return subprocess.Popen(
        [
            sys.executable,
            "-c",
            "from workers.isolation.process import main; main()",
            str(fd),
            str(os.getpid()),
        ],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))},
        stdin=subprocess.DEVNULL,
        pass_fds=[fd],
        start_new_session=True,  # a group of its own: it is killed with all that it has started
    )


async def how_ended(process: subprocess.Popen[bytes]) -> str:
    """What has become of a process that has closed its connection, as part of a sentence."""
    for _ in range(100):  # it should have ended; its watch tells
        if process.returncode is not None:
            return f"ended with exit code {process.returncode}"
        await asyncio.sleep(0.01)
    return "closed its connection"


class Pickler(pickle.Pickler):
    """Turns tensors into lists: the server unpickles them, and it does without torch."""

    def reducer_override(self, value: Any) -> Any:
        torch = sys.modules.get("torch")
        if torch and isinstance(value, torch.Tensor):
            plain = value.tolist()
            return type(plain), (plain,)
        return NotImplemented


def pickled(value: Any) -> bytes:
    """Its pickle, for where there is no torch."""
    buffer = io.BytesIO()
    Pickler(buffer).dump(value)
    return buffer.getvalue()


def packed(message: Any) -> bytes:
    """A message on its way to the model process or back: its length, then its pickle."""
    return framed(pickled(message))


def framed(body: bytes) -> bytes:
    """Return the body after its length; an empty one asks the model process to close the model and end."""
    return len(body).to_bytes(8) + body


async def unpacked(reader: asyncio.StreamReader) -> Any:
    """The next message. Raises EOFError or OSError where the process has ended, ModelFailed where it can't be read."""
    body = await reader.readexactly(int.from_bytes(await reader.readexactly(8)))
    try:
        return pickle.loads(body)
    except BaseException as exc:  # a custom class may do anything, also cancel us
        raise ModelFailed(f"its answer can't be unpickled: {in_words(exc)}") from exc


# --- in the model process ---------------------------------------------------------------------------------------------


def main() -> None:
    """Answer lists of queries from a socket until the server is gone. Its arguments: the socket, the server's pid."""
    sock, server = socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2])
    sock.set_inheritable(False)
    die_with(server)
    for stop in (signal.SIGINT, signal.SIGTERM):  # systemd signals us, too; the server decides
        signal.signal(stop, signal.SIG_IGN)
    stream = sock.makefile("rb")
    with contextlib.suppress(BrokenPipeError, ConnectionResetError, EOFError):  # the server is gone
        load, cores = pickle.loads(receive(stream))
        if cores:
            os.sched_setaffinity(0, cores)  # before torch makes its threads: they inherit it
        try:
            model = attempt_load(lambda: pickle.loads(load)())
        except CannotLoad as exc:
            return sock.sendall(packed((None, str(exc))))
        gc.collect()
        gc.freeze()  # what loading has left stays: to look through it for garbage takes 0.16 s
        sock.sendall(packed((model.description, None)))
        while body := receive(stream):
            try:
                reply = packed((model(pickle.loads(body)), None))
            except BaseException as exc:
                reply = packed((None, (in_words(exc), traceback.format_exc())))
            sock.sendall(reply)
        close(model)


def receive(stream: Any) -> bytes:
    """The next message; empty or cut short when the server is gone."""
    return stream.read(int.from_bytes(stream.read(8)))


def die_with(server: int) -> None:
    """Have the kernel kill this process when its server dies, even a stopped one or amid a call. Linux only.

    Elsewhere it ends when it next reads from its socket.
    """
    set_parent_death_signal = 1  # see prctl(2)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
    if os.getppid() != server:  # it died before
        sys.exit()
