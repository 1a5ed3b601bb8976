"""The Open Inference Protocol (v2), which the clients of Triton and KServe speak: over HTTP, and over gRPC if GRPC_PORT is set.

    client = tritonclient.http.InferenceServerClient("127.0.0.1:8000")
    text = tritonclient.http.InferInput("text", [1], "BYTES")
    text.set_data_from_numpy(numpy.array([b"Paris is the [MASK] of France."], object))
    client.infer("minilm-mlm", [text], parameters={"top_k": 3}).as_numpy("answer")   # JSON, as POST / gives it

The model has its folder's or its hub's name, and one version. The elements of the tensor are a list of inputs: see
tensors.py for its names. JSON, and the binary-tensor extension both ways. What there is over gRPC says grpc_server.py.
"""

import contextlib
import importlib.util
from collections.abc import AsyncIterator
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

import workers
from workers.context import context_of
from workers.errors import Malformed, Rejected, Unprocessable
from workers.protocols.open_inference import tensors
from workers.protocols.open_inference.tensors import ANSWER, VERSION, Tensor
from workers.protocols.openapi import STATUSES, an_object, asking, json_of, operation
from workers.service import Service
from workers.settings import Settings
from workers.web import parsing, replies
from workers.web.access import public

HEADER = "inference-header-content-length"
EXAMPLE = '{"inputs": [{"name": "text", "datatype": "BYTES", "shape": [1], "data": ["a text"]}]}'
FIELDS = {  # of each object: what must be there, what may
    "request": ({"inputs"}, {"id", "outputs", "parameters"}),
    "input": ({"name", "datatype", "shape"}, {"data", "parameters"}),
    "output": ({"name"}, {"parameters"}),
}
NEEDED = ("grpc", "grpc_health", "grpc_reflection", "google.rpc", "tritonclient.grpc")


def routes(settings: Settings) -> list[Route]:
    if settings.GRPC_PORT != "0":
        need_grpc()
    paths = model_paths(settings)
    return [
        Route("/v2", server),
        Route("/v2/health/live", live),
        Route("/v2/health/ready", ready),
        *(Route(path, model) for path in paths),
        *(Route(path + "/ready", ready) for path in paths),
        *(Route(path + "/infer", infer, methods=["POST"]) for path in paths),
        Route("/v2/models/{other:path}", no_model, methods=["GET", "POST"]),
    ]


def model_paths(settings: Settings) -> list[str]:
    path = f"/v2/models/{settings.model_name}"
    return [path, f"{path}/versions/{VERSION}"]


def need_grpc() -> None:
    """Exit with a sentence where a package is missing."""
    for name in NEEDED:
        with contextlib.suppress(ImportError):  # of the package around it
            if importlib.util.find_spec(name):
                continue
        raise SystemExit(
            f"GRPC_PORT is set but {name} is not there: pip install -r requirements-optional.txt"
        )


def operations(service: Service) -> dict[str, Any]:
    path = model_paths(service.settings)[0]
    said, most = service.task.describe(), service.settings.MAX_INPUTS
    named, is_open = said.parameters or {}, said.parameters is None
    a_size = {"type": "integer", "minimum": 0, "maximum": 2**31 - 1}
    a_shape = {"type": "array", "items": a_size, "maxItems": tensors.DIMENSIONS}
    tensor = {
        "name": {"enum": list(tensors.NAMES)},
        "datatype": {"enum": ["BYTES", *tensors.NUMPYS]},
        "shape": a_shape,
        "data": {"type": "array", "description": f"At most {most} inputs."},
    }
    output = an_object(
        {"name": {"const": ANSWER}}, {"parameters": an_object({}, {"binary_data": {"type": "boolean"}})}
    )
    own = {"binary_data_output": {"type": "boolean"}, "parameters": an_object({}, named, is_open)}
    optional = {
        "id": {"type": "string"},
        "parameters": an_object({}, named | own, is_open),
        "outputs": {"type": "array", "items": output, "maxItems": 1},
    }
    inputs = {
        "type": "array",
        "items": an_object(tensor, {"parameters": an_object({}, {})}),
        "minItems": 1,
        "maxItems": 1,
    }
    asked = asking(
        f"Ask the model: {said.takes}", "A tensor of answers.", json_of({"inputs": inputs}, optional)
    )
    asked["responses"]["200"]["content"]["application/octet-stream"] = {}
    told = {
        "/v2": "This server",
        "/v2/health/live": "Whether the process should be left alone",
        "/v2/health/ready": "Whether an instance of the model is loaded",
        path: "The model's tensors",
        path + "/ready": "Whether an instance of the model is loaded",
    }
    gets = {path: {"get": operation(what, {200: "It.", **STATUSES})} for path, what in told.items()}
    return gets | {path + "/infer": {"post": asked}}


@contextlib.asynccontextmanager
async def serving(service: Service) -> AsyncIterator[None]:
    """What runs beside the app: gRPC, if it is asked for. Only then are its packages imported: they take half a second."""
    if service.settings.GRPC_PORT == "0":
        yield
        return
    from workers.protocols.open_inference import grpc_server

    async with grpc_server.serving(service):
        yield


# --- what is served ---------------------------------------------------------------------------------------------------


async def server(request: Request) -> Response:
    """GET /v2: this server."""
    extensions = ["binary_tensor_data"]
    return JSONResponse({"name": "one-queue", "version": workers.__version__, "extensions": extensions})


@public
async def live(request: Request) -> Response:
    """GET /v2/health/live: 200 while the process should be left alone, as /health."""
    service: Service = request.state.service
    if trouble := service.trouble():
        raise Rejected(trouble)
    return JSONResponse({"live": True})


@public
async def ready(request: Request) -> Response:
    """GET /v2/health/ready and /v2/models/NAME/ready: 200 while an instance of the model is loaded, as /ready."""
    service: Service = request.state.service
    if reason := service.unready():
        raise Rejected(reason)
    return JSONResponse({"name": service.settings.model_name, "ready": True})


async def model(request: Request) -> Response:
    """GET /v2/models/NAME: its tensors."""
    return JSONResponse(tensors.metadata(request.state.service))


async def no_model(request: Request) -> Response:
    """Any other model, or version."""
    paths = (context_of(request.scope).path.removesuffix(end) for end in ("", "/ready", "/infer"))
    settings = request.state.service.settings
    if set(paths) & set(model_paths(settings)):
        raise HTTPException(405)
    raise HTTPException(404, unknown(settings))


def unknown(settings: Settings) -> str:
    return f'there is no such model here; ask "{settings.model_name}", version {VERSION}'


# --- inference --------------------------------------------------------------------------------------------------------


async def infer(request: Request) -> Response:
    """POST /v2/models/NAME/infer: the model's answer to each element of the tensor."""
    service: Service = request.state.service
    body = await service.in_flight.read(request)
    parsing.reject_encoded(context_of(request.scope))
    head, rest = parts(body, request)
    try:
        content = parsing.load_json(head.decode(), EXAMPLE)
    except UnicodeDecodeError as exc:
        raise HTTPException(400, f"byte {exc.start} of the JSON is not UTF-8; send UTF-8") from None
    asked = checked(content, "request")
    sent = dict(parameters_of(asked))
    in_binary = binary_output(asked, sent)
    inputs = tensors.inputs(the_input(asked, rest), service)
    answers, _ = await service.ask(request, inputs, tensors.parameters(sent), len(body))
    said = tensors.said(answers, service)
    output: dict[str, Any] = {"name": ANSWER, "datatype": said.datatype, "shape": said.shape}
    output |= {"parameters": {"binary_data_size": len(said.raw)}} if in_binary else {"data": said.data}
    content = {"model_name": service.settings.model_name, "model_version": VERSION, "outputs": [output]}
    reply = replies.AnswerResponse(answers, content | ({"id": asked["id"]} if "id" in asked else {}))
    return with_raw(reply, said.raw) if in_binary else reply


def parts(body: bytes, request: Request) -> tuple[bytes, bytes]:
    """The JSON, and the bytes of the tensors after it."""
    length = context_of(request.scope).headers.get(HEADER.encode(), b"%d" % len(body))
    if not (length.isdigit() and len(length) < 12 and int(length) <= len(body)):
        raise Malformed(f"{HEADER} is not the length of the JSON; leave it out where nothing follows")
    return body[: int(length)], body[int(length) :]


def checked(content: Any, what: str) -> dict[str, Any]:
    """The object, without what is null in it. Raises Malformed where it has not the fields of a `what`."""
    needed, known = FIELDS[what]
    if not isinstance(content, dict):
        raise Malformed(f"the {what} is no object; send {EXAMPLE}")
    found = {name: value for name, value in content.items() if value is not None}
    if missing := sorted(needed - found.keys()):
        raise Malformed(f'the {what} has no "{missing[0]}"; send {EXAMPLE}')
    if unknown := sorted(content.keys() - needed - known):
        raise Malformed(f'"{unknown[0][:100]}" is not a known field of the {what}; leave it out')
    if not all(isinstance(found.get(name, ""), str) for name in ("id", "name", "datatype")):
        raise Malformed('"id", "name" and "datatype" must be texts')
    return found


def parameters_of(content: dict[str, Any], *known: str) -> dict[str, Any]:
    """The parameters of an object; where some are named, no others."""
    found = content.get("parameters", {})
    if not isinstance(found, dict):
        raise Malformed('"parameters" are no object; send one, such as {"top_k": 3}')
    if known and (unknown := sorted(found.keys() - set(known))):
        raise Malformed(f'"{unknown[0][:100]}" is not a known parameter here; leave it out')
    return found


def the_input(asked: dict[str, Any], rest: bytes) -> Tensor:
    """The one tensor, whose bytes, if it has any, are the `rest` of the body."""
    if not isinstance(asked["inputs"], list) or len(asked["inputs"]) != 1:
        raise Malformed(f'"inputs" must be a list of one tensor; send {EXAMPLE}')
    tensor = checked(asked["inputs"][0], "input")
    size = parameters_of(tensor, "binary_data_size").get("binary_data_size")
    shape, data = tensor["shape"], tensor.get("data")
    if not isinstance(shape, list) or not all(map(is_size, shape)):
        raise Malformed('"shape" must be a list of whole numbers')
    if (size is None) == (data is None) or not isinstance(data, list | None):
        raise Malformed('send "data", a list, or the tensor after the JSON and its "binary_data_size"')
    if size is not None and type(size) is not int:
        raise Malformed('"binary_data_size" must be a whole number')
    if (size or 0) != len(rest):
        raise Unprocessable(f"{len(rest)} bytes follow the JSON; it says {size or 0}")
    if data is not None and tensor["datatype"] == "BYTES":
        for _ in shape[1 : tensors.DIMENSIONS]:  # nested as the shape is
            data = (
                [one for row in data for one in row] if all(isinstance(row, list) for row in data) else data
            )
        if not all(isinstance(one, str) for one in data):
            raise Unprocessable('"data" of BYTES must be texts')
    return Tensor(tensor["name"], tensor["datatype"], list(map(int, shape)), rest if data is None else data)


def is_size(one: Any) -> bool:
    """Whether it is a whole number, as JSON has them: 3.0 is one."""
    return type(one) in (int, float) and 0 <= one < 2**31 and one == int(one)


def binary_output(asked: dict[str, Any], sent: dict[str, Any]) -> bool:
    """Whether the answer is wanted as bytes after the JSON. Takes that from what was `sent` beside the task's parameters."""
    wanted = sent.pop("binary_data_output", False)
    outputs = asked.get("outputs", [])
    if not isinstance(outputs, list) or len(outputs) > 1:
        raise Malformed(f'"outputs" must be a list of one, {{"name": "{ANSWER}"}}, or left out')
    for output in outputs:
        found = checked(output, "output")
        if found["name"] != ANSWER:
            raise Unprocessable(f'there is no output {found["name"][:100]!r}; ask for "{ANSWER}"')
        wanted = parameters_of(found, "binary_data").get("binary_data", wanted)
    if type(wanted) is not bool and wanted is not None:
        raise Malformed('"binary_data" and "binary_data_output" must be true or false')
    return bool(wanted)


def with_raw(reply: replies.AnswerResponse, raw: bytes) -> replies.AnswerResponse:
    """The reply, and the tensor after its JSON."""
    length = len(reply.body)
    reply.body = bytes(reply.body) + raw
    reply.raw_headers[:2] = [
        (b"content-type", b"application/octet-stream"),
        (b"content-length", b"%d" % len(reply.body)),
        (HEADER.encode(), b"%d" % length),
    ]
    return reply
