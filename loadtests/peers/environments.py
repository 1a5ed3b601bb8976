"""An environment for each file of requirements, in a cache folder; torch and what else fits is the project's own."""

import json
import shutil
import subprocess
import sys
import sysconfig
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from packaging.requirements import Requirement

from loadtests.modes import ROOT
from loadtests.peers.catalogue import CACHE, FOLDER, Peer

INSTALL_S = 900


class NotInstalled(Exception):
    """Why there is no environment, in one sentence."""


def requirements(peer: Peer) -> list[str]:
    """The lines of its file; of ours, those that serving needs."""
    file = FOLDER / "requirements" / f"{peer.needs}.txt" if peer.needs else ROOT / "requirements.txt"
    lines = (line.partition("#")[0].strip() for line in file.read_text().splitlines())
    return [line for line in lines if line and not line.startswith("-")]


def is_met(lines: list[str]) -> bool:
    """Whether the interpreter that runs has all of them."""
    try:
        return all(
            Requirement(line).specifier.contains(version(Requirement(line).name).partition("+")[0])
            for line in lines
        )
    except PackageNotFoundError:
        return False


@cache
def prepare(needs: str, lines: tuple[str, ...]) -> None:
    """Make the environment where the project's own won't do. Raises NotInstalled with pip's reason."""
    folder = CACHE / needs
    if is_met(list(lines)) and not folder.exists():
        return
    done, python = folder / "installed.json", folder / "bin" / "python"
    is_done = done.exists() and json.loads(done.read_text()) == list(lines)
    if not is_done:
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    (site,) = folder.glob("lib/python*/site-packages")
    # Behind its own packages; written each time, as the project may have moved.
    (site / "project.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    if is_done:
        return
    if (fix := FOLDER / f"{needs}_fix").exists():
        shutil.copytree(fix, site, dirs_exist_ok=True)
    command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *lines]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_S)
    except subprocess.TimeoutExpired:
        raise NotInstalled(f"pip took more than {INSTALL_S} s") from None
    if found.returncode:
        reasons = [
            line for line in found.stderr.splitlines() if line.startswith("ERROR")
        ] or found.stderr.splitlines()
        raise NotInstalled(f"pip: {reasons[-1][:200]}" if reasons else "pip failed")
    if (unwanted := FOLDER / "requirements" / f"{needs}.without.txt").exists():
        command = [str(python), "-m", "pip", "uninstall", "--quiet", "--yes", "-r", str(unwanted)]
        subprocess.run(command, check=True)
    done.write_text(json.dumps(lines))


def installed_mb(peer: Peer) -> float:
    """MB on disk of its requirements and all that these require, shared or not, as pip on this machine resolved them."""
    command = [str(peer.python), "-m", "loadtests.packages", *requirements(peer)]
    return float(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout)


def lines_of_code(peer: Peer) -> int:
    """Lines that a user writes: no docstrings' first blocks, comments or blank lines, and the model's own not counted."""
    count = 0
    for name in peer.code:
        text = Path(FOLDER / f"{name}.py").read_text()
        body = text.split('"""', 2)[2] if text.startswith('"""') else text
        count += sum(bool(line.strip()) and not line.strip().startswith("#") for line in body.splitlines())
    return count
