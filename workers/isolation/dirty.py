"""OFFLOAD=dirty: inference in one of Gunicorn's "dirty" workers, which all web workers share. See gunicorn/dirty.conf.py."""

import asyncio
import os
import pickle
import signal
from typing import Any

from gunicorn.dirty import DirtyApp  # type: ignore[import-untyped]
from gunicorn.dirty.client import DirtyClient, get_dirty_socket_path  # type: ignore[import-untyped]
from gunicorn.dirty.errors import DirtyAppError, DirtyError  # type: ignore[import-untyped]

from workers import tasks
from workers.errors import CannotLoad, ModelDied, ModelFailed
from workers.isolation.process import die_with, pickled
from workers.offload import Offload, close
from workers.settings import Settings

APP = "workers.isolation.dirty:DirtyModel"


class DirtyModel(DirtyApp):  # type: ignore[misc]
    """In the dirty worker: the model, loaded once, called from one thread."""

    def init(self) -> None:
        die_with(os.getppid())  # a killed arbiter's would live on, and hold the port
        self.model = tasks.load_alone(Settings.read())

    def close(self) -> None:
        close(self.model)

    def describe(self) -> list[Any]:
        return [*self.model.description]  # its protocol knows no types of ours

    def answer(self, queries: bytes) -> bytes:
        return pickled(self.model(pickle.loads(queries)))


class Dirty(Offload):
    """In a web worker: its way to the shared model, one call at a time."""

    def __init__(self, hang_s: float) -> None:
        self.hang_s = hang_s
        self.loaded = asyncio.Event()
        self.asking: asyncio.Task[str] | None = None
        self.serves = False  # from its first `ready`: the examples of the start have been answered

    async def start(self) -> Any:
        try:
            self.client = DirtyClient(get_dirty_socket_path(), timeout=self.hang_s)
        except DirtyError as exc:
            raise CannotLoad("OFFLOAD=dirty needs `gunicorn -c workers/gunicorn/dirty.conf.py`") from exc
        return await self._ask()

    async def run(self, queries: list[Any]) -> list[Any]:
        while True:
            try:
                answers = pickle.loads(await self.client.execute_async(APP, "answer", pickled(queries)))
            except DirtyAppError as exc:
                raise ModelFailed(str(exc)) from exc
            except DirtyError as exc:
                leave_if_lost(exc)
                self.loaded.clear()
                if not self.serves:  # the examples didn't end it: it had answered them when it was loaded
                    await self._ask()
                    continue
                self.asking = asyncio.create_task(self._ask())
                raise ModelDied(str(exc)) from exc
            return answers

    async def ready(self) -> int:
        self.serves = True
        return await super().ready()

    async def close(self) -> None:
        pass  # others may use it; Gunicorn closes it

    def stop(self) -> None:
        if self.asking:
            self.asking.cancel()

    async def _ask(self) -> Any:
        """Ask what it is until it answers: it may still load; Gunicorn restarts one that can't."""
        while True:
            try:
                fields = await self.client.execute_async(APP, "describe")
            except DirtyError as exc:
                leave_if_lost(exc)
                await asyncio.sleep(0.2)
            else:
                self.loaded.set()
                info = tasks.ModelInfo(*fields)
                return info._replace(strategy=f"{info.strategy}, shared")


def leave_if_lost(exc: DirtyError) -> None:
    """End this worker where the arbiter has been replaced by one with another address, which only a new worker learns."""
    if isinstance(exc.__cause__, FileNotFoundError | ConnectionRefusedError):
        signal.raise_signal(signal.SIGTERM)
