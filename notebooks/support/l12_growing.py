"""Do something to a server under load, and see what its clients get."""

import re
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from lesson import counters

from loadtests.modes import ROOT, Server

READY = re.compile(r"replica (\d+) is ready")


@dataclass(frozen=True)
class Disturbed:
    """What the clients got; when it happened, on their clock; how long until it was over."""

    rows: pd.DataFrame
    at_s: float
    took_s: float


def answers(server: Server) -> int:
    """How many it has given."""
    return int(counters(server).get('model_requests_total{status="200"}', 0))


def replicas_ready(server: Server) -> int:
    """How often a replica has become ready since it was started."""
    return len(READY.findall(server.log()))


def disturb(
    server: Server,
    load: Callable[[], pd.DataFrame],
    act: Callable[[], None],
    after_answers: int,
    patience_s: float = 60.0,
) -> Disturbed:
    """Run `load`; after so many answers `act`; wait until one replica more has become ready, and the load has ended."""
    before, ready = answers(server), replicas_ready(server)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(load)
        while (n := answers(server) - before) < after_answers and not running.done():
            time.sleep(0.02)
        began = time.monotonic()
        act()
        while replicas_ready(server) == ready and time.monotonic() - began < patience_s:
            time.sleep(0.02)
        took_s = time.monotonic() - began
        rows = running.result()
    return Disturbed(rows, float(rows["due_s"].iloc[min(n, len(rows) - 1)]), took_s)


def kill_a_replica(server: Server) -> None:
    """kill -9, as the kernel does when memory runs out."""
    replica = next(process for process in server.processes() if "server:app" in process.cmdline())
    replica.kill()


def add_a_replica(server: Server) -> None:
    """As an operator does: kill -TTIN."""
    server.process.send_signal(signal.SIGTTIN)


def by_second(rows: pd.DataFrame, status: str = "200") -> pd.Series:
    """How many of the requests of each second ended so."""
    seconds = rows["due_s"].astype(int)
    return (rows["outcome"] == status).groupby(seconds).sum()


def ray() -> pd.DataFrame:
    """A stored run of Ray Serve's autoscaler: a row a second. Made by loadtests/ray/curve.py."""
    return pd.read_csv(ROOT / "loadtests" / "results" / "ray.csv", index_col="second")


def ray_waits_s(config: Path = ROOT / "deploy" / "ray" / "serve.yaml") -> int:
    """The seconds for which Serve looks and waits, by its settings, before it starts a replica."""
    names = "metrics_interval_s|look_back_period_s|upscale_delay_s"
    return sum(int(n) for n in re.findall(rf"^ +(?:{names}): (\d+)", config.read_text(), re.MULTILINE))
