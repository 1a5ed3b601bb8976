"""What a request costs before its queue: parsing, tokenising, decoding. Bounded in bytes and in time, and off the event loop.

Little of it runs at once. More goes to a few threads, long bodies to others than short ones, so that neither waits for the
other. If too much waits already, a request is rejected (503) before any work; if its deadline passes or its client leaves, the
work ends at the next input. So whatever a client sends takes a known amount of memory and at most its own deadline.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

from workers import tasks
from workers.context import RequestContext
from workers.errors import RETRY_LATER, TOO_SHORT, Late, Malformed, ModelFailed, Rejected, Unprocessable
from workers.offload import in_words
from workers.resources import usable_cores

T = TypeVar("T")

# Of text they take 3 ms to tokenise at worst: shorter than the way to a thread and back on a busy server.
QUICK_BYTES = 1024
QUICK_JSON_BYTES = 16_384  # take 3 ms to parse at worst
LONG_BYTES = 32_768
# Bodies of the largest size allowed that may wait for a thread or be in one, in each of the two pools.
MAX_BODIES = 8
BUSY = f"too many long requests are being read; {RETRY_LATER}"


class CheckThreads:
    """The threads, and how much waits for them."""

    def __init__(self) -> None:
        threads = min(4, usable_cores())
        self.pools = [ThreadPoolExecutor(threads, "check-short"), ThreadPoolExecutor(threads, "check-long")]
        self.pending_bytes = [0, 0]
        self.most_bytes = 0  # of one body

    async def run(
        self,
        context: RequestContext,
        n_bytes: int,
        work: Callable[[], T],
        quick_bytes: int = QUICK_BYTES,
    ) -> T:
        """Return what `work` gives, which takes time for `n_bytes`. Raises Rejected, Late, and what `work` raises."""
        if n_bytes <= quick_bytes:
            return work()
        which = int(n_bytes > LONG_BYTES)
        if self.pending_bytes[which] + n_bytes > MAX_BODIES * max(self.most_bytes, n_bytes):
            raise Rejected(BUSY, 1)
        self.pending_bytes[which] += n_bytes
        future = self.pools[which].submit(work)
        future.add_done_callback(partial(self._ended, asyncio.get_running_loop(), which, n_bytes))
        left_s = context.left_s
        try:
            async with asyncio.timeout(left_s if left_s < 1e6 else None):
                return await asyncio.wrap_future(future)
        except TimeoutError:
            raise Late(TOO_SHORT) from None
        finally:
            context.given_up = not future.done()

    def _ended(
        self, loop: asyncio.AbstractEventLoop, which: int, n_bytes: int, future: "Future[object]"
    ) -> None:
        """In the thread: the memory is free only now, whether or not somebody still waits."""

        def free() -> None:
            self.pending_bytes[which] -= n_bytes

        if not loop.is_closed():
            loop.call_soon_threadsafe(free)

    def stop(self) -> None:
        """Start no more work."""
        for pool in self.pools:
            pool.shutdown(wait=False, cancel_futures=True)


def check_all(
    check: Callable[[Any, dict[str, Any]], tasks.Query],
    inputs: list[Any],
    parameters: dict[str, Any],
    context: RequestContext,
) -> list[tasks.Query]:
    """Return the query of each input. Raises what `check` does, with the input's number if there are several, and Late."""
    queries = []
    for number, one in enumerate(inputs):
        if context.given_up or (number and not context.left_s):
            raise Late(TOO_SHORT)
        try:
            queries.append(check(one, parameters))
        except (Malformed, Unprocessable) as exc:
            if len(inputs) == 1:
                raise
            raise type(exc)(f"input {number}: {exc}") from exc
        except BaseException as exc:
            # SystemExit would end the server, StopIteration would never leave its thread.
            raise ModelFailed(in_words(exc)) from exc
    return queries
