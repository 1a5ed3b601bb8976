"""Inputs and answers as the Open Inference Protocol's tensors, the same over HTTP and over gRPC.

One tensor in. Its name says what an element is, each an input of its own:

    text      BYTES   a text
    json      BYTES   JSON: whatever POST / takes as one of its "inputs"
    bytes     BYTES   an image, a sound, where the task takes them
    numbers   FP32 …  a row is an input: a list of numbers

One out, `answer`: FP32 [n, dimensions] where the model returns one vector per text; else BYTES [n], the JSON of each answer.
"""

import math
import struct
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from starlette.exceptions import HTTPException

from workers.errors import Malformed, ModelFailed, Unprocessable
from workers.jobs import Answer
from workers.protocols import embeds, whole
from workers.service import Service
from workers.web import parsing, replies

VERSION, ANSWER = "1", "answer"
NAMES = ("text", "json", "bytes", "numbers")
DIMENSIONS = 32  # numpy's maximum; the product of thousands of sizes takes minutes
NUMPYS = {  # numpy's dtype of each datatype on the wire
    "BOOL": "?",
    **{f"{kind}{bits}": f"<{kind[0].lower()}{bits // 8}" for kind in ("INT", "UINT") for bits in (8, 16, 32, 64)},
    **{f"FP{bits}": f"<f{bits // 8}" for bits in (16, 32, 64)},
}  # fmt: skip
NO_STATE = "the model keeps no state between requests"
OPTIONS = {  # Triton's own options of a request, with the reason why one is rejected
    "timeout": "",
    "priority": "requests wait in one queue, in the order of arrival",
    **dict.fromkeys(("sequence_id", "sequence_start", "sequence_end"), NO_STATE),
}
# Dtype kinds of JSON numbers that fit each kind of datatype.
KINDS = {"b": "b", "i": "iu", "u": "iu", "f": "iuf"}


class Tensor(NamedTuple):
    """The tensor of a request: `data` are its elements as JSON or protobuf has them, or the bytes of all."""

    name: str
    datatype: str
    shape: list[int]
    data: Any


class Output(NamedTuple):
    """The tensor of answers: `data` are its elements as JSON has them, `raw` its bytes."""

    datatype: str
    shape: list[int]
    data: Any
    raw: bytes


def inputs(tensor: Tensor, service: Service) -> list[Any]:
    """Return the task's inputs. Raises Malformed and Unprocessable with a sentence."""
    name, most = tensor.name, service.settings.MAX_INPUTS
    if len(tensor.shape) > DIMENSIONS:
        raise Malformed(f"there are {len(tensor.shape)} dimensions; send at most {DIMENSIONS}")
    if name not in NAMES:
        raise Malformed(f"there is no input {name[:100]!r}; send {', '.join(NAMES[:-1])} or {NAMES[-1]}")
    if (tensor.datatype == "BYTES") == (name == "numbers"):
        raise Unprocessable(f'"{name}" is not a tensor of {tensor.datatype[:20]}; see GET /v2/models/NAME')
    if name == "bytes" and not service.task.media:
        raise Unprocessable('this model does not take bytes; send "text" or "json"')
    values = rows(tensor) if name == "numbers" else elements(tensor, most)
    if not 1 <= len(values) <= most:
        raise Unprocessable(f"there are {len(values)} inputs; send 1 to {most} at once")
    return values


def elements(tensor: Tensor, most: int) -> list[Any]:
    """Return the inputs of a BYTES tensor of any shape: its elements."""
    values = split(tensor.data, most) if isinstance(tensor.data, bytes) else tensor.data
    if len(values) != math.prod(tensor.shape):
        raise Unprocessable(f"there are {len(values)} elements; the shape says {math.prod(tensor.shape)}")
    if tensor.name == "bytes":
        return [one if isinstance(one, bytes) else one.encode() for one in values]
    return [element(one, number, tensor.name) for number, one in enumerate(values)]


def element(one: str | bytes, number: int, name: str) -> Any:
    try:
        text = one.decode() if isinstance(one, bytes) else one
    except UnicodeDecodeError as exc:
        raise Malformed(f"byte {exc.start} of element {number} is not UTF-8; send UTF-8") from None
    try:
        return text if name == "text" else parsing.load_json(text, 'JSON, such as "a text"')
    except HTTPException as exc:  # that of the request is well-formed
        raise Unprocessable(f"element {number}: {exc.detail}") from None


def split(raw: bytes, most: int) -> list[bytes]:
    """Return the elements, each after its length in 4 bytes; those after the first `most` as one."""
    values: list[bytes] = []
    at = 0
    while at < len(raw) and len(values) <= most:
        if len(raw) < at + 4:
            break
        (length,) = struct.unpack_from("<I", raw, at)
        values.append(raw[at + 4 : at + 4 + length])
        at += 4 + length
    if at > len(raw) or (at < len(raw) and len(values) <= most):
        raise Malformed("the elements of BYTES end too early; send each after its length in 4 bytes")
    return values


def rows(tensor: Tensor) -> list[Any]:
    """Return the inputs of a tensor of numbers: its rows."""
    numpys = NUMPYS.get(tensor.datatype)
    if numpys is None:
        raise Unprocessable(f"{tensor.datatype[:20]} is not taken; send {', '.join(('BYTES', *NUMPYS))}")
    try:
        if isinstance(tensor.data, bytes):
            array = np.frombuffer(tensor.data, numpys)
        else:
            values = np.array(tensor.data)
            with np.errstate(all="ignore"):  # a number that is too large becomes infinite
                array = values.astype(numpys)
            small = array.dtype.kind == "f" or (array == values).all()
            if values.size and not (values.dtype.kind in KINDS[array.dtype.kind] and small):
                raise ValueError
    except (ValueError, OverflowError, TypeError):
        raise Unprocessable(
            f"the data do not fit {tensor.datatype}, or rows differ in length; send numbers of one shape"
        ) from None
    if not array.size:  # [2147483647, 0] would be as many empty lists
        raise Unprocessable("the tensor has no numbers; send at least one")
    if array.size != math.prod(tensor.shape) or not tensor.shape:
        raise Unprocessable(f"there are {array.size} numbers; the shape says {tensor.shape[:10]}")
    if not np.isfinite(array).all():
        raise Unprocessable("a number is not finite; send finite ones")
    return array.reshape(tensor.shape).tolist()


def time_limit_s(sent: dict[str, Any], service: Service) -> float:
    """Take Triton's options of a request out of its parameters; return how long it may take.

    Raises Malformed for those that this server does not offer. Names that the task itself knows stay where they are.
    """
    own = (service.task.describe().parameters or {}) if OPTIONS.keys() & sent.keys() else {}
    for name, reason in OPTIONS.items():
        if reason and name not in own and sent.pop(name, None):
            raise Malformed(f'"{name}" is not supported: {reason}; leave it out')
    if "timeout" in own or not (timeout_us := whole(sent.pop("timeout", None))):
        return math.inf
    if type(timeout_us) is not int or timeout_us < 0:
        raise Malformed('"timeout" must be a whole number of microseconds')
    return min(timeout_us, 2**63) / 1e6  # a longer integer does not fit a float


def check_output(name: str, parameters: Iterable[str]) -> None:
    """Raise Unprocessable or Malformed where a client asks for an output that is not there, or in a form that is not."""
    if name != ANSWER:
        raise Unprocessable(f'there is no output {name[:100]!r}; ask for "{ANSWER}"')
    if "classification" in parameters:
        raise Malformed(
            '"classification" (class_count) is not supported; send the task\'s own parameter, such as "top_k"'
        )
    if parameter := next(iter(sorted(parameters)), None):
        raise Malformed(f'"{parameter[:100]}" is not a known parameter here; leave it out')


def parameters(sent: dict[str, Any]) -> dict[str, Any]:
    """Return the task's parameters. One named "parameters" is JSON with more of them: gRPC has no lists."""
    more = sent.pop("parameters", {})
    more = parsing.load_json(more, '{"targets": ["a"]}') if isinstance(more, str) else more
    if not isinstance(more, dict):
        raise Malformed('"parameters" in the parameters must be an object, such as {"targets": ["a"]}')
    return {name: value for name, value in (sent | more).items() if value is not None}


def output(answers: list[Answer], service: Service) -> Output:
    """Return the answers as one tensor. Raises ModelFailed where neither FP32 nor JSON can express one, such as NaN."""
    if embeds(service):
        vectors = np.array([answer.value for answer in answers], "<f4")
        if not np.isfinite(vectors).all():
            bad = int(np.argmin(np.isfinite(vectors).all(axis=1)))
            raise failed("the vector is not finite", bad, answers)
        return Output("FP32", list(vectors.shape), vectors.ravel(), vectors.tobytes())
    texts = []
    for index, answer in enumerate(answers):
        try:
            texts.append(replies.rendered(answer.value))
        except ModelFailed as exc:
            raise failed(str(exc), index, answers) from exc
    return of_texts(texts)


def of_texts(texts: list[bytes]) -> Output:
    """Return texts as one tensor."""
    raw = b"".join(struct.pack("<I", len(text)) + text for text in texts)
    return Output("BYTES", [len(texts)], [text.decode() for text in texts], raw)


def failed(why: str, index: int, answers: list[Answer]) -> ModelFailed:
    exc = ModelFailed(why)
    exc.index = index if len(answers) > 1 else None
    return exc
