"""What HTTP says: reads a request into a query, or refuses it with a sentence; gives every error its status and form."""

import contextlib
import json
import logging
import math
import re
from collections.abc import Callable
from operator import methodcaller
from typing import Any, NamedTuple

import orjson
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import Scope

from workers.errors import Late, Malformed, ModelFailed, Rejected, Unprocessable
from workers.jobs import Answer, slowest

log = logging.getLogger("uvicorn.error")

# What curl -d sends is called a form; nobody means one.
UNSAID = ("", "application/x-www-form-urlencoded", "application/octet-stream")
SENTENCES = {  # for Starlette's own phrases
    "Not Found": "there is nothing here for this TASK; POST to /, or see GET /openapi.json",
    "Method Not Allowed": "this method is not allowed here; see the Allow header",
}
MAX_HEADER_BYTES = 65_536  # httptools itself would take megabytes
CLOSE = {"Connection": "close"}  # what is left of such a request must not be read as the next one
CLIENT_GONE = 499  # nginx's name for it; never sent, only counted
QUOTED = r'"(?:\\.|[^"\\])*"?'  # whose end is missing lasts to the end
PREFERENCES = re.compile(rf"(?:[^\",]|{QUOTED})+")  # what stands between the commas
WAIT = re.compile(r'\s*wait\s*=\s*("?)([0-9]{1,9}(?:\.[0-9]+)?)\1\s*(?:;.*)?', re.IGNORECASE | re.DOTALL)
PARAMETER = re.compile(rf";\s*([^\s;=\"]+)\s*=\s*({QUOTED}|[^\s;\"]*)")
# Lists and objects in each other; Python's own bound is from 1,000 to none, by its version.
DEEPEST = 500
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
    if media and (media_type in UNSAID or media_type.startswith(media)):
        return ParsedBody([body], {})
    if media_type not in (*UNSAID, "text/plain", "application/json"):
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
        if text.count("[") + text.count("{") > DEEPEST and is_deeper(content, DEEPEST):
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


class AnswerResponse(Response):
    """What is said of the answers, as JSON, and where the time of the slowest of them went."""

    def __init__(self, answers: list[Answer], content: Any) -> None:
        self.status_code, self.background = 200, None
        try:
            self.body = rendered(content)
        except ModelFailed as exc:
            exc.index = culprit(answers)
            raise
        self.raw_headers = [  # by hand: Starlette's way takes as long as the loop takes for a job of a batch
            (b"content-type", b"application/json"),
            (b"content-length", b"%d" % len(self.body)),
            (b"server-timing", timing(answers).encode()),
        ]


def timing(answers: list[Answer]) -> str:
    """Where the time of the slowest went, as Server-Timing has it."""
    answer = slowest(answers)
    return (
        f"queue;dur={answer.queue_s * 1000:.2f}, model;dur={answer.model_s * 1000:.2f}, "
        f'batch;desc="size {answer.batch_size}, dispatched because {answer.dispatched_because}"'
    )


ENCODER = json.JSONEncoder(
    ensure_ascii=False, allow_nan=False, separators=(",", ":"), default=methodcaller("tolist")
)
# orjson writes a NumPy float32 with only the digits that it has: half as many as the same number as a float64 would take.
OPTIONS = (
    orjson.OPT_SERIALIZE_NUMPY
    | orjson.OPT_PASSTHROUGH_SUBCLASS
    | orjson.OPT_PASSTHROUGH_DATACLASS
    | orjson.OPT_PASSTHROUGH_DATETIME
)


def rendered(content: Any) -> bytes:
    """As JSON; NumPy's and torch's numbers are JSON, too. Raises ModelFailed where JSON can't say it, as NaN."""
    with contextlib.suppress(orjson.JSONEncodeError):  # the standard library says more, ten times as slowly
        body = orjson.dumps(content, methodcaller("tolist"), OPTIONS)
        if b"null" not in body:  # orjson says null for NaN, too
            return body
    try:
        return ENCODER.encode(content).encode()
    except Exception as exc:  # NaN, an object of its own, a text with half of a character
        raise ModelFailed(f"the answer can't be said in JSON: {exc}") from exc


def culprit(answers: list[Answer]) -> int | None:
    """Which of several answers JSON can't say."""
    for index, answer in enumerate(answers if len(answers) > 1 else []):
        try:
            rendered(answer.value)
        except ModelFailed:
            return index
    return None


ErrorBody = Callable[[int, str], Any]  # of a status and a sentence that says what to do


def error_body(status: int, sentence: str) -> dict[str, str]:
    """The form of every error, where no other protocol is spoken."""
    return {"error": sentence}


def error_reply(scope: Scope, exc: Exception) -> JSONResponse:
    """The reply to an error: status, headers, and a sentence in the form of the protocol that was asked. Logs a 500."""
    headers: dict[str, str] = {}
    match exc:
        case HTTPException():
            status, sentence = exc.status_code, SENTENCES.get(exc.detail, exc.detail)
            headers = dict(exc.headers or {})
            if status == 405:  # Starlette names the methods of one of the path's routes
                allowed = [method for method, path in scope["app"].endpoints if path == scope["path"]]
                headers["Allow"] = ", ".join(sorted(allowed)) or headers["Allow"]
        case Malformed():
            status, sentence = 400, str(exc)
        case Unprocessable():
            status, sentence = 422, str(exc)
        case Rejected():
            status, sentence = 503, str(exc)
            headers["Retry-After"] = str(exc.retry_after_s)
        case Late():
            status, sentence = 504, str(exc)
        case ClientDisconnect():
            status, sentence = CLIENT_GONE, "the client has left"
        case _:
            index = getattr(exc, "index", None)
            what = "this request" if index is None else f"input {index}"
            sentence = f"the model failed on {what}; report it with the X-Request-ID of this reply"
            status = 500
            log.error("request %s failed", scope["request_id"].decode(), exc_info=exc)
    return JSONResponse(scope["error"](status, sentence), status, headers)
