"""What pip installs for some requirements, from what is installed here: `python -m loadtests.packages torch`, for its MB."""

import sys
from collections.abc import Iterable
from importlib.metadata import Distribution, PackageNotFoundError, distribution

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


def required(lines: Iterable[str]) -> dict[str, Distribution]:
    """The packages that these lines name, and all that they require in turn, by name; those that are missing left out."""
    todo = [(Requirement(line), "") for line in lines]
    found: dict[str, Distribution] = {}
    seen: set[tuple[str, str]] = set()
    while todo:
        wanted, extra = todo.pop()
        if wanted.marker and not wanted.marker.evaluate({"extra": extra}):
            continue
        name = canonicalize_name(wanted.name)
        try:
            found[name] = distribution(name)
        except PackageNotFoundError:
            continue
        for extra in {"", *wanted.extras}:
            if (name, extra) not in seen:
                seen.add((name, extra))
                todo += [(Requirement(line), extra) for line in found[name].requires or []]
    return found


def listed_mb(packages: Iterable[Distribution]) -> float:
    """MB as their own lists of files say: without what Python compiles of them."""
    return sum(file.size or 0 for package in packages for file in package.files or []) / 1e6


if __name__ == "__main__":
    print(listed_mb(required(sys.argv[1:]).values()))
