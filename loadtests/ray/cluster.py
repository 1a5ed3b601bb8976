"""Ray on this machine with the app on it, for tests and measurements. Ray listens on all addresses: so only by

$ unshare -rnpf --kill-child --mount-proc sh -c 'ip link set lo up; exec "$@"' sh COMMAND

which gives it a network and processes of its own; all of them end with the command.
"""

import contextlib
import json
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil

from loadtests.modes import ROOT, Mode, Server

BIN = Path(sys.executable).parent
RAY = Mode("ray", "serve run deploy.ray.serve:app")


def obstacle() -> str:
    """Why Ray can't run here; empty where it can."""
    if not find_spec("ray"):
        return "Ray is not installed: pip install -r deploy/ray/requirements.txt"
    if [name for _, name in socket.if_nameindex()] != ["lo"]:
        return (
            "Ray listens on all addresses: run it in a network of its own, as loadtests/ray/cluster.py says"
        )
    return ""


@dataclass
class Cluster(Server):
    """Nodes on this machine and what Serve runs on them."""

    env: dict[str, str]

    def call(self, command: str, **env: str) -> str:
        """Run a command of this interpreter's environment and return what it says; RuntimeError where it fails."""
        program, *arguments = command.split()
        done = subprocess.run(
            [BIN / program, *arguments],
            cwd=ROOT,
            env=self.env | env,
            stdout=subprocess.PIPE,
            stderr=self.log_file,
            text=True,
        )
        if done.returncode:
            said = done.stdout + super().log()[-5000:]
            raise RuntimeError(f"{command} ended with {done.returncode}:\n{said}")
        return done.stdout

    def deploy(self, **settings: str) -> None:
        """Serve the app at /, or bring what is there to these settings; returns once it is served."""
        self.call("serve run --non-blocking deploy.ray.serve:app", **settings)

    def log(self) -> str:
        """What the replicas have said."""
        logs = Path(self.env["RAY_TMPDIR"]).glob("ray/session_latest/logs/worker-*.err")
        return "".join(log.read_text(errors="replace") for log in logs)

    def processes(self) -> list[psutil.Process]:
        """Ray's and HAProxy's, too."""
        return [one for one in psutil.process_iter() if self.env["RAY_TMPDIR"] in environ(one).values()]

    def wait_until_ready(self, timeout_s: float = 120.0) -> None:
        """Poll /ready: Serve still loads what a config file names when `serve run` has returned."""
        until = time.monotonic() + timeout_s
        while time.monotonic() < until:
            with contextlib.suppress(OSError), urllib.request.urlopen(self.url + "ready", timeout=5):
                return
            time.sleep(0.05)
        raise RuntimeError(f"{self.url} is not ready:\n{self.log()}")

    def wait_until_idle(self, timeout_s: float = 60.0, window_s: float = 0.25) -> None:
        """Wait `window_s`, no more: Ray's own processes are never idle."""
        time.sleep(window_s)

    def status(self) -> dict[str, Any]:
        """What Serve's controller knows."""
        token = {"Authorization": f"Bearer {self.env['RAY_AUTH_TOKEN']}"}
        ask = urllib.request.Request("http://127.0.0.1:8265/api/serve/applications/", headers=token)
        with urllib.request.urlopen(ask, timeout=30) as reply:
            return json.load(reply)

    def running(self, app: str = "default") -> set[int]:
        """The ids of the processes that serve it and that HAProxy asks."""
        with urllib.request.urlopen("http://127.0.0.1:8404/stats;csv", timeout=30) as reply:
            servers = [line.split(",") for line in reply.read().decode().splitlines()]
        up = {server[1].rpartition("-")[2] for server in servers if server[17:] and server[17] == "UP"}
        model = self.status()["applications"][app]["deployments"].get("Model", {"replicas": []})
        return {replica["pid"] for replica in model["replicas"] if replica["replica_id"] in up}


def environ(process: psutil.Process) -> dict[str, str]:
    with contextlib.suppress(psutil.Error):
        return process.environ()
    return {}


def ray_env() -> dict[str, str]:
    """What deploy/ray/ray.env sets."""
    path = {"PATH": f"{BIN}:{os.environ['PATH']}"}
    told = subprocess.run(
        ["sh", "-c", "set -a; . deploy/ray/ray.env; env -0"],
        cwd=ROOT,
        env=path,
        check=True,
        capture_output=True,
    )
    return dict(pair.split("=", 1) for pair in told.stdout.decode().split("\0") if pair)


@contextlib.contextmanager
def nodes(n: int = 1, env: Mapping[str, str] | None = None) -> Iterator[Cluster]:
    """So many nodes, with Serve's proxy on the first one, and no app yet; by default as deploy/ray/ray.env says."""
    with tempfile.TemporaryDirectory(prefix="ray") as folder, tempfile.NamedTemporaryFile() as log:
        whole = {**os.environ, **(ray_env() if env is None else env), "RAY_TMPDIR": folder}
        whole |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        whole |= {"RAY_ADDRESS": "127.0.0.1:6379", "RAY_USAGE_STATS_ENABLED": "0"}
        cluster = Cluster(RAY, "http://127.0.0.1:8000/", None, log, whole)  # type: ignore[arg-type]
        try:
            for node in range(n):  # each with an address of its own, or they would give out the same ports
                where = "--address=127.0.0.1:6379" if node else "--head --port=6379"
                cluster.call(f"ray start --node-ip-address=127.0.0.{node + 1} --num-cpus=8 {where}")
            # One proxy: a second one would want the same port.
            cluster.call("serve start --http-host=0.0.0.0 --proxy-location=HeadOnly")
            yield cluster
        finally:
            cluster.call("ray stop --force")
