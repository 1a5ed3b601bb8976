"""From a request to inputs: reads a body and its headers, or rejects them with a sentence that says what to send."""

import json
import math
import re
from typing import Any, NamedTuple

from starlette.exceptions import HTTPException
from starlette.requests import Request

# curl -d sends the first of these by default: treat them as "not given".
NOT_GIVEN = ("", "application/x-www-form-urlencoded", "application/octet-stream")
MAX_HEADER_BYTES = 65_536  # httptools itself would take megabytes
QUOTED = r'"(?:\\.|[^"\\])*"?'  # an unterminated quoted string extends to the end
PREFERENCES = re.compile(rf"(?:[^\",]|{QUOTED})+")  # what stands between the commas
WAIT = re.compile(r'\s*wait\s*=\s*("?)([0-9]{1,9}(?:\.[0-9]+)?)\1\s*(?:;.*)?', re.IGNORECASE | re.DOTALL)
PARAMETER = re.compile(rf";\s*([^\s;=\"]+)\s*=\s*({QUOTED}|[^\s;\"]*)")
MAX_NESTING = 500  # of JSON. CPython's own limit differs by version: 1,000 up to none.
BOM = b"\xef\xbb\xbf"  # some editors put it before UTF-8


class ParsedBody(NamedTuple):
    """What a body asks: inputs, each a query of its own, and the parameters that they share."""

    inputs: list[Any]
    parameters: dict[str, Any]
    is_list: bool = False  # a list gets a list, also of one


def parse(body: bytes, request: Request, media: tuple[str, ...], max_inputs: int) -> ParsedBody:
    """Return what the body asks. Raises HTTPException 400 or 415 with a sentence that says what to send.

    `media`: what the task takes as raw bytes, such as "image/".
    """
    fields = request.scope["fields"]
    content_type = fields.get(b"content-type", b"").decode("latin-1")
    media_type = content_type.partition(";")[0].strip().lower()
    reject_encoded(request)
    if not body:
        raise HTTPException(400, "the body is empty; send what the model should answer")
    if media and (media_type in NOT_GIVEN or media_type.startswith(media)):
        return ParsedBody([body], {})
    if media_type not in (*NOT_GIVEN, "text/plain", "application/json"):
        known = " or ".join(
            ["text/plain", "application/json", *(kind + "*" * kind.endswith("/") for kind in media)]
        )
        raise HTTPException(415, f"{media_type[:100]} is not understood; send {known}")
    if (charset := charset_of(content_type)) not in ("utf-8", "utf8", "us-ascii"):
        raise HTTPException(415, f"the body is said to be {charset[:100]}; send UTF-8")
    try:
        text = body.removeprefix(BOM).decode()
    except UnicodeDecodeError as exc:
        raise HTTPException(400, f"byte {exc.start} of the body is not UTF-8; send UTF-8") from None
    if media_type == "application/json":
        return parse_json(text, max_inputs)
    if not text.strip():
        raise HTTPException(400, "the text is empty; send one")
    return ParsedBody([text], {})


def reject_encoded(request: Request) -> None:
    """Raise HTTPException 415 where the body is compressed."""
    if request.scope["fields"].get(b"content-encoding", b"identity").lower() != b"identity":
        raise HTTPException(415, "the body is encoded; send it without Content-Encoding")


def charset_of(content_type: str) -> str:
    """The charset that it names, in lower case; "utf-8" where it names none."""
    named = {name.lower(): value.strip('"').lower() for name, value in PARAMETER.findall(content_type)}
    return named.get("charset") or "utf-8"


def load_json(text: str, example: str) -> Any:
    """Return what it says. Raises HTTPException 400 with a sentence that says to send the likes of `example`."""
    try:
        content = JSON.decode(text)
        if text.count("[") + text.count("{") > MAX_NESTING and is_deeper(content, MAX_NESTING):
            raise RecursionError
        if "\\ud" in text.lower():
            json.dumps(content, ensure_ascii=False).encode()  # a lone surrogate is JSON but not text
    except (ValueError, RecursionError) as exc:
        where = f" ({exc})" if isinstance(exc, json.JSONDecodeError) else ""
        raise HTTPException(400, f"the JSON cannot be read{where}; send {example}") from None
    return content


def is_deeper(content: Any, most: int) -> bool:
    """Whether more than `most` lists and objects stand in each other."""
    level = [content]
    for _ in range(most):
        members = (one.values() if isinstance(one, dict) else one for one in level)
        level = [one for some in members for one in some if isinstance(one, dict | list)]
    return bool(level)


def parse_json(text: str, max_inputs: int) -> ParsedBody:
    """Read the Hugging Face inference convention: {"inputs": ..., "parameters": {...}}; a list is several inputs.

    Its clients send some tasks' parameters beside the inputs: any other field is one.
    """
    content = load_json(text, '{"inputs": "a text"}')
    if not isinstance(content, dict) or content.get("inputs") is None:
        raise HTTPException(400, 'there are no "inputs"; send {"inputs": "a text"}')
    inputs, parameters = content.pop("inputs"), content.pop("parameters", None)
    parameters = {} if parameters is None else parameters
    if not isinstance(parameters, dict):
        raise HTTPException(400, '"parameters" are no object; send one, such as {"top_k": 3}')
    if twice := sorted(content.keys() & parameters.keys()):
        raise HTTPException(422, f'"{twice[0]}" is there twice; send it beside "inputs" or in "parameters"')
    parameters = {name: value for name, value in (content | parameters).items() if value is not None}
    if not isinstance(inputs, list):
        return ParsedBody([inputs], parameters)
    if not 1 <= len(inputs) <= max_inputs:
        raise HTTPException(400, f"there are {len(inputs)} inputs; send 1 to {max_inputs} at once")
    return ParsedBody(inputs, parameters, is_list=True)


def finite(number: str) -> float:
    """The number. Raises HTTPException for NaN and Infinity, which are no JSON, and 1e999, which would be one of them."""
    if not math.isfinite(value := float(number)):
        raise HTTPException(400, f"{number[:20]} is no finite number; send one")
    return value


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of these fields. Raises HTTPException where one is there twice: a proxy may have read the other one."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise HTTPException(400, "a field of the JSON is there twice; send each once")
    return fields


JSON = json.JSONDecoder(parse_float=finite, parse_constant=finite, object_pairs_hook=unique)


def client_budget_s(request: Request) -> float:
    """Return the seconds that `Prefer: wait=SECONDS` (RFC 7240) allows, infinity where it says nothing.

    What isn't understood is ignored, as the RFC has it.
    """
    if b"prefer" not in request.scope["fields"]:
        return math.inf
    preferences = ",".join(request.headers.getlist("prefer"))
    wait = next(filter(None, map(WAIT.fullmatch, PREFERENCES.findall(preferences))), None)
    return float(wait[2]) if wait else math.inf
