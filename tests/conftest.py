"""What the tests share: the plain pipeline to compare with, a model that fails, many clients."""

import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

from loadtests.modes import MODES, ROOT
from tests.support.client import Crowd
from workers.resources import usable_cores

MODEL = ROOT / "models" / "minilm-mlm"
# Their tests share nothing that takes long to make: each goes to whichever process is free.
SINGLE = {
    "test_admission",
    "test_loop",
    "test_notebooks",
    "test_offload",
    "test_custom_class",
    "test_planner",
    "test_service",
    "test_tasks",
}


# These files take longest, half a minute and more: they begin first, or one process would still be at one of them when the
# others have ended.
LONGEST = [
    "test_contract",
    "test_answers",
    "test_page",
    "test_locust",
    "test_load",
    "test_deployment",
    "test_openapi",
]
LONGEST += ["test_generation_http", "test_embeddings", "test_real_clients", "test_notebooks"]


class Together(LoadScopeScheduling):
    """What shares servers or models stays in one process: the tests of a file, or of a deployment mode in it.

    (xdist's own loadgroup writes to what pytest 9.2 no longer reads.)
    """

    def _split_scope(self, nodeid: str) -> str:
        file, _, test = nodeid.partition("::")
        if Path(file).stem in SINGLE:
            return nodeid
        mode = re.search(rf"\[({'|'.join(MODES)})[-\]]", test)
        return f"{file} {mode[1] if mode else ''}"


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling:
    return Together(config, log)


def pytest_configure(config: pytest.Config) -> None:
    config.option.loadscopereorder = False  # keep the order of `pytest_collection_modifyitems`


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let the longest files begin."""
    order = {name: n for n, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


def pytest_xdist_auto_num_workers() -> int:
    """Half of the time a test waits: for a server to start or to end, for a deadline."""
    return 2 * usable_cores()


@pytest.fixture(autouse=True)
def audible() -> None:
    """What the app logs reaches caplog, whoever has silenced it before: the lessons' helpers do, and server programs."""
    for name in ("uvicorn", "uvicorn.error"):
        log = logging.getLogger(name)
        log.handlers, log.propagate, log.disabled = [], True, False
        log.setLevel(logging.NOTSET)


@pytest.fixture(scope="session")
def crowd() -> Iterator[Crowd]:
    with Crowd() as crowd:
        yield crowd


@pytest.fixture(scope="session")
def oracle() -> Any:
    """The plain pipeline, as anybody would make it."""
    import transformers

    return transformers.pipeline("fill-mask", model=str(MODEL), dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A real browser; for tests with `in_browser`."""
    from tests.support.browser import launched

    with launched() as browser:
        yield browser
