"""From a chat to its prompt."""

from typing import Any

from starlette.requests import Request

from workers.context import context_of
from workers.errors import Malformed, Unprocessable
from workers.service import Service
from workers.tasks.text_generation import Task


async def chat_prompt(
    request: Request, task: Task, messages: list[dict[str, Any]], n_bytes: int
) -> list[int]:
    """Return a chat as token ids, off the event loop. Raises Malformed where the template does not take it."""
    service: Service = request.state.service
    try:
        return await service.checks.run(
            context_of(request.scope), n_bytes, lambda: task.chat_prompt(messages), 0
        )
    except Unprocessable as exc:
        raise Malformed(str(exc)) from exc
