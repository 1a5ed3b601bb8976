"""Reject inputs that repeatedly crash the model's process, for a while.

When the process dies, nothing shows what crashed it: one of its queries, or something else. So all queries that were
in it are suspects. A suspect runs alone from then on, so that no other query dies with it. An answer clears it. If its process
dies three times in a row, the query is rejected until it is forgotten. Two of these times it was alone, in a process that had
answered the task's examples. Queries that were beside it the first time are answered when they are sent again.

Only a digest of a query is kept, of MAX_SUSPECTS queries at most. Each web worker learns for itself.
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
MAX_SUSPECTS = 1024


class Quarantine:
    """The queries that were in processes that died. `now` tells the time."""

    def __init__(self, metrics: Metrics, now: Callable[[], float] = time.monotonic) -> None:
        self.metrics, self.now = metrics, now
        # By digest: in how many processes that died, and when in the last. The latest stands last.
        self.suspects: OrderedDict[bytes, tuple[int, float]] = OrderedDict()

    def around(self, run: Run) -> Run:
        """Wrap `run` to record which queries were in a batch when its process died.

        It raises ModelFailed for a batch with a suspect in it: the loop then runs the queries one by one.
        """

        async def watched(contents: list[Any]) -> Sequence[Any]:
            if self.suspects:
                suspects = sum(self.deaths(content) > 0 for content in contents)
                if suspects and len(contents) > 1:
                    raise ModelFailed("a query of this batch is a suspect: each runs alone")
                if suspects:
                    self.check(contents[0])  # its third death came after it was admitted
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
        """Raise Quarantined where this query is rejected. Any thread may ask; costs nothing while no process dies."""
        if self.suspects and self.deaths(content) >= DEATHS:
            self.metrics.quarantined.inc()
            raise Quarantined(
                f"the model's process ended each of the {DEATHS} times that it had this input; change it, "
                f"or ask again in {FORGET_S / 60:.0f} minutes"
            )

    def deaths(self, content: Any) -> int:
        """Return in how many processes in a row it was when they died."""
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
                log.error("one query has crashed %d model processes; it is rejected for %g s", n, FORGET_S)
        while len(self.suspects) > MAX_SUSPECTS:
            self.suspects.popitem(last=False)


def digest(content: Any) -> bytes:
    """Return what differs for different queries, but does not show what is in them."""
    return hashlib.blake2b(pickled(content), digest_size=16).digest()
