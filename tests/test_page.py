"""The page at GET /, in a real browser: Debian's Chromium, without which these tests are skipped."""

import base64
import io
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from playwright.sync_api import Browser, Route, expect

from loadtests import modes
from loadtests.modes import MODES, Server, start
from tests.support.browser import AXE, Visit, in_browser
from tests.support.client import Crowd, Reply, get, post_json, until
from workers.metrics import Metrics
from workers.protocols.page import recent as of_page

FILL_MASK = {"MODEL": "tests.support.fake_models:FillMask", "BATCH_SIZE": "8"}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with start(MODES["thread"], FILL_MASK) as server:
        yield server


def ask(visit: Visit) -> None:
    visit.page.get_by_role("button", name="Ask the model").click()


@pytest.fixture
def visit(browser: Browser, server: Server) -> Iterator[Visit]:
    visit = Visit(browser, server)
    yield visit
    visit.close()


@in_browser
def test_example_works_at_one_click_and_only_this_server_is_asked(visit: Visit, server: Server) -> None:
    visit.page.get_by_role("button", name="Example").click()
    answer = visit.page.locator("#answer")
    expect(answer.get_by_role("row")).to_have_count(5)
    expect(answer.get_by_role("row").first).to_contain_text("thing")
    expect(visit.page.locator("#rows tr")).to_contain_text("size 1, dispatched because")
    assert not visit.problems
    assert all(url.startswith((server.url, "data:")) for url in visit.asked)


@in_browser
def test_curl_and_python_shown_give_the_same_answer(visit: Visit) -> None:
    visit.page.get_by_label("Text").fill("""it's a "[MASK]", é\nor \\ two""")
    ask(visit)
    expect(visit.page.locator("#json")).to_contain_text("it's a")
    shown = visit.page.locator("#json").text_content()
    curl = visit.page.locator("#curl").text_content() or ""
    python = visit.page.locator("#python").text_content() or ""
    told = subprocess.run(
        ["bash", "-c", "curl -s " + curl.removeprefix("curl ")], capture_output=True, text=True
    )
    reckoned = subprocess.run([sys.executable, "-c", python], capture_output=True, text=True)
    same = visit.page.evaluate("([a, b]) => JSON.stringify(JSON.parse(a)) === b.trim()", [shown, told.stdout])
    assert same, told
    assert eval(reckoned.stdout) == visit.page.evaluate("text => JSON.parse(text)", shown)


@in_browser
def test_burst_of_a_hundred_shows_batches(visit: Visit) -> None:
    visit.page.get_by_role("button", name="100", exact=True).click()
    expect(visit.page.locator("#sent")).to_have_text("100 answered, 0 rejected (503).", timeout=20_000)
    expect(visit.page.locator("#blocks div").filter(has_text="8").first).to_be_attached()
    expect(visit.page.locator("#rows")).to_contain_text(
        "200 \N{MULTIPLICATION SIGN} 64"
    )  # a list, answered one by one
    visit.page.get_by_role("button", name="Steady rate").click()
    expect(visit.page.locator("#rate")).not_to_have_text("0")
    visit.page.get_by_role("button", name="Steady rate").click()
    assert not visit.problems


@in_browser
def test_steady_rate_above_capacity_shows_rejections(browser: Browser) -> None:
    """An open loop: it sends what is due however slow the answers are, and says what the browser can't send."""
    with start(MODES["thread"], {**FILL_MASK, "BATCH_SIZE": "1"}) as server:
        visit = Visit(browser, server, viewport={"width": 390, "height": 844})
        page = visit.page
        expect(page.get_by_label("Text")).to_have_value("a [MASK]")
        page.get_by_label("Text").fill("a [MASK] " + "and so on " * 100)  # 0.1 s of the model
        page.get_by_label("per second").fill("1000")
        page.get_by_label("each within").fill("0.5")
        page.get_by_role("button", name="Steady rate").click()
        sent = page.locator("#sent")
        expect(sent).to_contain_text(re.compile(r"[1-9]\d* answered, [1-9]\d* rejected"), timeout=20_000)
        expect(sent).to_contain_text("not sent: all of the browser's connections were in use", timeout=20_000)
        expect(page.locator("#rejected")).not_to_have_text("0")
        page.get_by_role("button", name="Steady rate").click()
        status = page.locator("#rows .status.rejected").first
        expect(status).to_be_visible()
        box = status.bounding_box()
        assert box and box["x"] + box["width"] <= 390
        visit.close()


@in_browser
def test_rate_that_is_not_one_is_not_started(visit: Visit) -> None:
    expect(visit.page.get_by_label("Text")).to_have_value("a [MASK]")
    for rate in ("", "-5", "0", "100000"):
        visit.page.get_by_label("per second").fill(rate)
        visit.page.get_by_role("button", name="Steady rate").click()
        expect(visit.page.locator("#answer")).to_contain_text("Set a rate from 1 to 2000")
        expect(visit.page.locator("#steady")).to_have_attribute("aria-pressed", "false")


@in_browser
@pytest.mark.parametrize(
    ("text", "help_text"),
    [
        ("top_k=3", 'such as {"top_k": 3}.'),
        ("top_k: 3, targets=cat", 'such as {"top_k": 3, "targets": "cat"}.'),
        ("3", 'must be a JSON object, such as {"top_k": 3}.'),
        ('{"top_k": 3', 'must be JSON, such as {"top_k": 3}.'),
    ],
)
def test_parameters_that_are_not_json_get_help(visit: Visit, text: str, help_text: str) -> None:
    expect(visit.page.get_by_label("Text")).to_have_value("a [MASK]")
    visit.page.locator("#more summary").click()
    visit.page.get_by_role("textbox", name="As JSON").fill(text)
    ask(visit)
    expect(visit.page.locator("#answer")).to_contain_text(help_text)


@in_browser
@pytest.mark.parametrize("root_path", ["", "/a/prefix"])
@pytest.mark.parametrize("path", ["/a/prefix", "/a/prefix/", "/a/prefix/docs"])
def test_path_prefix_of_a_proxy(browser: Browser, root_path: str, path: str) -> None:
    """The proxy takes the prefix off; the server may know it (--root-path) or not."""
    with start(MODES["thread"], {**FILL_MASK, "UVICORN_ROOT_PATH": root_path}) as server:
        origin = server.url.rstrip("/")
        page = browser.new_page()

        def proxy(route: Route) -> None:
            inner = route.request.url.removeprefix(origin)
            if not inner.startswith("/a/prefix"):
                return route.fulfill(status=404, body="outside of the prefix")
            return route.fulfill(
                response=route.fetch(url=origin + "/" + inner.removeprefix("/a/prefix").lstrip("/"))
            )

        page.route("**/*", proxy)
        page.goto(origin + path)
        page.get_by_role("button", name="Example").click()
        expect(page.locator("#answer").get_by_role("row")).to_have_count(5)
        expect(page.locator("#curl")).to_contain_text(origin + "/a/prefix/ ")
        page.get_by_role("link", name="info").click()
        expect(page.locator("body")).to_contain_text("MAX_INPUTS")
        page.close()


@in_browser
def test_loading_is_not_an_error(browser: Browser, server: Server) -> None:
    visit = Visit(browser, server)
    live = get(server, "/live").json | {
        "unready": "the model is still loading",
        "is_loading": True,
        "up_s": 0,
    }
    visit.page.route("**/live", lambda asked: asked.fulfill(json=live))
    visit.page.reload()
    expect(visit.page.locator("#banner")).to_have_text("The model is loading. This page goes on by itself.")
    expect(visit.page.locator("#banner")).to_have_class(re.compile("calm"))
    visit.page.unroute("**/live")
    expect(visit.page.get_by_label("Text")).to_have_value("a [MASK]")
    expect(visit.page.locator("#banner")).to_be_hidden()
    visit.close()


@in_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_page_is_accessible(browser: Browser, server: Server, scheme: Any, width: int) -> None:
    visit = Visit(browser, server, color_scheme=scheme, viewport={"width": width, "height": 844})
    visit.page.get_by_role("button", name="100", exact=True).click()
    visit.page.get_by_label("Text").fill("no mask here")
    ask(visit)
    expect(visit.page.locator("#answer")).to_contain_text("put [MASK] where the missing word is")
    visit.page.get_by_role("button", name="Example").click()
    expect(visit.page.locator("#answer")).to_contain_text("thing")
    for summary in visit.page.locator("summary").all():
        if not summary.evaluate("it => it.parentElement.open"):
            summary.click()
    expect(visit.page.locator("#statuses tr").first).to_be_visible()
    visit.page.evaluate(AXE)
    found = visit.page.evaluate("axe.run()")
    assert [(one["id"], [node["html"] for node in one["nodes"]]) for one in found["violations"]] == []
    assert visit.page.evaluate("document.documentElement.scrollWidth") <= width
    visit.close()


def picture() -> str:
    """An image of 64 x 32 pixels, in base64."""
    file = io.BytesIO()
    Image.new("RGB", (64, 32), "grey").save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


BOX = {"xmin": 16, "ymin": 8, "xmax": 48, "ymax": 16}
VECTORS = [[1.0, 0.0, 0.0, 0.0], [0.8, 0.6, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0]]
DRAWN: dict[str, tuple[Any, Any]] = {  # task -> its example, the answer
    "object-detection": (picture(), [{"score": 0.9, "label": "a cat", "box": BOX}]),
    "image-segmentation": (picture(), [{"score": None, "label": "grass", "mask": picture()}] * 2),
    "depth-estimation": (picture(), {"depth": picture()}),
    "document-question-answering": (picture(), [{"score": 0.9, "answer": "12 May", "start": 1, "end": 2}]),
    "feature-extraction": ("a text", VECTORS),
    "token-classification": ("\U0001f600 Ann", [{"score": 0.9, "entity_group": "PER", "start": 2, "end": 5}]),
    "sentence-similarity": ({"source_sentence": "a", "sentences": ["b", "c"]}, [0.9, -0.1]),
}


@in_browser
@pytest.mark.parametrize("task", DRAWN)
def test_answers_are_drawn_on_a_phone_too(browser: Browser, server: Server, task: str) -> None:
    inputs, answer = DRAWN[task]
    media = ["image/"] if inputs == picture() else []
    its = {**get(server, "/info").json, "task": task, "media": media, "example": {"inputs": inputs}}
    visit = Visit(browser, server, viewport={"width": 390, "height": 844})
    visit.page.route("**/info", lambda asked: asked.fulfill(json=its))
    visit.page.route(
        server.url, lambda asked: asked.fulfill(json=answer) if asked.request.post_data else asked.continue_()
    )
    visit.page.reload()
    visit.page.get_by_role("button", name="Example", exact=True).click()
    shown = visit.page.locator("#answer")
    match task:
        case "object-detection":
            expect(shown.locator(".boxes div")).to_have_text("a cat")
            image, box = (shown.locator(where).bounding_box() for where in (".boxes img", ".boxes div"))
            assert image and box
            assert (box["x"] - image["x"]) / image["width"] == pytest.approx(0.25, abs=0.02)
            assert box["width"] / image["width"] == pytest.approx(0.5, abs=0.02)
            assert (box["y"] - image["y"]) / image["height"] == pytest.approx(0.25, abs=0.02)
        case "image-segmentation":
            expect(shown.locator("figure img")).to_have_count(2)
        case "depth-estimation":
            expect(shown.locator("img")).to_have_count(1)
        case "feature-extraction":
            expect(shown.locator("tbody tr").nth(1)).to_contain_text("0.801.000.00")
        case "token-classification":
            expect(shown.locator("mark")).to_have_text("AnnPER 0.90")
        case _:
            expect(shown.get_by_role("row").first).to_contain_text("0.900")
    if task in ("object-detection", "feature-extraction"):
        visit.page.evaluate(AXE)
        assert [one["id"] for one in visit.page.evaluate("axe.run()")["violations"]] == []
    assert visit.page.evaluate("document.documentElement.scrollWidth") <= 390
    assert not visit.problems
    visit.close()


@in_browser
def test_keyboard_is_enough(visit: Visit) -> None:
    expect(visit.page.get_by_label("Text")).to_have_value("a [MASK]")
    visit.page.get_by_label("Text").focus()
    for _ in range(10):
        visit.page.keyboard.press("Tab")
        if visit.page.evaluate("document.activeElement.id") == "ask":
            break
    visit.page.keyboard.press("Enter")
    expect(visit.page.locator("#answer")).to_contain_text("thing")


@in_browser
def test_rejection_is_shown_with_when_to_retry(browser: Browser, crowd: Crowd, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    with start(MODES["thread"], {"MODEL": "tests.support.fake_models:Obedient", "MAX_QUEUE": "1"}) as server:
        visit = Visit(browser, server)
        expect(visit.page.get_by_label("Text")).to_have_value("a text")
        waiting: list[Future[Reply]] = []
        for n in (1, 0):  # one runs, one waits
            waiting.append(crowd.submit(post_json, server, {"inputs": {"until": str(gate)}}))
            until(lambda n=n: get(server, "/live").json["depth"] == 1 - n)
        ask(visit)
        expect(visit.page.locator("#answer")).to_contain_text("The server says 503")
        expect(visit.page.locator("#answer")).to_contain_text("Retry after")
        gate.touch()
        assert [reply.result().status for reply in waiting] == [200, 200]
        visit.close()


@in_browser
def test_progress_of_a_running_call_is_shown_until_it_ends(
    browser: Browser, crowd: Crowd, tmp_path: Path
) -> None:
    file = tmp_path / "progress"
    file.write_text("0.4")
    with start(MODES["thread"], {"MODEL": "tests.support.fake_models:Reports"}) as server:
        visit = Visit(browser, server, viewport={"width": 390, "height": 844})
        shown = visit.page.locator("#progress li")
        expect(visit.page.get_by_text("Progress of the calls")).to_be_hidden()
        reply = crowd.submit(post_json, server, {"inputs": str(file)})
        for fraction, percent in (("0.4", "40 %"), ("0.75", "75 %")):
            file.write_text(fraction)
            expect(shown).to_have_text(percent)
            expect(shown.get_by_role("progressbar")).to_have_js_property("value", float(fraction))
        expect(visit.page.get_by_text("Progress of the calls")).to_be_visible()
        assert visit.violations() == []
        file.write_text("1")
        expect(shown).to_have_count(0)
        expect(visit.page.get_by_text("Progress of the calls")).to_be_hidden()
        assert reply.result().status == 200 and not visit.problems
        visit.close()


@in_browser
def test_key_is_asked_for_where_it_is_required(browser: Browser) -> None:
    with start(MODES["thread"], {**FILL_MASK, "API_KEY": "a-key-0123"}) as server:
        visit = Visit(browser, server)
        expect(visit.page.locator("#banner")).to_contain_text("send a key")
        visit.page.get_by_label("API key").fill("a-key-0123")
        expect(visit.page.get_by_label("Text")).to_have_value("a [MASK]")
        ask(visit)
        expect(visit.page.locator("#answer")).to_contain_text("thing")
        assert "a-key-0123" not in (visit.page.locator("#curl").text_content() or "")
        visit.close()


@in_browser
def test_restart_starts_over(browser: Browser, monkeypatch: pytest.MonkeyPatch) -> None:
    port = modes.free_port()
    monkeypatch.setattr(modes, "free_port", lambda: port)
    with start(MODES["thread"], FILL_MASK) as server:
        visit = Visit(browser, server)
        visit.page.get_by_role("button", name="10", exact=True).click()
        expect(visit.page.locator("#sent")).to_contain_text("10 answered")
    expect(visit.page.locator("#banner")).to_contain_text("does not answer")
    with start(MODES["thread"], {"MODEL": "tests.support.fake_models:Obedient"}):
        expect(visit.page.get_by_label("Text")).to_have_value("a text")  # of the model that is served now
        expect(visit.page.locator("#sent")).to_contain_text("0 answered")
        expect(visit.page.locator("#rows tr")).to_have_count(0)
        expect(visit.page.locator("#banner")).to_be_hidden()
        ask(visit)
        expect(visit.page.locator("#answer")).to_contain_text("a text")
    visit.close()


def test_page_is_one_file_that_may_run_its_own_script_only(server: Server) -> None:
    reply = get(server, "/")
    assert reply.status == 200
    assert reply.headers.get_content_type() == "text/html"
    assert "default-src 'none'; script-src 'sha256-" in reply.headers["Content-Security-Policy"]
    assert get(server, "/docs").body == reply.body
    assert len(get(server, "/").headers.get_all("x-request-id")) == 1, "its own"


def test_batches_are_recorded_only_while_a_page_polls(monkeypatch: pytest.MonkeyPatch) -> None:
    metrics = Metrics()
    recent = of_page.RecentBatches(metrics)
    metrics.batch(1, "empty", 0.1, [0.0])
    assert recent.poll() == []
    metrics.batch(2, "full", 0.1, [0.0, 0.2])
    assert recent.poll() == [{"n": 1, "size": 2, "dispatched_because": "full", "model_s": 0.1, "wait_s": 0.2}]
    monkeypatch.setattr(of_page, "FORGET_S", -1)
    metrics.batch(3, "full", 0.1, [0.0])
    assert metrics.observer is None
