"""Lessons 13 and 12: the project's own language model and scheduler, one step at a time, and lanes to look at."""

import time
from collections.abc import Sequence as Many
from dataclasses import dataclass, field
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from lesson import COLORS, QUICK, quick

from loadtests.modes import ROOT
from workers.generation.model import TokenModel, load
from workers.generation.scheduler import Scheduler, Sequence
from workers.generation.slots import Slots
from workers.generation.step_cost import StepCost
from workers.generation.steps import Choice, Options, Row, Token
from workers.tasks.common.packed import PackedLinear, packable

CHAT = ROOT / "models" / "chat"
IS_CHAT = (CHAT / "config.json").is_file() and not QUICK  # the quick form always takes the tiny model
CONTEXT, SLOTS = 512, 64


def read() -> Any:
    """SmolLM2 where `make chat` has made it, else a tiny model of the same kind with random weights."""
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    if IS_CHAT:
        return AutoModelForCausalLM.from_pretrained(CHAT, dtype=torch.float32).eval()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=384,
        intermediate_size=1024,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
    )
    return LlamaForCausalLM(config).float().eval()


def loaded(slots: int = SLOTS) -> TokenModel:
    """The model as the server loads it, on one thread, with `slots` slots of 512 tokens."""
    torch.set_num_threads(1)
    return load(read, CONTEXT, 8_000_000_000, slots, pack_linears)


def pack_linears(model: Any) -> None:
    """As the server does: weights in the order that the processor likes."""
    for parent, name, linear in packable(model):
        setattr(parent, name, PackedLinear(linear))


def prompt(n: int, salt: int = 0) -> list[int]:
    """A prompt of n tokens; what they say makes no difference to the time."""
    return [(i * 7919 + salt * 104729) % 3900 + 100 for i in range(n)]


def step_ms(model: TokenModel, rows: Many[Row], times: int = 5) -> float:
    """The median time of a step with these rows, in ms."""
    took = []
    for _ in range(times):
        began = time.perf_counter()
        model([list(rows)])
        took.append(time.perf_counter() - began)
    return sorted(took)[times // 2] * 1000


def reading(n: int, slot: int = 0) -> list[Row]:
    """A step that reads a prompt of n tokens and chooses the next one."""
    return [Row(slot, 0, prompt(n), Choice(Options(), 0))]


def writing(sequences: int, at: int) -> list[Row]:
    """A step in which so many sequences get their next token, each with `at` tokens in its slot."""
    return [Row(slot, at, [7 + slot], Choice(Options(), 1)) for slot in range(sequences)]


@dataclass
class Lanes:
    """What each slot did in each step: the number of its sequence, -1 for nothing."""

    steps: list[list[int]] = field(default_factory=list)

    @property
    def busy(self) -> float:
        """The share of the slots' steps in which a token was made."""
        grid = np.array(self.steps)
        return float((grid >= 0).mean())


def static(lengths: Many[int], slots: int) -> Lanes:
    """Batches of as many sequences as there are slots; the next one begins when the longest has ended."""
    lanes = Lanes()
    for first in range(0, len(lengths), slots):
        batch = list(enumerate(lengths[first : first + slots], first))
        for step in range(max(length for _, length in batch)):
            row = [number if step < length else -1 for number, length in batch]
            lanes.steps.append(row + [-1] * (slots - len(row)))
    return lanes


def continuous(lengths: Many[int], slots: int) -> Lanes:
    """The project's scheduler, with a model that takes no time: a slot is free again in the step after an end."""
    scheduler, lanes = Scheduler(slots, StepCost()), Lanes()
    sequences = [Sequence([1], Options(max_tokens=length)) for length in lengths]
    numbers = {id(sequence): i for i, sequence in enumerate(sequences)}
    for sequence in sequences:
        scheduler.add(sequence)
    while step := scheduler.plan():
        row = [-1] * slots
        for sequence in step.sequences:
            row[sequence.slot] = numbers[id(sequence)]
        lanes.steps.append(row)
        for sequence, _, reason in list(scheduler.advance(step, [Token(5, 0.0)] * len(step.rows))):
            if reason:
                scheduler.end(sequence, reason)
    return lanes


def draw(**lanes: Lanes) -> None:
    """A strip for each way: slots as rows, steps from left to right, a colour for each sequence."""
    most = max(len(each.steps) for each in lanes.values())
    _, axes = plt.subplots(len(lanes), 1, sharex=True, figsize=(6.4, 1.9 * len(lanes)))
    for ax, (name, each) in zip(np.atleast_1d(axes), lanes.items()):
        for at, row in enumerate(each.steps):
            for slot, number in enumerate(row):
                if number >= 0:
                    ax.barh(slot, 1, 0.8, at, color=COLORS[number % len(COLORS)])
        ax.set_title(f"{name}: {len(each.steps)} steps, {each.busy:.0%} of the slots at work", fontsize=12)
        ax.set(xlim=(0, most), yticks=[], ylabel="slots")
        ax.grid(visible=False)
    axes[-1].set_xlabel("steps")
    plt.show()


def answer_lengths(n: int, mean: float, seed: int = 3) -> list[int]:
    """Lengths of answers: exponential, as many kinds of waiting are; at least one token."""
    drawn = np.random.default_rng(seed).exponential(mean, n)
    return [max(1, round(length)) for length in drawn]


def write(
    model: TokenModel, text_ids: list[int], tokens: int, *, slot: int = 0, options: Options | None = None
) -> list[int]:
    """What the model writes behind a prompt, alone."""
    return together(model, [text_ids], tokens, options=[options or Options()])[0]


def together(
    model: TokenModel, prompts: list[list[int]], tokens: int, *, options: list[Options]
) -> list[list[int]]:
    """What it writes behind several prompts in one batch."""
    scheduler = Scheduler(max(8, len(prompts)), StepCost(), step_tokens=512)
    scheduler.slots = Slots(min(SLOTS, max(8, len(prompts))))
    sequences = [Sequence(ids, each._replace(max_tokens=tokens)) for ids, each in zip(prompts, options)]
    for sequence in sequences:
        scheduler.add(sequence)
    while step := scheduler.plan():
        (outcomes,) = model([step.rows])
        for sequence, _, reason in list(scheduler.advance(step, outcomes)):
            if reason:
                scheduler.end(sequence, reason)
    return [sequence.tokens for sequence in sequences]


def tokenizer() -> Any:
    """SmolLM2's tokenizer; None for the tiny model, whose tokens mean nothing."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(CHAT) if IS_CHAT else None


def law_of(model: TokenModel) -> StepCost:
    """The law of a step that this model's times give: a + b per prompt token + c per sequence + d per cached token."""
    from workers.generation.scheduler import work

    cost, steps = StepCost(), []
    for rows in (
        writing(1, 8),
        writing(8, 8),
        writing(1, 300),
        writing(8, 300),
        reading(16),
        reading(64),
        reading(256),
        [*writing(8, 40), *reading(64, 9)],
    ):
        steps.append((work(rows), step_ms(model, rows, quick(3, 7)) / 1000))
    cost.warm_up(steps)
    return cost
