"""The page where text is generated: a chat, and the engine as it works, in a real browser."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, expect

from loadtests.modes import MODES, Server, start
from tests.support.browser import Visit, in_browser
from tests.support.client import dial, get, hear, metric, request, until
from workers.generation.scheduler import Step
from workers.generation.step_cost import Work
from workers.generation.steps import Choice, Limits, Options, Row
from workers.generation.token_loop import TokenLoop
from workers.protocols.page import recent

TEXT = "the old dog"
CANCELLED = 'model_sequences_total{reason="cancelled"}'
# How many pixels of the picture have each of the colours.
COLOURS = """() => {
  const canvas = document.getElementById("engine"), style = getComputedStyle(document.documentElement), found = {};
  const pixels = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
  for (const name of ["amber", "blue", "grey", "red"]) {
    const probe = document.createElement("canvas").getContext("2d");
    probe.fillStyle = style.getPropertyValue("--" + name).trim(); probe.fillRect(0, 0, 1, 1);
    const [r, g, b] = probe.getImageData(0, 0, 1, 1).data;
    found[name] = 0;
    for (let i = 0; i < pixels.length; i += 4) found[name] += pixels[i] === r && pixels[i + 1] === g && pixels[i + 2] === b;
  }
  return found;
}"""


def served(folder: str, **settings: str) -> dict[str, str]:
    sizes = {"TORCH_THREADS": "1", "KV_CACHE_MB": "8", "CONTEXT_TOKENS": "2048", "DEADLINE_S": "60"}
    return {"MODEL": folder, "TASK": "text-generation", **sizes, **settings}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    from tests.support.small_language_models import save

    return save(tmp_path_factory.mktemp("model"), max_position_embeddings=2048)


@pytest.fixture(scope="module")
def server(folder: str) -> Iterator[Server]:
    with start(MODES["thread"], served(folder)) as server:
        yield server


@pytest.fixture
def visit(browser: Browser, server: Server) -> Iterator[Visit]:
    visit = Visit(browser, server)
    yield visit
    visit.close()


def chat(server: Server, messages: list[Any], **fields: Any) -> str:
    body = json.dumps({"messages": messages, "temperature": 0, **fields}).encode()
    with dial(server) as connection:
        connection.sendall(request("POST", "/v1/chat/completions", body, Content_Type="application/json"))
        return str(hear(connection).json["choices"][0]["message"]["content"])


def say(visit: Visit, text: str, **fields: str) -> None:
    """Fill the form and send it by Enter."""
    page = visit.page
    expect(page.get_by_role("button", name="Send", exact=True)).to_be_enabled()
    if not page.get_by_label("Temperature").is_visible():
        page.get_by_text("Sampling", exact=True).click()
    for label, value in fields.items():
        page.get_by_label(label.replace("_", " "), exact=True).fill(value)
    page.locator("#prompt").fill(text)
    page.locator("#prompt").press("Enter")


@in_browser
def test_answer_streams_and_the_next_turn_has_the_whole_chat(visit: Visit, server: Server) -> None:
    say(visit, TEXT, Temperature="0", Most_tokens="12")
    answers = visit.page.locator(".message.assistant")
    expect(answers.locator("small")).to_contain_text("first token")
    first = chat(server, [{"role": "user", "content": TEXT}], max_tokens=12)
    assert answers.locator("span").text_content() == first
    say(visit, "a river")
    expect(answers.nth(1).locator("small")).to_contain_text("ended by")
    turns = [("user", TEXT), ("assistant", first), ("user", "a river")]
    second = chat(server, [{"role": role, "content": text} for role, text in turns], max_tokens=12)
    assert answers.nth(1).locator("span").text_content() == second
    assert not visit.problems
    assert all(url.startswith((server.url, "data:")) for url in visit.asked)


@in_browser
@pytest.mark.parametrize("by", ["button", "key"])
def test_stop_frees_the_row_and_keeps_what_was_written(visit: Visit, server: Server, by: str) -> None:
    before = metric(server, CANCELLED)
    say(visit, TEXT, Temperature="0", Most_tokens="1900")
    answer = visit.page.locator(".message.assistant")
    expect(answer.locator("span")).not_to_be_empty()
    if by == "button":
        visit.page.get_by_role("button", name="Stop", exact=True).click()
    else:
        visit.page.keyboard.press("Escape")
    expect(answer.locator("small")).to_have_text("stopped")
    until(lambda: metric(server, CANCELLED) == before + 1)
    until(lambda: get(server, "/health").json["running"] == 0)
    assert answer.locator("span").text_content()
    expect(visit.page.get_by_role("button", name="Send", exact=True)).to_be_enabled()


@in_browser
def test_curl_and_python_shown_give_the_same_answer(visit: Visit) -> None:
    visit.page.get_by_text("System prompt", exact=True).click()
    visit.page.get_by_label("What the model should keep to").fill("it's a \\ river")
    say(visit, 'an "old" dog,\nisn\'t it?', Temperature="0", Most_tokens="9", Top_k="5", Stop_text="zzzz")
    expect(visit.page.locator(".message small").last).to_contain_text("ended by")
    answer = visit.page.locator(".message.assistant span").text_content() or ""
    curl = visit.page.locator("#curl").text_content() or ""
    python = visit.page.locator("#python").text_content() or ""
    streamed = subprocess.run(["bash", "-c", curl], capture_output=True, text=True).stdout
    lines = [line[6:] for line in streamed.splitlines() if line.startswith("data: {")]
    assert "".join(json.loads(line)["choices"][0]["delta"]["content"] for line in lines) == answer
    assert subprocess.run([sys.executable, "-c", python], capture_output=True, text=True).stdout == answer


@in_browser
def test_wrong_value_is_told_in_the_chat(visit: Visit) -> None:
    say(visit, TEXT, Most_tokens="0")
    expect(visit.page.locator(".message.notice")).to_contain_text('The server says 400: "max_tokens"')


@in_browser
def test_picture_shows_prompts_tokens_ends_and_cancelled_sequences(visit: Visit, server: Server) -> None:
    page = visit.page
    expect(page.get_by_role("button", name="Send", exact=True)).to_be_enabled()
    page.get_by_role("button", name="8", exact=True).click()
    expect(page.locator("#sent")).to_have_text("8 answered.", timeout=60_000)
    expect(page.locator("#engine-said")).to_contain_text("Step")
    until(lambda: all(page.evaluate(COLOURS)[name] for name in ("amber", "blue", "grey")))
    page.evaluate("steps = []; ends = {}")  # so that what ends red from here on is this test's own
    say(visit, TEXT, Temperature="0", Most_tokens="1900")
    expect(page.locator("#running")).to_have_text("1")
    expect(page.locator("#cached")).not_to_contain_text("0 of")
    expect(page.locator("#rate")).not_to_have_text("0")
    page.keyboard.press("Escape")
    until(lambda: page.evaluate(COLOURS)["red"])
    assert all("readback" in problem for problem in visit.problems), "that is this test's own"


@in_browser
def test_load_can_be_cancelled(visit: Visit, server: Server) -> None:
    page, before = visit.page, metric(server, CANCELLED)
    expect(page.get_by_role("button", name="Send", exact=True)).to_be_enabled()
    page.evaluate("TOKENS.fill(600)")
    page.get_by_role("button", name="32", exact=True).click()
    expect(page.locator("#running")).not_to_have_text("0")
    page.get_by_role("button", name="Cancel them").click()
    expect(page.locator("#sent")).to_contain_text("cancelled")
    until(lambda: metric(server, CANCELLED) > before)
    until(lambda: get(server, "/health").json["running"] == 0)


@in_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_page_is_accessible(browser: Browser, server: Server, scheme: Any, width: int) -> None:
    visit = Visit(browser, server, color_scheme=scheme, viewport={"width": width, "height": 844})
    say(visit, TEXT, Temperature="0", Most_tokens="9")
    expect(visit.page.locator(".message small").last).to_contain_text("ended by")
    say(visit, TEXT, Most_tokens="0")
    expect(visit.page.locator(".notice").last).to_contain_text("400")
    for summary in visit.page.locator("summary").all():
        if not summary.evaluate("it => it.parentElement.open"):
            summary.click()
    assert visit.violations() == []
    assert visit.page.evaluate("document.documentElement.scrollWidth") <= width
    visit.close()


@in_browser
def test_keyboard_is_enough(visit: Visit) -> None:
    expect(visit.page.get_by_role("button", name="Send", exact=True)).to_be_enabled()
    reached = []
    for _ in range(14):
        visit.page.keyboard.press("Tab")
        reached.append(
            visit.page.evaluate("document.activeElement.id || document.activeElement.dataset.n || ''")
        )
    assert [one for one in reached if one in ("prompt", "send", "new", "1", "8", "32")] == [
        "prompt", "send", "new", "1", "8", "32",
    ]  # fmt: skip


@in_browser
def test_model_without_a_chat_template_continues_a_text(browser: Browser, tmp_path: Path) -> None:
    from tests.support.small_language_models import make_model, make_tokenizer

    make_model("gpt2").save_pretrained(tmp_path)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path)
    with start(MODES["thread"], served(str(tmp_path), CONTEXT_TOKENS="256", API_KEY="a-key-0123")) as server:
        visit = Visit(browser, server)
        expect(visit.page.locator("#banner")).to_contain_text("send a key")
        visit.page.get_by_label("API key").fill("a-key-0123")
        expect(visit.page.locator("#prompt-label")).to_contain_text("no chat template")
        say(visit, TEXT, Temperature="0", Most_tokens="7")
        expect(visit.page.locator(".message.assistant small")).to_contain_text("ended by")
        assert visit.page.locator(".message.assistant span").text_content()
        assert "a-key-0123" not in (visit.page.locator("#curl").text_content() or "")
        visit.close()


# --- the feed ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("after", ["", "x", "-1", "9" * 40, "3"])
def test_live_has_the_engine_and_only_the_steps_asked_for(server: Server, after: str) -> None:
    get(server, "/live")
    chat(server, [{"role": "user", "content": TEXT}], max_tokens=6, ignore_eos=True)
    found = get(server, "/live?after=" + after).json["generation"]
    assert found["slots"] * found["capacity"] > 0 and found["tokens"]["generated"] > 0
    assert found["steps"] and all(step["n"] > (3 if after == "3" else 0) for step in found["steps"])


def step_of(*rows: tuple[Any, Row]) -> Step:
    return Step([sequence for sequence, _ in rows], [row for _, row in rows], Work(0), [])


def test_steps_are_recorded_only_while_a_page_polls_with_how_each_sequence_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loop = TokenLoop()
    loop.limits = Limits(2, 16)
    feed = recent.RecentSteps(loop)
    assert feed.poll(0)["steps"] == [] and loop.observer
    one, other = (recent.Sequence([1, 2, 3], Options()) for _ in range(2))
    first, next_ = Choice(Options(), 0), Choice(Options(), 1)
    loop.observer(step_of((one, Row(0, 0, [1, 2, 3], first))), 0.5)
    one.reason = "stop"
    loop.observer(step_of((one, Row(0, 3, [4], next_)), (other, Row(1, 0, [1, 2]))), 0.25)
    other.reason = "cancelled"  # between two steps
    found = feed.poll(1)
    assert found["steps"] == [{"n": 2, "s": 0.25, "rows": [[0, 1, 1, 0], [1, 2, 2, 1]]}]
    assert found["ended"] == [(1, "stop", 2), (2, "cancelled", 2)]
    assert [step["n"] for step in feed.poll(0)["steps"]] == [1, 2] and feed.poll(2)["steps"] == []
    monkeypatch.setattr(recent, "FORGET_S", -1)
    loop.observer(step_of((one, Row(0, 3, [4], next_))), 0.25)
    assert loop.observer is None
