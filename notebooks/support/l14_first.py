"""Lesson 14: readers on the project's scheduler, in simulated time; a long prompt beside others, measured; drafts."""

import random
import time
from collections.abc import Iterable
from collections.abc import Sequence as Many
from dataclasses import dataclass, field
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from lesson import BLUE, GREY, ORANGE
from support.l13_tokens import prompt, read

from workers.generation.estimate import FirstTokenEstimate
from workers.generation.model import TokenModel
from workers.generation.scheduler import Scheduler, Sequence
from workers.generation.step_cost import StepCost
from workers.generation.steps import Options, Token

WHOLE = 100_000  # tokens in a step: all prompts that wait, in one
RULES = {
    "prefill first": {"prefill_first": True},
    "whole prompts": {"step_tokens": WHOLE},
    "budget by time": {},
}


@dataclass
class Reader:
    """Somebody with a prompt, who wants so many tokens and leaves after `stays` of them."""

    came_s: float
    prompt: int
    answer: int
    stays: int = 10**9
    token_s: list[float] = field(default_factory=list)
    predicted_s: float = 0.0  # of the first token, told at the door

    @property
    def ttft_s(self) -> float:
        return self.token_s[0] - self.came_s

    @property
    def gaps_s(self) -> list[float]:
        return [b - a for a, b in zip(self.token_s, self.token_s[1:])]

    def is_good(self, ttft_s: float, gap_s: float) -> bool:
        """Whether it has its first token in time, and each next one."""
        return self.ttft_s <= ttft_s and max(self.gaps_s, default=0.0) <= gap_s


@dataclass
class Run:
    """What became of all readers, how long it took, and how many tokens nobody read."""

    readers: list[Reader]
    seconds: float = 0.0
    unread: int = 0

    def goodput(self, ttft_s: float, gap_s: float) -> float:
        """Good readers per second of the time in which they came."""
        last_s = max(reader.came_s for reader in self.readers)
        return sum(reader.is_good(ttft_s, gap_s) for reader in self.readers) / last_s


def simulate(
    law: Many[float], readers: Iterable[Reader], *, slots: int = 32, notices: bool = True, **rule: Any
) -> Run:
    """Run the project's scheduler on a clock that jumps by what each step takes. `notices`: leaving ends a sequence."""
    run, cost, now = Run(sorted(readers, key=lambda reader: reader.came_s)), StepCost(*law), 0.0
    scheduler = Scheduler(slots, cost, **rule)
    to_come, whose = run.readers[::-1], {}
    while to_come or scheduler.waiting or scheduler.running:
        while to_come and to_come[-1].came_s <= now:
            reader = to_come.pop()
            sequence = Sequence(prompt(reader.prompt, len(to_come)), Options(max_tokens=reader.answer), now)
            reader.predicted_s = (
                now - reader.came_s + FirstTokenEstimate(scheduler, 1.0).first_token_s(reader.prompt)
            )
            whose[sequence] = reader
            scheduler.add(sequence)
        if (step := scheduler.plan(now)) is None:
            now = to_come[-1].came_s
            continue
        now += cost.predict_s(step.work)
        outcomes = [Token(5, 0.0) if row.choice else None for row in step.rows]
        for sequence, _, reason in list(scheduler.advance(step, outcomes)):
            reader = whose[sequence]
            if len(sequence.tokens) <= reader.stays:
                reader.token_s.append(now)
            else:
                run.unread += 1
            if reason or (notices and len(sequence.tokens) >= reader.stays):
                scheduler.end(sequence, reason or "cancelled")
    run.seconds = now
    return run


def crowd(
    per_s: float, seconds: float, *, seed: int = 0, prompt_mean: int = 80, answer_mean: int = 60
) -> list[Reader]:
    """Strangers with prompts and answers of random lengths; one prompt in ten is long, 400 tokens."""
    rng, readers, at_s = random.Random(seed), [], 0.0
    while (at_s := at_s + rng.expovariate(per_s)) < seconds:
        length = 400 if rng.random() < 0.1 else 1 + int(rng.expovariate(1 / prompt_mean)) % 300
        readers.append(Reader(at_s, length, 1 + int(rng.expovariate(1 / answer_mean)) % 400))
    return readers


def draw_gaps(**runs: Run) -> None:
    """A strip for each run: rows are readers, a tick is a token."""
    _, axes = plt.subplots(len(runs), 1, sharex=True, figsize=(6.4, 1.7 * len(runs)))
    for ax, (name, run) in zip(np.atleast_1d(axes), runs.items()):
        for row, reader in enumerate(run.readers):
            color = ORANGE if reader.prompt > 100 else BLUE
            ax.plot(reader.token_s, [row] * len(reader.token_s), "|", color=color, markersize=9)
            ax.plot([reader.came_s, reader.token_s[0]], [row, row], color=GREY, linewidth=1)
        ax.set_title(name.replace("_", " "), fontsize=12)
        ax.set(yticks=[], ylabel="readers")
    axes[-1].set_xlabel("s")
    plt.show()


# --- measured ---------------------------------------------------------------------------------------------------------


def newcomer(
    model: TokenModel, *, tokens: int = 400, readers: int = 8, **rule: Any
) -> tuple[float, float, float]:
    """A prompt of so many tokens joins `readers`: a plain step, the longest step, the newcomer's first token, in ms."""
    scheduler = Scheduler(readers + 1, StepCost(), **({"step_tokens": WHOLE} | rule))
    old = [Sequence(prompt(10, i), Options(200)) for i in range(readers)]
    for sequence in old:
        scheduler.add(sequence)
    while not all(sequence.tokens for sequence in old):
        timed_step(model, scheduler)
    plain = sorted(timed_step(model, scheduler) for _ in range(5))[2]
    new = Sequence(prompt(tokens, 99), Options(2))
    scheduler.add(new)
    steps = []
    while not new.tokens:
        steps.append(timed_step(model, scheduler))
    return plain * 1000, max(steps) * 1000, sum(steps) * 1000


def timed_step(model: TokenModel, scheduler: Scheduler) -> float:
    """Run a step; return its seconds."""
    step = scheduler.plan()
    assert step
    began = time.perf_counter()
    (outcomes,) = model([step.rows])
    seconds = time.perf_counter() - began
    for sequence, _, reason in list(scheduler.advance(step, outcomes)):
        if reason:
            scheduler.end(sequence, reason)
    return seconds


# --- drafts -----------------------------------------------------------------------------------------------------------


def draft_is_right(text: list[int], written: list[int], n: int = 2) -> float:
    """How often the token that followed the last `n` before is the next one again; where there is none it is not."""
    right, ids = 0, list(text)
    for token in written:
        tail = ids[-n:]
        at = next((i for i in range(len(ids) - n - 1, -1, -1) if ids[i : i + n] == tail), None)
        right += at is not None and ids[at + n] == token
        ids.append(token)
    return right / len(written)


@dataclass
class Written:
    """What generate() of Transformers wrote, in how many steps and seconds."""

    ids: list[int]
    steps: int
    seconds: float


@torch.inference_mode()
def write(model: Any, text: list[int], tokens: int, drafted: int = 0) -> Written:
    """Write so many tokens behind a text, greedily; with up to `drafted` looked up in the text so far for each step."""
    steps = []
    hook = model.register_forward_pre_hook(lambda *_: steps.append(1))
    options = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
    if drafted:
        options["prompt_lookup_num_tokens"] = drafted
    began = time.perf_counter()
    ids = model.generate(torch.tensor([text]), attention_mask=torch.ones(1, len(text)), **options)
    seconds = time.perf_counter() - began
    hook.remove()
    return Written(ids[0, len(text) :].tolist(), len(steps), seconds)


def stock() -> Any:
    """The model of lesson 13 as Transformers runs it."""
    torch.set_num_threads(1)
    return read()


@dataclass
class Draft:
    """What look-up drafts brought for one text."""

    p: float  # how often a drafted token is right
    predicted_per_step: float  # tokens
    per_step: float
    gain: float  # times as fast
    is_same: bool  # the text

    def row(self, longer: float) -> dict[str, str]:
        """For a table; a step with drafts takes `longer` times as long as one without."""
        return {
            "p": f"{self.p:.2f}",
            "tokens per step, formula": f"{self.predicted_per_step:.1f}",
            "measured": f"{self.per_step:.1f}",
            "times as fast, formula": f"{self.predicted_per_step / longer:.1f}",
            "gain, measured": f"{self.gain:.1f}",
        }


def with_drafts(model: Any, text: list[int], k: int, tokens: int) -> Draft:
    """Write so many tokens behind a text, without and with drafts of up to k tokens."""
    plain, drafted = write(model, text, tokens), write(model, text, tokens, drafted=k)
    p = draft_is_right(text, plain.ids)
    return Draft(
        p,
        sum(p**i for i in range(k + 1)),
        plain.steps / drafted.steps,
        plain.seconds / drafted.seconds,
        plain.ids == drafted.ids,
    )
