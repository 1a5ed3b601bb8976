"""Other APIs to the same loop, one file each, found by workers/apis.py, which says what a file may offer."""

from collections.abc import Collection
from typing import Any

from prometheus_client import Counter, Histogram
from starlette.exceptions import HTTPException
from starlette.requests import Request

from workers.context import context_of
from workers.service import Service
from workers.web import parsing
from workers.web.checks import QUICK_JSON_BYTES


async def read_json(request: Request, known: Collection[str]) -> tuple[dict[str, Any], int]:
    """Return the JSON object that the body is, without what is null in it, and the body's length in bytes.

    `known`: the fields, what must be there first. Raises HTTPException 400 or 415 with a sentence, also for any other field; what `InFlight.read` raises.
    """
    service: Service = request.state.service
    context = context_of(request.scope)
    body = await service.in_flight.read(request)
    parsing.reject_encoded(context)
    an_object = f'an object with "{next(iter(known))}"'

    def parse() -> Any:
        return parsing.load_json(parsing.text_of(body), an_object)

    content = await service.checks.run(context, len(body), parse, QUICK_JSON_BYTES)
    if not isinstance(content, dict):
        raise HTTPException(400, f"the JSON is not an object; send {an_object}")
    given = {name: value for name, value in content.items() if value is not None}
    if unknown := sorted(given.keys() - set(known)):
        raise HTTPException(400, f'"{unknown[0][:100]}" is not a known field; leave it out')
    return given, len(body)


def whole(number: Any) -> Any:
    """Return 3 for 3.0, which JSON does not tell apart; anything else as it is."""
    return int(number) if type(number) is float and number.is_integer() else number


def embeds(service: Service) -> bool:
    """Return whether the model returns one vector per text. Raises Rejected while it loads."""
    return bool(getattr(service.task, "embeds", False))


def embedder(request: Request) -> Service:
    """Return the service. Raises Rejected while the model loads, HTTPException 404 if it gives a vector per token."""
    service: Service = request.state.service
    if not embeds(service):
        raise HTTPException(404, "this model has no sentence embeddings; serve a sentence-transformers model")
    return service


def samples(metric: Counter | Histogram, ending: str) -> list[Any]:
    """Return this worker's own samples whose names end in `ending`."""
    return [s for family in metric.collect() for s in family.samples if s.name.endswith(ending)]
