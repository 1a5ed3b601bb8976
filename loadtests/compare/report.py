"""The comparison's table and pictures, made from its measurements alone: `python -m loadtests.compare --redraw`."""

import json
import math
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from loadtests.compare.pictures import (
    BLUE,
    FAINT,
    GREEN,
    GREY,
    PURPLE,
    RED,
    SKY,
    Name,
    plain_numbers,
    write_names,
)
from loadtests.host import one_line
from loadtests.modes import BASE, MODES
from loadtests.pictures import picture, save
from loadtests.plan.planner import markdown

# Which modes stand together in a picture of their own; the others are its grey background.
KINDS = {
    "one process": ("batch", "thread", "inline", "process"),
    "Gunicorn's event loops": ("recommended", "asgi", "uvicorn-2", "dirty"),
    "Gunicorn's threads and processes": ("gthread-1x8", "gthread-2x4", "sync-2"),
}
PREDICTED_SCENARIOS = ("own 50 %", "own 80 %", "own 2 x", "own 10 x")
TABLES = {  # title: {column: (scenario, metric, digits)}
    "Speed": {
        "capacity /s": ("capacity", "per_s", 0),
        "p50 ms at 80 %": ("own 80 %", "p50_ms", 0),
        "p99 ms at 80 %": ("own 80 %", "q99_ms", 0),
        "p99 ms at 80 % of common": ("common 80 %", "q99_ms", 0),
    },
    "Overload": {
        "goodput /s at 2 x": ("own 2 x", "goodput_per_s", 0),
        "goodput /s at 10 x": ("own 10 x", "goodput_per_s", 0),
        "recovery s": ("spike", "recovery_s", 1),
        "/health p99 ms at 80 %": ("own 80 %", "health_p99_ms", 0),
        "/health p99 ms at 2 x": ("own 2 x", "health_p99_ms", 0),
    },
    "Cost": {
        "memory MB": ("capacity", "memory_mb", 0),
        "instances": ("start", "instances", 0),
        "CPU s / 1000": ("capacity", "cpu_s_per_1000", 1),
        "cold start s": ("start", "first_answer_s", 1),
    },
}
PICTURES = {  # title: {file: what it shows}
    "Speed": {
        "latency": "The 99th percentile of the latency against offered load",
        "distribution": "The latencies at 80 % of each mode's capacity",
    },
    "Overload": {"overload": "Goodput at 2 and 10 times the capacity, % of it"},
    "The planner": {"prediction": "The 99th percentile, predicted and measured"},
}


class Results:
    """The medians over the rounds, and the least and greatest value."""

    def __init__(self, out: Path) -> None:
        rows = pd.read_csv(out / "measurements.csv")
        if rows.empty:
            raise SystemExit("no mode could be measured")
        self.about: dict[str, Any] = json.loads((out / "machine.json").read_text())
        self.rounds = int(rows["repeat"].max()) + 1
        measured = rows.groupby(["mode", "scenario", "metric"])["value"]
        self.medians, self.least, self.most = measured.median(), measured.min(), measured.max()
        self.by_round = rows.set_index(["mode", "scenario", "metric", "repeat"])["value"].sort_index()
        self.modes = sorted(rows["mode"].unique(), key=lambda mode: -self.get(mode, "capacity", "per_s"))

    def get(self, mode: str, scenario: str, metric: str, of: str = "medians") -> float:
        """One number, NaN where there is none."""
        return float(getattr(self, of).get((mode, scenario, metric), math.nan))

    def errors(self, mode: str, scenario: str, metric: str) -> "pd.Series[float]":
        """The planner's relative error in each round, empty where it predicted nothing."""
        try:
            predicted = self.by_round[mode, scenario, f"predicted_{metric}"]
            return (predicted / self.by_round[mode, scenario, metric] - 1).dropna()
        except KeyError:
            return pd.Series(dtype=float)


def write(out: Path) -> None:
    """Write table.md and the pictures next to the measurements."""
    results = Results(out)
    (out / "table.md").write_text(table(results) + "\n" + prediction_table(results))
    for name, draw in {
        "latency": draw_latency,
        "overload": draw_overload,
        "distribution": draw_distribution,
        "prediction": draw_prediction,
    }.items():
        figure = draw(results)
        if figure:
            save(figure, out / f"{name}.png", 130, footer=one_line(results.about))


# --- tables -----------------------------------------------------------------------------------------------------------


def table(results: Results) -> str:
    """All modes: medians, and in brackets the least and greatest of the rounds where they differ."""
    parts = []
    for title, columns in TABLES.items():
        rows = []
        for mode in results.modes:
            cells = {"mode": mode}
            if title == "Speed":
                cells["BATCH_SIZE"] = MODES[mode].env.get("BATCH_SIZE", BASE["BATCH_SIZE"])
            for column, (scenario, metric, digits) in columns.items():
                cells[column] = cell(results, mode, scenario, metric, digits)
            rows.append(cells)
        parts.append(f"## {title}\n\n{markdown(rows)}\n{pictures(title)}")
    about = results.about
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    return (
        "# Every deployment mode, under the same load\n\n[Which number is which](../../docs/numbers.md). Text generation has [tables of its own](generation-modes.md).\n\n"
        + "\n".join(parts)
        + f"\nMedians of {results.rounds} rounds, with the least and greatest where they differ; "
        f"{about['pinning']}. A client waits {about['limit_s']:g} s, disconnects after {about['timeout_s']:g} s, and counts a "
        f"rejection as {about['limit_s']:g} s of waiting. Goodput: correct responses within that time, per second, while the load "
        "lasts. Recovery: none, if it is not within the run. Own loads are multiples of the mode's capacity, "
        f"common ones of {about['common_per_s']:g} requests/s. "
        f"Loads are capped at {about['most_per_s']:,.0f} requests/s, the most that the generator can send on schedule: faster modes get "
        "less than 10 times their capacity.\n"
        + (f"Failed and left out: {', '.join(about['failed'])}.\n" if about["failed"] else "")
        + f"{about['processor']}, {about['cores']} cores, {about['memory_gb']} GB, device {about['device']}, "
        f"{about['date']}; Python {about['python']}, {versions}.\n"
    )


def pictures(title: str) -> str:
    """Those that stand below this table."""
    return "".join(f"\n{picture(f'{name}.png', text, 620)}" for name, text in PICTURES.get(title, {}).items())


def cell(results: Results, mode: str, scenario: str, metric: str, digits: int) -> str:
    """A median with its spread."""
    hung_up_ms = results.about["timeout_s"] * 1000 if metric.startswith("health") else math.inf

    def write(number: float) -> str:
        if math.isinf(number):
            return "none"
        return f"> {hung_up_ms:.0f}" if number >= hung_up_ms else f"{number:.{digits}f}"

    value, low, high = (results.get(mode, scenario, metric, of) for of in ("medians", "least", "most"))
    if math.isnan(value):
        return "-"
    return write(value) if write(low) == write(high) else f"{write(value)} ({write(low)} to {write(high)})"


def prediction_table(results: Results) -> str:
    """What the planner predicted from the bare model's cost, and by how much it was wrong."""
    rows = []
    for mode in results.modes:
        if results.errors(mode, "capacity", "per_s").empty:
            continue
        cells: dict[str, Any] = {"mode": mode}
        for title, scenario, metric in (
            ("capacity /s", "capacity", "per_s"),
            ("p50 ms at 80 %", "own 80 %", "p50_ms"),
            ("p99 ms at 80 %", "own 80 %", "p99_ms"),
            ("goodput /s at 2 x", "own 2 x", "goodput_per_s"),
        ):
            errors = results.errors(mode, scenario, metric)
            predicted, measured = (results.get(mode, scenario, of + metric) for of in ("predicted_", ""))
            cells[title] = f"{predicted:.0f}, measured {measured:.0f}: " + (
                f"{errors.median():+.0%} ({errors.min():+.0%} to {errors.max():+.0%})"
            )
        rows.append(cells)
    if not rows:
        return ""
    return (
        "\n## The planner\n\nIts prediction and its error: medians of the rounds (the error is the rounds' own, not that of the two "
        "medians beside it), and the error's least and greatest. In each round "
        "it times the plain model on the server's core beside the visit, and is told when the requests came.\n\n"
        f"{markdown(rows)}\n{pictures('The planner')}"
    )


# --- pictures ---------------------------------------------------------------------------------------------------------


def frame(title: str, height: float = 7.5) -> tuple[Figure, Axes]:
    """A picture that a phone shows upright: large type, no clutter."""
    plt.rcParams.update({"font.size": 12, "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = plt.subplots(figsize=(7.2, height), layout="constrained")
    figure.get_layout_engine().set(rect=(0, 0.035, 1, 0.965))
    axes.set_title(title, loc="left", fontsize=14, fontweight="bold")
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    return figure, axes


def list_modes(axes: Axes, modes: list[str]) -> None:
    """One row for each mode, the best on top."""
    axes.set_yticks(range(len(modes)), modes)
    axes.set_ylim(len(modes) - 0.5, -0.5)


def draw_latency(results: Results) -> Figure | None:
    """The hockey sticks: what 99 of 100 clients get within, against offered load; a panel for each kind of mode."""
    points = {
        mode: [
            (results.get(mode, scenario, "offered_per_s"), results.get(mode, scenario, "q99_ms"))
            for scenario in ("own 50 %", "own 80 %", "own 2 x")
            if (mode, scenario, "q99_ms") in results.medians
        ]
        for mode in results.modes
    }
    points = {mode: some for mode, some in points.items() if some}
    kinds = {kind: [mode for mode in modes if mode in points] for kind, modes in KINDS.items()}
    kinds = {kind: modes for kind, modes in kinds.items() if modes}
    if not kinds:
        return None
    figure, first = frame("", 1.2 + 3.0 * len(kinds))
    first.remove()
    figure.suptitle(latency_title(results), x=0.01, ha="left", fontsize=14, fontweight="bold")
    limit_ms = results.about["limit_s"] * 1000
    panels: list[Axes] = list(figure.subplots(len(kinds), sharex=True, sharey=True, squeeze=False)[:, 0])
    for axes, (kind, modes) in zip(panels, kinds.items(), strict=True):
        for mode in [mode for mode in points if mode not in modes]:
            axes.plot(*zip(*points[mode], strict=True), color=FAINT, linewidth=0.8)
        for mode, color in zip(modes, (BLUE, RED, GREEN, PURPLE)):
            axes.plot(*zip(*points[mode], strict=True), "o-", color=color, markersize=5)
        axes.axhline(limit_ms, color=GREY, linewidth=1, linestyle=":")
        axes.set(xscale="log", yscale="log", ylabel="p99 latency, ms", ylim=(None, limit_ms * 1.6))
        axes.set_title(kind, loc="left", fontsize=12)
        axes.grid(color="#dddddd", linewidth=0.6)
        plain_numbers(axes.xaxis, axes.yaxis)
        # Beside their last point below the limit, where all lines meet.
        before = {mode: points[mode][-2:][0] for mode in modes}
        names = [
            Name(x, y, mode, color)
            for (mode, (x, y)), color in zip(before.items(), (BLUE, RED, GREEN, PURPLE))
        ]
        write_names(axes, names, size=10.5)
    for axes in panels[-1:]:
        axes.set_xlabel("offered load, requests/s: 50 %, 80 %, 2× of the mode's own capacity")
    return figure


def latency_title(results: Results) -> str:
    one, batches = (results.get(mode, "capacity", "per_s") for mode in ("thread", "batch"))
    if math.isnan(one) or math.isnan(batches):
        return "p99 latency against offered load"
    return f"Batching moves saturation\nfrom about {one:.0f} to about {batches:.0f} requests/s"


def prediction_title(results: Results, modes: list[str]) -> str:
    pairs = [
        (results.get(mode, "own 80 %", "predicted_p99_ms"), results.get(mode, "own 80 %", "p99_ms"))
        for mode in modes
    ]
    close = sum(abs(predicted / measured - 1) <= 0.25 for predicted, measured in pairs)
    return f"{close} of {len(modes)} p99 predictions at 80 % are within 25 %"


def draw_overload(results: Results) -> Figure:
    """What is left of a mode's capacity at 2 and at 10 times the load, in % of it."""
    loads = {
        "own 2 x": ("at 2×", "o", BLUE),
        "own 10 x": (f"at 10×, at most {results.about['most_per_s']:,.0f}/s", "D", RED),
    }
    shares = {
        scenario: [100 * results.get(mode, scenario, "goodput_per_s") / results.get(mode, "capacity", "per_s") for mode in results.modes]
        for scenario in loads
    }  # fmt: skip
    kept = sum(share >= 75 for share in shares["own 2 x"])
    title = f"{kept} of {len(results.modes)} modes keep 75 % or more\nof their capacity at twice that load"
    figure, axes = frame(title, 2.4 + 0.42 * len(results.modes))
    for row, ends in enumerate(zip(*shares.values(), strict=True)):
        axes.plot(ends, [row, row], color=FAINT, linewidth=2)
    for scenario, (label, marker, colour) in loads.items():
        axes.scatter(shares[scenario], range(len(results.modes)), marker=marker, s=70, color=colour, label=label, zorder=3)  # fmt: skip
    list_modes(axes, results.modes)
    axes.set_xlim(left=0)
    axes.set_xlabel(f"goodput within {results.about['limit_s']:g} s, % of own capacity")
    axes.legend(loc="lower left", bbox_to_anchor=(0, 0), frameon=False, fontsize=11)
    return figure


def draw_distribution(results: Results) -> Figure | None:
    """At 80 % of its own capacity: the median, the middle half, nine tenths, and the 99th percentile of each mode."""
    modes = [mode for mode in results.modes if (mode, "own 80 %", "q50_ms") in results.medians]
    if not modes:
        return None
    modes.sort(key=lambda mode: results.get(mode, "own 80 %", "q50_ms"))
    p99 = [results.get(mode, "own 80 %", "q99_ms") for mode in modes]
    least, most = min(p99), max(p99)
    figure, axes = frame(
        f"At 80 % of its capacity every mode's p99\nis {least:.0f} to {most:.0f} ms", 2.2 + 0.42 * len(modes)
    )
    for row, mode in enumerate(modes):
        q = {n: results.get(mode, "own 80 %", f"q{n}_ms") for n in (5, 25, 50, 75, 95, 99)}
        axes.plot([q[5], q[95]], [row, row], color="#56B4E9", linewidth=3, solid_capstyle="butt")
        axes.plot([q[25], q[75]], [row, row], color="#0072B2", linewidth=9, solid_capstyle="butt")
        axes.plot(q[50], row, "o", color="white", markersize=6, markeredgecolor="#000000")
        axes.plot(q[99], row, "D", color="#D55E00", markersize=6)
    list_modes(axes, modes)
    axes.set(xscale="log", xlabel="latency, ms: ○ median, thick 25 to 75 %, thin 5 to 95 %, ◆ p99")
    plain_numbers(axes.xaxis)
    return figure


def draw_prediction(results: Results) -> Figure | None:
    """Measured against predicted."""
    modes = [mode for mode in results.modes if not results.errors(mode, "own 80 %", "p99_ms").empty]
    if not modes:
        return None
    figure, axes = frame(prediction_title(results, modes), 7)
    names = []
    for scenario, color in (("own 50 %", SKY), ("own 80 %", BLUE)):
        predicted, measured = (
            [results.get(mode, scenario, metric) for mode in modes]
            for metric in ("predicted_p99_ms", "p99_ms")
        )
        axes.plot(
            predicted, measured, "o", color=color, markersize=8, label=f"at {scenario[4:]} of its capacity"
        )
        names = [Name(x, y, mode, color) for x, y, mode in zip(predicted, measured, modes)]
    axes.set(xscale="log", yscale="log", xlabel="predicted, ms", ylabel="measured, ms")
    limits = [*axes.get_xlim(), *axes.get_ylim()]
    ends = [min(limits), max(limits)]
    axes.plot(ends, ends, color="black", linewidth=1)
    axes.fill_between(
        ends, [0.75 * end for end in ends], [1.25 * end for end in ends], color="#eeeeee", label="within 25 %"
    )
    axes.set(xlim=ends, ylim=ends)
    plain_numbers(axes.xaxis, axes.yaxis)
    axes.legend(loc="upper left", frameon=False, fontsize=11)
    write_names(axes, names, size=10.5)
    return figure
