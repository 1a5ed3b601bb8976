"""Environments of their own for clients that must not share the server's."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from loadtests.modes import ROOT

CLIENTS = ROOT / "tests" / "clients"
INSTALL_S = 500


def environment(folder: Path, requirements: Path) -> Path:
    """The Python of a new environment with these packages; skips where they can't be had."""
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    python = folder / "bin" / "python"
    command = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check", "-r", requirements]
    try:
        installed = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_S)
    except subprocess.TimeoutExpired:
        pytest.skip(f"pip took more than {INSTALL_S} s for {requirements.name}")
    unreachable = "No matching distribution" in installed.stderr or "Connection" in installed.stderr
    if installed.returncode and unreachable:
        pytest.skip("the package index does not have them, or can't be reached")
    assert installed.returncode == 0, installed.stderr
    return python


def ask(name: str, folder: Path, *arguments: Any) -> str:
    """The last line that `tests/clients/ask_NAME.py` prints, in an environment made of `tests/clients/NAME.txt`."""
    python = environment(folder / "environment", CLIENTS / f"{name}.txt")
    program = [str(python), "-W", "ignore", str(CLIENTS / f"ask_{name}.py"), *map(str, arguments)]
    # No telemetry, and nothing that the developer has set for them.
    env = {"PATH": os.environ["PATH"], "HOME": str(folder), "HAYSTACK_TELEMETRY_ENABLED": "False"}
    env["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"
    ran = subprocess.run(program, capture_output=True, text=True, timeout=200, env=env, cwd=folder)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.splitlines()[-1]
