"""Instances in threads of one process share one model where it may be shared, and answer as one alone does."""

import gc
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.support import small_media, small_models
from workers import tasks
from workers.settings import EMBEDDED, Settings
from workers.tasks.common import media
from workers.tasks.common.stock import same

N = 3
WORDS = ["the", "old", "house", "on", "the", "hill", "is", "in", "Paris", "and", "a", "dog", "runs", "home"]


def load(settings: Settings, n: int = N) -> tuple[tasks.Task, list[Any]]:
    """The task, and n instances, each loaded in a thread as a server does."""
    task = tasks.make(settings)
    with ThreadPoolExecutor(n) as threads:
        return task, list(threads.map(lambda i: tasks.load(task, settings, i, beside=n - 1), range(n)))


def agree(model: Any, models: list[Any], batches: list[list[Any]]) -> None:
    """Fail where instances that compute at once answer otherwise than one alone."""
    expected = [model(batch) for batch in batches]
    with ThreadPoolExecutor(len(models)) as threads:
        for _ in range(5):
            answers = threads.map(lambda i: models[i % len(models)](batches[i]), range(len(batches)))
            for answer, one in zip(answers, expected, strict=True):
                assert same(answer, one)


def text_batches(task: Any, make: Any) -> list[list[Any]]:
    """Batches of different sizes and lengths."""
    texts = [" ".join(WORDS[: 2 + i % 11]) for i in range(60)]
    contents = [task.check(make(text), {}).content for text in texts]
    return [contents[i : i + 1 + i % 7] for i in range(0, 56, 4)]


@pytest.mark.parametrize("name", ["fill-mask", pytest.param("feature-extraction", marks=pytest.mark.slow)])
def test_encoders_share_their_weights(name: str) -> None:
    settings = Settings(MODEL=EMBEDDED, TASK=name, INSTANCES=N, TORCH_THREADS=1, BATCH_SIZE=8)
    task, models = load(settings)
    assert len({id(model.model) for model in models}) == 1
    mask = " [MASK]." if name == "fill-mask" else ""
    agree(task.load(0), models, text_batches(task, lambda text: text + mask))


@pytest.mark.parametrize("name", ["vit", "ctc"])
def test_stock_models_share_their_weights(name: str, tmp_path: Path) -> None:
    kind, make = small_media.MODELS[name]
    make(tmp_path)
    settings = Settings(MODEL=str(tmp_path), TASK=kind, INSTANCES=N, TORCH_THREADS=1, BATCH_SIZE=4)
    task, models = load(settings)
    assert len({id(model.model) for model in models}) == 1
    one = media.example_image if kind.startswith("image") else lambda seed: media.example_sound(seed, 0.5)
    contents = [task.check(one(seed), {}).content for seed in range(12)]
    agree(task.load(0), models, [contents[i : i + 1 + i % 4] for i in range(9)])


def test_a_model_that_generates_is_not_shared(tmp_path: Path) -> None:
    small_media.whisper(tmp_path)
    _, models = load(
        Settings(MODEL=str(tmp_path), TASK="automatic-speech-recognition", INSTANCES=2, MAX_SOUND_S=5), 2
    )
    assert models[0].model is not models[1].model


@pytest.mark.parametrize("shareable", [True, False])
def test_a_custom_class_is_shared_where_it_says_so_and_closed_once(
    shareable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Any] = []
    closed: list[Any] = []

    class Model:
        def __init__(self) -> None:
            made.append(self)

        def __call__(self, inputs: list[Any]) -> list[Any]:
            return inputs

        def close(self) -> None:
            closed.append(self)

    Model.shareable = shareable  # type: ignore[attr-defined]
    module = ModuleType("somebodys_shared_model")
    module.Model = Model  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "somebodys_shared_model", module)
    _, models = load(Settings(MODEL="somebodys_shared_model:Model", INSTANCES=N))
    assert len(made) == (1 if shareable else N)
    for i, model in enumerate(models):
        assert len(closed) == (0 if shareable else i)
        model.close()
    assert closed == made or set(map(id, closed)) == set(map(id, made))
    assert [model(["a"]) for model in models] == [["a"]] * N


def test_a_shared_model_is_freed_with_its_instances() -> None:
    settings = Settings(MODEL=EMBEDDED, INSTANCES=2, TORCH_THREADS=1)
    task, models = load(settings, 2)
    model = weakref.ref(models[0].model)
    del task, models
    gc.collect()
    assert model() is None


def test_a_model_whose_passes_change_it_is_not_shared(tmp_path: Path) -> None:
    """BigBird's own forward pass sets its attention by the length of a text."""
    folder = small_models.save(tmp_path, "big_bird", small_models.make_model("big_bird", "MaskedLM"))
    _, models = load(Settings(MODEL=folder, INSTANCES=2, TORCH_THREADS=1), 2)
    assert models[0] is not models[1]


def test_an_instance_alone_is_not_wrapped() -> None:
    settings = Settings(MODEL=EMBEDDED, TORCH_THREADS=1)
    task = tasks.make(settings)
    assert not isinstance(tasks.load(task, settings), tasks.Shared)
