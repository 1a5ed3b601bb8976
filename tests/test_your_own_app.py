"""The loop in someone's own app: the FastAPI example of docs/your-own-app.md answers, rejects and fails as the page says."""

import asyncio
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import httpx2
import pytest

import workers
from examples import fastapi_app
from loadtests.modes import ROOT


def ask(*texts: str) -> list[Any]:
    """The replies to all texts, sent together to the app in this process."""

    async def run() -> list[Any]:
        async with fastapi_app.lifespan(fastapi_app.app) as state:

            async def app(scope: Any, receive: Any, send: Any) -> None:
                await fastapi_app.app(scope | {"state": dict(state)}, receive, send)

            transport = httpx2.ASGITransport(app)
            async with httpx2.AsyncClient(transport=transport, base_url="http://here") as client:
                return await asyncio.gather(*(client.post("/fill", json={"text": text}) for text in texts))

    return asyncio.run(run())


def test_fastapi_example_answers_and_only_the_bad_text_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    good, bad, other = ask("Paris is the [MASK] of France.", "no mask", "Rome is the [MASK] of Italy.")
    assert (good.json(), other.json()) == ({"answer": "capital"}, {"answer": "capital"})
    assert (bad.status_code, bad.json()) == (500, {"detail": "the model failed on this text"})


def test_fastapi_example_rejects_with_retry_after_when_its_queue_is_full(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fastapi_app, "load", lambda: lambda texts: texts)
    replies = ask(*map(str, range(200)))
    assert {reply.status_code for reply in replies} == {200, 503}
    assert all(int(reply.headers["Retry-After"]) >= 1 for reply in replies if reply.status_code == 503)


PROGRAM = """
import asyncio, sys
{imports}
{warm_up}

async def main():
    loop, thread = ModelLoop(batch_size=8, max_queue=2, budget_s=5), Thread(lambda: lambda texts: [text.upper() for text in texts])
    await thread.start()
    await warm_up(loop.cost_model, thread.run, [[("a", 1)] * n for n in (1, 4, 8)], loop.now)
    consumer = asyncio.create_task(loop.consume(thread.run))
    found = await asyncio.gather(*(loop.submit(text) for text in "abc"), return_exceptions=True)
    print([one if isinstance(one, Rejected) else one.value for one in found][:2], type(found[2]) is Rejected)
    await loop.drain(grace_s=5)
    consumer.cancel()
    thread.stop()

asyncio.run(main())
print("workers" in sys.modules)
"""


def run_elsewhere(folder: Path, path: Path, imports: str, warm_up: str) -> list[str]:
    """What the page's program prints in a folder where only `path` can be imported, without any installed package."""
    program = PROGRAM.format(imports=imports, warm_up=warm_up)
    done = subprocess.run(
        [sys.executable, "-S", "-c", program],
        cwd=folder,
        env={"PYTHONPATH": str(path)},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.splitlines()


def imports_of_the_page(name: str) -> tuple[str, str]:
    page = (ROOT / "docs" / "your-own-app.md").read_text()
    (imports,) = re.findall(r"^from model_loop import .+$", page, re.MULTILINE)
    (warm_up,) = re.findall(r"`model_loop(\.[\w.]*warm_up)`", page)
    return imports.replace("model_loop", name), f"from {name}{warm_up} import warm_up"


def test_installed_loop_is_imported_as_the_page_says_outside_of_the_repository(tmp_path: Path) -> None:
    source, wheels, elsewhere = (tmp_path / name for name in ("source", "wheels", "elsewhere"))
    shutil.copytree(ROOT / "workers", source / "workers", ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "LICENSE", "docs/your-own-app.md"):
        (source / file).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / file, source / file)
    offline = ["--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check"]
    wheel = [sys.executable, "-m", "pip", "wheel", "--quiet", *offline, "--wheel-dir", wheels, source]
    subprocess.run(wheel, check=True)
    (made,) = wheels.iterdir()
    zipfile.ZipFile(made).extractall(elsewhere)
    assert made.name == f"model_loop-{workers.__version__}-py3-none-any.whl"
    assert {path.name for path in elsewhere.iterdir()} == {"model_loop", made.stem[:-13] + ".dist-info"}
    found = run_elsewhere(tmp_path, elsewhere, *imports_of_the_page("model_loop"))
    assert found == ["['A', 'B'] True", "False"]


def test_files_that_the_page_names_work_copied_under_another_name(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "your-own-app.md").read_text()
    (files,) = re.findall(r"copy (`workers/__init__\.py`.*?) into a folder", page, re.DOTALL)
    for name in re.findall(r"`([\w./]+)`", files):
        source = ROOT / "workers" / name.removeprefix("workers/")
        target = tmp_path / "other" / source.relative_to(ROOT / "workers")
        if source.is_dir():
            shutil.copytree(source, target)
        else:
            target.parent.mkdir(exist_ok=True)
            shutil.copy(source, target)
    assert run_elsewhere(tmp_path, tmp_path, *imports_of_the_page("other")) == ["['A', 'B'] True", "False"]


def test_name_that_the_package_has_not_is_an_error_with_its_own_name() -> None:
    with pytest.raises(AttributeError, match="module 'workers' has no attribute 'Nonsense'"):
        workers.Nonsense  # noqa: B018


def test_loop_needs_nothing_but_python() -> None:
    code = (
        "import sys; before = set(sys.modules); from workers import ModelLoop, Thread; ModelLoop(batch_size=8); Thread(print)\n"
        "print(*{name.partition('.')[0] for name in set(sys.modules) - before} - sys.stdlib_module_names)"
    )
    modules = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert modules.stdout.split() == ["workers"]
