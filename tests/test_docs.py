"""The pages say what the code says, and their links lead somewhere."""

import ast
import importlib.util
import os
import re
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from urllib.parse import unquote

import pytest
from markdown_it import MarkdownIt
from mdit_py_plugins.anchors import anchors_plugin
from PIL import Image

from docs import generate
from loadtests.modes import ROOT
from workers import protocols
from workers.settings import Settings

MARKDOWN = MarkdownIt().enable("table").use(anchors_plugin, max_level=6)


def pages() -> Iterator[Path]:
    for folder, inner, names in os.walk(ROOT):
        inner[:] = [name for name in inner if not name.startswith(".") or name == ".github"]
        for path in map(Path(folder).joinpath, names):
            if path.suffix == ".md" or re.fullmatch(r"notebooks/\d\w+\.py", str(path.relative_to(ROOT))):
                yield path


@pytest.mark.parametrize("path", generate.PAGES, ids=lambda path: path.stem)
def test_page_has_the_tables_that_the_code_makes(path: Path) -> None:
    assert path.read_text() == generate.page(path.read_text()), "stale: run `make docs`"


@pytest.mark.parametrize(
    "task",
    ["fill-mask", "feature-extraction", "text-ranking", "text-generation", "automatic-speech-recognition"],
)
def test_every_api_is_on_its_page(task: str) -> None:
    page = (generate.DOCS / "protocols.md").read_text()
    for found in iter_modules(protocols.__path__):
        for route in import_module(f"{protocols.__name__}.{found.name}").routes(Settings(TASK=task)):
            assert f"{route.path}`" in page, f"docs/protocols.md says nothing of {route.path}"


def n_lines(*patterns: str) -> int:
    return sum(len(path.read_text().splitlines()) for one in patterns for path in ROOT.glob(one))


def test_table_of_what_minimal_lacks_has_true_line_counts() -> None:
    page = (generate.DOCS / "architecture.md").read_text()
    rows = re.findall(r"\| `(\w+)/` \| (\d+) \|$", page, re.MULTILINE)
    assert len(rows) == 8
    for folder, lines in rows:
        assert n_lines(f"workers/{folder}/**/*.py") == pytest.approx(int(lines), rel=0.1), folder
    assert f"{n_lines('minimal.py')} lines of `minimal.py`" in page


def imported_by(module: str, found: set[Path]) -> set[Path]:
    """Return the files of `module` and of what it imports from `workers` to be imported itself, and so on."""
    path = ROOT / f"{module.replace('.', '/')}.py"
    path = path if path.exists() else path.with_suffix("") / "__init__.py"
    if path not in found and path.exists():
        found.add(path)
        for node in ast.parse(path.read_text()).body:
            if not isinstance(node, ast.ImportFrom):
                continue
            package = ".".join(path.relative_to(ROOT).parent.parts) if node.level else ""
            source = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            if source.startswith("workers."):
                for one in (
                    source.rpartition(".")[0],
                    source,
                    *(f"{source}.{name.name}" for name in node.names),
                ):
                    imported_by(one, found)
    return found - {ROOT / "workers" / "__init__.py"}


def test_pattern_stays_small() -> None:
    assert n_lines("minimal.py") < 125
    assert n_lines("server.py") < 130
    core = imported_by("workers.loop", set()) - {ROOT / "workers" / "scheduling" / "__init__.py"}  # its table
    assert {path.name for path in core} >= {"loop.py", "jobs.py", "admission.py", "cost_model.py"}
    assert sum(len(path.read_text().splitlines()) for path in core) < 950
    assert sum(map(n_lines_of_code, core)) < 590


def n_lines_of_code(path: Path) -> int:
    """Return its lines without docstrings, comments and empty ones."""
    prose = {0}
    for node in ast.walk(ast.parse(path.read_text())):
        if (
            isinstance(node, ast.Expr)
            and isinstance(node.value, ast.Constant)
            and isinstance(node.value.value, str)
        ):
            prose |= set(range(node.lineno, (node.end_lineno or 0) + 1))
    lines = enumerate(path.read_text().splitlines(), 1)
    return sum(n not in prose and bool(re.match(r"\s*[^\s#]", line)) for n, line in lines)


def test_readme_is_short_and_leads_to_every_page() -> None:
    readme = (ROOT / "README.md").read_text()
    assert len(readme.splitlines()) <= 150
    here = {page.name for page in generate.DOCS.glob("*.md")}
    reached = {Path(address.partition("#")[0]).name for address in parsed(ROOT / "README.md")[0]}
    further = {"your-own-app.md"}  # linked from docs/migrating.md and docs/architecture.md
    assert here - reached <= further


@cache
def parsed(path: Path) -> tuple[list[str], set[str]]:
    """The addresses of its links and pictures, and the anchors of its headings."""
    text = path.read_text()
    if path.suffix == ".py":  # a lesson's prose stands in comments
        text = "\n".join(line[2:] for line in text.splitlines() if line.startswith("# "))
    tokens = list(flat(MARKDOWN.parse(text)))
    addresses = [str(token.attrs[key]) for token in tokens for key in ("href", "src") if key in token.attrs]
    return addresses, {str(token.attrs["id"]) for token in tokens if "id" in token.attrs}


def flat(tokens: list) -> Iterator:
    for token in tokens:
        yield token
        yield from flat(token.children or [])


def pictures(path: Path) -> Iterator[tuple[Path, Path]]:
    """Yield the light and the dark file of each picture on a page."""
    for dark, light in re.findall(
        r'<source [^>]*srcset="([^"]+)">\s*<img [^>]*src="([^"]+)"', path.read_text()
    ):
        yield path.parent / light, path.parent / dark


@pytest.mark.parametrize("path", sorted(pages()), ids=lambda path: str(path.relative_to(ROOT)))
def test_every_picture_has_a_dark_variant(path: Path) -> None:
    assert not re.search(r"!\[[^]]*\]\([^)]+\.png\)", path.read_text()), "use loadtests.pictures.picture"
    for light, dark in pictures(path):
        with Image.open(light) as one, Image.open(dark) as other:
            assert one.size == other.size, f"draw {light.name} again"


MEASURED = re.compile(r"\d (?:requests|texts|tokens)/s|\d×|\d[\d,]* of \d[\d,]+")
SOURCE = re.compile(r"\d{4}-\d\d-\d\d|results/|claims\.md|numbers\.md")


@pytest.mark.parametrize(
    "path", [ROOT / "README.md", *sorted(generate.DOCS.glob("*.md"))], ids=lambda path: path.stem
)
def test_every_measurement_has_its_source(path: Path) -> None:
    """A date beside it, or a link to a page that has date, machine and command."""
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)
    for section in re.split(r"^(?=#+ )", text, flags=re.MULTILINE):
        assert SOURCE.search(section) or not MEASURED.search(section), section.splitlines()[0]


def broken(path: Path) -> Iterator[str]:
    for address in parsed(path)[0]:
        if re.match(r"[a-z]+:", address):
            continue  # somebody else's: not asked for
        name, _, anchor = unquote(address).partition("#")
        target = (path.parent / name).resolve() if name else path
        is_there = target.exists() and target.is_relative_to(ROOT)
        if not is_there or (anchor and target.suffix == ".md" and anchor not in parsed(target)[1]):
            yield address


@pytest.mark.parametrize("path", sorted(pages()), ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_leads_somewhere(path: Path) -> None:
    assert not list(broken(path))
