"""Run the lessons, store their outputs beside them, write the claims ledger: `python notebooks/run.py [--quick] [3 4]`.

A lesson is a script in jupytext's percent format; its notebook has the same cells and the outputs of a full run. The
notebook's metadata says when, where and at which commit that was. `--cells` runs nothing: a cell that is as it was keeps
its outputs, a changed one has none until the next full run. Sources of claims are renewed.
"""

import argparse
import configparser
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import date, datetime
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from loadtests import host  # noqa: E402
from notebooks.support import said_by  # noqa: E402

LESSONS = sorted(HERE.glob("[0-9]*_*.py"), key=lambda script: int(script.stem.split("_")[0]))


GUESS = re.compile(r"^((?:guess_\w+, )*guess(?:_\w+)?) = \.\.\.(?:, \.\.\.)*", re.MULTILINE)


def common_guesses(number: str) -> dict[str, str]:
    """Of a lesson: what common_guesses.ini has for each name, as Python."""
    guesses = configparser.ConfigParser(interpolation=None)
    guesses.read_string((HERE / "common_guesses.ini").read_text())
    return dict(guesses[number])


def read(script: Path, *, guessed: bool = True) -> nbformat.NotebookNode:
    """The script as a notebook without outputs, always the same bytes; with common guesses, or `...` for a learner's own."""
    notebook = jupytext.read(script)
    if guessed:
        guesses = common_guesses(script.stem.split("_")[0])
        for cell in notebook.cells:
            cell.source = GUESS.sub(lambda found: f"{found[1]} = {guesses[found[1]]}", cell.source)
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for number, cell in enumerate(notebook.cells, 1):
        cell.id, cell.metadata = f"cell-{number}", {}
    return notebook


def execute(script: Path, *, quick: bool) -> nbformat.NotebookNode:
    """Run the script top to bottom in a new kernel. Raises CellExecutionError where a cell fails, as an assert does."""
    notebook = read(script)
    os.environ["QUICK"] = "1" if quick else "0"
    client = NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(HERE)}})
    client.execute()
    for cell in notebook.cells:
        report_slow(cell)
        cell.metadata = {}
        if str(HERE.parent) in (shown := str(cell.get("outputs", ""))):
            where = shown.index(str(HERE.parent))
            raise ValueError(
                f"{script.stem}, {cell.id} shows a path of this machine: …{shown[max(0, where - 200) :][:600]}"
            )
    notebook.metadata |= {"language_info": {"name": "python"}, "run": this_run()}
    return notebook


def this_run() -> dict[str, str]:
    """The commit, the machine and the date, for a notebook's metadata."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=HERE.parent, capture_output=True, text=True).stdout.strip()

    # What a run before this one has stored is no change of the code.
    others = [":!notebooks/*.ipynb", ":!notebooks/claims.md"]
    commit = git("rev-parse", "--short", "HEAD") + "-dirty" * bool(
        git("status", "--porcelain", "--", ".", *others)
    )
    machine = f"{host.processor()}, {len(os.sched_getaffinity(0))} cores"
    return {"commit": commit or "unknown", "machine": machine, "date": str(date.today())}


def with_stored_outputs(script: Path) -> nbformat.NotebookNode:
    """The script as a notebook; cells that the stored one has too keep their outputs."""
    notebook, path = read(script), script.with_suffix(".ipynb")
    if not path.exists():
        return notebook
    stored = nbformat.read(path, 4)
    outputs = {cell.source: cell for cell in stored.cells if cell.cell_type == "code"}
    for cell in notebook.cells:
        if cell.cell_type == "code" and (was := outputs.get(cell.source)):
            cell.outputs, cell.execution_count = (
                [with_source(one) for one in was.outputs],
                was.execution_count,
            )
    if run := stored.metadata.get("run"):
        notebook.metadata["run"] = run
    return notebook


def with_source(output: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The output of a claim with its source as support/said_by.py has it: that is not measured, so no run is needed."""
    if claim := output.get("metadata", {}).get("claim"):
        line = f"> Said by: {said_by.link(claim['claim'])}"
        text = output.data["text/markdown"]
        output.data["text/markdown"] = re.sub(
            r"^> Said by: .*?(?= *$)", lambda _: line, text, flags=re.MULTILINE
        )
    return output


def report_slow(cell: nbformat.NotebookNode, limit_s: float = 2.0) -> None:
    """Print where a lesson's time goes, from what nbclient notes on the cell."""
    if noted := cell.metadata.get("execution"):
        start, end = (
            datetime.fromisoformat(noted[key]) for key in ("iopub.status.busy", "iopub.status.idle")
        )
        if (took_s := (end - start).total_seconds()) > limit_s:
            print(f"    {cell.id}: {took_s:.0f} s  {cell.source.splitlines()[-1][:60]}")


def claims(notebook: nbformat.NotebookNode) -> Iterator[dict[str, str]]:
    """Every claim that the notebook's outputs enter, with the heading under which it does."""
    heading = ""
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            heading = next(
                (text.lstrip("# ") for text in cell.source.splitlines() if text.startswith("#")), heading
            )
        for output in cell.get("outputs", []):
            if entry := output.get("metadata", {}).get("claim"):
                yield {**entry, "heading": heading}


def ledger() -> str:
    """The claims of all stored notebooks, in Markdown."""
    text = [
        "# Common claims, tested",
        "",
        "What is often said about serving models, put to the test by the lessons. A verdict is *holds*, *fails*, *depends* or",
        "*untested*. Your own machine may tell otherwise: run them. This page is written by `notebooks/run.py` from the lessons'",
        "outputs.",
    ]
    for script in LESSONS:
        if (path := script.with_suffix(".ipynb")).exists():
            text += lesson_claims(nbformat.read(path, 4), path.name)
    return "\n".join(text) + "\n"


def lesson_claims(notebook: nbformat.NotebookNode, name: str) -> list[str]:
    """A lesson's part of the ledger: where and when it was run, and a row for each claim."""
    title = notebook.cells[0].source.splitlines()[0].lstrip("# ")
    found = list(claims(notebook))
    if not found:
        return []
    run = notebook.metadata.get("run")
    where = f"{run['machine']}, {run['date']}, commit {run['commit']}" if run else found[0]["on"]
    text = ["", f"## [{title}]({name})", "", f"Run on {where}.", ""]
    text += ["| claim | said by | measured | verdict | under |", "|---|---|---|---|---|"]
    for entry in found:
        first, *rest = entry["verdict"].split(maxsplit=1)
        verdict = " ".join([f"**{first.rstrip(':,;')}**{first[len(first.rstrip(':,;')) :]}", *rest])
        measured = f"{entry['who']}: {entry['number']}"
        cells = (
            f"“{entry['claim']}”",
            said_by.link(entry["claim"]),
            measured,
            verdict,
            f"“{entry['heading']}”",
        )
        text.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("lessons", nargs="*", help="their numbers; all when none is given")
    parser.add_argument(
        "--quick",
        action="store_true",
        default=os.environ.get("QUICK") == "1",
        help="short experiments: shows that it runs, stores nothing; also by QUICK=1",
    )
    parser.add_argument(
        "--cells", action="store_true", help="run nothing; store the cells and what outputs they have"
    )
    arguments = parser.parse_args()
    for script in LESSONS:
        if arguments.lessons and script.stem.split("_")[0] not in arguments.lessons:
            continue
        if arguments.cells:
            nbformat.write(with_stored_outputs(script), script.with_suffix(".ipynb"))
            continue
        began = time.monotonic()
        notebook = execute(script, quick=arguments.quick)
        if not arguments.quick:
            nbformat.write(notebook, script.with_suffix(".ipynb"))
        print(f"{script.stem}: {time.monotonic() - began:.0f} s", flush=True)
    if not arguments.quick:
        (HERE / "claims.md").write_text(ledger())


if __name__ == "__main__":
    main()
