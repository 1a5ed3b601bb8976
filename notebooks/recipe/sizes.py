"""What an image of this server holds, from what is installed here.

packages()["torch"]; compilers_mb()
"""

import re
import shutil
import subprocess
import zlib
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]


def packages(names: Iterable[str] | None = None) -> dict[str, float]:
    """MB of each of these packages, and of what they require; of requirements.txt where none is named."""
    lines = names or (ROOT / "requirements.txt").read_text().splitlines()
    todo, found = [Requirement(name) for line in lines if (name := line.partition("#")[0].strip())], {}
    while todo:
        wanted = todo.pop()
        name = re.sub("[-_.]+", "-", wanted.name).lower()
        if name in found or (wanted.marker and not wanted.marker.evaluate({"extra": ""})):
            continue
        try:
            installed = distribution(name)
        except PackageNotFoundError:
            continue
        paths = [Path(str(installed.locate_file(file))) for file in installed.files or []]
        found[name] = sum(path.stat().st_size for path in paths if path.is_file()) / 1e6
        todo += [Requirement(line) for line in installed.requires or []]
    return found


def folder_mb(*names: str) -> float:
    """MB of files and folders of the project, caches left out."""
    files = [file for name in names for file in [ROOT / name, *(ROOT / name).rglob("*")] if file.is_file()]
    return sum(file.stat().st_size for file in files if "__pycache__" not in file.parts) / 1e6


def compilers_mb() -> float | None:
    """MB of Debian's build-essential and all that it needs and a bare system hasn't; None where they aren't installed."""
    if not shutil.which("dpkg-query"):
        return None
    form = "${Package}\t${Installed-Size}\t${Priority}\t${Depends}\n"
    asked = subprocess.run(["dpkg-query", "-W", "-f", form], capture_output=True, text=True, timeout=20)
    known = {row[0]: row for line in asked.stdout.splitlines() if len(row := line.split("\t")) == 4}
    todo, kb = ["build-essential"], {}
    while todo:
        name = todo.pop()
        if name in known and name not in kb and known[name][2] not in ("required", "important"):
            kb[name] = int(known[name][1] or 0)
            todo += [re.split("[ (|:]", one.strip())[0] for one in known[name][3].split(",")]
    return sum(kb.values()) * 1024 / 1e6 if "build-essential" in kb else None


def packed_share(samples: int = 12, sample_bytes: int = 1_000_000) -> float:
    """How small torch's largest file gets in a wheel, as a share: from samples of it, deflated as wheels are."""
    installed = distribution("torch")
    paths = [Path(str(installed.locate_file(file))) for file in installed.files or []]
    largest = max((path for path in paths if path.is_file()), key=lambda path: path.stat().st_size)
    step, packed = largest.stat().st_size // samples, 0
    with largest.open("rb") as file:
        for i in range(samples):
            file.seek(i * step)
            packed += len(zlib.compress(file.read(sample_bytes), 6))
    return packed / samples / sample_bytes
