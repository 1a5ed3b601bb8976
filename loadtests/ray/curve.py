"""Serve's autoscaling as a curve: load, replicas, waits, rejections; results/ray.csv and ray.png, light and dark.

$ unshare -rnpf --kill-child --mount-proc sh -c 'ip link set lo up; exec "$@"' sh python -m loadtests.ray.curve

A model of 20 ms a request, so 50/s a replica; the load is four times what one replica can, for a while. Serve counts the
requests that are in each replica, as deploy/ray/serve.yaml says.
"""

import json
import tempfile
import threading
import time
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import pandas as pd
import yaml

from loadtests import arguments, host
from loadtests.load import generator
from loadtests.modes import ROOT
from loadtests.pictures import save
from loadtests.ray.cluster import Cluster, nodes

RESULTS = Path(__file__).parents[1] / "results"
PER_S = 50.0
PHASES = ((12, 0.4), (50, 4.0), (32, 0.4))  # seconds, and the load in capacities of one replica
LIMIT_S = 2.0
MAX_REPLICAS = 6


def config() -> dict[str, object]:
    """deploy/ray/serve.yaml's scaled application, for a model of known speed; it lets go sooner, to be seen doing so."""
    whole = yaml.safe_load((ROOT / "deploy" / "ray" / "serve.yaml").read_text())
    app = next(app for app in whole["applications"] if app["name"] == "fill-mask-1")
    app["route_prefix"] = "/"
    app["runtime_env"] = {"env_vars": {"MODEL": "loadtests.bench.apps:Sleeps", "DEADLINE_S": f"{LIMIT_S:g}"}}
    app["deployments"][0]["autoscaling_config"] |= {
        "max_replicas": MAX_REPLICAS,
        "downscale_delay_s": 8,
    }
    return {"applications": [app]}


def measure(cluster: Cluster) -> pd.DataFrame:
    """A row for each second: offered, answered, rejected, p95 of the wait in the queue, replicas."""
    counts: dict[int, int] = {}
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.5):
            counts[int(time.monotonic() - began)] = len(cluster.running("fill-mask-1"))

    watcher = threading.Thread(target=watch)
    parts = []
    with generator.generator() as locust:
        began = time.monotonic()
        watcher.start()
        for seconds, load in PHASES:
            since_s = time.monotonic() - began
            df = locust.run(
                cluster.url,
                "open",
                rate_per_s=load * PER_S,
                duration_s=seconds,
                limit_s=LIMIT_S,
                timeout_s=5.0,
            )
            df["due_s"] += since_s
            parts.append(df)
        over.set()
        watcher.join()
    df = pd.concat(parts)
    by_second = df.groupby(df["due_s"].astype(int))
    rows = pd.DataFrame(
        {
            "offered": by_second.size(),
            **{
                name: by_second["outcome"].agg(lambda o, name=name: (o == name).sum())
                for name in ("200", "503")
            },
            "wait_p95_ms": by_second["queue_ms"].quantile(0.95).round(1),
            "replicas": pd.Series(counts),
        }
    )
    rows["other"] = rows["offered"] - rows["200"] - rows["503"]
    rows["replicas"] = rows["replicas"].ffill().bfill().astype(int)
    return rows.dropna(subset=["offered"])


def draw(rows: pd.DataFrame, path: Path, about: str) -> None:
    """Load, replicas and waits below each other; `about` is the machine and the date."""
    plt.rcParams.update({"font.size": 12, "axes.spines.top": False, "axes.spines.right": False})
    figure, (load, replicas, wait) = plt.subplots(3, sharex=True, figsize=(9, 8), height_ratios=(3, 2, 2))
    load.plot(rows["offered"], color="#999999", label="offered")
    load.plot(rows["200"], color="#0072B2", label="answered")
    load.plot(rows["503"], color="#D55E00", label="rejected (503)")
    load.legend(frameon=False)
    load.set_ylabel("requests/s")
    replicas.step(rows.index, rows["replicas"], where="post", color="#0072B2")
    replicas.set(ylabel="replicas", ylim=(0, MAX_REPLICAS + 0.5))
    wait.plot(rows["wait_p95_ms"], color="#0072B2")
    wait.set(ylabel="p95 queue time, ms", xlabel="seconds", ylim=(0, None))
    rejecting = rows.index[rows["503"] > 0]
    lasted_s = rejecting.max() - rejecting.min() + 1 if len(rejecting) else 0
    figure.suptitle(
        f"When the load grows to {PHASES[1][1]:g} times one replica's capacity,\n"
        f"Ray Serve has enough replicas after {lasted_s:.0f} s; until then requests are rejected",
        x=0.02,
        ha="left",
        fontweight="bold",
    )
    figure.tight_layout(rect=(0, 0.02, 1, 1))
    shares = [f"{rows[name].sum() / rows['offered'].sum():.1%}" for name in ("200", "503", "other")]
    counts = "of {:,.0f} requests {} answered, {} rejected, {} other".format(rows["offered"].sum(), *shares)
    save(figure, path, 110, footer=f"stub model, 20 ms per request; {about}; {counts}")


def main() -> None:
    with nodes() as cluster, tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        json.dump(config(), file)
        file.flush()
        cluster.call(f"serve run --non-blocking {file.name}")
        cluster.wait_until_ready()
        rows = measure(cluster)
    rows.to_csv(RESULTS / "ray.csv", index_label="second")
    about = host.describe()
    draw(rows, RESULTS / "ray.png", f"{about['processor']}, {about['cores']} cores, {about['date']}")
    print(rows[["offered", "200", "503", "other"]].sum().to_string())


if __name__ == "__main__":
    arguments.run(main)
