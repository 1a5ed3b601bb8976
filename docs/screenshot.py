"""Takes docs/page.png and docs/page-dark.png of the page as it serves the bundled model: `python -m docs.screenshot`.

It needs Chromium: apt-get install chromium.
"""

import io
import os
import shutil

from PIL import Image
from playwright.sync_api import expect, sync_playwright

from docs.generate import DOCS
from loadtests.modes import MODES, start

WATCHED_S = 15  # of a steady rate, so that there are batches to be seen

with start(MODES["thread"], {"BATCH_SIZE": "32"}) as server, sync_playwright() as playwright:
    browser = playwright.chromium.launch(
        executable_path=shutil.which("chromium"), args=["--no-sandbox"] if os.geteuid() == 0 else []
    )
    for scheme, name in (("light", "page.png"), ("dark", "page-dark.png")):
        page = browser.new_page(color_scheme=scheme, viewport={"width": 1280, "height": 800})  # type: ignore[arg-type]
        page.goto(server.url)
        page.get_by_role("button", name="Example").click()
        expect(page.locator("#answer").get_by_role("row")).to_have_count(5)
        page.get_by_text("The answer as JSON").click()
        page.get_by_role("button", name="100", exact=True).click()
        expect(page.locator("#sent")).to_have_text("100 answered, 0 rejected (503).", timeout=60_000)
        page.get_by_role("button", name="Steady rate").click()
        page.wait_for_timeout(WATCHED_S * 1000)
        picture = Image.open(io.BytesIO(page.screenshot(full_page=True)))
        picture.quantize(256).save(DOCS / name, optimize=True)
        page.close()
    browser.close()
