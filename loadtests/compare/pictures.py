"""What all pictures share: colours, plain numbers, and names beside the data in place of legends."""

import math
import textwrap
from collections.abc import Iterable
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter

# Okabe and Ito's colours, which all kinds of eyes tell apart, in print too.
BLUE, ORANGE, GREEN, RED, PURPLE, SKY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9"
GREY, FAINT = "#777777", "#CCCCCC"


class Name(NamedTuple):
    """A name, the point in data coordinates that it stands beside, and its colour."""

    x: float
    y: float
    text: str
    color: str


def write_names(axes: Axes, names: Iterable[Name], *, size: float = 12, width: int = 18) -> None:
    """Write each to the right of its point, in lines of `width` characters; where it would cover another or a point, it moves up,
    and a thin line leads back.

    Call it last, when the data is drawn and the scales are set.
    """
    axes.figure.draw_without_rendering()  # type: ignore[union-attr]  # only then are the limits known
    px = axes.figure.dpi / 72
    placed: list[tuple[float, float, Name]] = []
    # Bottom, top, left and right of the points, and of the names that are written.
    taken: list[tuple[float, float, float, float]] = []
    for name in names:
        x_px, y_px = axes.transData.transform((name.x, name.y)).tolist()
        placed.append((x_px, y_px, name))
        taken.append((y_px - 4 * px, y_px + 4 * px, x_px - 4 * px, x_px + 4 * px))
    for x_px, y_px, name in sorted(placed, key=lambda one: one[1]):
        lines = textwrap.wrap(name.text, width)
        half, left = len(lines) * size * 1.2 * px / 2, x_px + 5 * px
        right = left + max(map(len, lines)) * size * 0.65 * px
        middle = max(y_px, axes.bbox.y0 + half)  # none on the axis
        for bottom, top, start, end in sorted(taken):
            if start < right and left < end and bottom < middle + half and middle - half < top:
                middle = top + half
        taken.append((middle - half, middle + half, left, right))
        offset = (8, (middle - y_px) / px)
        leader = {"arrowstyle": "-", "color": name.color, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 4}
        axes.annotate(
            "\n".join(lines),
            (name.x, name.y),
            offset,
            textcoords="offset points",
            color=name.color,
            va="center",
            fontsize=size,
            arrowprops=leader if offset[1] > size else None,
        )


def name_lines(axes: Axes, **options: Any) -> None:
    """Write the label of each line or series of dots beside its last point."""
    ends = []
    for line in axes.get_lines():
        points: list[list[float]] = line.get_xydata().tolist()
        points = [point for point in points if all(map(math.isfinite, point))]
        if points and not str(line.get_label()).startswith("_"):
            x, y = max(points)
            ends.append(Name(x, y, str(line.get_label()), str(line.get_color())))
    write_names(axes, ends, **options)


def plain_numbers(*axes: Any) -> None:
    """200, not 2 x 10^2, on a logarithmic axis; 2 and 5 between the powers of ten where there is room."""
    for axis in axes:

        def between(value: float, _: int, axis: Any = axis) -> str:
            low, high = axis.get_view_interval()
            return f"{value:g}" if f"{value:e}"[0] in "25" and high < 500 * low else ""

        axis.set_tick_params(which="both", length=3, pad=4)  # one line of numbers, not two
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(FuncFormatter(between))
