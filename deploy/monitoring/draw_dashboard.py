"""The dashboard's panels drawn from Prometheus' API: `python -m deploy.monitoring.draw_dashboard http://127.0.0.1:9090 5m`.

For a README or a report, and where there is no Grafana. Writes deploy/monitoring/dashboard.png, and its dark variant.
"""

import json
import math
import re
import sys
import time
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter, PercentFormatter

from deploy.monitoring.grafana import ACROSS, PANELS, RATE, Panel
from loadtests.pictures import save

PICTURE = Path(__file__).with_name("dashboard.png")
POINTS = 120
UNITS = {
    "s": EngFormatter("s", sep=" "),
    "bytes": EngFormatter("B", sep=" "),
    "percentunit": PercentFormatter(1, 0),
}
Series = list[tuple[str, list[float], list[float]]]  # the legend, when, what


def ask(prometheus: str, path: str, **query: Any) -> list[dict[str, Any]]:
    """What Prometheus finds. Raises urllib.error.HTTPError where it does not understand."""
    url = f"{prometheus}/api/v1/{path}?{urllib.parse.urlencode(query)}"
    with urllib.request.urlopen(url, timeout=30) as reply:
        return json.load(reply)["data"]["result"]


def series(prometheus: str, panel: Panel, minutes: float, rate: str) -> Series:
    """What a panel shows of the last `minutes`."""
    found: Series = []
    end = time.time()
    for legend, expr in panel.shows.items():
        told = {
            "query": expr.replace(RATE, rate),
            "start": end - 60 * minutes,
            "end": end,
            "step": 60 * minutes / POINTS,
        }
        for one in ask(prometheus, "query_range", **told):
            name = re.sub(r"{{(\w+)}}", lambda label, one=one: one["metric"].get(label[1], ""), legend)
            when = [(at - end) / 60 for at, _ in one["values"]]
            found.append((name, when, [float(value) for _, value in one["values"]]))
    return found


def draw(axes: Axes, panel: Panel, found: Series) -> None:
    axes.set_title(panel.title, loc="left", fontsize=10)
    axes.tick_params(labelsize=8)
    axes.locator_params(nbins=5)
    axes.spines[["top", "right"]].set_visible(False)
    if panel.kind == "heatmap":
        return draw_heatmap(axes, found, cumulative="{{le}}" in panel.shows)
    told = [one for one in found if any(one[2])] or found[:1]  # what was never there needs no line
    for name, when, values in told:
        axes.plot(when, values, linewidth=1.2, label=name)
    highest = max((value for _, _, values in told for value in values if math.isfinite(value)), default=0)
    axes.set_ylim(0, 1.4 * (panel.most or highest or 1))  # room for the legend
    if panel.unit in UNITS:
        axes.yaxis.set_major_formatter(UNITS[panel.unit])
    axes.legend(fontsize=7, frameon=False, loc="upper left", ncols=3)


def draw_heatmap(axes: Axes, found: Series, *, cumulative: bool) -> None:
    """A row for each series; of buckets each less those within it."""
    if cumulative:
        found = sorted(found, key=lambda one: float(one[0]))
    times = sorted({at for _, when, _ in found for at in when})
    rows, below = [], dict.fromkeys(times, 0.0)
    for _, when, values in found:
        row = dict.fromkeys(times, 0.0) | dict(zip(when, values))
        rows.append([max(0.0, row[at] - below[at]) if cumulative else row[at] for at in times])
        below = row
    kept = [(name, row) for (name, _, _), row in zip(found, rows) if any(row)]
    names = [name.removesuffix(".0") for name, _ in kept]
    axes.pcolormesh(
        times, range(len(kept)), [row for _, row in kept], cmap="Blues", vmin=0, shading="nearest"
    )
    axes.set_yticks(range(len(kept)), names)


def main(prometheus: str = "http://127.0.0.1:9090", span: str = "5m", rate: str = "15s") -> None:
    minutes = float(span.removesuffix("m"))
    found = [(panel, series(prometheus, panel, minutes, rate)) for panel in PANELS]
    found = [(panel, some) for panel, some in found if some]  # none of text generation beside another task
    down = -(-len(found) // ACROSS)
    figure, grid = plt.subplots(down, ACROSS, figsize=(12, 2 * down), layout="constrained", squeeze=False)
    for axes, (panel, some) in zip(grid.flat, found):
        draw(axes, panel, some)
    for axes in list(grid.flat)[len(found) :]:
        axes.remove()
    for axes in grid[-1]:
        axes.set_xlabel("minutes ago", fontsize=8)
    save(figure, PICTURE, 100)


if __name__ == "__main__":
    main(*sys.argv[1:])
