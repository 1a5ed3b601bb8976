"""The simulation of more cores: it gives what two cores gave, and no more than its three limits allow."""

import pytest

from loadtests.bench import cores
from loadtests.bench.cores import MEASURED, rate

BATCHES = pytest.mark.parametrize("batch", MEASURED)


@BATCHES
def test_two_cores_give_what_was_measured(batch: int) -> None:
    law = MEASURED[batch]
    assert rate(1, 1, batch) == pytest.approx(law.one)
    assert rate(2, 1, batch) == pytest.approx(law.two_threads, rel=0.01)  # p comes from it
    # Predicted. With one input per call two cores share what the memory gives: they had 1.66 times as much, not twice.
    assert rate(2, 2, batch) == pytest.approx(law.two_instances, rel=0.25 if batch == 1 else 0.05)


@BATCHES
def test_threads_of_one_instance_end_at_amdahls_limit(batch: int) -> None:
    law = MEASURED[batch]
    rates = [rate(n, 1, batch) for n in cores.CORES]
    assert rates == sorted(rates)
    assert rates[-1] < law.one / (1 - law.parallel) < 1.2 * rates[-1]


@BATCHES
def test_instances_of_one_process_end_at_its_interpreter_lock_and_processes_do_not(batch: int) -> None:
    law = MEASURED[batch]
    assert rate(64, 64, batch) <= law.one / law.locked * 1.001
    assert rate(64, 64, batch, processes=True) > rate(64, 64, batch)


def test_no_layout_reads_faster_than_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cores, "SOCKET_BYTES_S", 2e9)
    assert rate(64, 64, 1, processes=True) == pytest.approx(2e9 / cores.WEIGHTS_BYTES)
    assert rate(64, 64, 32, processes=True) == pytest.approx(32 * 2e9 / cores.WEIGHTS_BYTES)
