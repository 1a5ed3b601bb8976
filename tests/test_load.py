"""The load tests tell the truth: they catch servers that are wrong, and a slow one does not slow them down."""

import contextlib
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
import pytest

from loadtests import compare, drive, texts
from loadtests.modes import Mode, start


@contextlib.contextmanager
def fake(name: str) -> Iterator[str]:
    """The URL of one of fake_servers.py."""
    mode = Mode(
        name, f"uvicorn tests.fake_servers:{name}_app --log-level error --timeout-graceful-shutdown 1"
    )
    with start(mode) as server:
        yield server.url


@pytest.fixture(scope="module")
def locust() -> Iterator[drive.Generator]:
    with drive.generator() as generator:
        yield generator


def test_every_right_answer_counts_and_carries_what_the_server_said(locust: drive.Generator) -> None:
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
    assert drive.summary(df, limit_s=30)["good_share"] == 1


def test_an_answer_to_anothers_question_is_wrong(locust: drive.Generator) -> None:
    with fake("swaps") as url:
        df = locust.run(url, "closed", users=2, duration_s=0.5)
    assert (df["outcome"] == "wrong").sum() > 0
    # Two clients who asked the same got the same; and the last one may have waited alone.
    assert (df["outcome"] == "wrong").mean() > 0.5


def test_an_answer_that_never_comes_or_ends_early_is_lost(locust: drive.Generator) -> None:
    with fake("loses") as url:
        df = locust.run(url, "open", rate_per_s=30, duration_s=1, timeout_s=1.0, limit_s=1.0)
    n = len(df)
    assert (df["outcome"] == "lost").sum() == n // 3 + (n + 2) // 3
    assert set(df["outcome"]) <= {"200", "lost"}


def test_a_200_without_a_right_answer_is_wrong(locust: drive.Generator) -> None:
    with fake("lies") as url:
        df = locust.run(url, "open", rate_per_s=40, duration_s=1)
    assert set(df["outcome"]) == {"wrong"}
    assert drive.summary(df)["goodput_per_s"] == 0


def test_statuses_are_told_apart(locust: drive.Generator) -> None:
    with fake("varied") as url:
        df = locust.run(url, "open", rate_per_s=40, duration_s=1)
    counts = df["outcome"].value_counts()
    assert set(counts.index) == {"503", "504", "other"}
    assert abs(counts["other"] - counts["503"] - counts["504"]) <= 1


def test_the_open_loop_keeps_its_schedule_against_a_stalled_server(locust: drive.Generator) -> None:
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


def test_a_closed_loop_waits_for_a_stalled_server(locust: drive.Generator) -> None:
    with fake("stalls") as url:
        df = locust.run(url, "closed", users=3, duration_s=0.5, timeout_s=1)
    assert len(df) == 3


def test_retries_come_as_retry_after_says_or_at_once(locust: drive.Generator) -> None:
    options: dict[str, Any] = {"rate_per_s": 5, "duration_s": 1, "limit_s": 1, "timeout_s": 1.5, "seed": 1}
    with fake("refuses") as url:
        polite = locust.run(url, "retry", honour=1, attempts=2, **options)
        rude = locust.run(url, "retry", honour=0, attempts=3, **options)
    again = polite[polite["attempt"] == 1]
    assert set(polite["outcome"]) == {"503"} and (polite["retry_after_s"] == 1).all()
    assert len(again) and ((again["sent_s"] - again["due_s"]) >= 1).all()
    assert drive.summary(rude)["offered_per_s"] == (rude["attempt"] == 0).sum()
    assert set(rude["attempt"]) == {0, 1, 2}


def test_the_impatient_leave_and_the_others_get_no_answer_either_from_a_stalled_server(
    locust: drive.Generator,
) -> None:
    with fake("stalls") as url:
        df = locust.run(
            url, "impatient", rate_per_s=40, duration_s=0.5, timeout_s=1, limit_s=1, leave_after_s=0.1
        )
    assert set(df["outcome"]) == {"left", "lost"}


def test_an_unknown_option_or_scenario_is_named(locust: drive.Generator) -> None:
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
    df = rows([100.0, 100.0, 3000.0, 100.0, 100.0], ["200", "503", "200", "wrong", "200"])
    assert drive.summary(df, limit_s=2)["goodput_per_s"] == 0.2
    assert drive.summary(df, limit_s=4)["goodput_per_s"] == 0.3


def test_a_backlog_answered_after_the_end_is_no_speed() -> None:
    df = rows([5000.0] * 100, ["200"] * 100)
    assert drive.summary(df, limit_s=60)["goodput_per_s"] == pytest.approx(100 / 14.9)


def test_percentiles_are_not_rounded() -> None:
    assert drive.summary(rows([1234.5] * 9, ["200"] * 9))["p99_ms"] == 1234.5


def test_the_knee_is_the_last_step_before_the_first_that_fails() -> None:
    outcomes = ["200"] * 60 + ["503"] * 10 + ["200"] * 10
    assert drive.knee_per_s(rows([10.0] * 80, outcomes), steps=8) == 8.0
    assert drive.knee_per_s(rows([10.0] * 80, ["503"] * 80), steps=8) == 0


def test_recovery_counts_from_the_end_of_the_spike() -> None:
    df = rows([10.0] * 1000, ["200"] * 1000)  # the spike ends after 4 s
    df.loc[(df["due_s"] >= 3) & (df["due_s"] < 6), "outcome"] = "503"
    assert drive.recovery_s(df) == pytest.approx(2.0)
    df.loc[df["due_s"] >= 3, "outcome"] = "503"
    assert np.isnan(drive.recovery_s(df))


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


def test_quick_comparison_of_three_modes_leaves_table_and_pictures(tmp_path: Any) -> None:
    options = ["--quick", "--modes", "thread", "batch", "uvicorn-2", "--out", str(tmp_path)]
    assert compare.main(options) == 0
    names = {path.name for path in tmp_path.iterdir()}
    pictures = {"latency.png", "overload.png", "distribution.png", "memory.png", "prediction.png"}
    assert names == {"measurements.csv", "machine.json", "table.md"} | pictures
    measured = pd.read_csv(tmp_path / "measurements.csv")
    values = measured[measured["repeat"] == 0].set_index(["mode", "scenario", "metric"])["value"]
    for mode in ("thread", "batch", "uvicorn-2"):
        assert values[mode, "capacity", "per_s"] > 0
        assert sum(values[mode, scenario, "n_wrong"] for scenario in ("capacity", "own 80 %", "own 2 x")) == 0
    for mode in ("thread", "batch"):
        assert (
            values[mode, "capacity", "predicted_per_s"] > 0
            and values[mode, "own 80 %", "predicted_p99_ms"] > 0
        )
    assert values["thread", "start", "copies"] == 1 and values["uvicorn-2", "start", "copies"] == 2
    assert "/root" not in (tmp_path / "machine.json").read_text()
