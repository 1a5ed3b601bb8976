"""Takes docs/page.png and docs/page-dark.png of the page as it serves the bundled model: `python -m docs.screenshot`.

And docs/chat.png and docs/chat-dark.png of the page as a chat, where `make chat` has made models/chat. On an idle machine, with
Chromium (apt-get install chromium).
"""

import io
import os
import re
import shutil
from typing import Any

from PIL import Image
from playwright.sync_api import Browser, Page, Playwright, expect, sync_playwright

from docs.generate import DOCS
from loadtests.modes import MODES, ROOT, start

WATCHED_S = 15  # of a steady rate, so that there are batches to be seen

CHAT = {"TASK": "text-generation", "MODEL": str(ROOT / "models" / "chat"), "DEADLINE_S": "60"}


def launched(playwright: Playwright) -> Browser:
    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
    return playwright.chromium.launch(executable_path=shutil.which("chromium"), args=arguments)


def save(page: Page, name: str) -> None:
    picture = Image.open(io.BytesIO(page.screenshot(full_page=True)))
    picture.convert("RGB").save(DOCS / name, optimize=True)  # fewer colours would lose those of the legend
    page.close()


def take_page(browser: Browser, url: str, scheme: Any, name: str) -> None:
    """A task with answers of its own: one is asked for, then a steady rate."""
    page = browser.new_page(color_scheme=scheme, viewport={"width": 1280, "height": 800})
    page.goto(url)
    page.get_by_role("button", name="Example").click()
    expect(page.locator("#answer").get_by_role("row")).to_have_count(5)
    page.get_by_text("The answer as JSON").click()
    page.get_by_role("button", name="100", exact=True).click()
    expect(page.locator("#sent")).to_have_text("100 answered, 0 rejected (503).", timeout=60_000)
    page.get_by_role("button", name="Steady rate").click()
    page.wait_for_timeout(WATCHED_S * 1000)
    save(page, name)


def take_chat(browser: Browser, url: str, scheme: Any, name: str) -> None:
    """A chat that is being written, beside prompts that come, end and are cancelled."""
    page = browser.new_page(color_scheme=scheme, viewport={"width": 1280, "height": 800})
    page.goto(url)
    expect(page.get_by_role("button", name="Send", exact=True)).to_be_enabled(timeout=60_000)
    page.get_by_label("Message").fill("Name a city in France and say why one should go there.")
    page.get_by_label("Message").press("Enter")
    expect(page.locator(".message.assistant span")).not_to_be_empty()
    page.get_by_role("button", name="32", exact=True).click()
    expect(page.locator("#sent")).to_contain_text("8 answered", timeout=120_000)
    page.get_by_role("button", name="Cancel them").click()
    page.get_by_role("button", name="8", exact=True).click()
    expect(page.locator("#running")).to_have_text(re.compile("[7-9]"), timeout=60_000)
    page.wait_for_timeout(1000)
    save(page, name)


if __name__ == "__main__":
    with start(MODES["thread"], {"BATCH_SIZE": "32"}) as server, sync_playwright() as playwright:
        browser = launched(playwright)
        for scheme, name in (("light", "page.png"), ("dark", "page-dark.png")):
            take_page(browser, server.url, scheme, name)
        browser.close()
    if (ROOT / "models" / "chat").exists():
        with start(MODES["thread"], CHAT) as server, sync_playwright() as playwright:
            browser = launched(playwright)
            for scheme, name in (("light", "chat.png"), ("dark", "chat-dark.png")):
                take_chat(browser, server.url, scheme, name)
            browser.close()
