"""Choose a server by what was measured, not by points that somebody gave: loadtests/results/peers.csv.

measured().loc["mosec"]
choose(measured(), weights={"short texts/s": 1}, most={"memory, MB": 1000})
"""

from collections.abc import Mapping
from pathlib import Path
from unittest.mock import patch

import matplotlib
import numpy as np
import pandas as pd

with patch.object(matplotlib, "use"):  # they would switch to pictures in files only
    from loadtests.peers.report import FASTEST, Results

RESULTS = Path(__file__).resolve().parents[2] / "loadtests" / "results"
# Where it stands in peers.csv, and whether more is better.
CRITERIA = {
    "short texts/s": ("float32", "short 64", "per_s", True),
    "mixed texts/s": ("float32", "mixed 64", "per_s", True),
    "in time at twice its load, /s": ("float32", "at 2 x", "goodput_per_s", True),
    "p99 at half load, ms": ("float32", "at 50%", "p99_ms", False),
    "memory, MB": ("float32", "memory", "mb", False),
    "start, s": ("float32", "start", "first_answer_s", False),
}


def measured(folder: Path = RESULTS) -> pd.DataFrame:
    """A row for each server of which all criteria were measured: medians. Of our own settings the one of the README."""
    results = Results(folder)
    rows = {
        peer: {name: results.get(peer, *place) for name, (*place, _) in CRITERIA.items()}
        for peer in results.peers
        if not peer.startswith("ours") or peer == FASTEST
    }
    return pd.DataFrame.from_dict(rows, orient="index").dropna().rename(index={FASTEST: "this server"})


def day(folder: Path = RESULTS) -> str:
    """When it was measured, and on what."""
    about = Results(folder).about
    return f"{about['processor']}, {about['cores']} cores, {about['date']}"


def shares(found: pd.DataFrame) -> pd.DataFrame:
    """Each measurement as a share of the best one, from 0 to 1: half of the best speed is 0.5, twice its memory, too."""
    more = [CRITERIA[name][-1] for name in found]
    best = found.max().where(more, found.min())
    return (found / best).where(np.tile(more, (len(found), 1)), best / found)


def choose(
    found: pd.DataFrame,
    weights: Mapping[str, float],
    least: Mapping[str, float] | None = None,
    most: Mapping[str, float] | None = None,
) -> pd.Series:
    """Scores from 0 to 1, best first, of those that keep every limit. A limit is kept or not; a weight only moves points."""
    for name, limit in (least or {}).items():
        found = found[found[name] >= limit]
    for name, limit in (most or {}).items():
        found = found[found[name] <= limit]
    if found.empty:
        return pd.Series(dtype=float)
    wanted = pd.Series(weights, dtype=float)
    return (shares(found)[wanted.index] @ (wanted / wanted.sum())).sort_values(ascending=False)
