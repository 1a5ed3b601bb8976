"""Ctrl-C in each program that measures or simulates: one line, and nothing is left running."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from loadtests.modes import ROOT
from tests.support.client import until

# What starts servers or other processes is interrupted while one runs.
WITH_PROCESSES = {
    "bench": "--quick",
    "bench.threads": "--quick",
    "compare": "--quick --modes thread sync-2 --out {out}",
    "chaos": "",
    "plan": "--quick",
    "plan.anticipation": "",
}
ALONE = {"plan.replicas": "--report", "bench.model": "--quick"}


def interrupted(
    program: str, options: str, out: Path, *, with_processes: bool
) -> tuple[int, str, list[psutil.Process]]:
    """Interrupt a program's group of processes as a terminal does; return its exit code, what it said, and what still runs."""
    command = [sys.executable, "-m", f"loadtests.{program}", *options.format(out=out).split()]
    with (out / "said").open("w+") as said:
        process = subprocess.Popen(command, cwd=ROOT, stdout=said, stderr=said, start_new_session=True)
        me = psutil.Process(process.pid)
        until(lambda: me.children(recursive=True) if with_processes else os.path.getsize(said.name), 120)
        family = me.children(recursive=True)
        os.killpg(process.pid, signal.SIGINT)
        code = process.wait(timeout=60)
        left = psutil.wait_procs(family, timeout=20)[1]
        for one in left:
            one.kill()
        said.seek(0)
        return code, said.read(), left


@pytest.mark.slow
@pytest.mark.parametrize("program", [*WITH_PROCESSES, *ALONE])
def test_ctrl_c_ends_it_with_a_line_and_leaves_nothing_running(program: str, tmp_path: Path) -> None:
    options = {**WITH_PROCESSES, **ALONE}[program]
    code, said, left = interrupted(program, options, tmp_path, with_processes=program in WITH_PROCESSES)
    assert "Traceback" not in said and not left, said
    assert code in (1, 130) and "nterrupted" in said.splitlines()[-1], said
