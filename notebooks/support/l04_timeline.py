"""Lesson 4: requests and calls on a line of time, from the simulator."""

import matplotlib.pyplot as plt
import pandas as pd
from lesson import BLUE, GREY, ORANGE, simulate

from loadtests.plan.planner import CostLaw

RULES = {
    "one by one": {"batch_size": 1},
    "greedy": {"batch_size": 8, "delay_ms": 0},
    "delay 10 ms": {"batch_size": 8, "delay_ms": 10},
}


def timeline(cost: CostLaw, arrivals_ms: list[float]) -> dict[str, pd.DataFrame]:
    """For each rule a row per request: when it came, when its call began and ended, in ms."""
    found = {}
    for name, rule in RULES.items():
        df = simulate(cost, arrivals_s=[ms / 1000 for ms in arrivals_ms], overhead_s=0, **rule)
        began = df.due_s * 1000 + df.queue_ms
        found[name] = pd.DataFrame({"came": df.due_s * 1000, "began": began, "ended": began + df.model_ms})
    return found


def draw(found: dict[str, pd.DataFrame]) -> None:
    """A strip for each rule: letters where requests come, bars for calls with the letters that are in them."""
    _, axes = plt.subplots(len(found), 1, sharex=True, figsize=(6.4, 1.35 * len(found)))
    for ax, (name, df) in zip(axes, found.items()):
        letters = [chr(ord("A") + i) for i in range(len(df))]
        for letter, came in zip(letters, df.came):
            ax.text(came, 1.05, letter, ha="center", color=GREY, fontsize=11)
            ax.plot([came, came], [0.75, 1.0], color=GREY, linewidth=1)
        for (began, ended), call in df.assign(letter=letters).groupby([df.began.round(3), df.ended.round(3)]):
            ax.barh(
                0.35, ended - began, 0.6, began, color=BLUE if len(call) == 1 else ORANGE, edgecolor="white"
            )
            ax.text((began + ended) / 2, 0.35, "".join(call.letter), color="white", ha="center", va="center")
        mean = (df.ended - df.came).mean()
        ax.set_title(f"{name}: mean {mean:.0f} ms, the last at {df.ended.max():.0f} ms", fontsize=12)
        ax.set(ylim=(0, 1.4), yticks=[])
        ax.spines["left"].set_visible(False)
        ax.grid(visible=False)
    axes[-1].set_xlabel("ms")
    plt.show()
