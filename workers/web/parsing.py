"""From a request to inputs: reads a body and its headers, or rejects them with a sentence that says what to send."""

import json
import math
import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from starlette.exceptions import HTTPException

from workers.context import RequestContext
from workers.web import forms
from workers.web.replies import CLOSE

# curl -d sends the first of these by default: treat them as "not given".
NOT_GIVEN = ("", "application/x-www-form-urlencoded", "application/octet-stream")
MAX_HEADER_BYTES = 65_536  # httptools itself would take megabytes
QUOTED = r'"(?:\\.|[^"\\])*"?'  # an unterminated quoted string extends to the end
PREFERENCES = re.compile(rf"(?:[^\",]|{QUOTED})+")  # what stands between the commas
WAIT = re.compile(r'\s*wait\s*=\s*("?)([0-9]{1,9}(?:\.[0-9]+)?)\1\s*(?:;.*)?', re.IGNORECASE | re.DOTALL)
PARAMETER = re.compile(rf";\s*([^\s;=\"]+)\s*=\s*({QUOTED}|[^\s;\"]*)")
MAX_NESTING = 500  # of JSON. CPython's own limit differs by version: 1,000 up to none.
BOM = b"\xef\xbb\xbf"  # some editors put it before UTF-8


# Two of these would mean two things: servers and proxies differ in which one counts.
SINGLE = {b"authorization", b"content-length", b"content-type", b"host", b"origin", b"x-api-key"}


def combined(raw: Iterable[tuple[bytes, bytes]]) -> dict[bytes, bytes]:
    """Return each header once, a list's lines joined by commas (RFC 9110, 5.3). Raises HTTPException 400 for two values of one."""
    lines: dict[bytes, list[bytes]] = {}
    for name, value in raw:
        lines.setdefault(name, []).append(value)
    twice = [name for name in SINGLE if len(set(lines.get(name, ()))) > 1]
    if len(lines.get(b"host", ())) > 1 or twice:
        raise HTTPException(400, f"there are two {(twice or [b'host'])[0].decode()} headers; send one", CLOSE)
    return {name: values[0] if name in SINGLE else b", ".join(values) for name, values in lines.items()}


IsOne = Callable[[list[Any]], bool]  # whether a JSON list is one input


class ParsedBody(NamedTuple):
    """What a body holds: inputs, each a query of its own, and the parameters that they share."""

    inputs: list[Any]
    parameters: dict[str, Any]
    is_list: bool = False  # a list gets a list, also of one


def never(inputs: list[Any]) -> bool:
    """A JSON list is not one input but several, unless the task says so."""
    return False


def parse(
    body: bytes, context: RequestContext, media: tuple[str, ...], max_inputs: int, is_one: IsOne = never
) -> ParsedBody:
    """Return what the body asks. Raises HTTPException 400 or 415 with a sentence that says what to send.

    `media`: what the task takes as raw bytes, such as "image/".
    """
    content_type = context.headers.get(b"content-type", b"").decode("latin-1")
    media_type = content_type.partition(";")[0].strip().lower()
    reject_encoded(context)
    if not body:
        raise HTTPException(400, "the body is empty; send the input for the model")
    if media_type in NOT_GIVEN and body.lstrip()[:1] == b"{" and is_inputs(body):
        media_type = "application/json"
    if media and (media_type in NOT_GIVEN or media_type.startswith(media)):
        return ParsedBody([body], {})
    if media and media_type == forms.MEDIA_TYPE:
        return parse_form(body, content_type)
    if media_type not in (*NOT_GIVEN, "text/plain", "application/json"):
        as_bytes = [*(kind + "*" * kind.endswith("/") for kind in media), forms.MEDIA_TYPE] if media else []
        known = ["text/plain", "application/json", *as_bytes]
        raise HTTPException(415, f"{media_type[:100]} is not supported; send {' or '.join(known)}")
    if (charset := charset_of(content_type)) not in ("utf-8", "utf8", "us-ascii"):
        raise HTTPException(415, f"the charset {charset[:100]} is not supported; send UTF-8")
    text = text_of(body)
    if media_type == "application/json":
        return parse_json(text, max_inputs, is_one)
    if not text.strip():
        raise HTTPException(400, "the text is empty; send some text")
    return ParsedBody([text], {})


def parse_form(body: bytes, content_type: str) -> ParsedBody:
    """Return a form's file as the one input, and its fields as parameters: up to 32 MB of JSON. Raises HTTPException 400 or 413."""
    form = forms.read(body, content_type)
    return ParsedBody([form.file], forms.parameters(form, lambda text: load_json(text, "a value")))


def is_inputs(body: bytes) -> bool:
    """Return whether the body, of no known type, is a JSON object with "inputs": what `curl -d '{"inputs": …}'` sends."""
    try:
        content = JSON.decode(body.removeprefix(BOM).decode())
    except (ValueError, RecursionError):
        return False
    except HTTPException:  # NaN, or a field twice: to be told
        return b'"inputs"' in body
    return isinstance(content, dict) and "inputs" in content


def text_of(body: bytes) -> str:
    """Return the body as text. Raises HTTPException 400 if it is not UTF-8."""
    try:
        return body.removeprefix(BOM).decode()
    except UnicodeDecodeError as exc:
        raise HTTPException(400, f"byte {exc.start} of the body is not UTF-8; send UTF-8") from None


def reject_encoded(context: RequestContext) -> None:
    """Raise HTTPException 415 if the body is compressed."""
    if context.headers.get(b"content-encoding", b"identity").lower() != b"identity":
        raise HTTPException(415, "compressed bodies are not supported; send it without Content-Encoding")


def charset_of(content_type: str) -> str:
    """Return the charset that it names, in lower case; "utf-8" where it names none."""
    named = {name.lower(): value.strip('"').lower() for name, value in PARAMETER.findall(content_type)}
    return named.get("charset") or "utf-8"


def load_json(text: str, example: str) -> Any:
    """Return what the JSON says. Raises HTTPException 400 with a sentence that says to send the likes of `example`."""
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
    """Return whether more than `most` lists and objects stand in each other."""
    level = [content]
    for _ in range(most):
        members = (one.values() if isinstance(one, dict) else one for one in level)
        level = [one for some in members for one in some if isinstance(one, dict | list)]
    return bool(level)


def parse_json(text: str, max_inputs: int, is_one: IsOne = never) -> ParsedBody:
    """Read the Hugging Face inference convention: {"inputs": ..., "parameters": {...}}; a list is several inputs.

    Its clients send some tasks' parameters beside the inputs: any other field is one.
    """
    content = load_json(text, '{"inputs": "a text"}')
    if not isinstance(content, dict) or content.get("inputs") is None:
        raise HTTPException(400, '"inputs" is missing; send {"inputs": "a text"}')
    inputs, parameters = content.pop("inputs"), content.pop("parameters", None)
    parameters = {} if parameters is None else parameters
    if not isinstance(parameters, dict):
        raise HTTPException(400, '"parameters" must be an object, such as {"top_k": 3}; send one')
    if twice := sorted(content.keys() & parameters.keys()):
        raise HTTPException(422, f'"{twice[0]}" is given both beside "inputs" and in "parameters"; use one')
    parameters = {name: value for name, value in (content | parameters).items() if value is not None}
    if not isinstance(inputs, list) or is_one(inputs):
        return ParsedBody([inputs], parameters)
    if not 1 <= len(inputs) <= max_inputs:
        raise HTTPException(400, f"there are {len(inputs)} inputs; send 1 to {max_inputs} at once")
    return ParsedBody(inputs, parameters, is_list=True)


def finite(number: str) -> float:
    """Return the number. Raises HTTPException for NaN and Infinity, which are not JSON, and 1e999, which would be one of them."""
    if not math.isfinite(value := float(number)):
        raise HTTPException(400, f"{number[:20]} is not valid JSON; send a finite number")
    return value


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the object of these fields. Raises HTTPException where one is there twice: a proxy may have read the other one."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                break
            seen.add(name)
        shown = name[:100].encode(errors="replace").decode()  # half of a character could not be sent back
        raise HTTPException(400, f'duplicate key "{shown}" in the JSON object; send it once')
    return fields


JSON = json.JSONDecoder(parse_float=finite, parse_constant=finite, object_pairs_hook=unique)


def client_budget_s(prefer: bytes) -> float:
    """Return the seconds that `Prefer: wait=SECONDS` (RFC 7240) allows, infinity where it says nothing.

    What is not understood is ignored, as the RFC has it.
    """
    preferences = PREFERENCES.findall(prefer.decode("latin-1"))
    wait = next(filter(None, map(WAIT.fullmatch, preferences)), None)
    return float(wait[2]) if wait else math.inf
