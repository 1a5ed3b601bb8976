"""The Open Inference Protocol (v2) of Triton and KServe clients: over HTTP, and over gRPC if GRPC_PORT is set.

    client = tritonclient.http.InferenceServerClient("127.0.0.1:8000")
    text = tritonclient.http.InferInput("text", [1], "BYTES")
    text.set_data_from_numpy(numpy.array([b"Paris is the [MASK] of France."], object))
    client.infer("minilm-mlm", [text], parameters={"top_k": 3}).as_numpy("answer")   # JSON, as POST / gives it

The model has its folder's or its hub's name, and one version. The elements of the tensor are a list of inputs: tensors.py
lists its names. JSON and the binary-tensor extension, in both directions. See grpc_server.py for gRPC.

This folder is optional, and about a seventh of the server's code: delete it if your clients speak other APIs, and nothing else changes.
"""

import contextlib
import importlib.util
import zlib
from collections.abc import AsyncIterator
from functools import partial
from typing import Any, NamedTuple

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from workers.context import context_of
from workers.errors import Malformed, Rejected, Unprocessable
from workers.protocols.open_inference import model_info, tensors
from workers.protocols.open_inference.tensors import ANSWER, VERSION, Tensor
from workers.protocols.openapi import STATUSES, an_object, asking, json_of, operation
from workers.service import Service
from workers.settings import Settings
from workers.web import parsing, replies
from workers.web.access import is_loopback, public, words
from workers.web.checks import QUICK_JSON_BYTES
from workers.web.inflight import InFlight

HEADER = "inference-header-content-length"
EXAMPLE = '{"inputs": [{"name": "text", "datatype": "BYTES", "shape": [1], "data": ["a text"]}]}'
FIELDS = {  # of each object: required fields, optional ones
    "request": ({"inputs"}, {"id", "outputs", "parameters"}),
    "input": ({"name", "datatype", "shape"}, {"data", "parameters"}),
    "output": ({"name"}, {"parameters"}),
}
ALL_STATISTICS = "/v2/models/stats"
NEEDED = ("grpc", "grpc_health", "grpc_reflection", "google.rpc", "tritonclient.grpc")


def routes(settings: Settings) -> list[Route]:
    if settings.GRPC_PORT != "0":
        need_grpc()
        need_key(settings)
    paths = model_paths(settings)
    return [
        Route("/v2", server),
        Route("/v2/repository/index", repository_index, methods=["POST"]),
        Route(ALL_STATISTICS, statistics),
        Route("/v2/health/live", live),
        Route("/v2/health/ready", ready),
        *(Route(path, model) for path in paths),
        *(Route(path + "/config", config) for path in paths),
        *(Route(path + "/stats", statistics) for path in paths),
        *(Route(path + "/ready", ready) for path in paths),
        *(Route(path + "/infer", infer, methods=["POST"]) for path in paths),
        Route("/v2/models/{other:path}", no_model, methods=["GET", "POST"]),
    ]


def model_paths(settings: Settings) -> list[str]:
    path = f"/v2/models/{settings.model_name}"
    return [path, f"{path}/versions/{VERSION}"]


def need_grpc() -> None:
    """Exit with a sentence where a package of gRPC's is missing."""
    for name in NEEDED:
        with contextlib.suppress(ImportError):  # of the package around it
            if importlib.util.find_spec(name):
                continue
        raise SystemExit(
            f"GRPC_PORT is set but {name} is not installed: pip install -r requirements-optional.txt"
        )


def need_key(settings: Settings) -> None:
    """Exit with a sentence where everybody could connect: grpc can't limit the connections of one address."""
    host = settings.GRPC_PORT.rpartition(":")[0].strip("[]")
    if host and host != "localhost" and not is_loopback(host) and not words(settings.API_KEY):
        raise SystemExit(
            f"GRPC_PORT={settings.GRPC_PORT} listens beyond this machine without a key: set API_KEY, or name no host"
        )


def operations(service: Service) -> dict[str, Any]:
    path = model_paths(service.settings)[0]
    summaries = {
        "/v2": "The server: name, version, extensions",
        "/v2/health/live": "Whether the process should be left alone",
        "/v2/health/ready": "Whether an instance of the model is loaded",
        path: "The model's input and output tensors",
        path + "/config": "The model's configuration, in Triton's form",
        path + "/ready": "Whether an instance of the model is loaded",
        path + "/stats": "Counts and durations of this worker since its start, in Triton's form",
        ALL_STATISTICS: "The same",
    }
    paths = {
        path: {"get": operation(summary, {200: summary, **STATUSES})} for path, summary in summaries.items()
    }
    paths["/v2/repository/index"] = {"post": operation("The models: one", {200: "The models.", **STATUSES})}
    return paths | {path + "/infer": {"post": infer_operation(service)}}


def infer_operation(service: Service) -> dict[str, Any]:
    """Return the description of POST /v2/models/NAME/infer."""
    description, most = service.task.describe(), service.settings.MAX_INPUTS
    known, is_open = description.parameters or {}, description.parameters is None
    size = {"type": "integer", "minimum": 0, "maximum": 2**31 - 1}
    tensor = {
        "name": {"enum": list(tensors.NAMES)},
        "datatype": {"enum": ["BYTES", *tensors.NUMPYS]},
        "shape": {"type": "array", "items": size, "maxItems": tensors.DIMENSIONS},
        "data": {"type": "array", "description": f"At most {most} inputs."},
    }
    output = an_object(
        {"name": {"const": ANSWER}}, {"parameters": an_object({}, {"binary_data": {"type": "boolean"}})}
    )
    options = {
        "binary_data_output": {"type": "boolean"},
        "timeout": {"type": "integer", "minimum": 0, "description": "In microseconds; 0: DEADLINE_S."},
        "parameters": an_object({}, known, is_open),
    }
    optional = {
        "id": {"type": "string"},
        "parameters": an_object({}, options | known, is_open),
        "outputs": {"type": "array", "items": output, "maxItems": 1},
    }
    inputs = {
        "type": "array",
        "items": an_object(tensor, {"parameters": an_object({}, {})}),
        "minItems": 1,
        "maxItems": 1,
    }
    operation = asking(
        f"Ask the model: {description.takes}", "A tensor of answers.", json_of({"inputs": inputs}, optional)
    )
    operation["responses"]["200"]["content"]["application/octet-stream"] = {}
    return operation


@contextlib.asynccontextmanager
async def serving(service: Service) -> AsyncIterator[None]:
    """Run gRPC beside the app if GRPC_PORT is set. Only then are its packages imported, which takes half a second."""
    if service.settings.GRPC_PORT == "0":
        yield
        return
    from workers.protocols.open_inference import grpc_server

    async with grpc_server.serving(service):
        yield


# --- what is served ---------------------------------------------------------------------------------------------------


async def server(request: Request) -> Response:
    """GET /v2: the server's name, version and extensions."""
    return JSONResponse(model_info.server())


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
    return JSONResponse(model_info.metadata(request.state.service))


async def config(request: Request) -> Response:
    """GET /v2/models/NAME/config: its configuration in Triton's form."""
    return JSONResponse(model_info.config(request.state.service))


async def statistics(request: Request) -> Response:
    """GET /v2/models/stats and /v2/models/NAME/stats: what this worker has counted, in Triton's form."""
    return JSONResponse(model_info.statistics(request.state.service))


async def repository_index(request: Request) -> Response:
    """POST /v2/repository/index: the one model."""
    return JSONResponse(model_info.index(request.state.service))


async def no_model(request: Request) -> Response:
    """Any other model or version: 404 with the name of the one that is served."""
    endings = ("", "/config", "/infer", "/ready", "/stats")
    paths = {context_of(request.scope).path.removesuffix(ending) for ending in endings}
    settings = request.state.service.settings
    if paths & set(model_paths(settings)) or context_of(request.scope).path == ALL_STATISTICS:
        raise HTTPException(405)
    raise HTTPException(404, unknown_model(settings))


def unknown_model(settings: Settings) -> str:
    return f'there is no such model here; ask for "{settings.model_name}", version {VERSION}'


# --- inference --------------------------------------------------------------------------------------------------------


class Inference(NamedTuple):
    """What an infer request asks."""

    id: str | None
    inputs: list[Any]
    parameters: dict[str, Any]  # the task's
    time_limit_s: float
    is_binary: bool  # the answer as bytes after the JSON


async def infer(request: Request) -> Response:
    """POST /v2/models/NAME/infer: the model's answer to each element of the tensor."""
    service: Service = request.state.service
    context = context_of(request.scope)
    body = await service.in_flight.read(request)
    # A compressed body may become as long as any.
    n_bytes = service.in_flight.most_bytes if b"content-encoding" in context.headers else len(body)
    parse = partial(parsed, body, context.headers, service)
    asked = await service.checks.run(context, n_bytes, parse, QUICK_JSON_BYTES)
    context.budget_s = min(context.budget_s, asked.time_limit_s)
    answers, _ = await service.ask(request, asked.inputs, asked.parameters, n_bytes)
    tensor = tensors.output(answers, service)
    output: dict[str, Any] = {"name": ANSWER, "datatype": tensor.datatype, "shape": tensor.shape}
    output |= (
        {"parameters": {"binary_data_size": len(tensor.raw)}} if asked.is_binary else {"data": tensor.data}
    )
    content = {"model_name": service.settings.model_name, "model_version": VERSION, "outputs": [output]}
    reply = replies.AnswerResponse(answers, content | ({} if asked.id is None else {"id": asked.id}))
    return with_raw(reply, tensor.raw) if asked.is_binary else reply


def parsed(body: bytes, headers: dict[bytes, bytes], service: Service) -> Inference:
    """Return what the body asks. Raises HTTPException, Malformed or Unprocessable with a sentence."""
    head, rest = parts(decompressed(body, headers, service.in_flight), headers)
    try:
        content = parsing.load_json(head.decode(), EXAMPLE)
    except UnicodeDecodeError as exc:
        raise HTTPException(400, f"byte {exc.start} of the JSON is not UTF-8; send UTF-8") from None
    fields = checked(content, "request")
    parameters = dict(parameters_of(fields))
    is_binary = binary_output(fields, parameters)
    limit_s = tensors.time_limit_s(parameters, service)
    inputs = tensors.inputs(the_input(fields, rest), service)
    return Inference(fields.get("id"), inputs, tensors.parameters(parameters), limit_s, is_binary)


def decompressed(body: bytes, headers: dict[bytes, bytes], in_flight: InFlight) -> bytes:
    """Return the body as it was before its Content-Encoding. Raises HTTPException 413 where that is too long, 415, Malformed."""
    encoding = headers.get(b"content-encoding", b"identity").lower()
    if encoding == b"identity":
        return body
    if encoding not in (b"gzip", b"deflate"):
        raise HTTPException(415, "the body has an unknown Content-Encoding; send gzip, deflate or none")
    decompressor = zlib.decompressobj(zlib.MAX_WBITS | 32)  # of gzip or zlib, as its first bytes say
    try:
        content = decompressor.decompress(body, in_flight.most_bytes + 1)
    except zlib.error:
        sentence = f"the body is not valid {encoding.decode()}; send it as Content-Encoding says"
        raise Malformed(sentence) from None
    in_flight.check_length(len(content))
    if not decompressor.eof or decompressor.unused_data:
        raise Malformed("the compressed body ends too early or too late; send it whole")
    return content


def parts(body: bytes, headers: dict[bytes, bytes]) -> tuple[bytes, bytes]:
    """Return the JSON, and the bytes of the tensors after it."""
    length = headers.get(HEADER.encode(), b"%d" % len(body))
    if not (length.isdigit() and len(length) < 12 and int(length) <= len(body)):
        raise Malformed(f"{HEADER} is not the length of the JSON; leave it out where nothing follows")
    return body[: int(length)], body[int(length) :]


def checked(content: Any, what: str) -> dict[str, Any]:
    """Return the object without its null fields. Raises Malformed where its fields are not those of a `what`."""
    needed, known = FIELDS[what]
    if not isinstance(content, dict):
        raise Malformed(f"the {what} must be an object, such as {EXAMPLE}")
    fields = {name: value for name, value in content.items() if value is not None}
    if missing := sorted(needed - fields.keys()):
        raise Malformed(f'the {what} has no "{missing[0]}"; send {EXAMPLE}')
    if unknown := sorted(fields.keys() - needed - known):
        raise Malformed(f'"{unknown[0][:100]}" is not a known field of the {what}; leave it out')
    if not all(isinstance(fields.get(name, ""), str) for name in ("id", "name", "datatype")):
        raise Malformed('"id", "name" and "datatype" must be texts')
    return fields


def parameters_of(content: dict[str, Any], *known: str) -> dict[str, Any]:
    """Return the parameters of an object. Raises Malformed where some are `known` and another one is sent."""
    parameters = content.get("parameters", {})
    if not isinstance(parameters, dict):
        raise Malformed('"parameters" must be an object, such as {"top_k": 3}')
    if known and (unknown := sorted(parameters.keys() - set(known))):
        raise Malformed(f'"{unknown[0][:100]}" is not a known parameter here; leave it out')
    return parameters


def the_input(fields: dict[str, Any], rest: bytes) -> Tensor:
    """Return the request's one tensor; its bytes, if it has any, are the `rest` of the body."""
    if not isinstance(fields["inputs"], list) or len(fields["inputs"]) != 1:
        raise Malformed(f'"inputs" must be a list of one tensor; send {EXAMPLE}')
    tensor = checked(fields["inputs"][0], "input")
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
    """Return whether it is a whole number of at least 0. In JSON 3.0 is one."""
    return type(one) in (int, float) and 0 <= one < 2**31 and one == int(one)


def binary_output(fields: dict[str, Any], parameters: dict[str, Any]) -> bool:
    """Return whether the client wants the answer as bytes after the JSON. Takes that out of the request's `parameters`."""
    is_binary = parameters.pop("binary_data_output", False)
    outputs = fields.get("outputs", [])
    if not isinstance(outputs, list) or len(outputs) > 1:
        raise Malformed(f'"outputs" must be a list of one, {{"name": "{ANSWER}"}}, or left out')
    for output in outputs:
        output = checked(output, "output")
        options = parameters_of(output)
        tensors.check_output(output["name"], options.keys() - {"binary_data"})
        is_binary = options.get("binary_data", is_binary)
    if type(is_binary) is not bool and is_binary is not None:
        raise Malformed('"binary_data" and "binary_data_output" must be true or false')
    return bool(is_binary)


def with_raw(reply: replies.AnswerResponse, raw: bytes) -> replies.AnswerResponse:
    """Return the reply with the tensor's bytes after its JSON."""
    length = len(reply.body)
    reply.body = bytes(reply.body) + raw
    reply.raw_headers[:2] = [
        (b"content-type", b"application/octet-stream"),
        (b"content-length", b"%d" % len(reply.body)),
        (HEADER.encode(), b"%d" % length),
    ]
    return reply
