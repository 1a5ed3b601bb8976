"""The program for a GPU: every path runs, on the CPU in place of one, and the page's table takes its rows."""

import re
import subprocess

import pytest

from loadtests.bench import gpu

MIG = """GPU 0: NVIDIA H100 (UUID: GPU-5c89852c)
  MIG 3g.40gb     Device  0: (UUID: MIG-1c1a3a4d-7b3c-5f2e)
  MIG 3g.40gb     Device  1: (UUID: MIG-9d2b4c5e-8c4d-6a3f)
"""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Transformers' own
def test_every_path_runs_and_gives_the_cpus_answers() -> None:
    found = list(gpu.rows("cpu"))
    assert len({path for path, *_ in found}) == 5 + 3
    assert {len(cells) for cells in found} == {gpu.HEAD.splitlines()[0].count("|") - 1}
    *timed, cache = found
    assert {agree for _, _, _, agree, *_ in timed} == {"the CPU's"}
    assert all(float(ms) > 0 for *_, ms, _ in timed)
    assert re.fullmatch(r"text-generation, 64 slots of 512 tokens", cache[0]) and "by hand" in cache[3]


def test_path_that_fails_is_a_row_so_that_the_others_still_run() -> None:
    rows = ((f"{1 / n}",) for n in (1, 0))
    assert list(gpu.or_why_not("a path", "float16", rows)) == [
        ("1.0",),
        ("a path", "float16", "", "fails: ZeroDivisionError", "", ""),
    ]


def test_each_mig_slice_runs_in_a_process_that_sees_it_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def run(command: list[str], env: dict[str, str] | None = None, **_: object) -> object:
        if command[0] == "nvidia-smi":
            return subprocess.CompletedProcess(command, 0, MIG)
        assert env
        seen.append(env["CUDA_VISIBLE_DEVICES"])
        cells = (gpu.PACKED, "bfloat16", "256", "the CPU's", "9.1", "120")
        return subprocess.CompletedProcess(command, 0, " | ".join(cells) + "\n")

    monkeypatch.setattr(subprocess, "run", run)
    found = list(gpu.slice_rows())
    assert seen == ["MIG-1c1a3a4d-7b3c-5f2e", "MIG-9d2b4c5e-8c4d-6a3f"]
    assert found[1] == (f"MIG slice 1: {gpu.PACKED}", "bfloat16", "256", "the CPU's", "9.1", "120")


def test_table_replaces_what_the_page_says() -> None:
    page = gpu.PAGE.read_text()
    assert gpu.TABLE.search(page)
    assert "| a |" in gpu.with_table(page, ["| a |\n"], "cpu")
