"""Queries that models die of: after the third time they are refused, for a while.

When a model's process dies nobody can see what killed it: one of its queries, or something else. So all queries that were
in it are suspect. A suspect runs alone from then on, so that nobody dies with it again. An answer clears it. If its process
dies three times in a row it is refused until it is forgotten. Two of these times it was alone, in a process that had
answered the task's examples. Queries that were beside it the first time are answered when they are sent again.

What is kept of a query is a digest, of MOST queries at most. Each web worker learns for itself.
"""

import hashlib
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

from workers.errors import ModelDied, ModelFailed, Quarantined
from workers.isolation.process import pickled
from workers.metrics import Metrics
from workers.scheduling.cost_model import Run

log = logging.getLogger("uvicorn.error")

DEATHS = 3
FORGET_S = 600.0  # after the last of them
MOST = 1024


class Quarantine:
    """The queries that were in processes that died. `now` tells the time."""

    def __init__(self, metrics: Metrics, now: Callable[[], float] = time.monotonic) -> None:
        self.metrics, self.now = metrics, now
        # By digest: in how many processes that died, and when in the last. The latest stands last.
        self.suspects: OrderedDict[bytes, tuple[int, float]] = OrderedDict()

    def around(self, run: Run) -> Run:
        """`run`, with an eye on who is in it when its process dies."""

        async def watched(contents: list[Any]) -> Sequence[Any]:
            if self.suspects:
                suspects = sum(self.deaths(content) > 0 for content in contents)
                if suspects and len(contents) > 1:
                    raise ModelFailed("some of it is suspect: each runs alone")
                if suspects:
                    self.check(contents[0])  # it has come since it was admitted
            try:
                answers = await run(contents)
            except ModelDied:
                self.note_death(contents)
                raise
            if self.suspects:
                for content in contents:
                    self.suspects.pop(digest(content), None)
            return answers

        return watched

    def check(self, content: Any) -> None:
        """Raise Quarantined where this query is refused. Any thread may ask; costs nothing while no process dies."""
        if self.suspects and self.deaths(content) >= DEATHS:
            self.metrics.quarantined.inc()
            raise Quarantined(
                f"the model's process ended each of the {DEATHS} times that it had this input; change it, "
                f"or ask again in {FORGET_S / 60:.0f} minutes"
            )

    def deaths(self, content: Any) -> int:
        """In how many processes that died it was, in a row."""
        n, at = self.suspects.get(digest(content), (0, 0.0))
        return n if self.now() < at + FORGET_S else 0

    def note_death(self, contents: list[Any]) -> None:
        now = self.now()
        while self.suspects and next(iter(self.suspects.values()))[1] + FORGET_S <= now:
            self.suspects.popitem(last=False)
        for key in {digest(content) for content in contents}:
            n = self.suspects.pop(key, (0, now))[0] + 1
            self.suspects[key] = n, now
            if n == DEATHS:
                log.error("one query has ended %d model processes: it is refused for %g s", n, FORGET_S)
        while len(self.suspects) > MOST:
            self.suspects.popitem(last=False)


def digest(content: Any) -> bytes:
    """Different for different queries; what is in them can't be read from it."""
    return hashlib.blake2b(pickled(content), digest_size=16).digest()
