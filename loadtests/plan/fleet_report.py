"""What the fleet simulator advises, with its picture: make plan FLEET=--report."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from loadtests.pictures import picture, save
from loadtests.plan.fleet import POLICIES, Autoscaler, Fleet, Outcome, Retries, replicas_for, simulate
from loadtests.plan.planner import CostLaw, markdown

# Nine texts in ten are short, one takes nine times as long: 20 ms on average.
RATIOS = {1: [0.556] * 9 + [5.0]}
UNEVEN = CostLaw(0.0, 0.02, RATIOS)
BATCHES = CostLaw(0.01, 0.0005)
REFUSAL_S = 0.0003
COLOURS = dict(zip(POLICIES, ("#D55E00", "#E69F00", "#0072B2", "#999999"), strict=True))
DAY_S = 86_400.0
CLIENTS = {
    "no retries": Retries(),
    "3 retries at once": Retries(3, 0.02),
    "3 retries, within a budget of 10 %": Retries(3, 0.02, 0.1),
    "50 retries at once": Retries(50, 0.02),
}


def policies(loads: list[float]) -> dict[str, list[float]]:
    """p99 in ms of 20 replicas at these loads."""
    return {
        policy: [
            simulate(
                Fleet(UNEVEN, 20, policy, deadline_s=5.0), rate_per_s=load * 1000, duration_s=40
            ).summary()["p99_ms"]
            for load in loads
        ]
        for policy in POLICIES
    }


def storms(times: list[float]) -> dict[str, list[float]]:
    """Goodput of 4 replicas of an even 20 ms, as a share of their capacity, at multiples of it."""
    fleet = Fleet(CostLaw(0.0, 0.02), 4, refusal_s=REFUSAL_S)
    return {
        name: [
            simulate(replace(fleet, retries=retries), rate_per_s=200 * x, duration_s=8).summary()[
                "goodput_per_s"
            ]
            / 200
            for x in times
        ]
        for name, retries in CLIENTS.items()
    }


def spare(rates: list[float]) -> list[int]:
    """The fewest replicas that answer 99.9 % of these rates within half a second."""
    fleet = Fleet(UNEVEN, deadline_s=0.5)
    return [replicas_for(fleet, rate, 0.001) for rate in rates]


def load_of_day(at_s: float) -> float:
    """A wave between 5 and 35 requests per second, and at eleven a rush of 10 minutes that doubles within one."""
    wave = 20 - 15 * math.cos(2 * math.pi * at_s / DAY_S)
    since_s = at_s - 11 * 3600
    return wave * (1 + min(1.0, since_s / 60) * (0 <= since_s < 600))


def day(cold_start_s: float, headroom: float) -> Outcome:
    """Replicas of 100 ms a text through a day."""
    fleet = Fleet(
        CostLaw(0.0, 0.1), 2, cold_start_s=cold_start_s, autoscaler=Autoscaler(headroom, every_s=15.0)
    )
    return simulate(fleet, rate_per_s=load_of_day, duration_s=DAY_S)


def replica_hours(outcome: Outcome) -> float:
    """What they cost."""
    times, numbers = np.array(outcome.replicas).T
    return float((np.diff([*times, DAY_S]) * numbers).sum() / 3600)


def million() -> list[dict[str, Any]]:
    """A thousand replicas, a million requests per second, for a second."""
    rows = []
    for policy in POLICIES:
        found = simulate(
            Fleet(BATCHES, 1000, policy, batch_size=32), rate_per_s=1e6, duration_s=1.0
        ).summary()
        rows.append(
            {
                "policy": policy,
                "p50 ms": found["p50_ms"],
                "p99 ms": found["p99_ms"],
                "answered": f"{found['answered']:.1%}",
            }
        )
    return rows


def deaths() -> list[dict[str, Any]]:
    """One of ten replicas dies at 80 % of what all can do."""
    rows = []
    for failover in (True, False):
        fleet = Fleet(CostLaw(0.0, 0.02), 10, kills=((5.0, 1),), cold_start_s=6.0, failover=failover)
        outcome = simulate(fleet, rate_per_s=400, duration_s=20)
        found = outcome.summary()
        rows.append(
            {
                "the balancer": "asks another replica" if failover else "does not",
                "unanswered": str(outcome.failed),
                "of": str(outcome.offered),
                "p99 ms": found["p99_ms"],
            }
        )
    return rows


def write(out: Path) -> None:
    """Simulate all of it, a few minutes, and write fleet.md and its picture, light and dark."""
    loads, times = [0.5, 0.7, 0.8, 0.9, 0.95], [0.5, 0.9, 1.1, 1.5, 2.0, 3.0, 5.0]
    rates = [50.0, 200.0, 1000.0, 5000.0]
    p99, goodput, needed = policies(loads), storms(times), spare(rates)
    days = {
        (cold_s, headroom): day(cold_s, headroom)
        for cold_s, headroom in ((10.0, 1.3), (120.0, 1.3), (120.0, 2.2))
    }
    draw(out / "fleet.png", loads, p99, times, goodput, rates, needed, days[120.0, 1.3])
    fewest = [math.ceil(rate * 0.02) for rate in rates]
    text = [
        "# How many replicas, which balancer, where a retry storm begins\n",
        "Simulated, not measured: `make plan FLEET=--report`, with fixed seeds. For your own load and model: "
        '`make plan FLEET="--rate 5000 --replica-ms 10+0.5n --batch 32"`.\n',
        picture("fleet.png", "Policies, replicas needed, retries, a day"),
        "## Which policy\n",
        "p99 in ms of 20 replicas, by load; a request takes 20 ms on average, one in ten nine times as long as the others.\n",
        markdown(
            [{"policy": p, **{f"{x:.0%}": ms for x, ms in zip(loads, p99[p], strict=True)}} for p in POLICIES]
        ),
        "\nTake least connections: it is close to one shared queue, which no load balancer can be. Power of two choices needs no shared "
        "state and comes second; use it with many load balancers. Round robin is as good if all requests take the same time, and the "
        "worst if they don't.\n",
        "1,000 replicas (10 ms per call and 0.5 ms per input, batches of 32), a million requests/s, 81 % of their capacity:\n",
        markdown(million()),
        "\n## How many\n",
        "99.9 % of the requests answered within 0.5 s, least connections:\n",
        markdown(
            [
                {
                    "requests /s": f"{rate:g}",
                    "at least": str(least),
                    "needed": str(n),
                    "utilization": f"{rate * 0.02 / n:.0%}",
                }
                for rate, least, n in zip(rates, fewest, needed, strict=True)
            ]
        ),
        "\nA small fleet needs spare replicas, a large one next to none. Add one for restarts and failures.\n",
        "## When one dies\n",
        markdown(deaths()),
        "\n## Where a retry storm begins\n",
        f"Goodput as a share of the capacity of 4 replicas of 20 ms, by offered load and how clients retry; a rejection costs {REFUSAL_S * 1e3:g} ms of their core.\n",
        markdown(
            [
                {"load": f"{x:g}×", **{name: f"{shares[i]:.2f}" for name, shares in goodput.items()}}
                for i, x in enumerate(times)
            ]
        ),
        storm_advice(times, goodput),
        "## A day\n",
        "Between 5 and 35 requests/s of 100 ms each, twice as many for ten minutes at eleven. The autoscaler looks every 15 s "
        "and removes replicas that were idle for 5 minutes.\n",
        markdown(
            [
                {
                    "cold start s": f"{cold_s:g}",
                    "headroom": f"{headroom:g}",
                    "rejected": f"{outcome.failed / outcome.offered:.2%}",
                    "replica hours": replica_hours(outcome),
                    "most": str(max(n for _, n in outcome.replicas)),
                }
                for (cold_s, headroom), outcome in days.items()
            ]
        ),
        "\nRequests are rejected while replicas start, and at night when only one is running. Headroom must cover the growth of the load during one cold start; a "
        "shorter start costs less.\n",
    ]
    (out / "fleet.md").write_text("\n".join(text))


def storm_advice(times: list[float], goodput: dict[str, list[float]]) -> str:
    """From where on retries cost a tenth of the answers, and half of them."""
    plain = goodput["no retries"]
    lines = []
    for name in list(goodput)[1:]:
        shares = [share / base for share, base in zip(goodput[name], plain, strict=True)]
        tenth, half = (
            next((x for x, share in zip(times, shares) if share < most), None) for most in (0.9, 0.5)
        )
        found = (
            f"10 % of the goodput lost from {tenth:g}× the capacity on"
            if tenth
            else "less than 10 % of the goodput lost"
        )
        lines.append(
            f"- {name}: {found}, " + (f"half of it from {half:g}× on." if half else "and never half.")
        )
    return (
        "\n"
        + "\n".join(lines)
        + "\n\nWhat matters is offered load × (1 + retries) × the cost of a rejection. Shedding load keeps goodput up for a long time; unbounded "
        "retries are what collapse a fleet. Honour Retry-After or use a retry budget. (The simulation is pessimistic: the server holds "
        "each rejection for up to 0.1 s once there are more than 1,000 a second, which slows such clients down.)\n"
    )


def draw(
    path: Path,
    loads: list[float],
    p99: dict[str, list[float]],
    times: list[float],
    goodput: dict[str, list[float]],
    rates: list[float],
    needed: list[int],
    outcome: Outcome,
) -> None:
    """Four findings."""
    figure, axes = plt.subplots(2, 2, figsize=(11, 8), layout="constrained")
    figure.get_layout_engine().set(rect=(0, 0.03, 1, 0.97))
    one, two, three, four = (ax for row in axes for ax in row)
    for policy, ms in p99.items():
        one.plot([x * 100 for x in loads], ms, "o-", color=COLOURS[policy])
        one.text(loads[-1] * 101, ms[-1], policy, color=COLOURS[policy], va="center")
    titled(
        one, "Least connections is close to one shared queue", "offered load / capacity, %", "p99 latency, ms"
    )
    one.set_yscale("log")
    one.set_yticks([100, 200, 400], ["100", "200", "400"], minor=False)
    one.minorticks_off()
    one.set_xlim(right=108)
    one.set_xticks([50, 60, 70, 80, 90])
    two.plot(
        rates, [100 * rate * 0.02 / n for rate, n in zip(rates, needed, strict=True)], "o-", color="#0072B2"
    )
    for rate, n in zip(rates, needed, strict=True):
        two.annotate(f"{n} replicas", (rate, 100 * rate * 0.02 / n), (8, -16), textcoords="offset points")
    two.set_xscale("log")
    two.set_ylim(0, 105)
    two.margins(x=0.25)
    titled(
        two,
        "The larger the fleet, the higher its utilization can be\n(99.9 % answered within 0.5 s)",
        "requests per second",
        "utilization, %",
    )
    for (name, shares), colour in zip(
        goodput.items(), ("#999999", "#E69F00", "#009E73", "#D55E00"), strict=True
    ):
        three.plot(times, shares, "o-", color=colour)
        up = 0.03 if name == "no retries" else -0.03 if "budget" in name else 0.0  # they meet
        three.text(times[-1] + 0.1, shares[-1] + up, name, color=colour, va="center")
    three.set_ylim(0, 1.1)
    three.set_xlim(right=8.4)
    three.set_xticks(range(6))
    titled(
        three,
        "Retries without a bound leave no time for answers",
        "offered load / capacity",
        "goodput / capacity",
    )
    hours = [i / 20 for i in range(480)]
    four.plot(
        hours,
        [load_of_day(3600 * hour) * 0.1 for hour in hours],
        color="#999999",
        label="load, in replicas",
    )
    at, n = np.array(outcome.replicas).T
    four.step(at / 3600, n, where="post", color="#0072B2", label="replicas")
    lost = np.array(outcome.failed_s) / 3600
    four.plot(lost, np.zeros_like(lost), "|", color="#D55E00", markersize=12, label="rejections")
    four.legend(frameon=False, loc="upper right")
    titled(
        four,
        "A rush is rejected until new replicas have started\n(cold start 2 minutes)",
        "hour of the day",
        "replicas",
    )
    save(figure, path, 110, footer="simulated, fixed seeds")


def titled(ax: Axes, title: str, x: str, y: str) -> None:
    ax.set_title(title, loc="left", fontsize=11)
    ax.set_xlabel(x)
    ax.set_ylabel(y)
    ax.spines[["top", "right"]].set_visible(False)
