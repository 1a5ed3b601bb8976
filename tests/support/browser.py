"""A real browser: Debian's Chromium, without which these tests are skipped."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import axe_playwright_python
import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from loadtests.modes import Server

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
in_browser = pytest.mark.skipif(not CHROMIUM, reason="there is no Chromium: apt-get install chromium")
AXE = (Path(axe_playwright_python.__file__).parent / "axe.min.js").read_text()


@contextmanager
def launched() -> Iterator[Browser]:
    """A browser, closed at the end."""
    with sync_playwright() as playwright:
        # As root Chromium has no sandbox; it sees this server's page only.
        arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield browser
        browser.close()


class Visit:
    """A look at the page, what the browser complained of, and what it asked for."""

    def __init__(self, browser: Browser, server: Server, **options: Any) -> None:
        self.page: Page = browser.new_page(**options)
        self.problems: list[str] = []
        self.asked: set[str] = set()
        self.page.on("console", lambda message: self.problems.append(f"{message.type}: {message.text}"))
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("request", lambda request: self.asked.add(request.url))
        self.page.goto(server.url)

    def violations(self) -> list[Any]:
        """What axe-core finds that keeps people out."""
        self.page.evaluate(AXE)
        found = self.page.evaluate("axe.run()")["violations"]
        return [(one["id"], [node["html"] for node in one["nodes"]]) for one in found]

    def close(self) -> None:
        self.page.close()
