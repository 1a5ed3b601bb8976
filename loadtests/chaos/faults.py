"""What befalls a server in a chaotic run: each is put right again before the function returns.

`may_fail` marks those of which a request may fail with 500: a process dies with it, or the model raises on everybody.
"""

import asyncio
import contextlib
import os
import random
import resource
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from loadtests.chaos.clients import LOST, NOBODY, SHUT, UNHEARD, Outcome, asked, good, huge
from loadtests.modes import Mode, Server


@dataclass
class Target:
    """A running server, and the knobs of the world around it."""

    mode: Mode
    folder: Path  # its moods and its clock
    rng: random.Random
    restart: Callable[[], Awaitable[None]]
    server: Server = field(init=False)
    outcomes: list[Outcome] = field(default_factory=list)  # of requests that are part of a fault

    @property
    def moods(self) -> Path:
        return self.folder / "moods"

    @property
    def disk(self) -> Path | None:
        """The small disk of a starved server, as seen from here."""
        return (
            Path(f"/proc/{self.server.process.pid}/root{SMALL}") if isinstance(self.mode, Starved) else None
        )

    @property
    def has_process(self) -> bool:
        return self.mode.env.get("OFFLOAD") == "process"

    @property
    def has_master(self) -> bool:
        return "gunicorn" in self.mode.command

    def models(self) -> list[psutil.Process]:
        """The model's own processes."""
        found = []
        for process in self.server.processes():
            with contextlib.suppress(psutil.Error):
                if "workers.isolation.process" in " ".join(process.cmdline()):
                    found.append(process)
        return found

    def a_model(self) -> psutil.Process | None:
        return self.rng.choice(models) if (models := self.models()) else None


Happens = Callable[[Target], Awaitable[None]]


class Fault(NamedTuple):
    """One kind: what happens, where it can, and what may fail of it."""

    name: str
    happens: Happens
    where: Callable[[Target], Any]
    may_fail: bool = False
    may_be: tuple[str, ...] = ()  # what may come of a request that was sent meanwhile, in place of a reply


FAULTS: list[Fault] = []


def fault(name: str, where: Callable[[Target], Any] = lambda target: True, **may: Any) -> Any:
    def register(happens: Happens) -> Happens:
        FAULTS.append(Fault(name, happens, where, **may))
        return happens

    return register


async def nothing(target: Target) -> None:
    """Of itself."""


has_process, has_master = attrgetter("has_process"), attrgetter("has_master")


@fault("a model process killed", has_process, may_fail=True)
async def killed(target: Target) -> None:
    with contextlib.suppress(psutil.Error):
        if model := target.a_model():
            model.kill()
    await asyncio.sleep(0.5)


@fault("a model process frozen", has_process, may_fail=True)
async def frozen(target: Target) -> None:
    with contextlib.suppress(psutil.Error):
        if model := target.a_model():
            model.suspend()
            await asyncio.sleep(target.rng.uniform(0.2, 3.5))  # some beyond HANG_S
            model.resume()


@fault("the model slow")
async def slow(target: Target) -> None:
    async with mood(target, "slow"):
        await asyncio.sleep(target.rng.uniform(0.5, 2))


@fault("the model raises", may_fail=True)
async def raises(target: Target) -> None:
    async with mood(target, "raises"):
        await asyncio.sleep(target.rng.uniform(0.1, 1))


@fault("a flood")
async def flood(target: Target) -> None:
    clients = [asked(target.server.url, good(f"flood {i}", target.rng)) for i in range(300)]
    target.outcomes.extend(await asyncio.gather(*clients))


@fault("no memory for the model", has_process, may_fail=True)
async def no_memory(target: Target) -> None:
    """Room for a few megabytes more than it has."""
    if model := target.a_model():
        async with limited([model], resource.RLIMIT_AS, lambda p: p.memory_info().vms + 2**22):
            big = [asked(target.server.url, huge(f"memory {i}", target.rng)) for i in range(8)]
            target.outcomes.extend(await asyncio.gather(*big))


@fault("no file can grow")
async def no_disk(target: Target) -> None:
    async with limited(target.server.processes(), resource.RLIMIT_FSIZE, lambda p: 0):
        await asyncio.sleep(target.rng.uniform(0.5, 2))


@fault("no file descriptors", may_fail=True, may_be=(LOST, UNHEARD, SHUT))
async def no_files(target: Target) -> None:
    """libuv closes what it can't accept."""
    async with limited(target.server.processes(), resource.RLIMIT_NOFILE, lambda p: p.num_fds() + 3):
        await asyncio.sleep(target.rng.uniform(0.5, 1.5))


@fault("the disk full", lambda target: target.disk)
async def disk_full(target: Target) -> None:
    assert target.disk
    filler = target.disk / "filler"
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(b"\0" * 4096)
    await asyncio.sleep(target.rng.uniform(0.5, 2))
    filler.unlink(missing_ok=True)


@fault("the clock jumps")
async def clock_jumps(target: Target) -> None:
    target.folder.joinpath("clock").write_text(str(target.rng.choice((-86_400, -60, -5, 5, 60, 86_400))))
    await asyncio.sleep(target.rng.uniform(0.2, 2))
    if target.rng.random() < 0.5:
        target.folder.joinpath("clock").write_text("0")


@fault("SIGHUP", has_master, may_be=(SHUT,))  # the old worker may end before the new one listens
async def reloaded(target: Target) -> None:
    """Until the new worker listens."""
    master, *old = target.server.processes()
    os.kill(master.pid, signal.SIGHUP)
    await asyncio.to_thread(psutil.wait_procs, old, timeout=10)
    async with asyncio.timeout(10):
        while not await listens(int(master.environ()["GRPC_PORT"])):
            await asyncio.sleep(0.05)


async def listens(port: int) -> bool:
    with contextlib.suppress(OSError):
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.close()
        return True
    return False


@fault("SIGTERM and a new start", may_be=(NOBODY, UNHEARD, SHUT))
async def restarted(target: Target) -> None:
    target.folder.joinpath("clock").write_text("0")
    await target.restart()


@contextlib.asynccontextmanager
async def mood(target: Target, name: str) -> AsyncIterator[None]:
    target.moods.joinpath(name).touch()
    try:
        yield
    finally:
        target.moods.joinpath(name).unlink()


@contextlib.asynccontextmanager
async def limited(
    processes: list[psutil.Process], what: int, limit: Callable[[psutil.Process], int]
) -> AsyncIterator[None]:
    """Lower a soft limit of theirs, as `ulimit` would, and lift it again; also of who was born with it."""
    before = []
    for process in processes:
        with contextlib.suppress(psutil.Error):
            soft, hard = process.rlimit(what)
            process.rlimit(what, (limit(process), hard))
            before.append((process, (soft, hard)))
    try:
        yield
    finally:
        for process, limits in before:
            with contextlib.suppress(psutil.Error):
                for one in (process, *process.children(recursive=True)):
                    one.rlimit(what, limits)


SMALL = "/run/chaos"


class Starved(Mode):
    """In a world of its own: /dev/shm can't be written to, and the folder for temporary files is a disk of 1 MB."""

    def argv(self, port: int) -> list[str]:
        world = (
            "mount -t tmpfs -o ro none /dev/shm; mount -t tmpfs -o mode=755 none /run; "
            f"mkdir {SMALL}; mount -t tmpfs -o size=1m none {SMALL}; "
            f'export TMPDIR={SMALL}; exec "$@"'
        )
        apart = ["unshare", "--mount", *([] if os.geteuid() == 0 else ["--map-root-user"])]
        return [*apart, "sh", "-ec", world, "sh", *super().argv(port)]
