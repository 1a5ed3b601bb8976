"""A model loop on a virtual clock, with a model that is a formula."""

import asyncio
import functools
from collections.abc import Awaitable, Callable
from typing import Any

import looptime

from workers.jobs import Answer
from workers.loop import ModelLoop


class FakeModel:
    """Takes `b` seconds for each query, then answers each; raises what a query is, when it is an exception."""

    def __init__(self, b: float = 1.0) -> None:
        self.b = b
        self.calls: list[list[Any]] = []
        self.started: list[float] = []

    async def __call__(self, queries: list[Any]) -> list[Any]:
        self.calls.append(queries)
        self.started.append(now())
        await asyncio.sleep(self.b * len(queries))
        for query in queries:
            if isinstance(query, BaseException):
                raise query
        return [f"answer to {query}" for query in queries]


def now() -> float:
    return asyncio.get_running_loop().time()


def on_virtual_clock(test: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    """Run an async test on an event loop whose time jumps to the next event; fail it if it never ends."""

    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        with asyncio.Runner(loop_factory=lambda: looptime.new_event_loop(start=0, end=100_000)) as runner:
            runner.run(test(*args, **kwargs))

    return run


class serving:
    """A loop with its consumers, for the length of a with block."""

    def __init__(self, *models: Any, loop: type[ModelLoop] = ModelLoop, **options: Any) -> None:
        self.loop = loop(**{"budget_s": 1000.0} | options)
        self.models = models

    async def __aenter__(self) -> ModelLoop:
        self.consumers = [asyncio.create_task(self.loop.consume(model)) for model in self.models]
        await asyncio.sleep(0)
        return self.loop

    async def __aexit__(self, *exc: object) -> None:
        for consumer in self.consumers:
            assert not consumer.done(), "the loop has died"
            consumer.cancel()
        await asyncio.gather(*self.consumers, return_exceptions=True)


def submit_all(loop: ModelLoop, *queries: Any, **options: Any) -> list[asyncio.Task[Answer]]:
    return [asyncio.create_task(loop.submit(query, **options)) for query in queries]


def waits_for(loaded: asyncio.Event) -> Callable[[], Awaitable[None]]:
    """What tells the loop that an instance of the model is ready."""

    async def ready() -> None:
        await loaded.wait()

    return ready


async def outcomes(tasks: list[asyncio.Task[Answer]]) -> list[Any]:
    """What each task ended with: the value of its answer, or its exception's class."""
    done = await asyncio.gather(*tasks, return_exceptions=True)
    return [result.value if isinstance(result, Answer) else type(result) for result in done]
