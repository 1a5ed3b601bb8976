"""The generation part of `make bench`: the model's steps on one core, then what the token loop and HTTP take beside them.

    python -m loadtests.bench.generation [--model models/chat] [--dtype float32 bfloat16] [--quick]

Prints Markdown: tokens per second by sequences at once and what the machine allows, prefill, what a 400-token prompt does to
8 running streams at several step budgets, and memory. Times are CPU time of one thread: other programs on the machine change
them little.
"""

import argparse
import asyncio
import contextlib
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from loadtests import arguments
from loadtests.bench.overhead import CLIENT_CPU, SERVER_CPU
from loadtests.load.raw_client import on_core
from loadtests.load.token_streams import Readers
from loadtests.modes import MODES, start
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
TEXT = 64
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

    clock = staticmethod(time.process_time)

    def __init__(self, model: TokenModel, step_tokens: int) -> None:
        self.model, self.cost = model, StepCost()
        self.scheduler = Scheduler(SLOTS, self.cost, step_tokens)

    def step(self) -> float:
        """Run a step; return its seconds on the clock: CPU time."""
        step = self.scheduler.plan()
        assert step
        began = self.clock()
        (outcomes,) = self.model([step.rows])
        seconds = self.clock() - began
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


async def overhead(model: TokenModel, n: int) -> tuple[float, float]:
    """With n streams that are read: CPU seconds per token, and the share of it that the loop takes beside the model."""
    in_model, tokens = 0.0, 0

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
        nonlocal tokens
        async for _ in loop.submit(prompt(10, index), Options(TEXT)):
            tokens += 1

    began, in_model = time.process_time(), 0.0
    await asyncio.gather(*map(read, range(n)))
    whole = time.process_time() - began
    consumer.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await consumer
    return whole / tokens, 1 - in_model / whole


def over_http(model: str, dtype: str, n: int) -> float:
    """CPU seconds per token of a whole server, with n readers of as long texts over HTTP; they have another core, if there is one."""
    env = {"TASK": "text-generation", "MODEL": model, "DTYPE": dtype, "TORCH_THREADS": "1"}
    limits = {"CONTEXT_TOKENS": str(CONTEXT), "MAX_SEQUENCES": str(SLOTS)}
    with start(MODES["thread"], env | limits, cpus={SERVER_CPU}) as server:
        # The second time is measured.
        for _ in range(2):
            server.wait_until_idle()
            before = server.cpu_s()
            tokens = on_core(CLIENT_CPU, read_all(server.url, n))
        return (server.cpu_s() - before) / tokens


async def read_all(url: str, n: int) -> int:
    """Read n texts at once; return how many tokens they have."""
    readers = Readers(url, fields={"ignore_eos": True})
    each = (readers.read(f"Number {i}: Paris is the capital of", TEXT) for i in range(n))
    streams = await asyncio.gather(*each)
    if not all(stream.is_whole for stream in streams):
        raise RuntimeError("a text did not come to its end")
    return n * TEXT


def parameters(model: str) -> int:
    """How many numbers a step reads: all of the model's."""
    with torch.device("meta"):
        return int(AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model)).num_parameters())


def reading_speed() -> float:
    """Bytes per second of one core that reads 512 MB in a row."""
    memory = torch.ones(1 << 27)
    return memory.nbytes / min(cpu_s(memory.sum) for _ in range(5))


def matrix_speed(dtype: torch.dtype) -> float:
    """Floating point operations per second of a packed product: 64 rows, the shape of this model's largest layers."""
    rows = torch.ones(64, 576, dtype=dtype)
    weight = torch.ops.mkldnn._reorder_linear_weight(torch.ones(1536, 576, dtype=dtype))
    product = partial(torch.ops.mkldnn._linear_pointwise, rows, weight, None, "none", [], "")
    return 2 * 64 * 576 * 1536 / min(cpu_s(lambda: [product() for _ in range(50)]) / 50 for _ in range(5))


def cpu_s(function: Callable[[], Any]) -> float:
    began = time.process_time()
    function()
    return time.process_time() - began


def report(model: str, dtype: str, sequences: tuple[int, ...], line: Callable[[str], None]) -> None:
    made = loaded(model, dtype)
    line(f"\n{dtype}: {made.description}\n")
    speeds, sampled = ([decode(made, n, how) for n in sequences] for how in (GREEDY, SAMPLED))
    line("| sequences | " + " | ".join(map(str, sequences)) + " | prefill of 400 |")
    line("|---|" + "---|" * (len(sequences) + 1))
    line("| tokens/s | " + " | ".join(f"{speed:.0f}" for speed in speeds) + f" | {prefill(made, 400):.0f} |")
    line("| sampled, top_p 0.95 | " + " | ".join(f"{speed:.0f}" for speed in sampled) + " | |")
    numbers, type_ = parameters(model), getattr(torch, dtype)
    most = {1: reading_speed() / numbers / type_.itemsize, 64: matrix_speed(type_) / numbers / 2}
    for n, per_s in most.items():
        if n in sequences:
            what = (
                "reads memory" if n == 1 else "multiplies 64 rows by packed matrices that stay in its cache"
            )
            share = speeds[sequences.index(n)] / per_s
            line(
                f"\n{n} at once: {share:.0%} of the {per_s:,.0f} tokens/s that the core allows, as it {what}."
            )
    law = asyncio.run(law_of(made))
    line(
        f"\nA step takes {law[0] * 1e3:.1f} ms + {law[1] * 1e3:.2f} per prompt token + {law[2] * 1e3:.2f} per sequence."
    )
    n = min(32, sequences[-1])
    in_loop_s, share = asyncio.run(overhead(made, n))
    whole_s = over_http(model, dtype, n)
    line(
        f"With {n} sequences the loop takes {share:.1%} of a step, and HTTP {1 - in_loop_s / whole_s:.1%} of the server's CPU time "
        f"({whole_s * 1e3:.2f} ms per token, {in_loop_s * 1e3:.2f} without HTTP)."
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
