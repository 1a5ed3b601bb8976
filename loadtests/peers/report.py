"""The tables and pictures, made from the rows alone: `python -m loadtests.peers --redraw`."""

import csv
import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from loadtests.compare.pictures import BLUE, GREEN, ORANGE, PURPLE, RED, Name, plain_numbers, write_names
from loadtests.compare.report import frame
from loadtests.host import one_line
from loadtests.modes import ROOT
from loadtests.peers.catalogue import FOLDER, OURS, PEERS
from loadtests.plan.planner import markdown

DISTURBED = 0.15  # cores that something else took; a measurement beside which it was more is dropped
FASTEST, AUTO = f"{OURS}, batch 32", f"{OURS}, batch 32, auto"
GREY = "#b8b8b8"
USERS = (1, 8, 32, 64)
Columns = dict[str, Callable[[str], str]]  # title: the cell of a server
LOADS = ("at 50%", "at 80%", "at 2 x", "at 10 x")
FAILURES = ("one bad text", "a client that leaves", "model killed", "model hangs", "SIGTERM under load")
GONE = """
- TensorFlow Serving: Google's server of SavedModels. The registry has its client alone (tensorflow-serving-api 2.21); the
  server is a Debian package of Google's own archive or a container, and takes no PyTorch model. For those: Triton.
- Clipper: Berkeley's prediction server, whose adaptive batches and latency bounds many of these took over. Its last release,
  clipper_admin 0.4.1, starts Docker containers and asks for a Python of its time. Ray Serve took its place.
"""
FEATURES = """
Without a mark: seen by running it, or in its installed code. †: read on that page. `like this`: the setting that does it. A replica: a
server of its own behind a balancer, of which it knows nothing. TorchServe
[is no longer maintained](https://pytorch.org/serve/management_api.html).
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
        """The best of the others."""
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
        ("Answers per second, by connections in a closed loop", capacity(results)),
        ("Latency in ms, at a part of its own capacity", latency(results)),
        ("Overload: right answers within a second", overload(results)),
        ("When something goes wrong", failures(results)),
        ("What they cost", costs(results)),
        ("Sentence embeddings, all-MiniLM-L6-v2", embeddings(results)),
        ("Where the others are better", losses(results)),
        ("Features", features()),
        ("Not run", not_run(results)),
    ]
    text = "".join(
        f"\n## {title}\n\n{body.strip()}\n" if title else f"{body.strip()}\n" for title, body in parts if body
    )
    (out / "peers.md").write_text(f"{about(results)}\n{text}")
    for name, draw in {"peers": draw_capacity, "peers-overload": draw_overload}.items():
        figure = draw(results)
        figure.text(0.01, 0.005, one_line(results.about), fontsize=8, color="#555555")
        figure.savefig(out / f"{name}.png", dpi=130)
        plt.close(figure)


def about(results: Results) -> str:
    found = results.about
    versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    added = found.get("added", [])
    return (
        f"# This server and what people would pick instead\n\n"
        f"`make peers`, {found['date']}: {found['processor']}, {found['cores']} cores; {found['pinning']}; one thread for the model; "
        f"Python {found['python']}, {versions}. One model, the embedded fill-mask, the same texts, every answer compared with the "
        "plain pipeline's. Each peer is a small program after a page of its own documentation, see the files in "
        "[`loadtests/peers/`](../peers). "
        f"Medians of up to {results.repeats} rounds in which all took turns, with the least and greatest. "
        f"{', '.join(added)}{' took turns in a later run (`--add`). ' * bool(added)}"
        f"{results.disturbed} of {results.measurements} measurements were dropped, since something else took more than "
        f"{DISTURBED:.0%} of a core meanwhile; `~`: the quietest one, where that was so in every round.\n"
    )


# --- tables -----------------------------------------------------------------------------------------------------------


def decides(results: Results) -> str:
    """The rows that README shows."""
    rows = []

    def row(what: str, ours: float, best: tuple[str, float], model: str = "float32") -> None:
        name, theirs = best
        if ours > 0 and theirs >= 0:
            ratio = f"{ours / theirs:.1f} x" if theirs else "-"
            rows.append(
                {
                    "what": what,
                    "this server": f"{ours:,.0f}",
                    "best other": f"{theirs:,.0f} ({name})",
                    "ratio": ratio,
                }
            )

    for model, peer in (("float32", FASTEST), ("bfloat16", AUTO)):
        for kind in ("short", "mixed"):
            what = f"answers/s, {kind} texts, {model}"
            row(
                what,
                results.get(peer, model, f"{kind} 64", "per_s"),
                results.best(model, f"{kind} 64", "per_s"),
            )
    name, metric = "at 2 x", "goodput_per_s"
    row("right answers/s within 1 s at twice its load", results.get(FASTEST, "float32", name, metric),
        results.best("float32", name, metric))  # fmt: skip
    return markdown(rows) if rows else ""


def each(results: Results, columns: Columns) -> str:
    """A row for every server, but for those that have nothing to say."""
    rows = []
    for peer in results.peers:
        cells = {title: cell(peer) for title, cell in columns.items()}
        if set(cells.values()) != {"-"}:
            rows.append({"server": f"**{peer}**" if peer.startswith(OURS) else peer} | cells)
    return markdown(rows) if rows else ""


def tables(results: Results, parts: dict[str, Columns]) -> str:
    """One under another: nobody reads a table of more than six columns."""
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
        f"{what.removesuffix(' x')} times its own capacity".capitalize(): {
            "offered/s": of(results, "float32", what, "offered_per_s", spread=False),
            "in time/s": of(results, "float32", what, "goodput_per_s"),
            "the others got": partial(others_got, results, what),
            "/health within 1 s": partial(health, results, what),
            "answers again after, s": of(results, "float32", what, "recovery_s", 1),
        }
        for what in ("at 2 x", "at 10 x")
    }
    most = results.about["most_per_s"]
    text = tables(results, parts)
    return text and f"{text}\n\nCounted from the third second of the overload on, when queues have filled. A client hangs up after {results.about['timeout_s']} s: nothing. No load is above {most:,.0f}/s, all that the generator sends on time.\n"  # fmt: skip


def others_got(results: Results, what: str, peer: str) -> str:
    """Shares of the requests that were not answered in time, by what they got."""
    total = results.get(peer, "float32", what, "requests")
    if math.isnan(total):
        return "-"
    names = {
        "503": "503",
        "504": "504",
        "lost": "nothing",
        "other": "another error",
        "wrong": "a wrong answer",
    }
    shares = {
        name: results.get(peer, "float32", what, f"n_{key}", 0.0) / total for key, name in names.items()
    }
    in_time = results.get(peer, "float32", what, "good_share", 0.0)
    shares["an answer too late"] = max(
        0.0, results.get(peer, "float32", what, "n_200", 0.0) / total - in_time
    )
    return ", ".join(f"{share:.0%} {name}" for name, share in shares.items() if share >= 0.005) or "-"


def health(results: Results, what: str, peer: str) -> str:
    share = results.get(peer, "float32", what, "health_share")
    return "-" if math.isnan(share) else f"{share:.0%}"


def failures(results: Results) -> str:
    def outcome(name: str, peer: str) -> str:
        return results.about["failures"].get(peer, {}).get(name, "-")

    table = each(results, {name: partial(outcome, name) for name in FAILURES})
    return table and (
        f"{table}\n\nA model that takes 0.2 s a call stands in. One bad text: it and seven others arrive together. A client that leaves: "
        "20 do while the model is busy. Killed, hangs: one text of eight makes the model's process end, or its call never return; "
        "who can set a limit on a call was given 3 s.\n"
    )


def costs(results: Results) -> str:
    size = results.about["size"]
    overhead = {}
    for n in (1, 32):
        overhead[f"requests/s, {n}"] = of(results, "instant", f"instant {n}", "per_s")
        overhead[f"added ms, {n}"] = of(results, "instant", f"instant {n}", "ms", 2)
    parts: dict[str, Columns] = {
        "Start, memory, size": {
            "first answer, s": of(results, "float32", "start", "first_answer_s", 1),
            "memory, MB": of(results, "float32", "memory", "mb"),
            "installed, MB": lambda peer: f"{size[peer]['installed_mb']:,}" if peer in size else "-",
            "lines to write": lambda peer: str(size[peer]["lines"]) if peer in size else "-",
        },
        "With a no-op model, 1 and 32 connections": overhead,
    }
    files = [ROOT / "server.py", *ROOT.glob("workers/**/*.py")]
    own = sum(bool(line.strip()) for file in files for line in file.read_text().splitlines())
    text = tables(results, parts)
    return text and (
        f"{text}\n\nMemory: all of its processes, shared pages once (PSS). Installed: its requirements and all that these require, "
        "with the CPU build of torch. Lines: without comments and the model's own; this server is ready-made; its "
        f"{round(own, -2):,} lines, all tasks and protocols included, are yours once you copy them. Added: what a request takes when the model takes nothing, at so many connections.\n"
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
    """Every measured number in which another server beats the best of ours."""
    asked = [
        *(("float32", f"{kind} {n}", "per_s", True, f"answers/s, {kind}, {n} connections") for kind in ("short", "mixed") for n in USERS),
        *(("float32", what, "goodput_per_s", True, f"right answers/s within 1 s {what}") for what in ("at 2 x", "at 10 x")),
        ("float32", "start", "first_answer_s", False, "seconds to the first answer"),
        ("float32", "memory", "mb", False, "memory, MB"),
        *(("instant", f"instant {n}", "per_s", True, f"requests/s of a no-op model, {n} connections") for n in (1, 32)),
    ]  # fmt: skip
    lines = []
    for model, what, metric, more_is_better, title in asked:
        values = {name: results.get(name, model, what, metric) for name in results.peers}
        values = {name: value for name, value in values.items() if not math.isnan(value)}
        ours = {name: value for name, value in values.items() if name.startswith(OURS)}
        if not ours or len(ours) == len(values):
            continue
        best = (max if more_is_better else min)(ours.values())
        better = {
            n: v for n, v in values.items() if n not in ours and (v > best if more_is_better else v < best)
        }
        if better:
            order = sorted(better.items(), key=lambda item: -item[1] if more_is_better else item[1])
            digits = 1 if best < 10 else 0
            who = ", ".join(f"{name} {value:,.{digits}f}" for name, value in order)
            lines.append(f"- {title}: {who}; ours {best:,.{digits}f}")
    lines.append(
        "- A blocked loop serves in the order of arrival, without a word of refusal; TorchServe and Triton manage many models and their "
        "versions at run time; Triton has ensembles; Ray Serve spreads over machines by itself: see the features."
    )
    return "\n".join(lines)


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
    return failed + GONE.strip()


# --- pictures ---------------------------------------------------------------------------------------------------------


def colour(peer: str, best: list[str]) -> str:
    """Ours in blue, then the best of the others; the rest is grey."""
    if peer.startswith(OURS):
        return BLUE
    return (RED, GREEN, PURPLE, ORANGE)[best.index(peer)] if peer in best else GREY


def titled(title: str, height: float) -> tuple[Figure, Any]:
    """A frame whose title starts at the picture's edge: names of servers are long."""
    figure, axes = frame("", height)
    figure.suptitle(title, x=0.01, ha="left", fontsize=14, fontweight="bold")
    return figure, axes


def draw_capacity(results: Results) -> Figure:
    """Two bars a server: short and mixed texts, at 64 connections."""
    peers = [
        name for name in results.peers if not math.isnan(results.get(name, "float32", "short 64", "per_s"))
    ]
    shown = [(AUTO, "bfloat16")] * (not math.isnan(results.get(AUTO, "bfloat16", "short 64", "per_s")))
    shown += [(name, "float32") for name in peers]
    ratios = []
    for kind in ("short", "mixed"):
        best = results.best("float32", f"{kind} 64", "per_s")[1]
        ratios.append(results.get(FASTEST, "float32", f"{kind} 64", "per_s") / best if best > 0 else math.nan)
    title = "Answers a second from one core, one model, the same answers"
    if not any(map(math.isnan, ratios)):
        title = f"One core, the same answers: {ratios[0]:.1f} times as many as the best\nother server, {ratios[1]:.0f} times when lengths are mixed"
    figure, axes = titled(title, 2.4 + 0.5 * len(shown))
    most = max((results.get(name, model, "short 64", "per_s") for name, model in shown), default=1.0)
    for i, (name, model) in enumerate(shown):
        for kind, offset, alpha in (("short", -0.2, 1.0), ("mixed", 0.2, 0.5)):
            value = results.get(name, model, f"{kind} 64", "per_s")
            axes.barh(i + offset, value, 0.38, color=colour(name, []), alpha=alpha)
            words = f" {kind} texts" if i == 0 else ""
            axes.text(
                value + most * 0.01,
                i + offset,
                f"{value:,.0f}{words}",
                va="center",
                fontsize=10,
                color="#333333",
            )
    axes.set_yticks(
        range(len(shown)),
        [f"{name}{', bfloat16' * (name == AUTO)}".replace(", auto", "") for name, _ in shown],
    )
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.set_xlim(0, most * 1.25)
    axes.grid(visible=False, axis="y")
    axes.set_xlabel("answers per second; mixed: one text in ten has 200 tokens")
    return figure


def draw_overload(results: Results) -> Figure:
    """Right answers within a second, by offered load; labels stand at the lines' ends."""
    lines = {}
    for name in results.peers:
        points = [
            (
                results.get(name, "float32", what, "offered_per_s"),
                results.get(name, "float32", what, "goodput_per_s"),
            )
            for what in LOADS
        ]
        if not any(math.isnan(value) for point in points for value in point):
            lines[name] = points
    others = sorted(
        (name for name in lines if not name.startswith(OURS)), key=lambda name: -lines[name][2][1]
    )
    best = others[:4]
    title = "Right answers within a second, against what is asked for"
    if FASTEST in lines and others:
        here, theirs = lines[FASTEST][2][1], lines[others[0]][2][1]
        title = f"Asked for twice what they can: {here:,.0f} right answers a second\nwithin a second here, {theirs:,.0f} at the best other server"
    figure, axes = titled(title, 8)
    for name, points in lines.items():
        tone, front = colour(name, best), name in best or name.startswith(OURS)
        width = 3 if name == FASTEST else 1.8 if front else 1.0
        axes.plot(
            *zip(*points, strict=True),
            color=tone,
            linewidth=width,
            marker="o",
            markersize=4,
            zorder=3 if front else 2,
        )
    axes.set_xscale("log")
    axes.set_ylim(bottom=0)
    axes.set_xlim(right=axes.get_xlim()[1] * 5)
    plain_numbers(axes.xaxis)
    axes.set_xlabel("requests per second: 50 %, 80 %, 2 x, 10 x of its own capacity")
    axes.set_ylabel("right answers per second within 1 s")
    ends = {name: points[-1] for name, points in lines.items() if name in best or name.startswith(OURS)}
    write_names(
        axes, [Name(x, y, name, colour(name, best)) for name, (x, y) in ends.items()], size=11, width=24
    )
    return figure
