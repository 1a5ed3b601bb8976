"""Text generation in the deployment modes that stream, as part of `make compare`, or alone:

    $ python -m loadtests.compare.generation --modes thread gthread-1x8 --out /tmp/results

Each mode is visited once: readers in a closed loop, then twice what it can write. Needs models/chat (`make chat`).
"""

import argparse
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

import pandas as pd
from tqdm import tqdm

from loadtests import arguments, host
from loadtests.compare.run import PARTS, cores
from loadtests.load.token_streams import Readers
from loadtests.modes import MODES, Mode, start
from loadtests.peers.generation.catalogue import CHAT, ours
from loadtests.peers.generation.prompts import Prompts
from loadtests.peers.generation.visit import GOAL, Row, Visit
from loadtests.plan.planner import markdown

STREAMING = ("thread", "inline", "process", "recommended", "asgi", "gthread-1x8", "sync-2", "haproxy-2")
USERS = (8, 32)
COLUMNS = ("mode", "kind", "what", "metric", "value")
TABLES = {
    "Speed": {
        "tokens/s, 8 readers": ("readers 8", "tokens_per_s", 0),
        "tokens/s, 32": ("readers 32", "tokens_per_s", 0),
        "cold start, s": ("start", "first_token_s", 1),
        "memory, MB": ("memory", "mb", 0),
    },
    "Pace with 32 readers, ms": {
        "TTFT p50": ("readers 32", "ttft_p50_ms", 0),
        "TTFT p99": ("readers 32", "ttft_p99_ms", 0),
        "ITL p50": ("readers 32", "itl_p50_ms", 0),
        "ITL p99": ("readers 32", "itl_p99_ms", 0),
    },
    "At 2× its own capacity, texts/s": {
        "capacity": ("at 2 x", "capacity_per_s", 1),
        "offered": ("at 2 x", "offered_per_s", 1),
        "goodput": ("at 2 x", "good_per_s", 1),
        "rejected, share": ("at 2 x", "rejected", 2),
    },
}


def visit(mode: Mode, prompts: Prompts, cpus: set[int], scale: float) -> list[Row]:
    """Start the server in this mode, put its readers on it, stop it."""
    began = time.monotonic()
    with start(mode, ours("").env, cpus=cpus, base=mode.env) as server:
        found = Visit(server, Readers(server.url), prompts, mode.name, "float32", scale)
        found.note("start", first_token_s=time.monotonic() - began)
        found.speed(USERS)
        found.note("memory", mb=server.memory_mb())
        found.readers.headers = (f"Prefer: wait={GOAL.ttft_s:g}",)
        found.goodput(2.0)
    return found.rows


def write(out: Path) -> None:
    """Write generation-modes.md beside its rows."""
    rows = pd.read_csv(out / "generation-modes.csv")
    about: dict[str, Any] = json.loads((out / "generation-modes.json").read_text())
    values = {
        (mode, what, metric): float(value) for mode, _, what, metric, value in rows.itertuples(index=False)
    }
    parts = []
    for title, columns in TABLES.items():
        lines = []
        for mode in dict.fromkeys(rows["mode"]):
            cells = {"mode": mode}
            for column, (what, metric, digits) in columns.items():
                value = values.get((mode, what, metric), math.nan)
                cells[column] = "-" if math.isnan(value) else f"{value:,.{digits}f}"
            lines.append(cells)
        parts.append(f"## {title}\n\n{markdown(lines)}\n")
    (out / "generation-modes.md").write_text(introduction(about) + "\n" + "\n".join(parts))


def introduction(about: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    failed = "".join(f"Failed: {name}: {why}\n" for name, why in about["failed"].items())
    return (
        "# Text generation in the deployment modes\n\n"
        f"`python -m loadtests.compare.generation`, {about['date']}: {about['processor']}, {about['cores']} cores; {about['pinning']}; "
        f"Python {about['python']}, {versions}. SmolLM2-135M-Instruct in float32, `CONTEXT_TOKENS=512`. Each mode was visited once.\n\n"
        "Readers in a closed loop for 5 s ask for 32 to 96 tokens after a prompt of 8 to 12. Then they come at random times, twice as many as the mode "
        f"can serve: goodput counts whole texts whose first token came within {GOAL.ttft_s:g} s and each next piece within {GOAL.itl_s * 1000:g} ms. A sync "
        "worker writes one text at a time, a gthread worker as many as it has threads. At the default of 64 sequences a step is longer than the 200 ms under overload, so goodput is about 0: "
        "`MAX_SEQUENCES=24` holds it on this core. With that, and beside other servers: "
        f"[generation.md](generation.md).\n{failed}"
    )


def main(argv: list[str] | None = None) -> int:
    """Run it; return how many visits failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--quick", action="store_true", help="short runs: shows that it works, measures little"
    )
    parser.add_argument("--modes", nargs="+", choices=STREAMING, default=list(STREAMING), metavar="MODE")
    parser.add_argument("--out", type=Path, help=f"default: loadtests/results, of a part {PARTS}")
    parser.add_argument("--redraw", action="store_true", help="only make the tables again")
    options = parser.parse_args(argv)
    partial = options.quick or options.modes != list(STREAMING)
    out = options.out or (PARTS if partial else Path(__file__).parents[1] / "results")
    if options.redraw:
        write(out)
        return 0
    if not (CHAT / "config.json").exists():
        parser.error("there is no models/chat; `make chat` makes it")
    out.mkdir(parents=True, exist_ok=True)
    server_cpus, client_cpus = cores(1)
    about: dict[str, Any] = host.describe() | {
        "pinning": f"server on core {sorted(server_cpus)}, clients on core {sorted(client_cpus)}",
        "failed": {},
    }
    prompts, rows, had = Prompts.made(), [], os.sched_getaffinity(0)
    os.sched_setaffinity(0, client_cpus)
    for name in (progress := tqdm(options.modes, unit="visit", file=sys.stderr)):
        progress.set_description(name)
        try:
            rows += visit(MODES[name], prompts, server_cpus, 0.3 if options.quick else 1.0)
        except (RuntimeError, OSError) as exc:
            about["failed"][name] = str(exc).splitlines()[0]
            progress.write(f"{name} failed: {exc}")
        pd.DataFrame(rows, columns=COLUMNS).to_csv(out / "generation-modes.csv", index=False)
        (out / "generation-modes.json").write_text(json.dumps(about, indent=1) + "\n")
    os.sched_setaffinity(0, had)
    write(out)
    print((out / "generation-modes.md").read_text())
    return len(about["failed"])


if __name__ == "__main__":
    arguments.run(main)
