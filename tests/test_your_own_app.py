"""The loop in someone's own app: the FastAPI example of docs/your-own-app.md answers, rejects and fails as the page says."""

import asyncio
import re
import subprocess
import sys
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


def test_package_exports_what_the_page_imports() -> None:
    page = (ROOT / "docs" / "your-own-app.md").read_text()
    (names,) = re.findall(r"^from workers import (.+)$", page, re.MULTILINE)
    assert all(getattr(workers, name) for name in names.split(", "))
    with pytest.raises(AttributeError, match="has no attribute 'Nonsense'"):
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
