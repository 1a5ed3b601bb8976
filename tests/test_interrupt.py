"""Ctrl-C ends every measurement with one line, and leaves no server behind."""

import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator

import psutil
import pytest

from loadtests.modes import ROOT
from tests.support.client import until

pytestmark = pytest.mark.slow

PROGRAMS = {
    "bench": ["loadtests.bench", "--quick"],
    "bench.threads": ["loadtests.bench.threads", "--quick"],
    "chaos": ["loadtests.chaos", "--deployments", "thread"],
    "compare": ["loadtests.compare", "--quick", "--modes", "thread"],
    "plan": ["loadtests.plan", "--quick"],
    "plan.anticipation": ["loadtests.plan.anticipation"],
}


def marked(mark: str) -> Iterator[psutil.Process]:
    """The processes whose environment has `mark`: what a program started, and what those started."""
    for process in psutil.process_iter():
        try:
            if process.environ().get("INTERRUPT_TEST") == mark and process.status() != psutil.STATUS_ZOMBIE:
                yield process
        except psutil.Error:
            continue


@pytest.mark.parametrize("program", PROGRAMS)
def test_ctrl_c_ends_with_one_line_and_nothing_left_running(program: str) -> None:
    mark = uuid.uuid4().hex
    process = subprocess.Popen(
        [sys.executable, "-m", *PROGRAMS[program]],
        cwd=ROOT,
        env=os.environ | {"INTERRUPT_TEST": mark},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    until(lambda: len(list(marked(mark))) > 1)  # it measures something
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.rstrip().endswith("Interrupted.") and "Traceback" not in errors
    until(lambda: not list(marked(mark)))
