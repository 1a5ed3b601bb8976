"""Locust as its users meet it: the command line, the exit code, Ctrl-C, workers, and the page in a real browser."""

import contextlib
import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from playwright.sync_api import Page, sync_playwright

from loadtests.load.goodput import Goodput
from loadtests.load.rows import Row
from loadtests.modes import MODES, ROOT, Mode, Server, free_port, start
from tests.support import small_language_models
from tests.support.client import metric, until

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
LOCUST = str(Path(sys.executable).parent / "locust")
NAN = float("nan")


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with start(MODES["thread"], {"MODEL": "tests.support.fake_models:FillMask"}) as server:
        yield server


@contextlib.contextmanager
def fake(name: str) -> Iterator[str]:
    """The URL of one of fake_servers.py."""
    with start(Mode(name, f"uvicorn tests.support.fake_servers:{name}_app --log-level error")) as server:
        yield server.url


def run(url: str, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run Locust without its page."""
    command = [LOCUST, "--headless", "--only-summary", "-H", url.rstrip("/"), *arguments]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=120, env={**os.environ, **env}
    )


def names(ended: subprocess.CompletedProcess[str]) -> dict[str, int]:
    """How many requests each row has, of a run with --json."""
    return {f"{entry['method']} {entry['name']}": entry["num_requests"] for entry in json.loads(ended.stdout)}


def test_default_asks_the_model_for_as_long_as_said_and_counts_as_the_server_does(
    server: Server, tmp_path: Path
) -> None:
    before = metric(server, "model_requests_total")
    ended = run(server.url, "-t", "2s", "--json", "--csv", str(tmp_path / "a"))
    assert ended.returncode == 0, ended.stderr
    assert set(names(ended)) == {"POST /"}
    n = names(ended)["POST /"]
    assert n == metric(server, "model_requests_total") - before
    with (tmp_path / "a_stats.csv").open() as file:
        assert [int(row["Request Count"]) for row in csv.DictReader(file)] == [n, n], (
            "the CSV has the last ones, too"
        )
    with (tmp_path / "a_goodput.csv").open() as file:
        assert sum(float(row["good"]) for row in csv.DictReader(file)) == n
    assert re.search(r"Goodput [\d.]+ correct answers/s .*\nOf all: \d+ in time\.", ended.stderr)
    assert "ms in the queue" in ended.stderr


def test_shapes_fit_the_time_and_end_by_themselves(server: Server) -> None:
    ended = run(
        server.url,
        "-t",
        "3s",
        "--rate-per-s",
        "20",
        "--json",
        "Spike",
        "Steps",
        "RampUp",
        "HealthChecks",
        "Overload",
    )
    assert ended.returncode == 0, ended.stderr
    counted = names(ended)
    assert 10 <= counted["GET /health"] <= 60
    assert "are the capacity; offering" in ended.stderr


def test_streams_have_rows_for_the_first_token_the_next_ones_and_their_speed(tmp_path: Path) -> None:
    env = {"TASK": "text-generation", "MODEL": small_language_models.save(tmp_path), "TORCH_THREADS": "1"}
    with start(MODES["thread"], env) as server:
        for name, options in (
            ("StreamingClosedLoop", ["-u", "2"]),
            ("StreamingOpenLoop", ["--rate-per-s", "5"]),
        ):
            first = metric(server, "model_time_to_first_token_seconds_count")
            ended = run(
                server.url, "-t", "2s", "--max-tokens", "16", "--limit-s", "30", "--json", name, *options
            )
            assert ended.returncode == 0, ended.stderr
            rows, n = names(ended), names(ended)["POST /v1/completions"]
            assert rows.keys() == {f"stream {what}" for what in ("TTFT", "ITL", "tokens/s, not ms")} | {
                "POST /v1/completions"
            }
            assert (
                rows["stream TTFT"] == n == metric(server, "model_time_to_first_token_seconds_count") - first
            )
            assert n <= rows["stream ITL"] <= 15 * n, "an event for each token that completes a character"
            assert f"Of all: {n} in time." in ended.stderr, "tokens are no requests"


def test_rejections_and_late_answers_are_not_in_the_row_of_answers() -> None:
    with fake("varied") as url:
        ended = run(url, "-t", "2s", "--rate-per-s", "40", "--json", "OpenLoop")
    counted = names(ended)
    assert set(counted) == {"POST / rejected", "POST / late", "POST / failed"}
    assert ended.returncode == 1 and "no request got a correct answer" in ended.stderr
    for failure in (
        "503 rejected: no",
        "504 Gateway Timeout",
        "500 Internal Server Error",
        "422 Unprocessable",
    ):
        assert failure in ended.stderr


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--texts", "medium"], "argument --texts: invalid choice: 'medium'"),
        (["--rate-per-s", "-5"], "argument --rate-per-s: -5 is not above 0"),
        (["--rate-per-s", "abc"], "argument --rate-per-s: 'abc' is not a number"),
        (["--slo-goodput", "120%"], "argument --slo-goodput: 120% is more than all"),
        (["-H", "127.0.0.1:8000"], "127.0.0.1:8000 is not a URL; use one such as http://127.0.0.1:8000"),
        (["-H", "ftp://127.0.0.1"], "ftp://127.0.0.1 is not a URL"),
        (["-H", "http://a:b@127.0.0.1"], "use --api-key for a key"),
        (["-H", "http://127.0.0.1:9"], "connection refused: is the server running on 127.0.0.1:9?"),
        (["-t", "0"], "the run time (-t) is 0; say how long"),
        (["-u", "1", "OpenLoop", "HealthChecks"], "too few users (1): OpenLoop, HealthChecks need 2"),
        (["StreamingClosedLoop"], "StreamingClosedLoop reads texts as they are written: start the server with TASK=text-generation"),
        (["--tags", "slow"], "these classes have no tags"),
    ],
)  # fmt: skip
def test_wrong_option_is_a_sentence_before_the_first_request(
    server: Server, arguments: list[str], sentence: str
) -> None:
    before = metric(server, "model_requests_total")
    ended = run(server.url, *arguments)
    assert ended.returncode == 2 and sentence in ended.stderr
    assert "Traceback" not in ended.stderr + ended.stdout
    assert metric(server, "model_requests_total") == before


def test_key_is_sent_and_its_absence_named() -> None:
    with start(
        MODES["thread"], {"MODEL": "tests.support.fake_models:FillMask", "API_KEY": "a-key"}
    ) as server:
        without = run(server.url, "-t", "1s", API_KEY="")
        assert (
            without.returncode == 2
            and "401 Unauthorized: give the server's key with --api-key" in without.stderr
        )
        assert run(server.url, "-t", "1s", API_KEY="a-key").returncode == 0
        assert run(server.url, "-t", "1s", "--api-key", "a-key", API_KEY="").returncode == 0


def test_workers_share_the_users_and_their_seconds_add_up(server: Server) -> None:
    before = metric(server, "model_requests_total")
    ended = run(server.url, "-t", "6s", "--processes", "2", "-u", "5", "ClosedLoop", "OpenLoop")
    assert ended.returncode == 0, ended.stderr
    asked = metric(server, "model_requests_total") - before
    assert f"Of all: {asked:.0f} in time." in ended.stderr
    assert re.search(rf"POST +/ +{asked:.0f} +0\(0.00%\)", ended.stderr + ended.stdout)


def test_ctrl_c_keeps_the_results_and_leaves_no_process(server: Server) -> None:
    command = [
        sys.executable,
        "-m",
        "loadtests.load",
        "--headless",
        "-t",
        "100s",
        "--only-summary",
        "-H",
        server.url,
    ]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    before = metric(server, "model_requests_total")
    until(lambda: metric(server, "model_requests_total") > before)
    family = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, signal.SIGINT)
    told = process.communicate(timeout=60)[0]
    assert "Goodput" in told and "Traceback" not in told
    assert family and not psutil.wait_procs(family, timeout=20)[1]


@pytest.fixture
def page(server: Server) -> Iterator[Page]:
    """Locust's page, of a Locust that asks the server."""
    if not CHROMIUM:
        pytest.skip("there is no Chromium: apt-get install chromium")
    port = free_port()
    command = [LOCUST, "-H", server.url.rstrip("/"), "-P", str(port), "--api-key", "a-secret"]
    with (
        subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL) as locust,
        sync_playwright() as playwright,
    ):
        arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        page = browser.new_page()
        page.on("pageerror", lambda error: pytest.fail(str(error)))
        until(lambda: opened(page, f"http://127.0.0.1:{port}"))
        yield page
        browser.close()
        locust.terminate()


def opened(page: Page, url: str) -> bool:
    try:
        page.goto(url)
    except Exception:
        return False
    return True


def tick(page: Page, name: str) -> None:
    page.get_by_role("row", name=name, exact=True).get_by_role("checkbox").click()


def test_page_starts_charts_stops_downloads_and_starts_another_class(page: Page) -> None:
    assert "a-secret" not in page.content()
    page.get_by_role("button", name="Custom parameters").click()
    page.get_by_label("Rate Per S").fill("abc")
    page.get_by_role("button", name="Start").click()
    page.get_by_text("rate_per_s: 'abc' is not a number").wait_for()
    page.get_by_label("Rate Per S").fill("30")
    page.get_by_role("button", name="Start").click()
    page.locator("#goodput svg").first.wait_for()
    assert page.locator("#goodput svg").count() == 4
    page.get_by_text("99th percentile").or_(page.get_by_role("tab", name="Charts")).first.wait_for()
    stop, new = (page.get_by_role("button", name=name) for name in ("Stop", "New"))
    # The page is redrawn each second: a click may meet a button that is being replaced.
    until(lambda: new.is_visible() or (stop.is_visible() and stop.click()))
    first = page.request.get(page.url.partition("?")[0] + "stats/requests").json()["stats"]
    assert [(one["method"], one["name"]) for one in first][:1] == [("POST", "/")], (
        "ClosedLoop alone was ticked"
    )
    page.get_by_role("tab", name="Download Data").click()
    with page.expect_download() as download:
        page.get_by_text("Download goodput per second CSV").click()
    assert download.value.path().read_text().startswith("second,offered,good,rejected")
    page.get_by_role("button", name="New").click()
    tick(page, "ClosedLoop")
    tick(page, "HealthChecks")
    page.get_by_role("button", name="Start").click()
    root = page.url.partition("?")[0]
    until(lambda: names_on(page, root) == {"/health", "Aggregated"})


def names_on(page: Page, root: str) -> set[str]:
    return {one["name"] for one in page.request.get(f"{root}stats/requests").json()["stats"]}


# --- sums -------------------------------------------------------------------------------------------------------------


def ended(
    kind: str = "", latency_ms: float = 100.0, outcome: str = "200", attempt: int = 0
) -> tuple[Row, str]:
    return Row(0, 0, latency_ms, outcome, "model", 5.0, 2.0, 4.0, NAN, attempt), kind


def counted(*rows: tuple[Row, str]) -> Goodput:
    goodput = Goodput()
    for row, kind in rows:
        goodput.count(row, kind)
    return goodput


def test_objectives_decide_and_faults_are_never_excused() -> None:
    def verdict(goodput: Goodput, p99_ms: float = 0.0, least: str = "") -> str:
        return "; ".join(goodput.verdict(2.0, p99_ms, least))

    overload = counted(*[ended()] * 60, *[ended("rejected", 1.0, "503")] * 40)
    assert verdict(overload) == ""
    assert verdict(overload, 150.0, "60%") == ""
    assert verdict(overload, 99.0) == "objective missed: p99 100 ms, above 99 ms"
    assert verdict(overload, 0.0, "61%") == "objective missed: 60.0 % correct and in time, below 61%"
    assert "1 wrong: these are faults" in verdict(counted(ended(), ended("wrong", 1.0, "wrong")))
    assert verdict(counted()) == "no request was sent"


def test_seconds_of_workers_add_up_at_the_master() -> None:
    workers = [counted(ended(), ended("rejected", 1.0, "503")) for _ in range(3)]
    master = Goodput()
    for worker in workers:
        master.merge(json.loads(json.dumps(worker.take()), object_hook=with_whole_keys))
    assert master.total().counts == Counter(offered=6, good=3, rejected=3)
    assert not workers[0].seconds, "what was sent is not sent again"


def with_whole_keys(found: dict[str, Any]) -> dict[Any, Any]:
    return {int(key) if key.isdigit() else key: value for key, value in found.items()}


def test_class_does_the_same_beside_any_other() -> None:
    code = """
from types import SimpleNamespace
from loadtests import locustfile
def first(*classes):
    environment = SimpleNamespace(parsed_options=SimpleNamespace(**{n: o.default for n, o in locustfile.OPTIONS.items()}
        | locustfile.UNLISTED), numbers={}, example=None, mask="[MASK]", host="http://127.0.0.1:9")
    users = [one(environment) for one in classes]
    return next(users[-1].texts), next(users[-1].schedule())
assert first(locustfile.OpenLoop) == first(locustfile.SlowCalls, locustfile.MixedLengths, locustfile.OpenLoop)
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)
