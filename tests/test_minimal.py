"""minimal.py keeps the pattern's guarantees: on the virtual clock, under the names that the real loop's tests have."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import httpx2
import pytest

import minimal
from loadtests.modes import ROOT
from minimal import BATCH_SIZE, MAX_QUEUE, TIMEOUT_S, ModelFailed, ModelLoop, attempt
from tests.support.virtual_clock import FakeModel, now, on_virtual_clock


@contextlib.asynccontextmanager
async def serving(run: Any) -> AsyncIterator[ModelLoop]:
    loop = ModelLoop(run)
    consumer = asyncio.create_task(loop.consume())
    await asyncio.sleep(0)
    yield loop
    assert not consumer.done(), "the loop has died"
    consumer.cancel()


async def outcomes(loop: ModelLoop, *texts: Any) -> list[Any]:
    """What each text's request ends with: its answer, or its exception's class."""
    done = await asyncio.gather(*map(loop.submit, texts), return_exceptions=True)
    return [type(one) if isinstance(one, BaseException) else one for one in done]


@on_virtual_clock
async def test_each_text_gets_its_own_answer() -> None:
    async with serving(FakeModel(b=0.01)) as loop:
        assert await outcomes(loop, "a", "b", "c") == ["answer to a", "answer to b", "answer to c"]


@on_virtual_clock
async def test_texts_that_queued_while_the_model_ran_are_the_next_batch() -> None:
    model = FakeModel(b=0.1)
    async with serving(model) as loop:
        first = asyncio.create_task(loop.submit("a"))
        await asyncio.sleep(0.05)
        await asyncio.gather(first, *map(loop.submit, "bcd"))
    assert model.calls == [["a"], ["b", "c", "d"]]


@on_virtual_clock
async def test_batch_never_exceeds_its_size() -> None:
    model = FakeModel(b=0.001)
    async with serving(model) as loop:
        await asyncio.gather(*(loop.submit(str(i)) for i in range(3 * BATCH_SIZE)))
    assert [len(batch) for batch in model.calls] == [BATCH_SIZE] * 3


@on_virtual_clock
async def test_full_queue_rejects_without_calling_the_model() -> None:
    model = FakeModel(b=0.001)
    async with serving(model) as loop:
        ends = await outcomes(loop, *map(str, range(MAX_QUEUE + 1)))
    assert ends[-1] is asyncio.QueueFull and asyncio.QueueFull not in ends[:-1]
    assert sum(map(len, model.calls)) == MAX_QUEUE


@on_virtual_clock
async def test_late_answer_is_a_timeout_and_a_job_that_nobody_waits_for_is_not_run() -> None:
    model = FakeModel(b=2 * TIMEOUT_S)
    async with serving(model) as loop:
        slow = asyncio.create_task(outcomes(loop, "slow"))
        await asyncio.sleep(0.1)
        assert await outcomes(loop, "waits in vain") == [TimeoutError]
        assert await slow == [TimeoutError] and now() == TIMEOUT_S + 0.1
        await asyncio.sleep(2 * TIMEOUT_S)
    assert model.calls == [["slow"]]


@on_virtual_clock
async def test_one_bad_text_fails_alone_and_its_neighbours_get_answers() -> None:
    async with serving(FakeModel(b=0.01)) as loop:
        assert await outcomes(loop, "a", ValueError("bad"), "c") == ["answer to a", ValueError, "answer to c"]


@on_virtual_clock
async def test_wrong_number_of_answers_is_an_error_and_not_a_mix_up() -> None:
    async def model(texts: list[str]) -> list[str]:
        return texts[:1]

    async with serving(model) as loop:
        assert await outcomes(loop, "a", "b") == ["a", "b"], "each was asked again alone"

    async def silent(texts: list[str]) -> list[str]:
        return []

    async with serving(silent) as loop:
        assert await outcomes(loop, "a") == [ModelFailed]


@pytest.mark.parametrize("error", [StopIteration(), SystemExit(), KeyboardInterrupt(), MemoryError()])
def test_whatever_the_model_raises_its_caller_gets_an_error_and_the_next_is_served(
    error: BaseException,
) -> None:
    def model(texts: list[str]) -> list[str]:
        if "bad" in texts:
            raise error
        return texts

    async def check() -> None:
        with ThreadPoolExecutor(1) as thread:
            call = partial(asyncio.get_running_loop().run_in_executor, thread, attempt, model)
            async with serving(call) as loop:
                assert await outcomes(loop, "bad") == [ModelFailed]
                assert await outcomes(loop, "good") == ["good"]

    asyncio.run(check())


def test_app_answers_like_the_pipeline_and_says_503_504_500(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over HTTP, in the process, with the bundled model in its thread."""
    raised = {"full": asyncio.QueueFull(), "late": TimeoutError(), "bad": ModelFailed()}
    submit = ModelLoop.submit

    async def fail(loop: ModelLoop, text: str) -> Any:
        if text in raised:
            raise raised[text]
        return await submit(loop, text)

    async def check() -> None:
        monkeypatch.chdir(ROOT)
        monkeypatch.setattr(ModelLoop, "submit", fail)
        async with minimal.lifespan(minimal.app) as state:
            app = with_state(state)
            async with httpx2.AsyncClient(
                transport=httpx2.ASGITransport(app), base_url="http://here"
            ) as client:
                replies = await asyncio.gather(
                    *(
                        client.post("/", content=f"{city} is the [MASK] of France.")
                        for city in ("Paris", "Nice")
                    )
                )
                assert replies[0].json()[0]["token_str"] == "capital"
                assert all(len(reply.json()) == 5 for reply in replies)
                assert (await client.get("/health")).json() == {"queue_depth": 0}
                for text, status in {"full": 503, "late": 504, "bad": 500, "no mask": 500}.items():
                    assert (await client.post("/", content=text)).status_code == status

    asyncio.run(check())


def with_state(state: dict[str, Any]) -> Any:
    """The app as a server calls it: with what its lifespan has yielded."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await minimal.app(scope | {"state": dict(state)}, receive, send)

    return app


def test_readme_shows_the_loop_as_it_is() -> None:
    source = (ROOT / "minimal.py").read_text()
    loop = source[source.index("class ModelLoop:") : source.index("\n\n\ndef attempt")]
    assert loop in (ROOT / "README.md").read_text()
