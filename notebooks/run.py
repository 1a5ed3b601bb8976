"""Run the lessons, store their outputs beside them, write the claims ledger: `python notebooks/run.py [--quick] [3 4]`.

A lesson is a script in jupytext's percent format; its notebook has the same cells and the outputs of a full run.
"""

import argparse
import os
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).resolve().parent
LESSONS = sorted(HERE.glob("[0-9]*_*.py"), key=lambda script: int(script.stem.split("_")[0]))


def read(script: Path) -> nbformat.NotebookNode:
    """The script as a notebook without outputs, always the same bytes."""
    notebook = jupytext.read(script)
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
    notebook.metadata["language_info"] = {"name": "python"}
    return notebook


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
    stored = {
        script: script.with_suffix(".ipynb") for script in LESSONS if script.with_suffix(".ipynb").exists()
    }
    entries = [(script, entry) for script, path in stored.items() for entry in claims(nbformat.read(path, 4))]
    machines = sorted({entry["on"] for _, entry in entries})
    text = [
        "# Claims",
        "",
        f"Folk wisdom about serving models, put to the test by the lessons ({'; '.join(machines)}). Your own machine may",
        "tell otherwise: run them. This page is written by `notebooks/run.py` from the lessons' outputs.",
        "",
        "| claim | who is measured | number | verdict | where |",
        "|---|---|---|---|---|",
    ]
    for script, entry in entries:
        where = f"[lesson {script.stem.split('_')[0]}]({stored[script].name}), “{entry['heading']}”"
        cells = (f"“{entry['claim']}”", entry["who"], entry["number"], f"**{entry['verdict']}**", where)
        text.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(text) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("lessons", nargs="*", help="their numbers; all when none is given")
    parser.add_argument(
        "--quick",
        action="store_true",
        default=os.environ.get("QUICK") == "1",
        help="short experiments: shows that it runs, stores nothing; also by QUICK=1",
    )
    arguments = parser.parse_args()
    for script in LESSONS:
        if arguments.lessons and script.stem.split("_")[0] not in arguments.lessons:
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
