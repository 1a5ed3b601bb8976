"""Chaos: the real server under random load while everything around it fails; each request has one right outcome.

    make chaos                     # a few minutes
    CHAOS_S=3600 make chaos        # an hour
    python -m loadtests.chaos --deployments process --seed 7

Requests and faults follow from the seed. Of each request it knows what may come back: an answer that belongs to its text
alone, its own error, or a rejection, within its deadline. In the end nothing may have leaked, and the server does its full
rate again. Ends with 1 where anything was wrong; the report of a full storm goes to loadtests/results/chaos.md.
"""

import argparse
import asyncio
import contextlib
import itertools
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from loadtests import arguments
from loadtests.chaos import clients, faults
from loadtests.chaos.clients import (
    API,
    HUNG,
    KINDS,
    LEFT,
    LOST,
    NOBODY,
    TWICE,
    UNHEARD,
    Outcome,
    asked,
    good,
    huge,
    over_http,
)
from loadtests.chaos.faults import FAULTS, Fault, Starved, Target
from loadtests.chaos.grpc_clients import by_call, by_stream, over_grpc
from loadtests.host import processor
from loadtests.modes import MODES, ROOT, Server, free_port, start
from loadtests.plan.planner import markdown

FULL_S = 200.0  # a shorter storm is not stored
REPORT = ROOT / "loadtests" / "results" / "chaos.md"
RATE_PER_S = 60.0  # requests
# FULL: at this share of its rate before the server is as fast as before, since the machine is shared.
# TRIES: how often that is measured, once a second.
FULL, TRIES = 0.7, 15
# AFTER_S: a request that is sent so soon after a fault may still suffer from it.
# JUST_S: a request that is sent so shortly before or after a fault counts as sent while it lasted.
AFTER_S, JUST_S = 1.0, 0.1
EXECUTOR = (os.cpu_count() or 1) + 4  # asyncio's threads for long texts: they stay
COMPLAINTS = re.compile(r"never retrieved|Exception in callback|this is a bug|never awaited|Fatal Python")

# How often each is taken. grpcio's client costs the core many times what a socket does.
APIS: dict[API, int] = {over_http: 16, partial(over_grpc, by_call): 3, partial(over_grpc, by_stream): 1}

PATIENT = " --http workers.web.http_protocol:Protocol"  # uvicorn itself resets connections when it stops
DEPLOYMENTS = {
    **{
        name: replace(MODES[name], command=MODES[name].command + PATIENT)
        for name in ("thread", "process", "instances-2")
    },
    "recommended": MODES["recommended"],
    "starved": Starved("starved", MODES["recommended"].command, {"OFFLOAD": "process"}),
}


@dataclass
class Census:
    """What a server holds while it does nothing."""

    processes: int
    threads: int
    files: int
    memory_mb: float

    @classmethod
    def take(cls, server: Server) -> "Census":
        all_of_them = server.processes()
        threads, files = (sum(count) for count in zip(*((p.num_threads(), p.num_fds()) for p in all_of_them)))
        return cls(len(all_of_them), threads, files, server.memory_mb())

    def leaks(self, before: "Census") -> list[str]:
        """What there is more of than before; of memory, what an allocator may keep is allowed."""
        more = [
            f"{name}: {getattr(before, name)} before, {getattr(self, name)} after"
            for name in ("processes", "threads", "files")
            if getattr(self, name) > getattr(before, name) + (EXECUTOR if name == "threads" else 0)
        ]
        if self.memory_mb > 1.2 * before.memory_mb + 20:
            more.append(f"memory: {before.memory_mb:.0f} MB before, {self.memory_mb:.0f} after")
        return more


@dataclass
class Window:
    """When a fault lasted."""

    fault: Fault
    began_at: float
    ended_at: float = float("inf")

    def meets(self, outcome: Outcome) -> bool:
        return outcome.sent_at <= self.ended_at + AFTER_S and self.began_at <= outcome.ended_at

    def was_there(self, outcome: Outcome) -> bool:
        """Whether it lasted already when the request was sent, or nearly so."""
        return self.began_at - JUST_S <= outcome.sent_at <= self.ended_at + JUST_S


@dataclass
class Run:
    """One deployment's: what befell it, what its clients got, what was wrong."""

    name: str
    outcomes: list[Outcome] = field(default_factory=list)
    windows: list[Window] = field(default_factory=list)
    # When the clients themselves were held up, how long.
    lags: list[tuple[float, float]] = field(default_factory=list)
    defects: list[str] = field(default_factory=list)
    before_per_s: float = 0.0
    after_per_s: float = 0.0
    recovered_s: float = 0.0  # when it had its full rate again
    unheard: int = 0  # who connected to nobody, as the server was restarted or had no descriptor left
    storm: tuple[float, float] = (0.0, 0.0)
    census: tuple[Census, Census] | None = None

    def judge(self) -> None:
        """Say what is wrong with each outcome."""
        deaths = [
            Window(Fault("a text that kills", faults.nothing, bool, may_fail=True), o.sent_at, o.ended_at)
            for o in self.outcomes
            if o.kind == "kills"
        ]
        for outcome in self.outcomes:
            if not outcome.verdict(False, (), 0):
                continue
            met = [window.fault for window in (*self.windows, *deaths) if window.meets(outcome)]
            may_be = {
                one for window in self.windows if window.was_there(outcome) for one in window.fault.may_be
            }
            lag_s = sum(s for at, s in self.lags if outcome.sent_at <= at + s and at <= outcome.ended_at)
            if wrong := outcome.verdict(any(fault.may_fail for fault in met), may_be, lag_s):
                names = ", ".join(sorted({fault.name for fault in met})) or "nothing"
                at_s = outcome.sent_at - self.storm[0]
                self.defects.append(f"{outcome.kind} at {at_s:.1f} s: {wrong} (amid: {names})")
            elif outcome.trouble:
                self.unheard += 1

    def count(self, *wrong: str) -> int:
        return sum(any(f": {one}" in defect for one in wrong) for defect in self.defects)

    def outage_s(self) -> float:
        """The longest time in which nobody got an answer."""
        began_at, ended_at = self.storm
        answered = sorted(o.ended_at for o in self.outcomes if o.answered)
        times = [began_at, *(at for at in answered if began_at <= at <= ended_at), ended_at]
        return max(b - a for a, b in itertools.pairwise(times))

    def row(self) -> dict[str, Any]:
        before, after = self.census or (Census(0, 0, 0, 0),) * 2
        lost = self.count(LOST, NOBODY, UNHEARD, TWICE)
        ends = Counter(outcome.name for outcome in self.outcomes)
        shown = ("200", "503", "504", "500", "422")
        return {
            "deployment": self.name,
            "faults": len(self.windows),
            "requests": f"{len(self.outcomes):,}",
            **{status: ends[status] for status in shown},
            "other statuses": sum(n for name, n in ends.items() if name.isdigit() and name not in shown),
            "client disconnected": ends[LEFT],
            "not accepted": self.unheard,
            "lost": lost,
            "response to wrong request": self.count("mixed up"),
            "hung": self.count(HUNG, "late"),
            "longest outage": f"{self.outage_s():.1f} s",
            "answers/s before → after": f"{self.before_per_s:.0f} → {self.after_per_s:.0f}",
            "full rate after": f"{self.recovered_s:.0f} s",
            "processes, threads, files": f"{before.processes}, {before.threads}, {before.files} → "
            f"{after.processes}, {after.threads}, {after.files}",
            "MB": f"{before.memory_mb:.0f} → {after.memory_mb:.0f}",
            "defects": len(self.defects),
        }


class Storm:
    """A deployment, its clients, and what befalls it."""

    def __init__(self, name: str, seconds: float, seed: int, is_bundled: bool = False) -> None:
        self.is_bundled = is_bundled
        self.run, self.seconds, self.rng = Run(name), seconds, random.Random(f"{seed} {name}")
        self.stack = contextlib.ExitStack()
        folder = Path(self.stack.enter_context(tempfile.TemporaryDirectory(prefix="chaos-")))
        folder.joinpath("moods").mkdir()
        folder.joinpath("clock").write_text("0")
        self.target = Target(DEPLOYMENTS[name], folder, random.Random(f"{seed} {name} faults"), self.restart)
        self.port, self.grpc_port = free_port(), free_port()
        self.logs = ""

    def start(self) -> None:
        env = {
            "MODEL": "loadtests.chaos.model:Model",
            "CHAOS_BUNDLED": "1" * self.is_bundled,
            "CHAOS_MOODS": str(self.target.moods),
            "CHAOS_CLOCK": str(self.target.folder / "clock"),
            "PYTHONPATH": os.pathsep.join([str(ROOT / "loadtests" / "chaos" / "clock"), str(ROOT)]),
            "BATCH_SIZE": "8",
            "DEADLINE_S": str(clients.DEADLINE_S),
            "BODY_TIMEOUT_S": str(clients.BODY_TIMEOUT_S),
            "MAX_BODY_BYTES": str(clients.MAX_BODY_BYTES),
            "HANG_S": "2",
            "GRACE_S": "5",
            "GRPC_PORT": str(self.grpc_port),
        }
        self.serving = contextlib.ExitStack()
        self.target.server = self.serving.enter_context(start(self.target.mode, env, port=self.port))

    def stop(self) -> None:
        process, began_at = self.target.server.process, time.monotonic()
        children = self.target.server.processes()
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(15)
        if process.returncode is None or (took_s := time.monotonic() - began_at) > 5 + 2 + clients.SLACK_S:
            self.run.defects.append(f"SIGTERM: it did not end in its grace time, or {took_s:.1f} s after")
        if left := psutil.wait_procs(children, timeout=5)[1]:
            self.run.defects.append(f"SIGTERM: {len(left)} processes were left")
        self.logs += self.target.server.log()
        self.serving.close()

    async def restart(self) -> None:
        """As a process manager would."""
        await asyncio.to_thread(self.stop)
        await asyncio.to_thread(self.start)

    async def clients(self, seconds: float) -> None:
        """Strangers, on a schedule that waits for nobody."""
        chance, due_at = self.rng, time.monotonic()
        ends_at, tasks = due_at + seconds, set[asyncio.Task[Outcome]]()

        def done(task: asyncio.Task[Outcome]) -> None:
            tasks.discard(task)
            self.run.outcomes.append(task.result())

        has_process = self.target.has_process
        kinds = {kind: n for kind, n in KINDS.items() if has_process or kind is not clients.kills}
        for i in itertools.count():
            due_at += chance.expovariate(RATE_PER_S)
            if due_at > ends_at:
                break
            (kind,) = chance.choices(list(kinds), list(kinds.values()))
            question, (api,) = kind(str(i), chance), chance.choices(list(APIS), list(APIS.values()))
            api = api if question.texts else over_http
            await asyncio.sleep(max(0.0, due_at - time.monotonic()))
            task = asyncio.create_task(asked(self.address(api), question, api))
            tasks.add(task)
            task.add_done_callback(done)
        while tasks:
            await asyncio.wait(tasks)

    def address(self, api: API) -> str:
        return self.target.server.url if api is over_http else f"127.0.0.1:{self.grpc_port}"

    async def befalls(self, seconds: float) -> None:
        """One after the other, each kind as often as any, now and then two at once."""
        chance, ends_at = self.target.rng, time.monotonic() + seconds
        possible: list[Fault] = []
        while time.monotonic() < ends_at:
            if len(possible) < 2:
                fresh = [fault for fault in FAULTS if fault.where(self.target)]
                possible += chance.sample(fresh, len(fresh))
            n = min(2 if chance.random() < 0.25 else 1, len(possible))
            some = [possible.pop(0) for _ in range(n)]
            if faults.restarted in {fault.happens for fault in some}:
                some = some[:1]
            await asyncio.gather(*(self.befall(fault) for fault in some))
            await asyncio.sleep(chance.uniform(0.2, 1.5))

    async def befall(self, fault: Fault) -> None:
        window = Window(fault, time.monotonic())
        self.run.windows.append(window)
        await fault.happens(self.target)
        window.ended_at = time.monotonic()

    async def rate(self, users: int = 32, seconds: float = 1.0) -> float:
        """Answers a second of users who ask again and again."""
        began_at, done = time.monotonic(), 0

        async def user(n: int) -> None:
            nonlocal done
            for i in itertools.count():
                outcome = await asked(self.target.server.url, good(f"{n} {i}", self.rng))
                done += outcome.status == 200
                if time.monotonic() > began_at + seconds:
                    return

        await asyncio.gather(*(user(n) for n in range(users)))
        return done / (time.monotonic() - began_at)

    async def recover(self) -> None:
        """Measure, a second after, whether it's as fast as before; again and again where it isn't, to say when it is."""
        run, began_at = self.run, time.monotonic()
        for _ in range(TRIES):
            await asyncio.sleep(1)
            run.after_per_s = await self.rate()
            run.recovered_s = time.monotonic() - began_at - 1
            if run.after_per_s > FULL * run.before_per_s:
                return
        run.defects.append(f"slower after: {run.before_per_s:.0f} → {run.after_per_s:.0f} answers/s")

    async def calm(self) -> Census:
        """What it holds after the usual load, when all is over."""
        url, chance = self.target.server.url, self.rng
        await asyncio.gather(*(asked(url, huge(f"calm {i}", chance)) for i in range(40)))
        await self.clients(1.5)
        await asyncio.to_thread(self.target.server.wait_until_idle)
        return Census.take(self.target.server)

    async def watch_the_clock(self) -> None:
        """Note when the clients can't run: what they see late then isn't the server's fault."""
        while True:
            at = time.monotonic()
            await asyncio.sleep(0.05)
            if (lag_s := time.monotonic() - at - 0.05) > 0.1:
                self.run.lags.append((at, lag_s))

    async def weather(self) -> Run:
        run = self.run
        watch = asyncio.create_task(self.watch_the_clock())
        await asyncio.to_thread(self.start)
        try:
            before = await self.calm()
            run.before_per_s = statistics.median([await self.rate() for _ in range(3)])
            began_at = time.monotonic()
            run.storm = began_at, began_at + self.seconds
            await asyncio.gather(self.clients(self.seconds), self.befalls(self.seconds - 2))
            run.outcomes += self.target.outcomes
            await self.recover()
            after = await self.calm()
            run.census = before, after
            run.defects += [f"a leak: {leak}" for leak in after.leaks(before)]
        finally:
            watch.cancel()
            await asyncio.to_thread(self.stop)
            self.stack.close()
        run.defects += [f"in the log: {line}" for line in self.logs.splitlines() if COMPLAINTS.search(line)]
        run.judge()
        return run


def report(runs: list[Run], seconds: float, seed: int, is_bundled: bool = False) -> str:
    """In Markdown."""
    injected = {run.name: Counter(window.fault.name for window in run.windows) for run in runs}
    kinds = sorted({kind for counts in injected.values() for kind in counts})
    faults = [{"fault": kind, **{name: counts[kind] for name, counts in injected.items()}} for kind in kinds]
    machine = f"{processor()}, {len(os.sched_getaffinity(0))} cores, shared, {time.strftime('%Y-%m-%d')}"
    rows = [run.row() for run in runs]
    flipped = [{"": key, **{str(row["deployment"]): row[key] for row in rows}} for key in list(rows[0])[1:]]
    defects = [f"- {run.name}: {defect}" for run in runs for defect in run.defects]
    parts = [
        "# Fault injection",
        "With the bundled model in each call."
        if is_bundled
        else "With a stub model that sleeps 4 ms + 1 ms per text.",
        f"`CHAOS_S={seconds:g} python -m loadtests.chaos --seed {seed}{' --bundled' * is_bundled}`; {machine}.",
        "Every request must get exactly one correct response within its deadline, whatever happens: its own answer, its own "
        "error, or a rejection. 500 is correct for a poison input, and for others only while a model process dies or the model "
        "raises on every input. Not accepted: connections opened while the server was restarting or out of file descriptors; "
        "over gRPC, which 20 % of the requests use, also calls not yet started when a worker stopped. Starved: the recommended deployment with a model process, where "
        "`/dev/shm` is read-only and the disk for temporary files has 1 MB.",
        markdown(flipped),
        "Faults:",
        markdown(faults),
        "Defects: none." if not defects else "Defects:\n\n" + "\n".join(defects),
    ]
    return "\n\n".join(parts) + "\n"


def possible() -> Iterator[str]:
    """The deployments that can be had here: a starved one needs what `unshare` and `mount` need."""
    for name, mode in DEPLOYMENTS.items():
        if isinstance(mode, Starved):
            probe = ["unshare", "--mount", *([] if os.geteuid() == 0 else ["--map-root-user"])]
            mount = "mount -t tmpfs -o ro none /dev/shm"
            if (
                not shutil.which("unshare")
                or subprocess.run([*probe, "sh", "-c", mount], capture_output=True).returncode
            ):
                print(f"{name}: left out, nothing can be mounted here", file=sys.stderr)
                continue
        yield name


def main() -> int:
    """Run the deployments' storms, print the report; return 1 if there was a defect."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--deployments", nargs="+", choices=DEPLOYMENTS, help="by default all that can be had here"
    )
    parser.add_argument("--bundled", action="store_true", help="run the bundled model in each call, too")
    parser.add_argument("--out", type=Path, help="where the report goes; that of a full storm is stored")
    options, seconds = parser.parse_args(), float(os.environ.get("CHAOS_S", FULL_S))
    names = options.deployments or list(possible())
    runs: list[Run] = []
    try:
        for name in names:
            runs.append(
                asyncio.run(Storm(name, seconds / len(names), options.seed, options.bundled).weather())
            )
            print(
                f"{name}: {len(runs[-1].outcomes)} requests, {len(runs[-1].windows)} faults", file=sys.stderr
            )
            for defect in runs[-1].defects:
                print(f"  {defect}", file=sys.stderr)
    finally:  # what was run before Ctrl-C is told
        text = report(runs, seconds, options.seed, options.bundled) if runs else ""
        print(text)
    is_full = not (options.deployments or options.bundled) and seconds >= FULL_S
    out = options.out or (REPORT if is_full else None)
    if out:
        out.write_text(text)
    return any(run.defects for run in runs)


if __name__ == "__main__":
    arguments.run(main)
