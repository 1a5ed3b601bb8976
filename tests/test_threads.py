"""Torch's threads follow what the cores have free: one less for each core that others use."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from workers.resources import usable_cores
from workers.tasks import threads
from workers.tasks.threads import WINDOW_S, Threads, busy_s, others_s

STAT = """\
cpu  1700 60 430 9900 44 7 50 70 30 0
cpu0 1000 10 200 5000 40 7 30 60 20 0
cpu1 700 50 230 4900 4 0 20 10 10 0
cpu10 9 9 9 9 9 9 9 9 9 9
intr 8885 0 9
ctxt 1
"""


class Cores:
    """A machine whose others use so many cores; `pass_s` lets time go by, then comes a call of the model."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, cores: int) -> None:
        self.now = self.used_s = 0.0
        self.set_to: list[int] = []
        monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(cores)), raising=False)
        monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(set_num_threads=self.set_to.append))

    def threads(self, most: int, instances: int = 1) -> Threads:
        return Threads(most, instances, others_s=lambda: self.used_s, clock=lambda: self.now)

    def pass_s(self, seconds: float, others: float, model: Threads) -> int:
        """Others use so many cores for so long, while the model is called every 10 ms; return its threads."""
        for _ in range(round(seconds / 0.01)):
            self.now += 0.01
            self.used_s += 0.01 * others
            model.between_calls()
        return model.threads


@pytest.mark.parametrize(
    ("cores", "others", "expected"),
    [
        (2, 0, 2),
        (2, 0.2, 2),
        (2, 0.4, 1),
        (2, 1, 1),
        (2, 2, 1),
        (8, 0.2, 8),
        (8, 1, 7),
        (8, 5.5, 2),
        (8, 8, 1),
    ],
)
def test_there_is_a_thread_for_each_core_that_others_leave_free(
    monkeypatch: pytest.MonkeyPatch, cores: int, others: float, expected: int
) -> None:
    machine = Cores(monkeypatch, cores)
    assert machine.pass_s(3, others, machine.threads(cores)) == expected
    assert machine.set_to == ([] if expected == cores else [expected])  # torch starts with all


def test_threads_are_back_when_the_neighbour_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Cores(monkeypatch, 2)
    model = machine.threads(2)
    machine.pass_s(60, 0, model)
    for _ in range(3):
        assert machine.pass_s(2 * WINDOW_S + 0.1, 1, model) == 1
        assert machine.pass_s(2 * WINDOW_S + 0.1, 0, model) == 2
    assert machine.set_to == [1, 2] * 3


def test_neighbour_that_comes_after_an_idle_night_is_noticed_in_two_seconds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    machine = Cores(monkeypatch, 2)
    model = machine.threads(2)
    machine.now += 30_000
    assert machine.pass_s(2 * WINDOW_S + 0.1, 1, model) == 1


def test_what_was_asked_for_is_kept_where_others_leave_more_free(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Cores(monkeypatch, 16)
    assert machine.pass_s(3, 8, machine.threads(4)) == 4
    assert machine.set_to == []


def test_instances_in_one_process_share_the_cores_that_are_free(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Cores(monkeypatch, 4)
    assert machine.pass_s(3, 1, machine.threads(2, instances=2)) == 1
    assert machine.pass_s(3, 0, machine.threads(2, instances=2)) == 2


def test_one_thread_never_asks_what_the_cores_do(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Cores(monkeypatch, 2)

    def never() -> float:
        raise AssertionError("asked")

    model = Threads(1, others_s=never, clock=lambda: machine.now)
    assert machine.pass_s(3, 2, model) == 1
    assert machine.set_to == []


def test_where_the_system_does_not_say_what_its_cores_do_nothing_changes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    machine = Cores(monkeypatch, 2)

    def unknown() -> float:
        raise FileNotFoundError("/proc/stat")

    model = Threads(2, others_s=unknown, clock=lambda: machine.now)
    assert machine.pass_s(3, 2, model) == 2
    assert machine.set_to == []


def test_call_does_not_fail_because_no_file_can_be_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Cores(monkeypatch, 2)
    model = machine.threads(2)
    assert machine.pass_s(3, 1, model) == 1
    asks = model.others_s

    def no_descriptor() -> float:
        raise OSError(24, "Too many open files")

    model.others_s = no_descriptor
    assert machine.pass_s(3, 0, model) == 1
    model.others_s = asks
    assert machine.pass_s(3, 0, model) == 2


def test_cores_are_asked_once_a_second_however_many_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    machine, asked = Cores(monkeypatch, 2), []
    model = Threads(2, others_s=lambda: asked.append(1) or 0.0, clock=lambda: machine.now)  # type: ignore[func-returns-value]
    machine.pass_s(10.5, 0, model)
    assert len(asked) == 1 + 10


def test_busy_is_all_but_idle_and_waiting_on_our_own_cores_only() -> None:
    ticks_per_s = os.sysconf("SC_CLK_TCK")
    assert busy_s(STAT, {0}) * ticks_per_s == 1000 + 10 + 200 + 7 + 30 + 60  # guests are in user already
    assert busy_s(STAT, {0, 1}) * ticks_per_s == 1307 + 700 + 50 + 230 + 20 + 10
    assert busy_s("cpu  0 0 0 0 0 0 0 0 0 0\nintr 0\n", {0}) == 0  # a sandbox that says nothing


def test_what_our_own_process_uses_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "busy_s", lambda stat, cores: 70.0)
    monkeypatch.setattr("time.process_time", lambda: 30.0)
    assert others_s() == 40


@pytest.mark.skipif(sys.platform != "linux", reason="/proc/stat is Linux's")
def test_what_a_neighbour_uses_is_counted() -> None:
    work = "import time\nwhile time.process_time() < 0.4: pass"
    before = others_s()
    subprocess.run([sys.executable, "-S", "-c", work], check=True)
    assert others_s() - before > 0.3  # further neighbours only add; the kernel counts in steps of 0.01


@pytest.mark.parametrize(
    ("cpu_max", "cores"),
    [
        ("max 100000", 8),
        ("200000 100000", 2),
        ("150000 100000", 2),
        ("20000 100000", 1),
        ("1600000 100000", 8),
    ],
)
def test_container_quota_is_a_number_of_cores(
    monkeypatch: pytest.MonkeyPatch, cpu_max: str, cores: int
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(8)), raising=False)
    files = {Path("/sys/fs/cgroup/cpu.max"): cpu_max}
    monkeypatch.setattr("pathlib.Path.read_text", lambda path: files[path])
    assert usable_cores() == cores


def test_without_a_quota_or_a_binding_every_core_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(path: Path) -> str:
        raise FileNotFoundError(path)

    monkeypatch.setattr("pathlib.Path.read_text", missing)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {3, 5}, raising=False)
    assert usable_cores() == 2
    monkeypatch.delattr("os.sched_getaffinity")  # as on a Mac
    monkeypatch.setattr("os.cpu_count", lambda: 6)
    assert usable_cores() == 6
