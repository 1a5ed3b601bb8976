"""The lessons run, their notebooks are what their scripts say, and every exercise can be solved."""

import os
import re
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import nbformat
import psutil
import pytest
from IPython.core.interactiveshell import InteractiveShell

from loadtests.modes import ROOT
from tests.support.client import until

NOTEBOOKS = ROOT / "notebooks"
sys.path.insert(0, str(NOTEBOOKS))

import checks  # noqa: E402
import learn  # noqa: E402
import run  # noqa: E402

SOLUTIONS = sorted((NOTEBOOKS / "solutions").glob("*.py"))


def name(path: Path) -> str:
    return path.stem


@pytest.mark.slow
@pytest.mark.parametrize("script", run.LESSONS, ids=name)
@pytest.mark.filterwarnings("ignore")  # of Jupyter's own
def test_lesson_runs_top_to_bottom_and_its_asserts_hold(script: Path) -> None:
    run.execute(script, quick=True)


@pytest.mark.parametrize(("quick", "judges"), [("0", True), ("1", False)])
def test_what_a_lesson_measured_is_judged_in_its_full_form_only(quick: str, judges: bool) -> None:
    argv = [sys.executable, "-c", "import lesson; lesson.holds(False, 'the wall is steep')"]
    said = subprocess.run(
        argv, cwd=NOTEBOOKS, env=os.environ | {"QUICK": quick}, capture_output=True, text=True
    )
    assert ("AssertionError: the wall is steep" in said.stderr, said.returncode != 0) == (judges, judges)


@pytest.mark.parametrize("script", run.LESSONS, ids=name)
def test_stored_notebook_has_the_cells_of_its_script_and_outputs(script: Path) -> None:
    stored = nbformat.read(script.with_suffix(".ipynb"), as_version=4)
    assert [(c.cell_type, c.source) for c in stored.cells] == [
        (c.cell_type, c.source) for c in run.read(script).cells
    ]
    assert any(cell.get("outputs") for cell in stored.cells)
    assert str(ROOT) not in str(stored)


@pytest.mark.parametrize("script", run.LESSONS, ids=name)
def test_figures_in_bold_come_from_the_lessons_own_outputs(script: Path) -> None:
    """Prose that quotes what was measured sets it in bold: **51 ms**."""
    stored = nbformat.read(script.with_suffix(".ipynb"), as_version=4)
    shown = "\n".join(str(cell.get("outputs", "")) for cell in stored.cells)
    prose = "\n".join(cell.source for cell in stored.cells if cell.cell_type == "markdown")
    quoted = [
        number
        for bold in re.findall(r"\*\*(.+?)\*\*", prose)
        for number in re.findall(r"\d[\d.,]*\d|\d", bold)
    ]
    missing = [
        number for number in quoted if not re.search(rf"(?<![\d.,]){re.escape(number)}(?![\d]|[.,]\d)", shown)
    ]
    assert not missing, "run the lesson anew, or mend its prose"


def test_claims_are_those_of_the_stored_notebooks() -> None:
    assert (NOTEBOOKS / "claims.md").read_text() == run.ledger()


@pytest.mark.parametrize("solution", SOLUTIONS, ids=name)
def test_solution_satisfies_its_checker(solution: Path) -> None:
    verdict = getattr(checks, f"exercise_{solution.stem}")(runpy.run_path(str(solution))["answer"])
    assert verdict, verdict


def test_every_exercise_has_a_solution_and_every_checker_waits_for_an_answer() -> None:
    exercises = {key.removeprefix("exercise_") for key in vars(checks) if key.startswith("exercise_")}
    assert exercises == {path.stem for path in SOLUTIONS}
    assert not any(getattr(checks, f"exercise_{one}")(...) for one in exercises)


@pytest.mark.parametrize("script", run.LESSONS, ids=name)
def test_learners_copy_has_no_outputs_and_no_guess_is_made(
    script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(learn, "COPIES", tmp_path)
    assert learn.copy([script.stem.split("_")[0]]) == [f"{script.stem}.ipynb"]
    cells = nbformat.read(tmp_path / f"{script.stem}.ipynb", as_version=4).cells
    guesses = [
        line
        for cell in cells
        for line in cell.source.splitlines()
        if re.match(r"guess(_\w+)?( = |, guess)", line)
    ]
    assert guesses and all(re.search(r"= \.\.\.(, \.\.\.)*($|  #)", line) for line in guesses)
    assert not any(cell.get("outputs") for cell in cells)


def test_cell_that_needs_a_guess_does_not_run_and_says_so_in_one_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    import lesson

    shell = InteractiveShell()
    shell.ast_transformers.append(lesson.GuessFirst(shell.user_ns))
    assert shell.run_cell("guess_wait = ...  # calls").success
    assert not shell.run_cell("measured = 3").success and "measured" not in shell.user_ns
    assert capsys.readouterr().out.strip() == (
        "You have not guessed yet: give guess_wait a value where it says `...`, then go on."
    )
    assert shell.run_cell("guess_wait = 2").success and shell.run_cell("measured = 3").success


def test_killed_kernel_leaves_no_server(tmp_path: Path) -> None:
    code = (
        "import lesson, os, signal; from loadtests import modes\n"
        "server = lesson.serve(modes.Mode('fake', 'uvicorn tests.support.fake_servers:swaps'), wait=False)\n"
        "print(server.process.pid, flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    kernel = subprocess.run([sys.executable, "-c", code], cwd=NOTEBOOKS, capture_output=True, text=True)
    assert kernel.returncode == -signal.SIGKILL
    until(lambda: not psutil.pid_exists(int(kernel.stdout.split()[-1])))
