"""Other doors to the same loop, one file each, found by the server: delete what you don't need.

`routes(settings)` are what it answers to, none where the task is another one; `error_body(status, sentence)`, where there
is one, is how its errors read; `serving(service)`, where there is one, is an async context manager of what runs beside the
app, for as long as the app does. A protocol never talks to the model.
"""

from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request

from workers.web import parsing


async def read_json(request: Request, known: tuple[str, ...]) -> tuple[dict[str, Any], int]:
    """The JSON object that the body is, without what is null in it, and the body's length in bytes.

    Raises HTTPException 400 or 415 with a sentence, also where a field is none of the known ones; what `InFlight.read`
    raises.
    """
    body = await request.state.service.in_flight.read(request)
    parsing.reject_encoded(request)
    wanted = f'an object with "{known[0]}"'
    try:
        content = parsing.load_json(body.removeprefix(parsing.BOM).decode(), wanted)
    except UnicodeDecodeError as exc:
        raise HTTPException(400, f"byte {exc.start} of the body is not UTF-8; send UTF-8") from None
    if not isinstance(content, dict):
        raise HTTPException(400, f"the JSON is no object; send {wanted}")
    if unknown := sorted(content.keys() - set(known)):
        raise HTTPException(400, f'"{unknown[0]}" is not a known field; leave it out')
    return {name: value for name, value in content.items() if value is not None}, len(body)


def whole(number: Any) -> Any:
    """3 for 3.0, as JSON has it; anything else as it is."""
    return int(number) if type(number) is float and number.is_integer() else number
