"""Text generation beside other servers: the same weights, the same prompts, one core: part of `make peers`, or alone:

    $ python -m loadtests.peers.generation --kinds float32
    $ python -m loadtests.peers.generation --quick --servers litserve --out /tmp/results

Needs models/chat (`make chat`). Each server runs in an environment of its own, at its best setting; see catalogue.py.
What can't be installed or started is named in the page; the others go on.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pandas as pd
from tqdm import tqdm

from loadtests import arguments, host
from loadtests.bench.overhead import CLIENT_CPU, SERVER_CPU
from loadtests.load.token_streams import Readers
from loadtests.modes import ROOT, Server, start
from loadtests.peers.catalogue import CACHE
from loadtests.peers.environments import NotInstalled, prepare, requirements
from loadtests.peers.generation import report
from loadtests.peers.generation.catalogue import CHAT, GGUF, WRITERS, Writer
from loadtests.peers.generation.prompts import Prompts
from loadtests.peers.generation.visit import LOADS, USERS, Visit
from loadtests.peers.visit import reason

KINDS = ("float32", "bfloat16", "Q8_0")
START_S = 180.0


def visit(writer: Writer, kind: str, prompts: Prompts, scale: float) -> Visit:
    """Start the server, measure it, end it."""
    began = time.monotonic()
    with start(writer.of(kind), writer.settings(kind), cpus={SERVER_CPU}, wait=False) as server:
        readers = Readers(server.url, writer.model)
        wait_for_first_token(server, readers)
        started_s = time.monotonic() - began
        found = Visit(server, readers, prompts, writer.name, kind, scale)
        found.note("start", first_token_s=started_s)
        measure(found, writer, USERS if scale == 1.0 else USERS[:2])
    return found


def measure(found: Visit, writer: Writer, users: tuple[int, ...]) -> None:
    """All that the tables show. What leaves work behind comes last: some servers compute for readers who have gone."""
    if writer.is_paced:
        found.speed(users[-2:-1])
        # Of this server; the others ignore it.
        found.readers.headers = ("Prefer: wait=1",)
        for times in LOADS:
            found.goodput(times)
        return
    found.answers()
    found.alone()
    found.speed(users[:1] if writer.is_serial else users)
    found.note("memory", mb=found.server.memory_mb())
    found.beside()
    found.leaving()


def wait_for_first_token(server: Server, readers: Readers) -> None:
    """Ask until a text comes. Raises RuntimeError with the log's reason when none does."""
    import uvloop

    until = time.monotonic() + START_S
    while time.monotonic() < until and server.process.poll() is None:
        if uvloop.run(readers.read("Paris is the capital of", 4)).is_whole:
            return
        time.sleep(0.1)
    raise RuntimeError(f"it wrote nothing: {reason(server.log())}")


def install(writers: list[Writer], about: dict[str, Any]) -> list[Writer]:
    """Make the environments and GGUF files; return the servers that have what they need, and note why others have not."""
    ready = []
    for writer in (progress := tqdm(writers, unit="environment", file=sys.stderr)):
        progress.set_description(writer.needs or "our own")
        try:
            if writer.needs:
                prepare(writer.needs, tuple(requirements(writer)))
            if writer.gguf and not (GGUF / "Q8_0.gguf").exists():
                command = [str(writer.python), "-m", "loadtests.peers.generation.gguf_files", str(GGUF)]
                subprocess.run(command, cwd=ROOT, check=True)
            ready.append(writer)
        except (NotInstalled, OSError, subprocess.SubprocessError) as exc:
            about["failed"][writer.name] = f"not installed: {exc}"
    return ready


def save(out: Path, rows: pd.DataFrame, about: dict[str, Any]) -> None:
    """Write all after every visit: an interrupted run is not lost."""
    rows = rows.assign(
        value=rows["value"].map(lambda value: float(f"{value:.4g}") if math.isfinite(value) else value)
    )
    rows.to_csv(out / "generation.csv", index=False)
    (out / "generation.json").write_text(json.dumps(about, indent=1) + "\n")


def main(argv: list[str] | None = None) -> int:
    """Run it; return how many visits failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--quick", action="store_true", help="short runs: shows that it works, measures little"
    )
    parser.add_argument("--servers", nargs="+", choices=WRITERS, default=list(WRITERS), metavar="SERVER")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), metavar="KIND")
    parser.add_argument(
        "--add", action="store_true", help="put these visits among the results that are there"
    )
    parser.add_argument("--out", type=Path, help="folder for the results; only a whole run has a default")
    parser.add_argument("--redraw", action="store_true", help="only make the tables again")
    options = parser.parse_args(argv)
    whole = options.servers == list(WRITERS) and options.kinds == list(KINDS) and not options.quick
    out = options.out or (
        ROOT / "loadtests" / "results" if whole or options.add or options.redraw else CACHE / "results"
    )
    if options.redraw:
        report.write(out)
        return 0
    if not (CHAT / "config.json").exists():
        parser.error("there is no models/chat; `make chat` makes it")
    out.mkdir(parents=True, exist_ok=True)
    CACHE.mkdir(exist_ok=True)
    about: dict[str, Any] = {
        **host.describe(),
        "pinning": f"server on core {SERVER_CPU}, clients on core {CLIENT_CPU}",
        "failed": {},
    }
    columns = ["server", "kind", "what", "metric", "value"]
    rows = pd.DataFrame(columns=columns)
    visits = [
        (WRITERS[name], kind)
        for kind in options.kinds
        for name in options.servers
        if kind in WRITERS[name].kinds
    ]
    if options.add:
        rows = pd.read_csv(out / "generation.csv")
        about["failed"] = json.loads((out / "generation.json").read_text())["failed"]
        again = {(writer.name, kind) for writer, kind in visits}
        rows = rows[[pair not in again for pair in zip(rows["server"], rows["kind"], strict=True)]]
    ready = install([WRITERS[name] for name in options.servers], about)
    prompts = Prompts.made()
    had = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {CLIENT_CPU})
    for writer, kind in (
        progress := tqdm([one for one in visits if one[0] in ready], unit="visit", file=sys.stderr)
    ):
        progress.set_description(f"{writer.name}, {kind}")
        about["failed"].pop(f"{writer.name}, {kind}", None)
        try:
            found = visit(writer, kind, prompts, 0.3 if options.quick else 1.0)
            rows = pd.concat([rows, pd.DataFrame(found.rows, columns=columns)], ignore_index=True)
        except (RuntimeError, OSError) as exc:
            about["failed"][f"{writer.name}, {kind}"] = str(exc)
            progress.write(f"{writer.name}, {kind} failed: {exc}")
        save(out, rows, about)
    os.sched_setaffinity(0, had)
    report.write(out)
    print((out / "generation.md").read_text())
    return len(about["failed"])


if __name__ == "__main__":
    arguments.run(main)
