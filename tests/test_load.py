"""The load tests tell the truth: they catch servers that are wrong, and a slow one does not slow them down."""

import contextlib
import itertools
import json
import math
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pandas as pd
import psutil
import pytest

from loadtests.compare import run
from loadtests.load import generator, texts
from loadtests.load.raw_client import Connection
from loadtests.modes import MODES, ROOT, Mode, Server, start
from loadtests.plan import planner
from tests.support.client import until


@contextlib.contextmanager
def fake(name: str) -> Iterator[str]:
    """The URL of one of fake_servers.py."""
    mode = Mode(
        name, f"uvicorn tests.support.fake_servers:{name}_app --log-level error --timeout-graceful-shutdown 1"
    )
    with start(mode) as server:
        yield server.url


@pytest.fixture(scope="module")
def locust() -> Iterator[generator.Generator]:
    with generator.generator() as locust:
        yield locust


def test_every_right_answer_counts_and_carries_what_the_server_said(locust: generator.Generator) -> None:
    with fake("honest") as url:
        df = locust.run(url, "open", rate_per_s=40, duration_s=1, limit_s=30, texts="mixed", health_per_s=10)
    assert set(df["outcome"]) == {"200"}
    assert set(df["kind"]) == {"model", "health"}
    model = df[df["kind"] == "model"]
    assert (
        (model["queue_ms"] == 1.5).all()
        and (model["model_ms"] == 2.5).all()
        and (model["batch_size"] == 4).all()
    )
    assert df[df["kind"] == "health"]["model_ms"].isna().all()
    assert generator.summary(df, limit_s=30)["good_share"] == 1


@pytest.mark.slow
def test_another_model_is_asked_its_own_example(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODEL", "models.iris:Iris")
    with start(MODES["batch"]) as server, generator.generator() as locust:
        df = locust.run(server.url, "closed", users=4, duration_s=0.5, limit_s=30)
    assert set(df["outcome"]) == {"200"} and len(df) > 4


def test_answer_to_anothers_question_is_wrong(locust: generator.Generator) -> None:
    with fake("swaps") as url:
        df = locust.run(url, "closed", users=2, duration_s=0.5)
    assert (df["outcome"] == "wrong").sum() > 0
    # Two clients who asked the same got the same; and the last one may have waited alone.
    assert (df["outcome"] == "wrong").mean() > 0.5


def test_answer_that_never_comes_or_ends_early_is_lost(locust: generator.Generator) -> None:
    with fake("loses") as url:
        df = locust.run(url, "open", rate_per_s=30, duration_s=1, timeout_s=5, limit_s=5)
    n = len(df)
    assert (df["outcome"] == "lost").sum() == n // 3 + (n + 2) // 3
    assert set(df["outcome"]) <= {"200", "lost"}


def test_200_without_a_right_answer_is_wrong(locust: generator.Generator) -> None:
    with fake("lies") as url:
        df = locust.run(url, "open", rate_per_s=40, duration_s=1, limit_s=30)
    assert set(df["outcome"]) == {"wrong"}
    assert generator.summary(df)["goodput_per_s"] == 0


def test_statuses_are_counted_apart(locust: generator.Generator) -> None:
    with fake("varied") as url:
        df = locust.run(url, "open", rate_per_s=40, duration_s=1, limit_s=30)
    counts = df["outcome"].value_counts()
    assert set(counts.index) == {"503", "504", "other"}
    assert abs(counts["other"] - counts["503"] - counts["504"]) <= 1


def test_open_loop_keeps_its_schedule_against_a_stalled_server(locust: generator.Generator) -> None:
    options: dict[str, Any] = {"rate_per_s": 50, "duration_s": 1, "timeout_s": 5, "limit_s": 5, "seed": 3}
    with fake("honest") as url:
        fast = locust.run(url, "open", **options)
    with fake("stalls") as url:
        stalled = locust.run(url, "open", **options)
    assert set(stalled["outcome"]) == {"lost"}
    np.testing.assert_allclose(np.diff(stalled["due_s"]), np.diff(fast["due_s"]), atol=1e-9)
    assert stalled["sent_s"].max() < stalled["latency_ms"].min() / 1000, (
        "all are sent before the first one gives up"
    )
    assert (stalled["latency_ms"] >= 5000).all()


def test_closed_loop_waits_for_a_stalled_server(locust: generator.Generator) -> None:
    with fake("stalls") as url:
        df = locust.run(url, "closed", users=3, duration_s=0.5, timeout_s=1)
    assert len(df) == 3


def test_retries_come_as_retry_after_says_or_at_once(locust: generator.Generator) -> None:
    options: dict[str, Any] = {"rate_per_s": 5, "duration_s": 1, "limit_s": 1, "timeout_s": 20, "seed": 1}
    with fake("refuses") as url:
        polite = locust.run(url, "retry", honour=1, attempts=2, **options)
        rude = locust.run(url, "retry", honour=0, attempts=3, **options)
    again = polite[polite["attempt"] == 1]
    assert set(polite["outcome"]) == {"503"} and (polite["retry_after_s"] == 1).all()
    assert len(again) and ((again["sent_s"] - again["due_s"]) >= 1).all()
    assert generator.summary(rude)["offered_per_s"] == (rude["attempt"] == 0).sum()
    assert set(rude["attempt"]) == {0, 1, 2}


def test_impatient_clients_leave_and_the_others_get_no_answer_either_from_a_stalled_server(
    locust: generator.Generator,
) -> None:
    with fake("stalls") as url:
        df = locust.run(
            url, "impatient", rate_per_s=40, duration_s=0.5, timeout_s=1, limit_s=1, leave_after_s=0.1
        )
    assert set(df["outcome"]) == {"left", "lost"}


def test_unknown_option_or_scenario_is_named(locust: generator.Generator) -> None:
    with pytest.raises(ValueError, match="choose from closed, open"):
        locust.run("http://127.0.0.1:9/", "stampede", duration_s=1)
    with pytest.raises(RuntimeError, match="load generator failed"):
        locust.run("http://127.0.0.1:9/", "open", duration_s=1, speed=3)


# --- sums -------------------------------------------------------------------------------------------------------------


def rows(latencies_ms: list[float], outcomes: list[str], duration_s: float = 10.0) -> pd.DataFrame:
    """Requests that were due one after the other, evenly over `duration_s`."""
    due_s = np.linspace(0, duration_s, len(latencies_ms), endpoint=False)
    df = pd.DataFrame({"due_s": due_s, "sent_s": due_s, "latency_ms": latencies_ms, "outcome": outcomes})
    df["kind"], df["attempt"] = "model", 0
    df.attrs["duration_s"] = duration_s
    return df


def test_goodput_counts_right_answers_within_the_clients_limit() -> None:
    df = rows([100.0, 100.0, 3000.0, 100.0, 100.0] * 20, ["200", "503", "200", "wrong", "200"] * 20)
    assert generator.summary(df, limit_s=2)["goodput_per_s"] == pytest.approx(4)
    assert generator.summary(df, limit_s=4)["goodput_per_s"] == pytest.approx(6)


def test_goodput_counts_neither_a_queue_that_was_empty_at_first_nor_one_that_is_emptied_afterwards() -> None:
    df = rows([1.0] * 20 + [900.0] * 80, ["200"] * 20 + ["503"] * 60 + ["200"] * 20, duration_s=5.0)
    in_time, seconds = 2, 4  # of the last 20
    assert generator.summary(df, limit_s=1)["goodput_per_s"] == pytest.approx(in_time / seconds)


def test_percentiles_are_not_rounded() -> None:
    assert generator.summary(rows([1234.5] * 9, ["200"] * 9))["p99_ms"] == 1234.5


def test_recovery_counts_from_the_end_of_the_spike() -> None:
    df = rows([10.0] * 1000, ["200"] * 1000)  # the spike ends after 4 s
    df.loc[(df["due_s"] >= 3) & (df["due_s"] < 6), "outcome"] = "503"
    assert generator.recovery_s(df) == pytest.approx(2.0)
    df.loc[df["due_s"] >= 3, "outcome"] = "503"
    assert generator.recovery_s(df) == math.inf


@pytest.mark.parametrize("kind", ["short", "long"])
def test_no_answer_fits_another_text(kind: str) -> None:
    corpus = texts.corpus(kind)
    assert len({text.text for text in corpus}) == len(corpus) == 60
    for text in corpus:
        body = [
            {"score": 0.1, "token_str": "##Word", "sequence": text.text.replace("[MASK]", "word").upper()}
        ] * 5
        assert [other.text for other in corpus if other.is_answered_by(json.dumps(body).encode())] == [
            text.text
        ]


@pytest.mark.slow
def test_quick_comparison_of_two_modes_leaves_table_and_pictures(tmp_path: Any) -> None:
    options = ["--quick", "--modes", "batch", "uvicorn-2", "--out", str(tmp_path)]
    assert run.main(options) == 0
    names = {path.name for path in tmp_path.iterdir()}
    pictures = {
        f"{name}{suffix}.png"
        for name in ("latency", "overload", "distribution", "prediction")
        for suffix in ("", "-dark")
    }
    assert names == {"measurements.csv", "machine.json", "table.md"} | pictures
    measured = pd.read_csv(tmp_path / "measurements.csv")
    values = measured[measured["repeat"] == 0].set_index(["mode", "scenario", "metric"])["value"]
    for mode in ("batch", "uvicorn-2"):
        assert values[mode, "capacity", "per_s"] > 0
        assert sum(values[mode, scenario, "n_wrong"] for scenario in ("capacity", "own 80 %", "own 2 x")) == 0
    assert values["batch", "capacity", "predicted_per_s"] > 0
    assert values["batch", "own 80 %", "predicted_p99_ms"] > 0
    assert values["batch", "start", "instances"] == 1 and values["uvicorn-2", "start", "instances"] == 2
    assert json.loads((tmp_path / "machine.json").read_text())["failed"] == []
    assert "/root" not in (tmp_path / "machine.json").read_text()


def test_visit_that_fails_is_named_and_leaves_nothing_half(tmp_path: Any, monkeypatch: Any) -> None:
    setting = planner.Setting(planner.CostLaw(0.0, 0.01), overhead=planner.Overhead(0.001))
    monkeypatch.setattr(run.Foresight, "setting", lambda *_: setting)
    monkeypatch.setattr(run.Comparison, "visit", lambda *_: (_ for _ in ()).throw(RuntimeError("it broke")))
    with pytest.raises(SystemExit, match="no mode could be measured"):
        run.main(["--quick", "--modes", "thread", "--out", str(tmp_path)])
    assert json.loads((tmp_path / "machine.json").read_text())["failed"] == ["thread, round 1"]


def test_partial_comparison_does_not_overwrite_the_full_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    drawn: list[Path] = []
    monkeypatch.setattr(run.report, "write", drawn.append)
    for options in ([], ["--quick"], ["--modes", "thread"], ["--quick", "--out", str(tmp_path)]):
        run.main([*options, "--redraw"])
    whole, *parts, asked = drawn
    assert whole == ROOT / "loadtests" / "results" and parts == [run.PARTS] * 2 and asked == tmp_path


def test_interrupted_comparison_keeps_its_visits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    setting = planner.Setting(planner.CostLaw(0.0, 0.01), overhead=planner.Overhead(0.001))
    visits = iter([[("thread", 0, "capacity", "per_s", 100.0)]])

    def visit(*_: Any) -> list[Any]:
        if rows := next(visits, None):
            return rows
        raise KeyboardInterrupt

    monkeypatch.setattr(run.Foresight, "setting", lambda *_: setting)
    monkeypatch.setattr(run.Comparison, "visit", visit)
    monkeypatch.setattr(run.report, "write", lambda out: (out / "table.md").write_text("a table"))
    assert run.main(["--quick", "--modes", "thread", "sync-2", "--out", str(tmp_path)]) == 1
    assert len(pd.read_csv(tmp_path / "measurements.csv")) == 1


@pytest.mark.parametrize(
    "program", ["compare", "plan", "bench", "bench.model", "bench.scaling", "bench.preparing"]
)
def test_each_program_explains_itself(program: str) -> None:
    said = subprocess.run(
        [sys.executable, "-m", f"loadtests.{program}", "--help"], cwd=ROOT, capture_output=True, text=True
    )
    assert said.returncode == 0 and "--quick" in said.stdout, said.stderr


def test_stopped_open_loop_counts_the_requests_that_still_wait() -> None:
    with fake("stalls") as url:
        said = subprocess.run(
            [
                *(str(Path(sys.executable).parent / "locust"), "-f", "loadtests/locustfile.py", "--headless"),
                *("--host", url.rstrip("/"), "-t", "5s", "-u", "1", "OpenLoop"),
                *("--rate-per-s", "20", "--timeout-s", "2", "--exit-code-on-error", "1", "--json"),
            ],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
    assert said.returncode == 1, said.stderr
    (entry,) = json.loads(said.stdout)
    assert entry["num_failures"] == entry["num_requests"] > 0


def test_mode_is_what_it_is_called_whatever_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, str] = {}

    def popen(*_: Any, env: dict[str, str], **__: Any) -> None:
        given.update(env)
        raise OSError("not started")

    monkeypatch.setenv("BATCH_SIZE", "8")
    monkeypatch.setattr("loadtests.modes.subprocess.Popen", popen)
    for name, batch_size in (("thread", "1"), ("batch", "32")):
        with pytest.raises(OSError, match="not started"), start(MODES[name]):
            pass
        assert given["BATCH_SIZE"] == batch_size


def test_ctrl_c_while_a_server_is_being_started_leaves_none_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """The process is there, and Popen has not yet returned it."""
    started: list[subprocess.Popen[bytes]] = []
    real = subprocess.Popen

    def popen(*args: Any, **kwargs: Any) -> Any:
        started.append(real(*args, **kwargs))
        signal.raise_signal(signal.SIGINT)
        return started[0]

    monkeypatch.setattr("loadtests.modes.subprocess.Popen", popen)
    # A shell's background jobs ignore it.
    was = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt), start(MODES["thread"]):
            pass
    finally:
        signal.signal(signal.SIGINT, was)
    assert started[0].poll() is not None


def test_busy_server_is_waited_for_but_not_forever(monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server(MODES["thread"], "", Mock(), Mock())
    used_s = iter([0.0, 1.0, 1.0, 2.0, 2.0, 2.0, 2.0])
    monkeypatch.setattr(server, "cpu_s", lambda: next(used_s))
    server.wait_until_idle(window_s=0.01)
    assert next(used_s) == 2.0, "it looked twice, and was still the second time"
    monkeypatch.setattr(server, "cpu_s", itertools.count().__next__)
    monkeypatch.setattr(server, "log", lambda: "what it said")
    with pytest.raises(RuntimeError, match="still busy"):
        server.wait_until_idle(timeout_s=0.02, window_s=0.01)


def test_interrupted_generator_leaves_no_process_behind() -> None:
    with fake("stalls") as url, contextlib.suppress(KeyboardInterrupt), generator.generator() as locust:
        options = {"rate_per_s": 20, "duration_s": 60, "timeout_s": 60}
        threading.Thread(target=suppressed, args=(locust.run, url, "open"), kwargs=options).start()
        until(lambda: psutil.Process(locust.process.pid).children())
        children = psutil.Process(locust.process.pid).children()
        began = time.monotonic()
        raise KeyboardInterrupt
    assert time.monotonic() - began < 30, "it did not wait for the load's own end, in 60 s"
    assert not psutil.wait_procs(children, timeout=30)[1]


def suppressed(run: Any, *args: Any, **kwargs: Any) -> None:
    with contextlib.suppress(RuntimeError):
        run(*args, **kwargs)


def test_unknown_kind_of_text_is_named() -> None:
    with pytest.raises(ValueError, match="texts=lnog is not allowed: it must be one of short, mixed, long"):
        next(texts.stream("lnog", random.Random(0)))


def test_reply_in_chunks_is_whole_at_its_end() -> None:
    statuses: list[int] = []
    connection = Connection()
    connection.then = statuses.append
    connection.data_received(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n")
    assert not statuses
    connection.data_received(b"0\r\n\r\n")
    assert statuses == [200]
