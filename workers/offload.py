"""Two of the four places where inference runs: the event loop and a thread. The others are in `isolation/`, which chooses."""

import asyncio
import contextlib
import logging
import os
import queue
import sys
import threading
import traceback
from collections.abc import Callable
from functools import partial
from itertools import chain
from typing import Any, Protocol

from .errors import CannotLoad, ModelFailed

log = logging.getLogger("uvicorn.error")

Todo = tuple[asyncio.Future[Any], Callable[[], Any]]  # a call, and the future that gets its outcome


class Offload(Protocol):
    """One instance of the model, somewhere."""

    loaded: asyncio.Event  # set while a model is loaded: cleared while a dead one is replaced
    trouble: str = ""  # why it could not be loaded again, after several tries; empty as a rule
    pid: int = 0  # of the model's own process; 0 where it has none

    async def start(self) -> Any:
        """Load the model; return its description, one line as a text. Raises CannotLoad."""

    async def ready(self) -> int:
        """Wait until a model is loaded; return its process's id: another one where the process was replaced."""
        await self.loaded.wait()
        return self.pid

    async def run(self, queries: list[Any]) -> list[Any]:
        """Answer the queries, one call at a time. Raises ModelFailed whatever the model raised."""

    async def close(self) -> None:
        """Let the model close itself, after a call in progress. The caller bounds how long it waits, then calls `stop`."""

    def stop(self) -> None:
        """Let go of it, without waiting for a call in progress."""


class Inline(Offload):
    """On the event loop, which is blocked meanwhile: nothing else is answered. Here to be measured against."""

    def __init__(self, load: Callable[[], Any]) -> None:
        self.load, self.loaded = load, asyncio.Event()

    async def start(self) -> Any:
        self.model = attempt_load(self.load)
        self.loaded.set()
        return getattr(self.model, "description", "")

    async def run(self, queries: list[Any]) -> list[Any]:
        try:
            return self.model(queries)
        except BaseException as exc:
            raise ModelFailed(in_words(exc)) from exc

    async def close(self) -> None:
        if self.loaded.is_set():
            await in_thread(partial(close, self.model))

    def stop(self) -> None:
        pass


class Thread(Offload):
    """In a dedicated thread, so that calls can't overlap. A daemon: a hung call can't hold the interpreter at exit."""

    def __init__(self, load: Callable[[], Any]) -> None:
        self.load, self.loaded = load, asyncio.Event()
        self.todo: queue.SimpleQueue[Todo | None] = queue.SimpleQueue()

    async def start(self) -> Any:
        threading.Thread(target=self._work, name="model", daemon=True).start()
        self.model, exc = await self._call(lambda: attempt_load(self.load))
        if exc is not None:
            raise exc
        self.loaded.set()
        return getattr(self.model, "description", "")

    async def run(self, queries: list[Any]) -> list[Any]:
        answers, exc = await self._call(lambda: self.model(queries))
        if exc is not None:
            raise ModelFailed(in_words(exc)) from exc
        return answers

    async def close(self) -> None:
        if self.loaded.is_set():
            await self._call(partial(close, self.model))

    def stop(self) -> None:
        self.todo.put(None)  # ends `_work`

    def _call(self, call: Callable[[], Any]) -> asyncio.Future[Any]:
        """Make the call in the thread: a pair of its result and what it raised."""
        future = asyncio.get_running_loop().create_future()
        self.todo.put((future, call))
        return future

    def _work(self) -> None:
        while item := self.todo.get():
            answer_with(*item)


async def in_thread(call: Callable[[], Any]) -> Any:
    """Make the call in a daemon thread; return or raise what it does. `asyncio.to_thread` would hold up the exit."""
    future = asyncio.get_running_loop().create_future()
    threading.Thread(target=answer_with, args=(future, call), daemon=True).start()
    result, exc = await future
    if exc is not None:
        raise exc
    return result


def answer_with(future: asyncio.Future[Any], call: Callable[[], Any]) -> None:
    """Make the call in this thread; hand a pair of its result and what it raised to the future."""
    outcome: tuple[Any, BaseException | None]
    try:
        outcome = call(), None
    except BaseException as exc:
        outcome = None, exc  # as a value: StopIteration, set as a future's exception, would never arrive
    with contextlib.suppress(RuntimeError):  # the event loop is closed: the server has stopped without us
        future.get_loop().call_soon_threadsafe(settle, future, outcome)


def attempt_load(load: Callable[[], Any]) -> Any:
    """Load; raises CannotLoad with one line, whatever the library raised."""
    try:
        return load()
    except BaseException as exc:
        raise CannotLoad(one_line(exc)) from exc


def close(model: Any) -> None:
    """Let a model that has a `close` close itself; log what that raises."""
    try:
        getattr(model, "close", lambda: None)()
    except BaseException as exc:
        log.error("the model failed to close: %s", one_line(exc))


def one_line(exc: BaseException) -> str:
    """Return its name and its message's first line, and those of its root cause where they say more."""
    try:
        lines = str(exc).strip().splitlines()
    except Exception:  # a custom class may do anything
        lines = []
    if not lines:
        return in_words(exc)
    # Transformers wraps a whole traceback into its message: the cause is its last line.
    line = lines[-1] if any(line.startswith("Traceback") for line in lines) else lines[0]
    sentence = f"{type(exc).__name__}: {line}"
    # The root tells what to do: an optional module that one in between could not import, for one.
    root = one_line(exc.__cause__) if exc.__cause__ not in (None, exc) else ""
    return sentence if root.partition(": ")[2] in sentence else f"{sentence} (caused by {root})"


def in_words(exc: BaseException) -> str:
    """Its `repr`, or its name where it has none."""
    try:
        return repr(exc)
    except Exception:
        return type(exc).__name__


def model_stacks() -> str:
    """Return where in its code each thread of the model is now."""
    frames = sys._current_frames()
    model_threads = [thread for thread in threading.enumerate() if thread.name == "model"]
    return "".join(
        chain.from_iterable(
            traceback.format_stack(frames[t.ident]) for t in model_threads if t.ident in frames
        )
    )


def failed_at(exc: CannotLoad) -> str:
    """Return the line of a custom class's file at which loading it failed, if this process knows it, else an empty text."""
    frames = traceback.extract_tb(exc.__cause__.__traceback__) if exc.__cause__ else []
    ours = (os.path.dirname(__file__), os.path.dirname(os.__file__), "<")  # and Python's
    own = [one for one in frames if not one.filename.startswith(ours) and "site-packages" not in one.filename]
    return f" ({os.path.basename(own[-1].filename)}, line {own[-1].lineno})" if own else ""


def settle(future: asyncio.Future[Any], outcome: Any) -> None:
    """Give a future its result unless it was cancelled meanwhile."""
    if not future.done():
        future.set_result(outcome)
