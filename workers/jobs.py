"""The jobs that wait for the model, in two lanes, single requests and lists of inputs; and how they end."""

import asyncio
import itertools
import math
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from .errors import Late, Unanswered


class Answer(NamedTuple):
    """What the model returned for one query, and where its time went."""

    value: Any
    queue_s: float
    model_s: float
    batch_size: int
    dispatched_because: str
    generated: Any = None  # `generation.stream.Generated`, if it is a text that came token by token


@dataclass(eq=False, slots=True)
class Lane:
    """Jobs, first in, first out; and the rate of the work that is offered, admitted or not."""

    jobs: "OrderedDict[Job, None]" = field(default_factory=OrderedDict)
    size: float = 0
    offered: float = 0.0  # size since the rate was last measured
    rate: float = 0.0  # size per second

    def measure(self, passed_s: float, over_s: float) -> None:
        """Update the rate, `passed_s` after the last time: a mean over about `over_s`."""
        keep = math.exp(-passed_s / over_s)
        self.rate = keep * self.rate + (1 - keep) * self.offered / passed_s
        self.offered = 0.0


@dataclass(eq=False, slots=True)
class Job:
    """One query, its size in the model's unit of cost (tokens), its times on the loop's clock, its future answer."""

    query: Any
    size: float
    enqueued_at: float
    deadline: float
    lane: Lane = field(repr=False)  # a lane's repr lists its jobs
    future: asyncio.Future[Answer]
    running: bool = False
    index: int | None = None  # in its list
    # How many jobs its client may send again once it is answered: a list's last one has all.
    ends_request_of: int = 1

    @property
    def alive(self) -> bool:
        """Whether the client still waits for the answer."""
        return not self.future.done()

    def fail(self, error: Unanswered) -> None:
        """End it with `error` unless it has ended."""
        if self.alive:
            error.index = self.index if error.index is None else error.index
            self.future.set_exception(error)


def expire(jobs: list[Job]) -> None:
    """End with `Late`, at their common deadline, those of `jobs` that have not ended."""
    for job in jobs:
        job.fail(Late(f"no answer within {job.deadline - job.enqueued_at:.3g} s; allow more time"))


def fail_together(jobs: list[Job], ended: asyncio.Future[Answer]) -> None:
    """When one of a list's `jobs` fails, its error ends the others, too."""
    if not ended.cancelled() and isinstance(error := ended.exception(), Unanswered):
        for job in jobs:
            job.fail(error)


class JobQueue:
    """Two lanes that take turns, so neither can shut the other out: each can always have half of the model.

    If one lane is empty, the other gets all of it. Within a lane jobs stay in order. So later requests take at most half of
    the model from an admitted list. Removing a job whose client has left takes O(1).
    """

    def __init__(self) -> None:
        self.singles, self.lists = Lane(), Lane()
        self.turn, self.other = self.singles, self.lists
        self._came = asyncio.Event()

    def __len__(self) -> int:
        return len(self.singles.jobs) + len(self.lists.jobs)

    def __iter__(self) -> Iterator[Job]:
        return itertools.chain(self.singles.jobs, self.lists.jobs)

    @property
    def size(self) -> float:
        return self.singles.size + self.lists.size

    def put(self, job: Job) -> None:
        """Add `job` at the end of its lane."""
        job.lane.jobs[job] = None
        job.lane.size += job.size
        self._came.set()

    def first(self) -> Job:
        """Return the job whose turn it is; there must be one."""
        return next(iter(self.turn.jobs or self.other.jobs))

    def take(self, job: Job) -> None:
        """Remove `job`, the first one; then it's the other lane's turn."""
        self.discard(job)
        if job.lane is self.turn:
            self.turn, self.other = self.other, self.turn

    def discard(self, job: Job) -> None:
        """Remove `job` if it is still in."""
        if job in job.lane.jobs:
            del job.lane.jobs[job]
            job.lane.size -= job.size

    async def not_empty(self) -> None:
        """Wait until a job is in."""
        while not len(self):
            self._came.clear()
            await self._came.wait()
