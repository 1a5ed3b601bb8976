"""Each example is served by the command in its first line, and answers what its docstring shows."""

import ast
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from loadtests.modes import MODES, ROOT, start

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
ELSEWHERE = {"fastapi_app"}  # tests/test_your_own_app.py
HEAVY = {"embeddings", "chat"}


def docstring(path: Path) -> str:
    return ast.get_docstring(ast.parse(path.read_text())) or ""


def settings(path: Path) -> dict[str, str]:
    """The settings of the command in the first line."""
    command = docstring(path).partition(" -- ")[0]
    if command == "make chat":
        return {"MODEL": "models/chat", "TASK": "text-generation"}
    assert command.endswith("uvicorn server:app"), command
    pairs = re.findall(r"(\w+)=(\$\(.*?\)|\S+)", command)
    run = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    return {
        name: subprocess.check_output(["bash", "-c", f"echo -n {value}"], text=True, env=os.environ | run)
        for name, value in pairs
    }


def sessions(path: Path) -> list[tuple[str, str]]:
    """Each command of the docstring and the output below it."""
    found = re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n?)*)", docstring(path), re.MULTILINE)
    return [(command, output.strip()) for command, output in found if not command.startswith("pip install")]


@pytest.mark.parametrize(
    "path", [path for path in EXAMPLES if path.stem not in ELSEWHERE | HEAVY], ids=lambda p: p.stem
)
def test_example_answers_what_it_shows(path: Path, tmp_path: Path) -> None:
    answers(path, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("path", [path for path in EXAMPLES if path.stem in HEAVY], ids=lambda p: p.stem)
def test_heavy_example_answers_what_it_shows(path: Path, tmp_path: Path) -> None:
    if path.stem == "chat" and not (ROOT / "models/chat/config.json").exists():
        pytest.skip("there is no models/chat: `make chat` makes it")
    answers(path, tmp_path)


def answers(path: Path, tmp_path: Path) -> None:
    asked = sessions(path)
    assert asked, "its docstring has no commands"
    with start(MODES["thread"], settings(path)) as server:
        for command, expected in asked:
            argv = shlex.split(command.replace("http://127.0.0.1:8000/", server.url))
            if argv[0] == "curl":
                argv = [
                    *argv[:1],
                    "-sS",
                    "--fail-with-body" if '"error"' not in expected else "-s",
                    *argv[1:],
                ]
            if argv[0] == "python":
                argv = [sys.executable, *argv[1:], server.url.rstrip("/")]
            argv = [str(tmp_path / word) if word == "edges.png" else word for word in argv]
            output = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
            pattern = re.escape(expected).replace("…", ".*")
            assert re.fullmatch(pattern, output, re.DOTALL), f"{command}\n{output}"
            if "edges.png" in command:
                with Image.open(tmp_path / "edges.png") as image, Image.open(ROOT / "docs/page.png") as page:
                    assert (image.size, image.mode) == (page.size, "L")
                (tmp_path / "edges.png").unlink()
