"""What an image of this server holds, from what is installed here.

packages()["torch"]; compilers_mb()
"""

import re
import shutil
import subprocess
import zlib
from collections.abc import Iterable
from importlib.metadata import Distribution, distribution
from pathlib import Path

from loadtests.packages import required

ROOT = Path(__file__).resolve().parents[2]


def files(package: Distribution) -> list[Path]:
    """What is on disk of it, with what Python has compiled."""
    paths = [Path(str(package.locate_file(file))) for file in package.files or []]
    return [path for path in paths if path.is_file()]


def packages(names: Iterable[str] | None = None) -> dict[str, float]:
    """MB of each of these packages, and of what they require; of requirements.txt where none is named."""
    lines = names or (ROOT / "requirements.txt").read_text().splitlines()
    found = required(name for line in lines if (name := line.partition("#")[0].strip()))
    return {name: sum(path.stat().st_size for path in files(one)) / 1e6 for name, one in found.items()}


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
    largest = max(files(distribution("torch")), key=lambda path: path.stat().st_size)
    step, packed = largest.stat().st_size // samples, 0
    with largest.open("rb") as file:
        for i in range(samples):
            file.seek(i * step)
            packed += len(zlib.compress(file.read(sample_bytes), 6))
    return packed / samples / sample_bytes


def layers(installed: dict[str, float]) -> dict[str, float]:
    """MB of the image's parts that this project puts there."""
    torch, transformers = installed["torch"], installed["transformers"]
    return {
        "torch": torch,
        "transformers": transformers,
        "other packages": sum(installed.values()) - torch - transformers,
        "model": folder_mb("models/minilm-mlm"),
        "code": folder_mb("server.py", "gunicorn.conf.py", "workers"),
    }


def left_out(installed: dict[str, float]) -> dict[str, float]:
    """MB that a first stage has and the second hasn't."""
    return {"pip": packages(["pip"])["pip"], "pip's cache": packed_share() * sum(installed.values())}
