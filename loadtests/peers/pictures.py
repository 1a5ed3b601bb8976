"""The two pictures of the comparison, made from the rows alone."""

import math
from pathlib import Path
from typing import Protocol

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from loadtests.pictures import save

INCHES, DPI = (9.0, 4.2), 200
INK, GRID = "#1f2328", "#d8dee4"
# The six servers that are named; of the others the tables tell.
SHOWN = {
    "this server, batch 32": "#0072B2",
    "mosec": "#009E73",
    "transformers-page": "#B8860B",
    "bentoml": "#AA4499",
    "torchserve": "#D55E00",
    "litserve": "#777777",
}
LOADS = ("at 50%", "at 80%", "at 2 x", "at 10 x")
TOP = 6  # servers in the picture of throughput


class Measured(Protocol):
    """What a picture needs of the results."""

    peers: list[str]

    def get(self, peer: str, model: str, what: str, metric: str, default: float = math.nan) -> float: ...


def write_pictures(results: Measured, footer: str, out: Path) -> None:
    """Write peers.png and peers-overload.png, and of each a dark variant."""
    for name, draw in {"peers": draw_throughput, "peers-overload": draw_overload}.items():
        save(draw(results), out / f"{name}.png", DPI, footer=footer)


def panels(title: str, widths: tuple[float, float], **margins: float) -> tuple[Figure, list[Axes]]:
    """Return a figure with its finding as the title, and two panels beside each other."""
    figure, axes = plt.subplots(1, 2, figsize=INCHES, width_ratios=widths, layout="none")
    figure.subplots_adjust(
        **{"left": 0.075, "right": 0.98, "top": 0.76, "bottom": 0.2, "wspace": 0.45} | margins
    )
    figure.text(0.012, 0.97, title, fontsize=13, fontweight="bold", color=INK, va="top", linespacing=1.25)
    for axis in axes:
        axis.tick_params(colors=INK, labelsize=10, length=0)
        axis.grid(color=GRID, linewidth=0.8)
        axis.set_axisbelow(True)
        for side in axis.spines.values():
            side.set_visible(False)
    return figure, list(axes)


def headed(axis: Axes, text: str) -> None:
    axis.set_title(text, fontsize=10.5, color=INK, loc="left", pad=8)


def own_capacity(results: Measured, peer: str) -> float:
    """What a server answers in a closed loop, per second: half of the load that was offered at 2 x."""
    return results.get(peer, "float32", "at 2 x", "offered_per_s") / 2


def goodput_shares(results: Measured, peer: str) -> list[tuple[float, float]]:
    """For each load: offered load as a multiple of the server's own capacity, goodput as % of it."""
    capacity = own_capacity(results, peer)
    return [
        (
            results.get(peer, "float32", load, "offered_per_s") / capacity,
            100 * results.get(peer, "float32", load, "goodput_per_s") / capacity,
        )
        for load in LOADS
    ]


def replied(results: Measured, peer: str, load: str) -> float:
    """% of the clients that got a reply, an answer or a rejection, before they hung up."""
    requests = results.get(peer, "float32", load, "requests")
    return 100 * (1 - results.get(peer, "float32", load, "n_lost", 0.0) / requests)


def draw_overload(results: Measured) -> Figure:
    """Left: goodput by load, both in shares of the server's own capacity. Right: how many clients got any reply at 10 x."""
    shown = [name for name in SHOWN if name in results.peers and not math.isnan(own_capacity(results, name))]
    kept = [
        name.partition(",")[0]
        for name in shown
        if goodput_shares(results, name)[-1][1] >= 50 and replied(results, name, "at 10 x") >= 99
    ]
    title = (
        f"Under overload {' and '.join(filter(None, [', '.join(kept[:-1]), *kept[-1:]]))} keep half of their capacity or more\n"
        "and reply to every client; most others collapse, or leave clients without a reply"
    )
    figure, (left, right) = panels(title, (1.3, 1), wspace=0.68)
    for name in shown:
        colour, front = SHOWN[name], name == next(iter(SHOWN))
        points = goodput_shares(results, name)
        left.plot(*zip(*points, strict=True), color=colour, linewidth=3 if front else 1.8, marker="o", markersize=5 if front else 4, zorder=4 if front else 3)  # fmt: skip
    same = sum(goodput_shares(results, name)[2][1] < 2 for name in results.peers if name not in SHOWN)
    left.text(0.37, 2, f"{same} other servers\ndo as litserve does", fontsize=9, color=SHOWN["litserve"])
    left.set_xscale("log")
    left.set_xlim(0.34, 16)
    left.set_ylim(-4, 112)
    left.set_xticks([0.5, 1, 2, 5, 10], ["0.5×", "1×", "2×", "5×", "10×"])
    left.minorticks_off()
    headed(left, "goodput within 1 s, % of own capacity")
    left.set_xlabel("offered load / own capacity", fontsize=10, color=INK)
    shares = {name: replied(results, name, "at 10 x") for name in shown}
    for row, (name, share) in enumerate(shares.items()):
        loads = goodput_shares(results, name)
        right.barh(row, share, 0.62, color=SHOWN[name])
        right.text(share + 2, row, f"{share:.0f} %", va="center", fontsize=10, color=INK)
        label = f"{name} ({loads[-1][0]:.0f}×)".replace("this server, batch 32", "this server")
        right.text(-3, row, label, va="center", ha="right", fontsize=10, color=SHOWN[name],
                   fontweight="bold" if row == 0 else "normal")  # fmt: skip
    right.set_yticks([])
    right.set_ylim(len(shown) - 0.4, -0.6)
    right.set_xlim(0, 119)
    right.set_xticks([0, 50, 100])
    headed(right, "clients with any reply within 1.5 s, %")
    right.set_xlabel("at the highest load it got", fontsize=10, color=INK)
    return figure


def draw_throughput(results: Measured) -> Figure:
    """Bars of the fastest servers at 64 connections: short texts, and mixed lengths."""
    names = [
        name for name in results.peers if not math.isnan(results.get(name, "float32", "short 64", "per_s"))
    ]
    here, stock = next(iter(SHOWN)), "this server, batch 32, stock"
    others = [name for name in names if not name.startswith("this server")]
    kept = [name for name in (here, stock) if name in names] + others[: TOP - 2]
    title = "Most of the gain is the model call: no padding, so mixed lengths cost little;\nwith the stock pipeline this server is as fast as the other PyTorch servers"
    figure, axes = panels(title, (1, 1), left=0.245, bottom=0.16, wspace=0.12)
    for axis, kind in zip(axes, ("short", "mixed"), strict=True):
        values = [results.get(name, "float32", f"{kind} 64", "per_s") for name in kept]
        rest = max(
            (results.get(name, "float32", f"{kind} 64", "per_s") for name in others[TOP - 2 :]), default=0.0
        )
        most = max(values, default=1.0)
        for row, (name, value) in enumerate(zip(kept, values, strict=True)):
            ours = SHOWN[here]
            axis.barh(row, value, 0.66, color=ours if name.startswith("this server") else SHOWN["litserve"],
                      alpha=0.55 if name == stock else 1.0)  # fmt: skip
            axis.text(value + most * 0.02, row, f"{value:,.0f}", va="center", fontsize=10, color=INK)
        axis.text(most * 0.4, len(kept) - 0.25, f"the {len(others[TOP - 2 :])} other servers: at most {rest:,.0f}", fontsize=9, color=INK, va="center")  # fmt: skip
        axis.set_yticks(range(len(kept)), [name.replace("this server, batch 32, stock", "this server, stock pipeline").replace(", batch 32", "") for name in kept])  # fmt: skip
        axis.set_ylim(len(kept) + 0.1, -0.6)
        axis.set_xlim(0, most * 1.15)
        axis.grid(visible=False, axis="y")
    axes[1].set_yticks([])
    headed(axes[0], "requests/s, short texts")
    headed(axes[1], "requests/s, mixed lengths")
    return figure
