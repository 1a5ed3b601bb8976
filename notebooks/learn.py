"""`make learn`: copies of the lessons without outputs and without guesses, in notebooks/learn/, opened in JupyterLab.

A copy that is there stays as it is; delete it to start again.
"""

import os
import subprocess
import sys

import nbformat
import run

COPIES = run.HERE / "learn"
FIRST = """import sys

sys.path.insert(0, "..")  # this copy lies in notebooks/learn: keep it there
"""


def copy(numbers: list[str]) -> list[str]:
    """Write the copies that are not there; return the names of all that were asked for."""
    COPIES.mkdir(exist_ok=True)
    names = []
    for script in run.LESSONS:
        if numbers and script.stem.split("_")[0] not in numbers:
            continue
        path = COPIES / f"{script.stem}.ipynb"
        names.append(path.name)
        if not path.exists():
            notebook = run.read(script, guessed=False)
            first = next(cell for cell in notebook.cells if cell.cell_type == "code")
            first.source = FIRST + first.source
            nbformat.write(notebook, path)
    return names


if __name__ == "__main__":
    names = copy(sys.argv[1:])
    as_root = ["--allow-root"] if os.getuid() == 0 else []
    environment = os.environ | {"PYTHONPATH": str(run.HERE), "LEARNING": "1"}
    command = [sys.executable, "-m", "jupyter", "lab", *names[:1], *as_root]
    sys.exit(subprocess.run(command, cwd=COPIES, env=environment).returncode)
