"""From a chat to its prompt."""

from collections.abc import Callable
from typing import Any, TypeVar

from starlette.requests import Request

from workers.context import context_of
from workers.errors import Malformed, Unprocessable
from workers.service import Service
from workers.tasks.text_generation import Task

T = TypeVar("T")


async def chat_prompt(
    request: Request,
    task: Task,
    messages: list[dict[str, Any]],
    n_bytes: int,
    tools: list[Any] | None = None,
) -> list[int]:
    """Return a chat as token ids, off the event loop. Raises Malformed where the template does not take it."""
    return await checked(request, n_bytes, lambda: task.chat_prompt(messages, tools=tools))


async def checked(request: Request, n_bytes: int, work: Callable[[], T]) -> T:
    """Return what `work` gives, off the event loop. Raises Malformed for what is unprocessable: OpenAI has no 422."""
    service: Service = request.state.service
    try:
        return await service.checks.run(context_of(request.scope), n_bytes, work, 0)
    except Unprocessable as exc:
        raise Malformed(str(exc)) from exc
