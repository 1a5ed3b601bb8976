"""The lessons run, their notebooks are what their scripts say, and every exercise can be solved."""

import json
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

from notebooks.support import said_by  # noqa: E402

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
def test_lesson_has_at_most_60_cells_and_a_cell_15_lines(script: Path) -> None:
    cells = run.read(script).cells
    assert len(cells) <= 60
    longest = max(len(cell.source.splitlines()) for cell in cells if cell.cell_type == "code")
    assert longest <= 15, "move machinery to notebooks/support"


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


MEASURED = re.compile(
    r"(?<![\w.,])(\d[\d,]*(?:\.\d+)?) ?(?:%|ms|µs|s|MB|GB|KB|×|times|(?:\w+ )?per second)(?![\w-])"
)


def figures_without_a_source(cells: list[nbformat.NotebookNode], machinery: str = "") -> list[str]:
    """Figures with a unit in plain sentences that stand in no output, in no code and in no formula.

    The first cell, which says how long the lesson takes, and the exercises have figures of their own.
    """
    known = machinery + "".join(c.source + str(c.get("outputs", "")) for c in cells if c.cell_type == "code")
    prose = "\n".join(cell.source for cell in cells[1:] if cell.cell_type == "markdown")
    prose = prose.partition("## Exercises")[0]
    known += "".join(re.findall(r"\$.*?\$", prose, re.DOTALL))
    prose = re.sub(r"\$.*?\$|`.*?`|\]\(.*?\)|\*\*.*?\*\*|<details>.*?</details>", "", prose, flags=re.DOTALL)
    found = re.findall(r"\d+(?:\.\d+)?(?:e-\d+)?", known.replace("_", "").replace(",", ""))
    numbers = {f"{float(one) * factor:g}" for one in found if len(one) < 12 for factor in (1, 100, 1000)}
    return [
        match[0].replace("\n", " ")
        for match in MEASURED.finditer(prose)
        if f"{float(match[1].replace(',', '')):g}" not in numbers
    ]


@pytest.mark.parametrize("script", run.LESSONS, ids=name)
def test_figure_in_a_plain_sentence_is_the_lessons_own(script: Path) -> None:
    """A sentence that rests on a measured figure belongs into `said`, which shows it only where it is true."""
    stored = nbformat.read(script.with_suffix(".ipynb"), as_version=4)
    machinery = [
        path.read_text()
        for path in (NOTEBOOKS / "support").glob(f"l{int(script.stem.split('_')[0]):02}_*.py")
    ]
    assert not figures_without_a_source(stored.cells, "".join(machinery))


def test_sentence_with_a_figure_that_no_output_has_is_found() -> None:
    head = nbformat.v4.new_markdown_cell("It takes about 3 minutes (quick form: 40 s).")
    prose = nbformat.v4.new_markdown_cell("A call takes 0.7 ms more, and $a$ is 20 ms.")
    output = nbformat.v4.new_output("stream", text="0.36 ms")
    code = nbformat.v4.new_code_cell("a_s = 0.02", outputs=[output])
    assert figures_without_a_source([head, prose, code]) == ["0.7 ms"]
    code.outputs[0].text = "0.7 ms"
    assert figures_without_a_source([head, prose, code]) == []


def test_every_source_belongs_to_a_claim_and_claims_have_a_verdict_of_four() -> None:
    import lesson

    scripts = (
        "".join(script.read_text() for script in run.LESSONS) + (NOTEBOOKS / "support/l09_gpu.py").read_text()
    )
    assert [claim for claim in said_by.SAID_BY if f'"{claim}"' not in scripts] == []
    stored = [
        entry
        for script in run.LESSONS
        for entry in run.claims(nbformat.read(script.with_suffix(".ipynb"), 4))
    ]
    verdicts = {entry["verdict"].split()[0].rstrip(":,;") for entry in stored}
    assert verdicts <= set(lesson.VERDICTS)
    with pytest.raises(ValueError, match="holds, fails, depends, untested"):
        lesson.claim("Water is wet", who="water", number="1", verdict="surely")


def test_stored_claims_name_the_sources_of_the_table() -> None:
    outputs = [
        output
        for script in run.LESSONS
        for cell in nbformat.read(script.with_suffix(".ipynb"), 4).cells
        for output in cell.get("outputs", [])
        if output.get("metadata", {}).get("claim") and output.data["text/markdown"]
    ]
    stale = [
        claim
        for output in outputs
        if f"> Said by: {said_by.link(claim := output.metadata.claim.claim)}  \n"
        not in output.data["text/markdown"]
    ]
    assert outputs and not stale, "run `python notebooks/run.py --cells`"


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
    assert 'sys.path.insert(0, "..")' in next(cell.source for cell in cells if cell.cell_type == "code")


@pytest.mark.parametrize("script", run.LESSONS, ids=name)
def test_scripts_leave_guesses_open_and_each_has_a_common_one_in_the_file(script: Path) -> None:
    open_ones = [found[1] for found in run.GUESS.finditer(script.read_text())]
    assert open_ones == list(run.common_guesses(script.stem.split("_")[0]))
    assert not re.findall(r"^guess(?:_\w+)? = (?!\.\.\.)", script.read_text(), re.MULTILINE)


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


def test_share_of_a_lock_is_measured_although_all_processes_start_at_once() -> None:
    argv = [sys.executable, "-m", "notebooks.support.l08_locks", "fork", "0.5", "0"]
    found = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=True)
    assert 0 < json.loads(found.stdout)["share"] < 1


def test_servers_of_the_quick_form_use_all_cores_and_end_soon() -> None:
    code = (
        "import lesson; print(lesson.SERVER_CORES == lesson.CLIENT_CORES == set(lesson.CORES), lesson.COMMON)"
    )
    argv = [sys.executable, "-c", code]
    quick, full = (
        subprocess.run(
            argv, cwd=NOTEBOOKS, env=os.environ | {"QUICK": one}, capture_output=True, text=True
        ).stdout
        for one in ("1", "0")
    )
    assert quick.startswith("True") and "GRACE_S" in quick and "GRACE_S" not in full
    assert full.startswith("True") == (len(os.sched_getaffinity(0)) == 1)


def test_changed_cell_loses_its_outputs_and_the_others_keep_theirs(tmp_path: Path) -> None:
    script = tmp_path / "1_name.py"
    script.write_text("# %%\n1 + 1\n\n# %%\n2 + 2\n")
    stored = run.read(script)
    for cell, text in zip(stored.cells, ("2", "4")):
        cell.outputs = [nbformat.v4.new_output("stream", text=text)]
    stored.metadata["run"] = run.this_run()
    nbformat.write(stored, script.with_suffix(".ipynb"))
    script.write_text("# %%\n1 + 1\n\n# %%\n3 + 3\n")
    kept = run.with_stored_outputs(script)
    assert [[output.text for output in cell.outputs] for cell in kept.cells] == [["2"], []]
    assert set(kept.metadata["run"]) == {"commit", "machine", "date"}


@pytest.mark.parametrize(
    ("value", "measured", "words"),
    [
        (100, 100, "right"),
        (50, 100, "2 × too low"),
        (300, 100, "3 × too high"),
        (0, 100, "too low"),
        (5, 0, "too high"),
    ],
)
def test_guess_is_told_how_far_off_it_is(value: float, measured: float, words: str) -> None:
    import lesson

    assert lesson.off(value, measured) == words


def test_comparisons_are_counted_and_a_reader_is_not_told_to_have_guessed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import lesson

    shown: list[str] = []
    monkeypatch.setattr(lesson, "display", lambda markdown, **_: shown.append(markdown.data))
    monkeypatch.setattr(lesson, "_compared", [])
    lesson.compare("the wait, s", guess=2, formula=9.5, measured=10)
    lesson.score()
    assert shown[0].startswith("*the wait, s.* A common guess: 2 (5 × too low).")
    assert "a common guess" in shown[1] and "5 ×" in shown[1] and "0 of 1" in shown[2]
    monkeypatch.setattr(lesson, "LEARNING", True)
    lesson.compare("the wait, s", guess=2, formula=9.5, measured=10)
    assert "Your guess: 2" in shown[3]


def test_sentence_is_shown_only_where_its_condition_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    import lesson

    shown: list[str] = []
    monkeypatch.setattr(lesson, "display", lambda markdown, **_: shown.append(markdown.data))
    lesson.said(1 < 2, "one is less than two")
    lesson.said(1 > 2, "one is more than two")
    lesson.said(1 > 2, "one is more than two", "it is not")
    assert shown == ["one is less than two", "it is not"]


JUDGED = [
    ("1", ([200] * 100,), ([200] * 65 + [503] * 35,)),
    ("2", ([500, 503, 503, 503],), ([500, 200, 200, 200],)),
    ("3", (60.0, 80.0, 40.0, 50.0), (90.0, 80.0, 48.0, 50.0)),
    ("3", (60.0, 80.0, 40.0, 50.0), (25.0, 80.0, 20.0, 50.0)),
    ("4", (4.0, 3.5), (4.0, 8.0)),
    ("5", (45.0, 60), (5.0, 60)),
    ("5", (45.0, 60), (45.0, 26)),
    ("6", (23.0, 24), (8.0, 24)),
    ("7", (0.4, 1.35), (0.6, 1.22)),
    ("7", (0.4, 1.35), (0.1, 1.51)),
    ("8", (3.0, 2.6), (0.5, 2.6)),
    ("9", ({1: 900.0, 2: 12.0}, 2), ({2: 12.0, 3: 1.0}, 3)),
    ("9", ({1: 900.0, 2: 12.0}, 2), ({1: 900.0}, 1)),
    ("10", (9.0, 0.0001), (9.0, 0.02)),
    ("10", (9.0, 0.0001), (2.0, 0.0001)),
    ("11", ({1: 1.0, 4: 3.0, 8: 5.5}, 8), ({1: 1.0, 2: 1.9, 4: 3.0}, 4)),
    ("11", ({1: 1.0, 4: 3.0, 8: 5.5}, 8), ({1: 1.0, 16: 7.0, 32: 9.0}, 32)),
    ("12", ({"200": 300},), ({"200": 280, "503": 20},)),
    ("13", (90.0, 170.0, 230.0), (90.0, 190.0, 260.0)),
    ("13", (90.0, 170.0, 230.0), (90.0, 120.0, 150.0)),
    ("14", (20.0, 50.0, 400.0), (20.0, 500.0, 400.0)),
    ("15", (0.84, 0.1), (0.44, 1.0)),
    ("15", (0.84, 0.1), (0.84, 0.0)),
]


@pytest.mark.parametrize(("lesson", "right", "wrong"), JUDGED)
def test_lab_accepts_what_was_asked_for_and_no_more(lesson: str, right: tuple, wrong: tuple) -> None:
    import labs

    judge = getattr(labs, f"judge_{lesson}")
    assert judge(*right), judge(*right)
    assert not judge(*wrong), judge(*wrong)


def test_lab_judges_nothing_where_the_same_experiment_gave_different_figures() -> None:
    import labs

    assert labs.steady([140.0, 132.0, 138.0]) == 138.0
    with pytest.raises(labs.NotYet, match=r"84 to 140 per second\. Try again"):
        labs.steady([140.0, 84.0, 138.0])


def test_lab_without_an_answer_measures_nothing_and_a_failed_one_says_why(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import labs

    def refuse(**settings: object) -> None:
        raise RuntimeError(f"no server with {settings}")

    monkeypatch.setattr(labs, "serve", refuse)
    assert "your turn" in labs.lab_5(...).sentence
    assert "no server with" in labs.lab_5({"MAX_QUEUE": 3}).sentence
