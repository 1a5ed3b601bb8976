"""How many replicas a load needs, by which policy, and where a retry storm begins.

$ make plan FLEET="--rate 5000 --replica-ms 10+0.5n --batch 32"
$ make plan FLEET="--report"        # loadtests/results/fleet.md and its picture
"""

import argparse
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from loadtests import arguments
from loadtests.arguments import above
from loadtests.plan import fleet_report
from loadtests.plan.fleet import MARGIN, POLICIES, Fleet, replicas_for, simulate
from loadtests.plan.planner import CostLaw, markdown

RESULTS = Path(__file__).parents[1] / "results"


def law(text: str) -> CostLaw:
    """Read `10+0.5n`: a call with n texts takes 10 ms and half of one more for each. `20`: it takes 20 ms."""
    a_ms, _, b_ms = text.replace(" ", "").partition("+")
    try:
        cost = CostLaw(float(a_ms) / 1e3, float(b_ms.removesuffix("n") or 0) / 1e3)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a cost; use 10+0.5n or 20") from None
    if not 0 < cost.seconds(1) < math.inf or min(cost.a_s, cost.b_s) < 0:
        raise argparse.ArgumentTypeError(f"{text!r} takes no time; use 10+0.5n or 20")
    return cost


def loss(text: str) -> float:
    """Check a share that simulations of some seconds can show."""
    if not 1e-5 <= (value := arguments.share(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a share from 0.00001 to 1")
    return value


def plan(fleet: Fleet, rate_per_s: float, loss: float) -> str:
    """Return how many replicas, by policy, in words."""
    fewest = math.ceil(rate_per_s / fleet.capacity_per_s)
    lines = [
        f"One replica answers {fleet.capacity_per_s:.0f} requests per second at most: {rate_per_s:g} per second take "
        f"{fewest} at least.",
        f"To answer {1 - loss:.3%} within {fleet.deadline_s:g} s:",
        "",
    ]
    rows: list[dict[str, Any]] = []
    for policy in tqdm(POLICIES, "Simulating each policy", delay=2.0, leave=False, disable=None):
        n = replicas_for(replace(fleet, policy=policy), rate_per_s, loss)
        chosen = replace(fleet, policy=policy, replicas=n)
        found = simulate(
            chosen, rate_per_s=rate_per_s, duration_s=max(2 * fleet.deadline_s, 2e4 / rate_per_s)
        )
        rows.append(
            {
                "policy": policy,
                "replicas": str(n),
                "busy": f"{rate_per_s / n / fleet.capacity_per_s:.0%}",
                "p50 ms": found.summary()["p50_ms"],
                "p99 ms": found.summary()["p99_ms"],
            }
        )
    lines.append(markdown(rows))
    n = int(next(row["replicas"] for row in rows if row["policy"] == "least connections"))
    lines += [
        "",
        f"Take least connections, as deploy/haproxy.cfg does, and one more than {n}, so that one may die or restart: "
        f"`make cluster N={n + 1}`"
        + (" on one machine." if n < 31 else " is for one machine; so many need several."),
    ]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Print the plan for one load, or make the report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rate", type=above(0.0), default=100.0, help="requests per second; default 100")
    parser.add_argument(
        "--deadline-s", type=above(0.0), default=1.0, help="an answer after this is worth nothing"
    )
    parser.add_argument("--loss", type=loss, default=0.001, help="the share that may get none; default 0.001")
    parser.add_argument(
        "--replica-ms",
        type=law,
        default=law("20"),
        metavar="A+Bn",
        help="what a call of n texts takes, as `make plan` measures it; default 20",
    )
    parser.add_argument("--batch", type=above(0, int), default=1, help="BATCH_SIZE; default 1")
    parser.add_argument(
        "--report", action="store_true", help="make loadtests/results/fleet.md and its picture"
    )
    options = parser.parse_args(argv)
    if options.report:
        print("Simulating for some minutes.", flush=True)
        fleet_report.write(RESULTS)
        return
    chosen = Fleet(options.replica_ms, deadline_s=options.deadline_s, batch_size=options.batch)
    if chosen.call_s(1) * MARGIN >= chosen.deadline_s:
        parser.error(
            f"a call takes {chosen.call_s(1):g} s, too long for a deadline of {chosen.deadline_s:g} s"
        )
    try:
        print(plan(chosen, options.rate, options.loss))
    except ValueError as exc:
        parser.error(str(exc))


if __name__ == "__main__":
    arguments.run(main)
