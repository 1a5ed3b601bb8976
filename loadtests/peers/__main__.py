"""This server and what people would pick instead, by the same load on the same core: `make peers`, or some of them:

    $ make peers PEERS="litserve mosec"
    $ python -m loadtests.peers --quick --peers fastapi-def --out /tmp/results

Each peer runs as its own documentation has it, see the file in `loadtests/peers/`, with the stock pipeline and one thread.
Peers take turns, round after round. What can't be installed or started is told in its row; the others go on.
"""

import argparse
import json
import os
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
from tqdm import tqdm

from loadtests import arguments, host
from loadtests.bench.overhead import CLIENT_CPU, SERVER_CPU
from loadtests.load import expected, generator
from loadtests.peers import report
from loadtests.peers.catalogue import CACHE, LAWS, MODEL, OURS, PEERS, Peer, embedding_model
from loadtests.peers.environments import NotInstalled, installed_mb, lines_of_code, prepare, requirements
from loadtests.peers.failures import Failures
from loadtests.peers.visit import LIMIT_S, TIMEOUT_S, USERS, Row, Visit, running

ROUNDS = {"float32": 3, "bfloat16": 2, "instant": 2, "flat": 1, "gpu-like": 1, "embeddings": 2, "tricks": 1}
# Seconds of a visit, start and end included, as seen on two cores of a Xeon.
VISIT_S = {
    "float32": 40.0,
    "bfloat16": 15.0,
    "instant": 8.0,
    "flat": 18.0,
    "gpu-like": 18.0,
    "embeddings": 20.0,
    "tricks": 25.0,
}
OURS_WITH_PEERS = [name for name in PEERS if name.startswith(OURS)]


@dataclass
class Run:
    """What is the same for all visits, and all that was found."""

    out: Path
    scale: float
    locust: generator.Generator
    server_cpus: set[int]
    client_cpus: set[int]
    expected: dict[str, str]
    about: dict[str, Any]
    rows: list[Row] = field(default_factory=list)

    def visit(self, peer: Peer, model: str, repeat: int) -> None:
        """Measure one server with one model; keep what was found, also when it fails midway."""
        if model == "tricks":
            self.about["failures"][peer.name] = Failures(peer, self.server_cpus).find()
            return
        began = time.monotonic()
        with running(peer, model, self.server_cpus) as server:
            first_answer_s = time.monotonic() - began
            cpus = self.server_cpus | self.client_cpus
            asked = self.expected.get(model, "")
            visit = Visit(peer, model, repeat, server, self.locust, cpus, asked, self.scale)
            try:
                visit.note("start", first_answer_s=first_answer_s)
                if model == "instant":
                    visit.overhead()
                elif model in LAWS:
                    visit.batches()
                elif model == "float32":
                    self.measure_all(visit)
                else:
                    visit.capacity(users=(1, 32) if model == "embeddings" else (64,))
                    visit.note("memory", mb=server.memory_mb())
            finally:
                self.rows += visit.rows

    @staticmethod
    def measure_all(visit: Visit) -> None:
        """All that the tables show; in later rounds only what decides, or three of them would take hours."""
        capacity = visit.capacity(USERS if visit.repeat == 0 else USERS[2:])
        visit.note("memory", mb=visit.server.memory_mb())
        if visit.repeat < 2:
            visit.latency(capacity)
        visit.server.wait_until_idle()
        visit.overload(capacity, 2)
        if visit.repeat == 0:
            visit.server.wait_until_idle()
            visit.overload(capacity, 10)

    def save(self) -> None:
        """Write all after every visit: an interrupted run is not lost."""
        df = pd.DataFrame(self.rows, columns=Row._fields)
        for column in ("value", "others"):
            df[column] = df[column].map(lambda value: float(f"{value:.5g}"))
        df.to_csv(self.out / "peers.csv", index=False)
        (self.out / "peers.json").write_text(json.dumps(self.about, indent=1) + "\n")


def order(peers: list[Peer], rounds: dict[str, int]) -> Iterator[tuple[Peer, str, int]]:
    """Each round visits every peer once with each model, in an order of its own."""
    for repeat in range(max(rounds.values())):
        visits = [
            (peer, model, repeat) for peer in peers for model in peer.kinds if repeat < rounds.get(model, 0)
        ]
        yield from random.Random(repeat).sample(visits, len(visits))


def install(peers: list[Peer], about: dict[str, Any]) -> list[Peer]:
    """Make the environments; return those peers that have one, and note why the others have not."""
    ready = []
    for peer in (progress := tqdm(peers, unit="environment", file=sys.stderr)):
        progress.set_description(peer.needs or "our own")
        try:
            if peer.needs:
                prepare(peer.needs, tuple(requirements(peer)))
            ready.append(peer)
            if peer.kinds == LAWS:
                continue
            sizes = {"installed_mb": installed_mb(peer), "lines": lines_of_code(peer)}
            about["size"][peer.name] = {name: round(value) for name, value in sizes.items()}
        except (NotInstalled, OSError, ValueError) as exc:
            about["failed"][peer.name] = f"not installed: {exc}"
    return ready


def expected_answers(models: set[str]) -> dict[str, str]:
    """Model: the file of the plain pipeline's answers, made once for these versions."""
    versions = f"torch-{version('torch')}-transformers-{version('transformers')}.json"
    found: dict[str, str] = {}
    if models & {"float32", "bfloat16"}:
        file = CACHE / f"fill-mask-{versions}"
        if not file.exists():
            expected.write(file, expected.fill_mask(MODEL))
        found |= {"float32": str(file), "bfloat16": f"{file}:bfloat16"}
    if "embeddings" in models:
        file = CACHE / f"vectors-{versions}"
        if not file.exists():
            expected.write(file, expected.embeddings(embedding_model()))
        found["embeddings"] = str(file)
    return found


def without(out: Path, names: list[str], models: list[str], about: dict[str, Any]) -> list[Row]:
    """The rows in `out` but those of these peers with these models, which are measured again; `about` becomes theirs."""
    here = dict(about)
    about |= json.loads((out / "peers.json").read_text())
    run = {"date": here["date"], "models": models, "peers": names}
    about["added"] = [*about.get("added", []), run]
    again = {(name, model) for name in names for model in models}
    about["failed"] = {
        name: why for name, why in about["failed"].items() if (name, why.partition(":")[0]) not in again
    }
    if different := [key for key in ("processor", "versions") if about[key] != here[key]]:
        raise SystemExit(f"those results have another {different[0]}: run all of it again")
    old = pd.read_csv(out / "peers.csv")
    kept = old[~(old["peer"].isin(names) & old["model"].isin(models))]
    return [Row(*values) for values in kept.itertuples(index=False)]


def main(argv: list[str] | None = None) -> int:
    """Run it; return how many visits failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--quick", action="store_true", help="once and short: shows that it works, measures little"
    )
    parser.add_argument(
        "--peers", nargs="*", choices=PEERS, metavar="PEER", help=f"besides this server: {', '.join(PEERS)}"
    )
    parser.add_argument(
        "--models", nargs="+", choices=ROUNDS, default=list(ROUNDS), metavar="MODEL", help=", ".join(ROUNDS)
    )
    parser.add_argument("--only", action="store_true", help="the chosen peers only, without this server")
    parser.add_argument(
        "--add", action="store_true", help="the chosen peers only, put among the results that are there"
    )
    parser.add_argument("--out", type=Path, help="folder for the results; only a whole run has a default")
    parser.add_argument("--redraw", action="store_true", help="only make the tables and pictures again")
    options = parser.parse_args(argv)
    partial = options.quick or options.peers or set(options.models) != set(ROUNDS)
    if partial and not options.add and not options.out:
        options.out = CACHE / "results"  # a part must not overwrite the whole
    out = options.out or Path(__file__).parent.parent / "results"
    if options.redraw:
        report.write(out)
        return 0
    out.mkdir(parents=True, exist_ok=True)
    chosen = list(options.peers or PEERS)
    names = chosen if options.only or options.add else list(dict.fromkeys([*chosen, *OURS_WITH_PEERS]))
    rounds = {model: 1 if options.quick else ROUNDS[model] for model in options.models}
    about: dict[str, Any] = {
        **host.describe(),
        "limit_s": LIMIT_S,
        "timeout_s": TIMEOUT_S,
        "most_per_s": generator.MOST_PER_S,
        "scale": 0.25 if options.quick else 1.0,
        "size": {},
        "failures": {},
        "failed": {},
    }
    rows = without(out, names, options.models, about) if options.add else []
    CACHE.mkdir(exist_ok=True)
    peers = install([PEERS[name] for name in names], about)
    server_cpus, client_cpus = {SERVER_CPU}, {CLIENT_CPU}
    about["pinning"] = f"server on core {sorted(server_cpus)}, load generator on core {sorted(client_cpus)}"
    visits = list(order(peers, rounds))
    minutes = sum(VISIT_S[model] * (0.5 if options.quick else 1.0) for _, model, _ in visits) / 60
    print(
        f"{len(visits)} visits of {len(peers)} servers, about {minutes:.0f} minutes; {about['pinning']}",
        flush=True,
    )
    had = os.sched_getaffinity(0)
    os.sched_setaffinity(0, client_cpus)
    answers = expected_answers({model for _, model, _ in visits})
    with generator.generator(client_cpus) as locust:
        run = Run(out, about["scale"], locust, server_cpus, client_cpus, answers, about, rows)
        for peer, model, repeat in (progress := tqdm(visits, unit="visit", file=sys.stderr)):
            progress.set_description(f"round {repeat + 1}: {peer.name}, {model}")
            try:
                run.visit(peer, model, repeat)
            except (RuntimeError, OSError) as exc:
                about["failed"].setdefault(peer.name, f"{model}: {exc}")
                progress.write(f"{peer.name}, {model} failed: {exc}")
            run.save()
    os.sched_setaffinity(0, had)
    report.write(out)
    print((out / "peers.md").read_text())
    return len(about["failed"])


if __name__ == "__main__":
    arguments.run(main)
