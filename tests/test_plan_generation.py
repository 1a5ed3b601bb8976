"""The planner of generation: its simulation against the arithmetic of a step's law, and its advice."""

from dataclasses import replace
from pathlib import Path

import pytest

from loadtests.plan import generation
from loadtests.plan.generation import Setting, Texts
from tests.support import small_language_models
from workers.generation.step_cost import StepCost
from workers.generation.steps import Limits
from workers.settings import Settings

TEXTS = Texts(prompt=100, answer=50, capacity=1024)


def setting(sequences: int, a: float = 0.02, b: float = 0.0005, c: float = 0.001) -> Setting:
    return Setting(StepCost(a, b, c), sequences, TEXTS)


def test_lone_reader_sees_what_the_law_says() -> None:
    seen = setting(4).at_rate(0.01, requests=50)
    assert seen.answered == 1
    first_ms, gap_ms = seen.p_ms(0.5)
    assert gap_ms == pytest.approx(21)
    # The median of exponential lengths is ln 2 times their mean.
    assert first_ms == pytest.approx(20 + 0.5 * 69, rel=0.3)


def test_sequences_at_once_share_the_cost_of_a_step() -> None:
    one, many = (setting(n, b=1e-9).at_most(requests=200) for n in (1, 16))
    assert one.tokens / one.ended_s == pytest.approx(1 / 0.021, rel=0.1)
    assert many.tokens / many.ended_s == pytest.approx(16 / 0.036, rel=0.1)


def test_readers_of_a_long_prompt_wait_as_the_real_scheduler_lets_them() -> None:
    long = Texts(prompt=600, answer=50, capacity=4096)
    seen = Setting(StepCost(0.02, 0.0005, 0.001), 8, long).at_rate(0.5, requests=100)
    plain_s = 0.02 + 8 * 0.001
    assert max(seen.gaps_s) <= 3 * plain_s, "the scheduler's promise"


def test_more_than_it_can_is_called_overloaded() -> None:
    assert setting(1).at_rate(10.0, requests=300).cell == "overloaded"


def test_unsure_law_makes_the_simulation_reject_earlier_as_it_does_the_server() -> None:
    sure, unsure = (replace(setting(16), deadline_s=1.0) for _ in range(2))
    unsure.cost.error = 2.0
    burst = [choice.at_rate(1e4, requests=50) for choice in (sure, unsure)]
    assert 0 < burst[1].answers < 0.7 * burst[0].answers < 0.7 * 50
    assert all(max(seen.first_s) <= 1.0 for seen in burst)


def test_the_fewest_sequences_that_keep_both_times_are_advised() -> None:
    choices = [setting(n) for n in (1, 2, 16, 64)]
    rate = 2.0  # of 50 tokens each
    choice, seen = generation.recommend(choices, rate, 2000, 200, 200) or (None, None)
    assert choice is choices[2] and seen and seen.answered >= 0.99
    assert generation.recommend(choices, rate, 5, 200, 200) is None


def test_plan_of_a_real_model_names_a_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = Settings(TASK="text-generation", MODEL=small_language_models.save(tmp_path), TORCH_THREADS=1)
    cost, limits = generation.measure(settings)
    assert any(cost.law) and limits.slots == 64
    monkeypatch.setattr(Settings, "read", lambda: settings)
    monkeypatch.setattr(generation, "measure", lambda _: (StepCost(0.02, 0.0005, 0.001), Limits(16, 256)))
    assert generation.main(["--quick", "--prompt-tokens", "40", "--answer-tokens", "20"]) == 0
    told = capsys.readouterr().out
    assert "MAX_SEQUENCES=" in told and "TTFT p50 / p99" in told
    assert generation.main(["--prompt-tokens", "400"]) == 2
    assert "room for 256 tokens" in capsys.readouterr().err
