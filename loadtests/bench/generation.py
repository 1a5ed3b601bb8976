"""The generation part of `make bench`: the token loop's model half on one core, without a server.

    python -m loadtests.bench.generation [--model models/chat] [--dtype float32 bfloat16] [--quick]

Prints Markdown: tokens per second by sequences at once, prefill, what a 400-token prompt does to 8 running streams at several
step budgets, and memory. Times are CPU time of one thread: other programs on the machine change them little.
"""

import argparse
import asyncio
import contextlib
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from loadtests import arguments
from workers import resources
from workers.generation.model import TokenModel
from workers.generation.scheduler import Scheduler, Sequence
from workers.generation.step_cost import StepCost
from workers.generation.steps import Options
from workers.generation.token_loop import TokenLoop
from workers.offload import Inline
from workers.settings import HERE, Settings
from workers.tasks.text_generation import Task

CONTEXT, SLOTS = 512, 64
STEPS = 20
BUDGETS = (512, 256, 128, 64, 40, 24, 0)
GREEDY = Options(CONTEXT - 10)
SAMPLED = Options(CONTEXT - 10, temperature=0.8, top_p=0.95)


def prompt(n: int, salt: int = 0) -> list[int]:
    """A prompt of n tokens; what they say makes no difference to the time."""
    return [(i * 7919 + salt * 104729) % 40_000 + 100 for i in range(n)]


def loaded(model: str, dtype: str, fast: bool = True) -> TokenModel:
    settings = Settings(
        MODEL=model,
        TASK="text-generation",
        DTYPE=dtype,
        TORCH_THREADS=1,
        CONTEXT_TOKENS=CONTEXT,
        MAX_SEQUENCES=SLOTS,
        KV_CACHE_MB=4000,
    )
    return Task(settings).load(0)


class Stepper:
    """A scheduler that runs the model step by step."""

    def __init__(self, model: TokenModel, step_tokens: int) -> None:
        self.model, self.cost = model, StepCost()
        self.scheduler = Scheduler(SLOTS, self.cost, step_tokens)

    def step(self) -> float:
        """Run a step; return its CPU seconds."""
        step = self.scheduler.plan()
        assert step
        began = time.process_time()
        (outcomes,) = self.model([step.rows])
        seconds = time.process_time() - began
        if any(self.cost.law):
            self.cost.observe(step.work, seconds)
        for sequence, _, reason in list(self.scheduler.advance(step, outcomes)):
            if reason:
                self.scheduler.end(sequence, reason)
        return seconds

    def start(self, n: int, length: int, options: Options) -> list[Sequence]:
        """Add n sequences and read their prompts."""
        sequences = [Sequence(prompt(length, i), options._replace(seed=i)) for i in range(n)]
        for sequence in sequences:
            self.scheduler.add(sequence)
        while not all(sequence.tokens for sequence in sequences):
            self.step()
        return sequences


def decode(model: TokenModel, n: int, options: Options = GREEDY) -> float:
    """Tokens per second of n sequences."""
    stepper = Stepper(model, 512)
    stepper.start(n, 10, options)
    for _ in range(3):
        stepper.step()
    return n / statistics.median(stepper.step() for _ in range(STEPS))


def prefill(model: TokenModel, n: int) -> float:
    """Prompt tokens per second of one prompt that is alone, in the steps that the scheduler makes."""
    times = []
    for salt in range(3):
        stepper = Stepper(model, 0)
        sequence = Sequence(prompt(n, salt), Options(2))
        stepper.scheduler.add(sequence)
        seconds = 0.0
        while not sequence.tokens:
            seconds += stepper.step()
        times.append(seconds)
    return n / min(times[1:])


def beside(model: TokenModel, budget: int, law: list[float]) -> tuple[float, float, float]:
    """A 400-token prompt joins 8 streams: a plain step, the longest gap, the newcomer's first token, in ms."""
    found = []
    for salt in range(3):
        stepper = Stepper(model, budget or 512)
        stepper.start(8, 10, GREEDY._replace(max_tokens=200))
        plain = statistics.median(stepper.step() for _ in range(STEPS))
        stepper.cost.law, stepper.scheduler.step_tokens = law[:], budget
        new = Sequence(prompt(400, salt + 9), Options(2))
        stepper.scheduler.add(new)
        steps = []
        while not new.tokens:
            steps.append(stepper.step())
        found.append((plain * 1e3, max(steps) * 1e3, sum(steps) * 1e3))
    plain, gap, first = (statistics.median(each[i] for each in found[1:]) for i in range(3))
    return plain, gap, first


async def law_of(model: TokenModel) -> list[float]:
    """The cost law that the token loop finds at its warm-up."""
    place = Inline(lambda: model)
    await place.start()
    loop = TokenLoop(now=time.process_time)
    await loop.warm_up(place.run)
    return loop.cost_model.law


async def overhead(model: TokenModel, n: int) -> float:
    """What share of a step the loop takes beside the model, with n streams that are read."""
    in_model = 0.0

    async def run(contents: list[Any]) -> list[Any]:
        nonlocal in_model
        began = time.process_time()
        answers = model(contents)
        in_model += time.process_time() - began
        return answers

    loop = TokenLoop(budget_s=1000)
    await loop.warm_up(run)
    consumer = asyncio.create_task(loop.consume(run))
    await asyncio.sleep(0)

    async def read(index: int) -> None:
        async for _ in loop.submit(prompt(10, index), Options(64)):
            pass

    began, in_model = time.process_time(), 0.0
    await asyncio.gather(*map(read, range(n)))
    whole = time.process_time() - began
    consumer.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await consumer
    return 1 - in_model / whole


def report(model: str, dtype: str, sequences: tuple[int, ...], line: Callable[[str], None]) -> None:
    made = loaded(model, dtype)
    line(f"\n{dtype}: {made.description}\n")
    speeds, sampled = ([decode(made, n, how) for n in sequences] for how in (GREEDY, SAMPLED))
    line("| sequences | " + " | ".join(map(str, sequences)) + " | prefill of 400 |")
    line("|---|" + "---|" * (len(sequences) + 1))
    line("| tokens/s | " + " | ".join(f"{speed:.0f}" for speed in speeds) + f" | {prefill(made, 400):.0f} |")
    line("| sampled, top_p 0.95 | " + " | ".join(f"{speed:.0f}" for speed in sampled) + " | |")
    law = asyncio.run(law_of(made))
    line(
        f"\nA step takes {law[0] * 1e3:.1f} ms + {law[1] * 1e3:.2f} per prompt token + {law[2] * 1e3:.2f} per sequence."
    )
    line(
        f"The loop itself takes {asyncio.run(overhead(made, min(32, sequences[-1]))):.1%} of a step with 32 sequences."
    )
    line(
        "\n| tokens per step | plain step, ms | longest gap, ms | first token of 400, ms |\n|---|---|---|---|"
    )
    for budget in BUDGETS:
        plain, gap, first = beside(made, budget, law)
        line(f"| {budget or 'default'} | {plain:.0f} | {gap:.0f} | {first:.0f} |")
    line(f"\n{resources.resident_bytes([os.getpid()]) / 1e6:.0f} MB, the KV cache above included")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default=str(HERE / "models" / "chat"))
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    if not Path(options.model).is_dir():
        raise SystemExit(
            f"there is no {options.model}; `python models/chat.py` makes it, or name another --model"
        )
    torch.set_num_threads(1)
    for dtype in options.dtype:
        report(
            options.model,
            dtype,
            (1, 8) if options.quick else (1, 8, 32, 64),
            lambda text: print(text, flush=True),
        )


if __name__ == "__main__":
    arguments.run(main)
