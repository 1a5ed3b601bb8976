"""How many sequences at once, and what readers see of it: the real token loop on a virtual clock.

    $ TASK=text-generation MODEL=models/chat make plan
    $ TASK=text-generation MODEL=models/chat make plan PLAN="--rate 0.5 --prompt-tokens 400 --ttft-ms 2000"

The cost law of a step is measured as the server does it at its warm-up; HTTP is not in it. TTFT: time to first token, from
the request on. ITL: inter-token latency, from one token of a reader to the next.
"""

import argparse
import asyncio
import copy
import math
import os
import random
import sys
from collections.abc import Coroutine
from dataclasses import dataclass, field
from itertools import count, pairwise
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from loadtests import arguments
from loadtests.arguments import above
from loadtests.plan.planner import VirtualClock, markdown, poisson
from workers import tasks
from workers.errors import Unanswered
from workers.generation.scheduler import work
from workers.generation.step_cost import StepCost
from workers.generation.steps import Limits, Options, Outcome, Row, Token
from workers.generation.token_loop import TokenLoop
from workers.offload import Inline
from workers.settings import Settings

SEQUENCES = (1, 2, 4, 8, 16, 32, 64)
SHOWN = (1, 4, 16, 64)
MORE, END = 0, 1  # what the formula generates: another token, and the last one
SHORTEST = 4  # tokens


class Texts(NamedTuple):
    """Exponential lengths with these means, in tokens, as far as `capacity` allows; clients ask for `most` new ones at most."""

    prompt: int
    answer: int
    capacity: int

    @property
    def most(self) -> int:
        return min(3 * self.answer, self.capacity - SHORTEST)

    def draw(self, rng: random.Random) -> tuple[int, int]:
        """Return the length of one prompt, and of its answer."""
        prompt, answer = (round(rng.expovariate(1 / mean)) for mean in (self.prompt, self.answer))
        return min(max(prompt, SHORTEST), self.capacity - self.most), min(max(answer, SHORTEST), self.most)


@dataclass
class Seen:
    """What readers saw, in seconds, and how many were rejected or too late."""

    first_s: list[float] = field(default_factory=list)
    gaps_s: list[float] = field(default_factory=list)
    tokens: int = 0
    answers: int = 0
    unanswered: int = 0
    ended_s: float = 0.0

    @property
    def answered(self) -> float:
        """The share of the requests that got their text."""
        return self.answers / max(1, self.answers + self.unanswered)

    def p_ms(self, share: float) -> tuple[float, float]:
        """TTFT and ITL that this share of them is below, in milliseconds; inf where there is none."""
        first, gap = (
            float(np.quantile(times, share)) if times else math.inf for times in (self.first_s, self.gaps_s)
        )
        return 1000 * first, 1000 * gap

    @property
    def cell(self) -> str:
        """TTFT p50 / p99 and ITL p50 / p99."""
        if self.answered < 0.95:
            return "overloaded"
        (first, gap), (first_99, gap_99) = self.p_ms(0.5), self.p_ms(0.99)
        return f"{first:.0f} / {first_99:.0f}, {gap:.0f} / {gap_99:.0f}"


def measure(settings: Settings) -> tuple[StepCost, Limits]:
    """Return the cost law of a step of the real model, and what it has room for."""

    async def warm_up() -> TokenLoop:
        place = Inline(lambda: tasks.make(settings).load(0))
        await place.start()
        loop = TokenLoop(step_tokens=settings.STEP_TOKENS)
        await loop.warm_up(place.run)
        return loop

    loop = asyncio.run(warm_up())
    return loop.cost_model, loop.limits


@dataclass
class Setting:
    """MAX_SEQUENCES=`sequences`; a step costs what `cost` says."""

    cost: StepCost
    sequences: int
    texts: Texts
    step_tokens: int = 0
    deadline_s: float = 10.0

    def at_rate(self, rate_per_s: float, requests: int) -> Seen:
        """Return what readers see who come by a Poisson process of this rate."""

        async def traffic(loop: TokenLoop, seen: Seen) -> None:
            rng = random.Random(0)
            async with asyncio.TaskGroup() as readers:
                for number, due_s in enumerate(poisson(rng, rate_per_s, requests / rate_per_s)):
                    await asyncio.sleep(due_s - loop.now())
                    readers.create_task(self._read(loop, seen, number, *self.texts.draw(rng)))

        return self._run(traffic)

    def at_most(self, requests: int) -> Seen:
        """Return what it can do: one reader more than it has places for, who each ask again at once."""

        async def traffic(loop: TokenLoop, seen: Seen) -> None:
            rng, numbers = random.Random(0), count()

            async def reader() -> None:
                while (number := next(numbers)) < requests + self.sequences:
                    await self._read(loop, seen, number, *self.texts.draw(rng))

            await asyncio.gather(*(reader() for _ in range(self.sequences + 1)))

        return self._run(traffic, deadline_s=1e6)

    def _run(self, traffic: Any, deadline_s: float | None = None) -> Seen:
        limits, seen = Limits(self.sequences, self.texts.capacity), Seen()

        async def model(contents: list[Any]) -> list[Any]:
            (rows,) = contents
            if rows is None:
                return [limits]
            await asyncio.sleep(self.cost.predict_s(work(rows)))
            return [[outcome(row) for row in rows]]

        async def simulation() -> None:
            budget_s, cost = deadline_s or self.deadline_s, copy.copy(self.cost)
            loop = TokenLoop(step_tokens=self.step_tokens, budget_s=budget_s, cost_model=cost)
            loop.set_limits(limits)
            consumer = asyncio.create_task(loop.consume(model))
            await asyncio.sleep(0)
            await traffic(loop, seen)
            seen.ended_s = loop.now()
            consumer.cancel()
            await asyncio.gather(consumer, return_exceptions=True)

        run(simulation())
        return seen

    async def _read(self, loop: TokenLoop, seen: Seen, number: int, prompt: int, answer: int) -> None:
        """One request: read its text to the end, and note when each token came."""
        came_at = [loop.now()]
        # The formula reads the answer's length in the seed. Prompts that begin alike would share what is in a slot.
        options = Options(self.texts.most, seed=answer, end_ids=frozenset([END]))
        try:
            async for piece in loop.submit([number, *[MORE] * (prompt - 1)], options):
                came_at += [loop.now()] * len(piece.tokens)
        except Unanswered:
            seen.unanswered += 1
            return
        seen.answers += 1
        seen.tokens += len(came_at) - 1
        seen.first_s.append(came_at[1] - came_at[0])
        seen.gaps_s += [b - a for a, b in pairwise(came_at[1:])]


def run(simulation: Coroutine[Any, Any, None]) -> None:
    """Run it to its end on a virtual clock."""
    with asyncio.Runner(loop_factory=VirtualClock) as runner:
        runner.run(simulation)


def outcome(row: Row) -> Outcome:
    """What the formula makes of a row: a token once its prompt is read, the last one after as many as the answer has."""
    if not row.choice:
        return None
    return Token(END if row.choice.generated + 1 >= row.choice.options.seed else MORE, 0.0)


def recommend(
    choices: list[Setting], rate_per_s: float, ttft_ms: float, itl_ms: float, requests: int
) -> tuple[Setting, Seen] | None:
    """Return the first of `choices` that answers 99 % with p99 of TTFT and ITL below these; None where none does."""
    for choice in tqdm(choices, "Looking for the fewest sequences", delay=2.0, leave=False, disable=None):
        seen = choice.at_rate(rate_per_s, requests)
        first_ms, gap_ms = seen.p_ms(0.99)
        if seen.answered >= 0.99 and first_ms <= ttft_ms and gap_ms <= itl_ms:
            return choice, seen
    return None


def table(choices: list[Setting], requests: int) -> tuple[str, float]:
    """Return the predictions as Markdown, and the answers per second of the best of `choices`."""
    bounds = [
        choice.at_most(requests)
        for choice in tqdm(choices, "Simulating", delay=2.0, leave=False, disable=None)
    ]
    best = max(seen.answers / seen.ended_s for seen in bounds)
    rates = [best * share for share in (0.25, 0.5, 0.8)]
    rows = []
    for choice, most in zip(
        tqdm(choices, "Simulating", delay=2.0, leave=False, disable=None), bounds, strict=True
    ):
        row = {
            "sequences": str(choice.sequences),
            "answers/s": f"{most.answers / most.ended_s:.2f}",
            "tokens/s": f"{most.tokens / most.ended_s:.0f}",
        }
        rows.append(row | {f"at {rate:.2f}/s": choice.at_rate(rate, requests).cell for rate in rates})
    return markdown(rows), best


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--rate", type=above(0.0), help="requests per second to plan for; default: half of the most"
    )
    parser.add_argument(
        "--prompt-tokens", type=above(0, int), default=128, help="of a prompt on average; default 128"
    )
    parser.add_argument(
        "--answer-tokens", type=above(0, int), default=128, help="of an answer on average; default 128"
    )
    parser.add_argument(
        "--ttft-ms", type=above(0.0), default=1000.0, help="p99 of the time to first token to keep"
    )
    parser.add_argument(
        "--itl-ms", type=above(0.0), default=200.0, help="p99 of the time between two tokens to keep"
    )
    parser.add_argument("--limit-s", type=above(0.0), default=10.0, help="DEADLINE_S: until the first token")
    parser.add_argument("--quick", action="store_true", help="simulate less")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Measure the law of a step, then print what to expect and what to set."""
    options, settings = parse(argv), Settings.read()
    requests, name = 60 if options.quick else 300, os.path.basename(settings.MODEL)
    print(f"Measuring a step of {name}, some seconds ...", flush=True)
    try:
        cost, limits = measure(settings)
    except Exception as exc:  # of the model, whatever it is: the server's own log says more
        print(f"{name} can't be measured as TASK={settings.TASK}: {exc}", file=sys.stderr)
        return 2
    texts = Texts(options.prompt_tokens, options.answer_tokens, limits.capacity)
    if options.prompt_tokens + options.answer_tokens > limits.capacity - SHORTEST:
        print(
            f"Prompt and answer have room for {limits.capacity} tokens together: CONTEXT_TOKENS.",
            file=sys.stderr,
        )
        return 2  # fmt: skip
    a, b, c, d = (1000 * term for term in cost.law)
    print(
        f"\nA step takes {a:.2f} ms + {b:.3f} ms per prompt token + {c:.3f} ms per sequence + {d * 1000:.3f} ms per 1,000 "
        f"tokens in the cache. There is room for {limits.slots} sequences of {limits.capacity} tokens.\n"
    )
    sequences = sorted({n for n in SEQUENCES if n < limits.slots} | {limits.slots})
    choices = [Setting(cost, n, texts, settings.STEP_TOKENS, options.limit_s) for n in sequences]
    shown = [choice for choice in choices if choice.sequences in (*SHOWN, limits.slots)]
    print("TTFT p50 / p99, ITL p50 / p99 in ms, predicted by the real token loop on a virtual clock:\n")
    lines, best = table(shown, requests)
    rate = options.rate or best / 2
    print(
        f"{lines}\n\nFor {rate:.2f} requests per second with p99 of TTFT below {options.ttft_ms:g} ms and of ITL below "
        f"{options.itl_ms:g} ms:",
        end=" ",
        flush=True,
    )
    if not (found := recommend(choices, rate, options.ttft_ms, options.itl_ms, requests)):
        print("no number of sequences does that; ask less of it, or take a faster model or machine.")
        return 1
    choice, seen = found
    print(
        f"\n\n    MAX_SEQUENCES={choice.sequences} DEADLINE_S={options.limit_s:g}\n\n"
        f"    predicted: {seen.cell}; {seen.tokens / seen.ended_s:.0f} tokens per second"
    )
    return 0


if __name__ == "__main__":
    arguments.run(main)
