"""What a custom class may know of the client that waits for its answer, and how its items reach that client as they come."""

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

# The server's own timer, which makes a request late, comes first: an answer that ends because of the deadline would pass for a whole one.
TIMER_S = 0.5

RUNNING: set["CallContext"] = set()  # of the requests that wait, for GET /live


class CallContext:
    """One input's client: whether it still waits, until when, and how far the answer is. Any thread may use it.

    In a process of its own the model learns of no client that leaves, and its progress is not shown; `deadline` is
    DEADLINE_S after the call's start.
    """

    def __init__(self) -> None:
        self.deadline = math.inf  # on the clock of time.monotonic(): afterwards nobody waits
        self.fraction: float | None = None
        self.has_left = False
        self.listener: Callable[[str, Any], None] | None = None

    @property
    def cancelled(self) -> bool:
        """Whether nobody waits any more: the client has left, or was told that the deadline has passed."""
        return self.has_left or time.monotonic() >= self.deadline + TIMER_S

    def progress(self, fraction: float) -> None:
        """Say how much is done, from 0 to 1: GET /live shows it, and a client that asked for events gets one."""
        self.fraction = min(1.0, max(0.0, float(fraction)))
        if self.listener:
            self.listener("progress", self.fraction)

    def give(self, item: Any) -> bool:
        """Send an item to the client; return whether there is one that takes items as they come."""
        if self.listener:
            self.listener("item", item)
        return bool(self.listener)

    def __reduce__(self) -> Any:
        """On its way to a model process there is nothing to take along; equal inputs stay equal for the quarantine."""
        return CallContext, ()


class Followed(NamedTuple):
    """What the model gets of one input, with its client."""

    content: Any
    context: CallContext
    streams: bool = False  # whether the answer is a list of items, those that are not yet with the client


def followed(contents: Sequence[Any], left_s: float) -> contextlib.AbstractContextManager[None]:
    """While it lasts clients wait for these contents, at most `left_s`; afterwards their contexts are cancelled."""
    contexts = [content.context for content in contents if isinstance(content, Followed)]
    return running(contexts, left_s) if contexts else contextlib.nullcontext()


@contextlib.contextmanager
def running(contexts: Sequence[CallContext], left_s: float) -> Iterator[None]:
    """While it lasts these have a client that waits, at most `left_s`; afterwards they are cancelled."""
    for context in contexts:
        context.deadline = time.monotonic() + left_s
    RUNNING.update(contexts)
    try:
        yield
    finally:
        for context in contexts:
            context.has_left = True
        RUNNING.difference_update(contexts)
