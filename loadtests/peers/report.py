"""The tables, made from the rows alone: `python -m loadtests.peers --redraw`."""

import csv
import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from loadtests.host import one_line
from loadtests.modes import ROOT
from loadtests.peers.catalogue import FOLDER, LAWS, OURS, PEERS, Peer
from loadtests.peers.environments import requirements
from loadtests.peers.pictures import own_capacity, replied, write_pictures
from loadtests.peers.visit import LAW_S, LAW_USERS
from loadtests.pictures import picture
from loadtests.plan.planner import markdown

DISTURBED = 0.15  # cores that something else took; a measurement beside which it was more is dropped
FASTEST, STOCK, AUTO = (f"{OURS}, batch 32{more}" for more in ("", ", stock", ", auto"))
USERS = (1, 8, 32, 64)
Columns = dict[str, Callable[[str], str]]  # title: the cell of a server
LAW_TITLES = {"flat": "100 ms", "gpu-like": "10 ms, and 1 ms per input"}
FAILURES = {  # as found: as shown
    "one bad text": "one bad input",
    "a client that leaves": "20 clients disconnect",
    "model killed": "model killed",
    "model hangs": "model hangs",
    "SIGTERM under load": "SIGTERM under load",
}
DEVIATIONS = """
Each server is configured as in its own documentation, except for these:

- **mosec**: `--capacity 64` (default 1,024) and `--timeout 30000`: with the defaults it queues longer than a client waits, and ends long batches.
- **pytriton** is PyTriton, which runs the model in a Python process beside Triton. Triton's own backends were not compared.
- **infinity** needs Transformers below 5, so it runs another version than the others. It ran with `--engine torch` and
  `--no-bettertransformer`, because `optimum` is not installed. Its README often prefers ONNX on a CPU, which was not compared.

No server with length bucketing or padding-free attention was compared, such as text-embeddings-inference.
"""
NOT_COMPARED = """
- text-embeddings-inference (TEI): a Rust server that is published as container images and as source; no container could be run on this
  machine, and the package index has no build of it. It packs sequences without padding, so expect it to be the closest of all.
- TensorFlow Serving: serves SavedModels, not PyTorch. The package index has only its client (tensorflow-serving-api 2.21).
- Clipper: its last release, clipper_admin 0.4.1, starts Docker containers and needs a Python version of 2019. Ray Serve took its place.
"""
EXPLAINED = """
Mixed: 10 % of the texts have 200 tokens. Most of the gain is the model call: BERT-like models run packed, without padding. With the stock
pipeline this server is about as fast as the other PyTorch servers. Servers that pad their batches lose throughput on mixed lengths.
"""
ELSEWHERE = """
- TorchServe and Triton manage several models and their versions at run time; Triton has ensembles; Ray Serve spreads over machines by
  itself. See the features below.
"""
FEATURES = """
Without a mark: seen by running it, or in its installed code. †: read on that page. `like this`: the setting that does it. A replica is a
whole server behind a load balancer. TorchServe [is no longer maintained](https://pytorch.org/serve/management_api.html).
"""


class Results:
    """Medians over the undisturbed rounds, with the least and the greatest."""

    def __init__(self, out: Path) -> None:
        rows = pd.read_csv(out / "peers.csv")
        self.about: dict[str, Any] = json.loads((out / "peers.json").read_text())
        measured = ["peer", "model", "repeat", "what"]
        self.disturbed = rows[rows["others"] > DISTURBED].groupby(measured).ngroups
        self.measurements = rows.groupby(measured).ngroups
        cell = ["peer", "model", "what", "metric"]
        # Where every round was disturbed the quietest one stands, marked.
        least = rows.groupby(cell)["others"].transform("min")
        kept = rows[(rows["others"] <= DISTURBED) | (rows["others"] == least)]
        grouped = kept.groupby(cell)
        self.median, self.least, self.most = (
            getattr(grouped["value"], f)() for f in ("median", "min", "max")
        )
        self.quietest = grouped["others"].min()
        self.repeats = int(rows["repeat"].max()) + 1 if len(rows) else 0
        seen = set(rows["peer"]) | set(self.about["failures"])
        self.peers = [name for name in PEERS if name in seen and "embeddings" not in PEERS[name].kinds]
        self.peers.sort(key=lambda name: -self.get(name, "float32", "short 64", "per_s", 0.0))

    def get(self, peer: str, model: str, what: str, metric: str, default: float = math.nan) -> float:
        return float(self.median.get((peer, model, what, metric), default))

    def cell(
        self, peer: str, model: str, what: str, metric: str, digits: int = 0, *, spread: bool = True
    ) -> str:
        """The median, its spread where there is one, `~` before what was disturbed in every round."""
        key = (peer, model, what, metric)
        if key not in self.median:
            return "-"
        value, low, high = (number(series[key], digits) for series in (self.median, self.least, self.most))
        mark = "~" if self.quietest[key] > DISTURBED else ""
        return mark + (f"{value} ({low} to {high})" if spread and low != high else value)

    def best(self, model: str, what: str, metric: str) -> tuple[str, float]:
        """The best of the other servers."""
        others = {
            name: self.get(name, model, what, metric, -1.0)
            for name in self.peers
            if not name.startswith(OURS)
        }
        name = max(others, key=lambda name: others[name], default="")
        return name, others.get(name, math.nan)


def number(value: float, digits: int) -> str:
    return "> 10" if math.isinf(value) else f"{value:,.{digits}f}"


def write(out: Path) -> None:
    """Write peers.md and the pictures beside the rows."""
    results = Results(out)
    parts = [
        ("", decides(results)),
        ("How they were configured", configured()),
        ("Throughput: requests/s by connections, closed loop", capacity(results)),
        ("Latency in ms, at a share of its own capacity", latency(results)),
        ("Overload: goodput within 1 s", overload(results)),
        ("Stub models: do batches fill?", laws(results)),
        ("When something goes wrong", failures(results)),
        ("Overhead and size", costs(results)),
        ("Sentence embeddings, all-MiniLM-L6-v2", embeddings(results)),
        ("Where other servers are better", losses(results)),
        ("Features", features()),
        ("Not run", not_run(results)),
    ]
    text = "".join(
        f"\n## {title}\n\n{body.strip()}\n" if title else f"{body.strip()}\n" for title, body in parts if body
    )
    (out / "peers.md").write_text(f"{about(results)}\n{text}")
    found = results.about
    dates = sorted({found["date"], *(run["date"] for run in found.get("added", []))})
    write_pictures(results, one_line({**found, "date": " and ".join(dates)}), out)


def about(results: Results) -> str:
    found = results.about
    versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    later = "".join(
        f"- {run['date']}, {', '.join(run['models'])}: {'; '.join(run['peers'])}\n"
        for run in found.get("added", [])
    )
    later = f"Measured again or later (`--add`), by model; the last run counts:\n\n{later}\n" if later else ""
    return (
        f"# This server and other servers\n\n"
        f"`make peers`, {found['date']}: {found['processor']}, {found['cores']} cores; {found['pinning']}; one thread for the model; "
        f"Python {found['python']}, {versions}. One model, the bundled fill-mask (BERT, 6 layers of 384, 23 M parameters), and the same texts; "
        "every answer was compared with the plain pipeline's. Each server is a small program after a page of its own documentation, in "
        "[`loadtests/peers/`](../peers). "
        f"Medians of up to {results.repeats} rounds in which all took turns, with the least and greatest; 1 and 8 connections and 10x were "
        "run once, bfloat16 twice. "
        f"{results.disturbed} of {results.measurements} measurements were dropped, because something else used more than "
        f"{DISTURBED:.0%} of a core meanwhile; `~`: the quietest one, where that was so in every round. "
        "[Which number is which](../../docs/numbers.md).\n\n"
        f"{later}"
        f"{picture('peers.png', 'Throughput of the fastest servers')}\n"
        f"{picture('peers-overload.png', 'Goodput and replies under overload')}"
    )


# --- tables -----------------------------------------------------------------------------------------------------------


def decides(results: Results) -> str:
    """The rows that README shows: the fast path, the same server with the stock pipeline, and the best of the others."""
    rows = []

    def row(what: str, ours: float, stock: float, best: tuple[str, float]) -> None:
        name, theirs = best
        if ours > 0 and theirs >= 0:
            rows.append(
                {
                    "what": what,
                    "this server": f"{ours:,.0f}",
                    "with the stock pipeline": "-" if math.isnan(stock) else f"{stock:,.0f}",
                    "best other": f"{theirs:,.0f} ({name})",
                }
            )

    for model, peer in (("float32", FASTEST), ("bfloat16", AUTO)):
        for kind in ("short", "mixed"):
            for n in USERS if model == "float32" else (64,):
                what = f"{kind} {n}"
                row(
                    f"requests/s, {kind} texts, {n} connection{'s' * (n > 1)}, {model}",
                    results.get(peer, model, what, "per_s"),
                    results.get(STOCK, model, what, "per_s"),
                    results.best(model, what, "per_s"),
                )
    return f"{markdown(rows)}\n\n{EXPLAINED.strip()}" if rows else ""


def configured() -> str:
    """The version of each server, and where it deviates from its documentation."""
    rows = [
        {"server": peer.name, "packages": ", ".join(pinned(peer))}
        for peer in PEERS.values()
        if not peer.name.startswith(OURS) and peer.kinds != LAWS
    ]
    return f"{markdown(rows)}\n\n{DEVIATIONS.strip()}"


def pinned(peer: Peer) -> list[str]:
    """Its own packages with their versions; torch and Transformers are the same for all, above."""
    same = ("torch==", "transformers==", "starlette==", "uvicorn==", "uvloop==", "httptools==")
    return [line.replace("==", " ") for line in requirements(peer) if not line.startswith(same)] or [
        "as above"
    ]


def each(results: Results, columns: Columns) -> str:
    """A row for every server, but for those that have nothing to say."""
    rows = []
    for peer in results.peers:
        cells = {title: cell(peer) for title, cell in columns.items()}
        if set(cells.values()) != {"-"}:
            rows.append({"server": f"**{peer}**" if peer.startswith(OURS) else peer} | cells)
    return markdown(rows) if rows else ""


def tables(results: Results, parts: dict[str, Columns]) -> str:
    """Several tables, as one of more than six columns is hard to read."""
    made = {title: each(results, columns) for title, columns in parts.items()}
    return "\n\n".join(f"{title}:\n\n{table}" for title, table in made.items() if table)


def of(
    results: Results, model: str, what: str, metric: str, digits: int = 0, *, spread: bool = True
) -> Callable[[str], str]:
    return lambda peer: results.cell(peer, model, what, metric, digits, spread=spread)


def capacity(results: Results) -> str:
    parts: dict[str, Columns] = {}
    for kind in ("short", "mixed"):
        columns = {f"{n}": of(results, "float32", f"{kind} {n}", "per_s") for n in USERS}
        parts[f"{kind.capitalize()} texts"] = columns | {
            "64, bfloat16": of(results, "bfloat16", f"{kind} 64", "per_s")
        }
    return tables(results, parts)


def latency(results: Results) -> str:
    columns = {
        f"p{p} at {share}": of(results, "float32", f"at {share}", f"p{p}_ms")
        for share in ("50%", "80%")
        for p in (50, 99)
    }
    return each(results, columns)


def overload(results: Results) -> str:
    parts: dict[str, Columns] = {
        title: {
            "offered, x capacity": partial(multiple, results, what),
            "goodput/s": of(results, "float32", what, "goodput_per_s"),
            "goodput, % of capacity": partial(goodput_share, results, what),
            "the rest got": partial(others_got, results, what),
            "any reply; /health; recovery": partial(replies, results, what),
        }
        for what, title in (
            ("at 2 x", "At 2× its own capacity"),
            ("at 10 x", "At up to 10× its own capacity, once"),
        )
    }
    most = results.about["most_per_s"]
    text = tables(results, parts)
    return text and (
        f"{text}\n\nCounted from the third second of the overload on, when queues have filled. Capacity: half of the load that was offered at "
        f"2×, from a closed loop just before. A client disconnects after {results.about['timeout_s']} s (client timeout). The generator sends at "
        f"most {most:,.0f}/s on schedule, so fast servers get less than 10×. Any reply: clients with an answer or a rejection before they "
        "disconnect. /health: probes that are answered within 1 s. Recovery: seconds until 1 s answers are back.\n"
    )


def laws(results: Results) -> str:
    parts: dict[str, Columns] = {
        f"`{model}`: a call takes {title}": {
            f"{n}": of(results, model, f"users {n}", "per_s") for n in LAW_USERS
        }
        for model, title in LAW_TITLES.items()
    }
    text = tables(results, parts)
    bounds = "; ".join(
        f"`{model}` " + ", ".join(f"{allowed(model, n):.0f}" for n in LAW_USERS) for model in LAW_TITLES
    )
    return text and (
        f"{text}\n\nRequests/s of so many users who ask again as soon as they have their answer, once for {LAW_S} s, batches of at most 32. "
        f"The law allows: {bounds}. This server's class has an `example`, so it knows from the start what a batch costs; without one it learns that from requests of "
        "different numbers, which took two users some seconds. mosec and LitServe were run with two batching delays, 10 ms and 3 ms; Triton and TorchServe have 10 ms, the page has 1 ms, "
        "BentoML adapts its own, and rejects some of 64. The page's batches have no bound: with 64 users it puts all of them into one.\n"
    )


def allowed(model: str, users: int) -> float:
    """Requests per second when everybody who waits is in the next batch, and nothing but the model takes time."""
    n = min(users, 32)
    return n / (0.1 if model == "flat" else 0.01 + 0.001 * n)


def multiple(results: Results, what: str, peer: str) -> str:
    """The offered load as a multiple of the server's own capacity."""
    share = results.get(peer, "float32", what, "offered_per_s") / own_capacity(results, peer)
    return "-" if math.isnan(share) else f"{share:.1f}"


def goodput_share(results: Results, what: str, peer: str) -> str:
    """The goodput as a share of the server's own capacity, and that of the worst round."""
    capacity, key = own_capacity(results, peer), (peer, "float32", what, "goodput_per_s")
    if math.isnan(capacity) or key not in results.median:
        return "-"
    median, least = results.median[key] / capacity, results.least[key] / capacity
    return f"{median:.0%}" + f" (worst {least:.0%})" * bool(least < median)


def replies(results: Results, what: str, peer: str) -> str:
    """Clients with any reply, probes in time, seconds to recover."""
    if math.isnan(share := replied(results, peer, what)):
        return "-"
    recovery = results.cell(peer, "float32", what, "recovery_s", 1, spread=False)
    return f"{share:.0f}%; {health(results, what, peer)}; {recovery} s"


def others_got(results: Results, what: str, peer: str) -> str:
    """Shares of the requests that were not answered in time, by what they got."""
    total = results.get(peer, "float32", what, "requests")
    if math.isnan(total):
        return "-"
    names = {
        "503": "503",
        "504": "504",
        "lost": "client timeout",
        "other": "another error",
        "wrong": "a wrong answer",
    }
    shares = {
        name: results.get(peer, "float32", what, f"n_{key}", 0.0) / total for key, name in names.items()
    }
    in_time = results.get(peer, "float32", what, "good_share", 0.0)
    shares["late answer"] = max(0.0, results.get(peer, "float32", what, "n_200", 0.0) / total - in_time)
    return ", ".join(f"{share:.0%} {name}" for name, share in shares.items() if share >= 0.005) or "-"


def health(results: Results, what: str, peer: str) -> str:
    share = results.get(peer, "float32", what, "health_share")
    return "-" if math.isnan(share) else f"{share:.0%}"


def failures(results: Results) -> str:
    def outcome(name: str, peer: str) -> str:
        return results.about["failures"].get(peer, {}).get(name, "-")

    table = each(results, {title: partial(outcome, name) for name, title in FAILURES.items()})
    return table and (
        f"{table}\n\nMeasured with a stub model (0.2 s per call). One bad input: it and seven others arrive together, so they can share a batch. "
        "20 clients disconnect while the model is busy: how many of their inputs it computes all the same. Killed, hangs: one input of eight "
        "ends the model's process, or its call never returns; servers with a configurable call timeout were set to 3 s.\n"
    )


def costs(results: Results) -> str:
    size = results.about["size"]
    overhead = {}
    for n in (1, 32):
        overhead[f"requests/s, {n}"] = of(results, "instant", f"instant {n}", "per_s")
        overhead[f"added ms, {n}"] = of(results, "instant", f"instant {n}", "ms", 2)
    parts: dict[str, Columns] = {
        "Start, memory, size": {
            "cold start, s": of(results, "float32", "start", "first_answer_s", 1),
            "memory, MB": of(results, "float32", "memory", "mb"),
            "installed, MB": lambda peer: f"{size[peer]['installed_mb']:,}" if peer in size else "-",
            "lines to write": lambda peer: str(size[peer]["lines"]) if peer in size else "-",
        },
        "No-op model, 1 and 32 connections": overhead,
    }
    files = [ROOT / "server.py", *ROOT.glob("workers/**/*.py")]
    own = sum(bool(line.strip()) for file in files for line in file.read_text().splitlines())
    text = tables(results, parts)
    return text and (
        f"{text}\n\nMemory: all of its processes, shared pages once (PSS). Installed: its requirements and all that these require, "
        "with the CPU build of torch. Lines: without comments and the model's own. This server needs none, but brings "
        f"{round(own, -2):,} lines, all tasks and protocols included, which you maintain if you copy them. Added: time per request with a model that returns at once.\n"
    )


def embeddings(results: Results) -> str:
    names = [name for name in PEERS if "embeddings" in PEERS[name].kinds]
    rows = [
        {"server": name} | {f"{kind} {n}": results.cell(name, "embeddings", f"{kind} {n}", "per_s") for kind in ("short", "mixed") for n in (1, 32)}
        for name in names
        if not math.isnan(results.get(name, "embeddings", "short 1", "per_s"))
    ]  # fmt: skip
    return markdown(rows) if rows else ""


def losses(results: Results) -> str:
    """Every measured number in which another server beats the configuration of the headline."""
    asked = [
        *(("float32", f"{kind} {n}", "per_s", True, f"requests/s, {kind} texts, {n} connection{'s' * (n > 1)}") for kind in ("short", "mixed") for n in USERS),
        ("float32", "start", "first_answer_s", False, "cold start, s"),
        ("float32", "memory", "mb", False, "memory, MB"),
        *(("instant", f"instant {n}", "per_s", True, f"requests/s of a no-op model, {n} connection{'s' * (n > 1)}") for n in (1, 32)),
    ]  # fmt: skip
    lines = [
        f"Compared with {FASTEST} (`BATCH_SIZE=32`, `OFFLOAD=thread`), the configuration of the first table; all that was measured.\n"
    ]
    for model, what, metric, more_is_better, title in asked:
        values = {name: results.get(name, model, what, metric) for name in results.peers}
        add_loss(lines, title, values, more_is_better)
    for what in ("at 2 x", "at 10 x"):
        shares = {name: goodput_percent(results, what, name) for name in results.peers}
        add_loss(lines, f"goodput {what} its own capacity, % of it", shares, True)
    for name, title in FAILURES.items():
        found = {peer: row.get(name, "") for peer, row in results.about["failures"].items()}
        if back := [peer for peer, text in found.items() if "recovers" in text and not peer.startswith(OURS)]:
            lines.append(
                f"- {title}: {', '.join(sorted(back))} recover; {FASTEST}: {found.get(FASTEST, '-')}. `OFFLOAD=process` recovers, too"
            )
    return "\n".join([*lines, ELSEWHERE.strip()])


def goodput_percent(results: Results, what: str, peer: str) -> float:
    return 100 * results.get(peer, "float32", what, "goodput_per_s") / own_capacity(results, peer)


def add_loss(lines: list[str], title: str, values: dict[str, float], more_is_better: bool) -> None:
    """Add a line that names all other servers which are better than FASTEST."""
    here = values.get(FASTEST, math.nan)
    better = {
        name: value
        for name, value in values.items()
        if not name.startswith(OURS) and (value > here if more_is_better else value < here)
    }
    if better:
        order = sorted(better.items(), key=lambda item: -item[1] if more_is_better else item[1])
        digits = 1 if here < 10 else 0
        names = ", ".join(f"{name} {value:,.{digits}f}" for name, value in order)
        lines.append(f"- {title}: {names}; this server {here:,.{digits}f}")


def features() -> str:
    """features.csv as tables, this server in each; a cell that was read, not run, links to its page."""
    with (FOLDER / "features.csv").open(newline="") as file:
        cells = list(csv.DictReader(file))
    pages = list(dict.fromkeys(cell["source"] for cell in cells if cell["source"] != "run"))
    by_feature: dict[str, dict[str, str]] = {}
    for cell in cells:
        mark = "" if cell["source"] == "run" else f" [†][{pages.index(cell['source']) + 1}]"
        by_feature.setdefault(cell["feature"], {})[cell["server"]] = cell["value"] + mark
    here, *others = dict.fromkeys(cell["server"] for cell in cells)
    parts = [
        markdown([{"": name} | {s: found[s] for s in (here, *some)} for name, found in by_feature.items()])
        for some in (others[:4], others[4:])
    ]
    links = "\n".join(f"[{i}]: {page}" for i, page in enumerate(pages, 1))
    return "\n\n".join([*parts, FEATURES.strip(), links])


def not_run(results: Results) -> str:
    failed = "".join(f"- {name}: {why}\n" for name, why in results.about["failed"].items())
    return failed + NOT_COMPARED.strip()
