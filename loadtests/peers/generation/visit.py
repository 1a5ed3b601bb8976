"""One visit of one server that streams texts: its speed, its pace, its goodput, its answers, what it does when readers leave."""

import asyncio
import contextlib
import time
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median

import uvloop

from loadtests.load.token_streams import (
    Connection,
    Goal,
    Readers,
    Stream,
    goodput,
    lengths,
    pace,
    throughput,
)
from loadtests.modes import Server
from loadtests.peers.generation.prompts import NEW, Prompts, count

GOAL = Goal()
USERS = (1, 8, 32, 64)
LOADS = (0.8, 2.0, 5.0)
SPEED_S, WARM_S = 5.0, 1.0
OPEN_S, SKIP_S = 16.0, 8.0
# How long to look whether a server computes for readers who have left.
AFTER_S = 5.0
# Longest wait for a server that still computes for readers who have left.
IDLE_S = 12.0
Row = tuple[str, str, str, str, float]


@dataclass
class Visit:
    """What is the same for all parts, and the rows that it found."""

    server: Server
    readers: Readers
    prompts: Prompts
    name: str
    kind: str
    scale: float = 1.0
    rows: list[Row] = field(default_factory=list)
    # Most tokens per second that it has shown.
    best: float = 0.0

    def note(self, what: str, **values: float) -> None:
        self.rows.extend((self.name, self.kind, what, metric, value) for metric, value in values.items())

    def idle(self) -> None:
        """Wait until the server has done what was left, but not for long: some compute for readers who have gone."""
        with contextlib.suppress(RuntimeError):
            self.server.wait_until_idle(IDLE_S)

    def speed(self, users: tuple[int, ...] = USERS) -> None:
        """Tokens per second of so many readers who ask again and again for texts of 32 to 96 tokens."""
        for n in users:
            self.idle()
            seconds = SPEED_S * self.scale
            began = time.perf_counter()
            streams = uvloop.run(self.readers.closed(n, WARM_S + seconds, self.prompts.short, lengths(n)))
            per_s = throughput(streams, count, began + WARM_S, began + WARM_S + seconds)
            self.note(f"readers {n}", tokens_per_s=per_s, **pace(streams))
            self.best = max(self.best, per_s)

    def alone(self) -> None:
        """The first token of one reader with a short, and with a 400-token prompt."""
        for what, prompts in (("alone", self.prompts.short[:3]), ("alone, 400", self.prompts.huge[:2])):
            streams = [uvloop.run(self.readers.read(prompt, 8)) for prompt in prompts]
            gaps = [gap for stream in streams for gap in stream.gaps_s()]
            self.note(
                what,
                ttft_ms=1000 * median(stream.ttft_s for stream in streams),
                gap_ms=1000 * max(gaps, default=float("nan")),
            )

    def beside(self) -> None:
        """A 400-token prompt joins 8 streams, twice: its first token, and the longest gap of the others meanwhile."""
        self.idle()
        found = [uvloop.run(self._join(prompt)) for prompt in self.prompts.huge[4:6]]
        for i, metric in enumerate(("ttft_ms", "gap_ms", "plain_ms")):
            self.note("beside 8", **{metric: 1000 * median(one[i] for one in found)})

    async def _join(self, prompt: str) -> tuple[float, float, float]:
        others = [await self.readers.begin(short, 160) for short in self.prompts.short[:8]]
        until = time.perf_counter() + 4.0
        while min(len(other.stream.pieces) for other in others) < 8 and time.perf_counter() < until:
            await asyncio.sleep(0.02)
        plain = [gap for other in others for gap in other.stream.gaps_s()[2:]]
        began = time.perf_counter()
        new = await self.readers.read(prompt, 2, patience_s=15.0)
        ended = new.pieces[0][0] if new.pieces else time.perf_counter()
        gaps = [longest_gap(other.stream, began, ended) for other in others]
        await leave(others)
        return new.ttft_s, max(gaps), median(plain) if plain else float("nan")

    def goodput(self, times: float) -> None:
        """Readers come at random times, at so many times what it can write."""
        self.idle()
        capacity_per_s = self.best / 64
        seconds = OPEN_S * self.scale
        began = time.perf_counter()
        streams = uvloop.run(
            self.readers.open(
                times * capacity_per_s, seconds, self.prompts.short, lengths(int(10 * times)), GOAL
            )
        )
        found = goodput(streams, GOAL, began + min(SKIP_S, seconds / 2), began + seconds)
        self.note(f"at {times:g} x", capacity_per_s=capacity_per_s, **found, **pace(streams))

    def answers(self) -> None:
        """How many greedy answers are those of `generate`, asked alone and all at once."""
        expected = self.prompts.answers
        alone = [uvloop.run(self.readers.read(prompt, NEW)) for prompt in list(expected)[::2]]

        async def together() -> list[Stream]:
            return list(await asyncio.gather(*(self.readers.read(prompt, NEW) for prompt in expected)))

        for what, streams in (("answers alone", alone), ("answers together", uvloop.run(together()))):
            equal = sum(stream.text.strip() == expected[stream.prompt].strip() for stream in streams)
            self.note(what, equal=equal, of=len(streams))

    def leaving(self) -> None:
        """Processor seconds that the server spends after its 8 readers have left, each in the middle of 200 tokens."""

        async def run() -> None:
            others = [await self.readers.begin(short, 200) for short in self.prompts.short[:8]]
            await asyncio.sleep(1.0)
            await leave(others)

        self.idle()
        uvloop.run(run())
        before = self.server.cpu_s()
        time.sleep(AFTER_S * self.scale)
        self.note("after 8 left", cpu_s=self.server.cpu_s() - before, of_s=AFTER_S * self.scale)


def longest_gap(stream: Stream, since: float, until: float) -> float:
    """Return the longest time without a piece between these times, in seconds."""
    came = [at for at, _ in stream.pieces]
    at = [
        max((one for one in came if one <= since), default=since),
        *(one for one in came if since < one),
        until,
    ]
    return max(b - a for a, b in pairwise(sorted(at)) if a <= until)


async def leave(connections: list[Connection]) -> None:
    """Close the connections, and wait until they are."""
    for connection in connections:
        connection.leave()
    await asyncio.gather(*(connection.ended.wait() for connection in connections))
