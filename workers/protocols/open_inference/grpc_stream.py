"""ModelStreamInfer: many requests in one call, each answered by itself."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Coroutine
from typing import Any, Protocol

import grpc
from starlette.exceptions import HTTPException

from workers.errors import STOPPING, Rejected
from workers.settings import Settings
from workers.web.middleware import HOLD_S

STREAM_BYTES = 2**26  # of messages and unsent answers that all streams hold together

Context = Any  # grpc.aio.ServicerContext of bytes
Future = asyncio.Future[Any]


class Servicer(Protocol):
    """What a stream needs of the servicer."""

    settings: Settings
    stopping: asyncio.Event
    stopped: asyncio.Task[Any]
    stream_bytes: int

    def held(self, n_bytes: int) -> contextlib.AbstractContextManager[None]: ...
    def keep(self, operation: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]: ...
    def replied(self, raw: bytes, context: Context) -> AsyncGenerator[Any]: ...
    async def operate(
        self, operation: Coroutine[Any, Any, Any], limit_s: float | None, *ends: Future
    ) -> Any: ...
    async def write(self, context: Context, reply: Any) -> None: ...


class Stream:
    """One ModelStreamInfer call."""

    def __init__(self, servicer: Servicer, context: Context) -> None:
        self.servicer, self.context = servicer, context
        self.unanswered: set[asyncio.Task[None]] = set()
        self.failed: Future = asyncio.get_running_loop().create_future()
        self.writing, self.rejected = asyncio.Lock(), asyncio.Event()

    async def run(self) -> None:
        """Read requests until the client ends the stream; return when all are answered."""
        servicer = self.servicer
        try:
            with contextlib.suppress(TimeoutError):  # failed or stopped
                while (raw := await self.read()) is not grpc.aio.EOF:
                    task = servicer.keep(self.answer(raw))
                    self.unanswered.add(task)
                    task.add_done_callback(self.unanswered.discard)
                    await asyncio.sleep(0)  # let it count its bytes
                    while self.is_full():
                        await asyncio.wait(self.unanswered, return_when=asyncio.FIRST_COMPLETED)
                    if self.rejected.is_set():  # the client sends too much: let it wait
                        await asyncio.sleep(HOLD_S)
                        self.rejected.clear()
            while self.unanswered:
                await asyncio.wait(self.unanswered)
        finally:
            for task in self.unanswered:
                task.cancel()
        if self.failed.done():
            raise self.failed.result()
        if servicer.stopping.is_set():
            raise Rejected(STOPPING)

    async def read(self) -> Any:
        """Return the next message. Raises TimeoutError once the stream has failed or the server stops."""
        operation = self.context.read()
        return await self.servicer.operate(operation, None, self.failed, self.servicer.stopped)

    def is_full(self) -> bool:
        """Return whether the stream must not be read for now. It may always have one request."""
        is_over = self.servicer.stream_bytes > STREAM_BYTES
        is_long = len(self.unanswered) >= self.servicer.settings.MAX_INPUTS
        return bool(self.unanswered) and (is_over or is_long)

    async def answer(self, raw: bytes) -> None:
        """Answer one request, unless the client has stopped reading."""
        servicer = self.servicer
        with servicer.held(len(raw)):
            async with contextlib.aclosing(servicer.replied(raw, self.context)) as replies:
                async for reply in replies:
                    if "retry_after_s" in reply.infer_response.parameters:
                        self.rejected.set()
                    if not await self.write(reply):
                        return

    async def write(self, reply: Any) -> bool:
        """Write one message; return whether the client still reads."""
        servicer = self.servicer
        with servicer.held(reply.ByteSize()):
            async with self.writing:
                if self.failed.done():
                    return False
                try:
                    await servicer.write(self.context, reply)
                except HTTPException as exc:
                    self.failed.set_result(exc)
        return not self.failed.done()
