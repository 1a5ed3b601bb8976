"""What is said over gRPC: each call, its errors, its streams. How it is served: grpc_server.py."""

import asyncio
import contextlib
import math
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine
from functools import partial
from typing import Any, NamedTuple

import grpc
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import DecodeError
from google.rpc import status_pb2
from google.rpc.error_details_pb2 import RetryInfo
from starlette.exceptions import HTTPException

# The protocol's messages, as its clients have them: two sets of the same names in one process would collide.
from tritonclient.grpc import service_pb2 as pb

import workers
from workers.context import RequestContext, request_id
from workers.errors import STOPPING, Malformed, Rejected, Unprocessable
from workers.protocols.open_inference import tensors, unknown
from workers.protocols.open_inference.tensors import ANSWER, VERSION, Tensor
from workers.service import Service
from workers.web import replies
from workers.web.access import NO_KEY, AccessControl
from workers.web.middleware import HOLD_S
from workers.web.replies import CLIENT_GONE, explain

SERVICE = pb.DESCRIPTOR.services_by_name["GRPCInferenceService"].full_name
CODES = {
    401: grpc.StatusCode.UNAUTHENTICATED,
    404: grpc.StatusCode.NOT_FOUND,
    500: grpc.StatusCode.INTERNAL,
    504: grpc.StatusCode.DEADLINE_EXCEEDED,
}  # of 503 see `InferenceServicer.failure`; any other is INVALID_ARGUMENT
SEND_S = 0.5  # to send the last answers when the server stops
CONTENTS = {  # where a tensor's elements are, of those that are not in raw_input_contents
    "BYTES": "bytes_contents",
    "BOOL": "bool_contents",
    **dict.fromkeys(("INT8", "INT16", "INT32"), "int_contents"),
    **dict.fromkeys(("UINT8", "UINT16", "UINT32"), "uint_contents"),
    "INT64": "int64_contents",
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
}

OPEN = {
    *(f"/{SERVICE}/{name}" for name in ("ServerLive", "ServerReady", "ModelReady")),
    *(f"/grpc.health.v1.Health/{name}" for name in ("Check", "Watch")),
}  # without a key, as /health and /ready

Context = Any  # grpc.aio.ServicerContext of bytes
Answering = Callable[[Context], Awaitable[Any]]  # a message, or None where it writes them itself
Continuation = Callable[[Any], Awaitable[grpc.RpcMethodHandler]]
Future = asyncio.Future[Any]


class Status(NamedTuple):
    """A failure, as gRPC says it."""

    code: grpc.StatusCode
    sentence: str
    retry_after_s: int = 0

    def details(self) -> tuple[tuple[str, bytes], ...]:
        """When to ask again, as clients' libraries read it."""
        if not self.retry_after_s:
            return ()
        status = status_pb2.Status(code=self.code.value[0], message=self.sentence)
        status.details.add().Pack(RetryInfo(retry_delay=Duration(seconds=self.retry_after_s)))
        return (("grpc-status-details-bin", status.SerializeToString()),)


class InferenceServicer(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """The protocol's methods, and who may ask for them.

    They read their messages themselves, as bytes: in time, and what can't be read is an error in our words.
    """

    def __init__(self, service: Service) -> None:
        self.service, self.settings, self.loop = service, service.settings, service.loop
        self.guard, self.count = AccessControl(service.settings), service.metrics.requests_with
        self.open: Counter[str] = Counter()
        most = service.settings.MAX_QUEUE
        self.most = {"ModelInfer": 2 * most, "ModelStreamInfer": most}
        self.operations: set[asyncio.Task[Any]] = set()
        self.stopping = asyncio.Event()
        self.stopped = asyncio.create_task(self.stopping.wait())

    def methods(self) -> dict[str, grpc.RpcMethodHandler]:
        unary = {
            "ServerLive": self.server_live,
            "ServerReady": self.server_ready,
            "ServerMetadata": self.server_metadata,
            "ModelReady": self.model_ready,
            "ModelMetadata": self.model_metadata,
            "ModelInfer": self.infer,
        }
        handlers = {
            name: grpc.stream_unary_rpc_method_handler(partial(self.call, name, answer))
            for name, answer in unary.items()
        }
        stream = partial(self.call, "ModelStreamInfer", self.stream)
        return handlers | {"ModelStreamInfer": grpc.stream_stream_rpc_method_handler(stream)}

    async def intercept_service(self, continuation: Continuation, details: Any) -> grpc.RpcMethodHandler:
        """Ask for a key before anything is read."""
        if not self.guard.keys or details.method in OPEN:
            return await continuation(details)
        fields = {
            name.encode(): v if isinstance(v, bytes) else v.encode()
            for name, v in details.invocation_metadata
        }
        if self.guard.knows(fields):
            return await continuation(details)
        name = details.method.removeprefix(f"/{SERVICE}/")
        name = name if name in self.most else "other"  # of a stranger's names none is kept
        return grpc.stream_stream_rpc_method_handler(partial(self.call, name, self.no_key))

    async def no_key(self, context: Context) -> None:
        raise HTTPException(401, NO_KEY)

    # --- every call ---------------------------------------------------------------------------------------------------

    async def call(self, name: str, answer: Answering, _: Any, context: Context) -> bytes | None:
        """What it answers, as bytes; or an error, in its status."""
        call_id = id_of(context)
        context.set_trailing_metadata((("x-request-id", call_id),))
        self.open[name] += 1
        try:
            if self.open[name] > self.most.get(name, math.inf):
                raise Rejected("there are too many calls at once; ask again later")
            reply = await answer(context)
            if name == "ModelInfer":
                self.count(200).inc()
            return reply.SerializeToString() if reply else None
        except asyncio.CancelledError:
            if name == "ModelInfer":
                self.count(CLIENT_GONE if left_s(context) else 504).inc()
            raise
        except Exception as exc:
            failure = self.failure(exc, call_id, name in self.most)
            if failure.code is grpc.StatusCode.RESOURCE_EXHAUSTED:
                # Who asks again at once would keep the core busy with refusals.
                await asyncio.sleep(min(HOLD_S, left_s(context) / 2))
            metadata = (("x-request-id", call_id), *failure.details())
            with contextlib.suppress(TimeoutError):  # the client reads nothing: it ends with the connection
                await self.operate(context.abort(failure.code, failure.sentence, metadata), SEND_S)
            return None
        finally:
            self.open[name] -= 1

    def failure(self, exc: Exception, call_id: str, is_counted: bool) -> Status:
        """What is said of an error."""
        failure = explain(exc, call_id)
        if is_counted:
            self.count(failure.status).inc()
        code = CODES.get(failure.status, grpc.StatusCode.INVALID_ARGUMENT)
        if failure.status == 503:
            nobody_can = self.service.unready()
            code = grpc.StatusCode.UNAVAILABLE if nobody_can else grpc.StatusCode.RESOURCE_EXHAUSTED
        return Status(code, failure.sentence, failure.retry_after_s)

    async def operate(self, operation: Coroutine[Any, Any, Any], limit_s: float | None, *ends: Future) -> Any:
        """What `operation` gives. Raises TimeoutError when that takes too long, or one of `ends` comes first.

        It goes on even so: grpc's core writes into its memory, so it must not be cancelled.
        """
        task = self.keep(operation)
        done, _ = await asyncio.wait({task, *ends}, timeout=limit_s, return_when=asyncio.FIRST_COMPLETED)
        if task not in done:
            raise TimeoutError
        return task.result()

    def keep(self, operation: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """A task that goes on though nobody waits for it."""
        task = asyncio.create_task(operation)
        self.operations.add(task)
        task.add_done_callback(self.ended)
        return task

    def ended(self, task: asyncio.Task[Any]) -> None:
        self.operations.discard(task)
        task.cancelled() or task.exception()  # asyncio complains of what nobody looked at

    async def read(self, context: Context, kind: type[Any]) -> Any:
        """The one message of a call. Raises HTTPException and Malformed with a sentence; Rejected once the server stops."""
        try:
            raw = await self.operate(context.read(), self.settings.BODY_TIMEOUT_S, self.stopped)
        except TimeoutError:
            if self.stopping.is_set():
                raise Rejected(STOPPING) from None
            raise HTTPException(408, "the message did not arrive in time; send it faster") from None
        if raw is grpc.aio.EOF:
            raise Malformed("there is no message; send one")
        return self.parsed(raw, kind)

    def parsed(self, raw: bytes, kind: type[Any]) -> Any:
        try:
            return kind.FromString(raw)
        except DecodeError:
            raise Malformed(f"the message is no {kind.DESCRIPTOR.full_name}; send one") from None

    # --- what is served -----------------------------------------------------------------------------------------------

    async def server_live(self, context: Context) -> Any:
        return pb.ServerLiveResponse(live=not self.service.trouble())

    async def server_ready(self, context: Context) -> Any:
        return pb.ServerReadyResponse(ready=not self.service.unready())

    async def server_metadata(self, context: Context) -> Any:
        return pb.ServerMetadataResponse(name="one-queue", version=workers.__version__)

    async def model_ready(self, context: Context) -> Any:
        request = await self.read(context, pb.ModelReadyRequest)
        self.know(request.name, request.version)
        return pb.ModelReadyResponse(ready=not self.service.unready())

    async def model_metadata(self, context: Context) -> Any:
        request = await self.read(context, pb.ModelMetadataRequest)
        self.know(request.name, request.version)
        return pb.ModelMetadataResponse(**tensors.metadata(self.service))

    def know(self, name: str, version: str) -> None:
        """Raise HTTPException 404 where that is no model of ours."""
        if name != self.settings.model_name or version not in ("", VERSION):
            raise HTTPException(404, unknown(self.settings))

    # --- inference ----------------------------------------------------------------------------------------------------

    async def infer(self, context: Context) -> Any:
        """ModelInfer: refused before it is read where the model has no room."""
        if refused := self.loop.rejection(left_s(context)):
            raise refused
        return await self.answered(await self.read(context, pb.ModelInferRequest), context)

    async def answered(self, request: Any, context: Context) -> Any:
        """The model's answer to each element of the tensor."""
        service = self.service
        self.know(request.model_name, request.model_version)
        sent = {
            name: getattr(p, p.WhichOneof("parameter_choice") or "", None)
            for name, p in request.parameters.items()
        }
        if any(output.name != ANSWER for output in request.outputs):
            raise Unprocessable(f'there is but one output; ask for "{ANSWER}"')
        inputs = tensors.inputs(the_input(request), service)
        asked = RequestContext({}, "", budget_s=min(left_s(context), self.loop.budget_s))
        queries = await service.check(asked, inputs, tensors.parameters(sent), request.ByteSize())
        answers = await self.loop.submit_all(*zip(*queries), budget_s=asked.left_s)
        said = tensors.said(answers, service)
        return pb.ModelInferResponse(
            model_name=request.model_name,
            model_version=VERSION,
            id=request.id,
            parameters={"timing": pb.InferParameter(string_param=replies.timing(answers))},
            outputs=[{"name": ANSWER, "datatype": said.datatype, "shape": said.shape}],
            raw_output_contents=[said.raw],
        )

    async def stream(self, context: Context) -> None:
        """ModelStreamInfer: read a request, let it be answered, read the next one."""
        unanswered: set[asyncio.Task[None]] = set()
        stalled = asyncio.get_running_loop().create_future()
        writing, refused = asyncio.Lock(), asyncio.Event()

        async def answer(raw: bytes) -> None:
            reply = await self.replied(raw, context)
            if "retry_after_s" in reply.infer_response.parameters:
                refused.set()
            async with writing:
                if stalled.done():
                    return
                try:
                    await self.operate(context.write(reply.SerializeToString()), self.settings.BODY_TIMEOUT_S)
                except TimeoutError:
                    stalled.set_result(None)

        try:
            with contextlib.suppress(TimeoutError):  # stalled or stopped
                while (
                    raw := await self.operate(context.read(), None, stalled, self.stopped)
                ) is not grpc.aio.EOF:
                    task = self.keep(answer(raw))
                    unanswered.add(task)
                    task.add_done_callback(unanswered.discard)
                    while len(unanswered) >= self.settings.MAX_INPUTS:
                        await asyncio.wait(unanswered, return_when=asyncio.FIRST_COMPLETED)
                    if refused.is_set():  # the client sends too much: let it wait
                        await asyncio.sleep(HOLD_S)
                        refused.clear()
            while unanswered:
                await asyncio.wait(unanswered)
        finally:
            for task in unanswered:
                task.cancel()
        if stalled.done():
            raise HTTPException(408, "the answers were not taken in time; read them faster")
        if self.stopping.is_set():
            raise Rejected(STOPPING)

    async def replied(self, raw: bytes, context: Context) -> Any:
        """What a stream says of one of its requests."""
        request = pb.ModelInferRequest()
        try:
            request = self.parsed(raw, pb.ModelInferRequest)
            if refused := self.loop.rejection(left_s(context)):
                raise refused
            reply = await self.answered(request, context)
            self.count(200).inc()
            return pb.ModelStreamInferResponse(infer_response=reply)
        except asyncio.CancelledError:
            self.count(CLIENT_GONE).inc()
            raise
        except Exception as exc:
            failure = self.failure(exc, dict(context.trailing_metadata())["x-request-id"], True)
            # Triton's clients show of an error only its message.
            sentence = f"request {request.id}: {failure.sentence}" if request.id else failure.sentence
            said = {"status": pb.InferParameter(string_param=failure.code.name)}
            if failure.retry_after_s:
                said["retry_after_s"] = pb.InferParameter(int64_param=failure.retry_after_s)
            about = pb.ModelInferResponse(id=request.id, model_name=request.model_name, parameters=said)
            return pb.ModelStreamInferResponse(error_message=sentence, infer_response=about)


def id_of(context: Context) -> str:
    """Return the call's own id if it is short and plain, else a new one."""
    sent = dict(context.invocation_metadata()).get("x-request-id", "")
    return request_id(sent if isinstance(sent, bytes) else sent.encode())


def left_s(context: Context) -> float:
    """The seconds until the client's deadline."""
    left = context.time_remaining()
    return math.inf if left is None else left


def the_input(request: Any) -> Tensor:
    """The one tensor."""
    if len(request.inputs) != 1 or len(request.raw_input_contents) > 1:
        raise Malformed(f"there are {len(request.inputs)} inputs; send one tensor")
    tensor = request.inputs[0]
    if tensor.parameters:
        raise Malformed("the tensor has parameters; leave them out, shared memory too")
    if not all(0 <= one < 2**31 for one in tensor.shape):
        raise Malformed("the shape must be of whole numbers of at least 0")
    data: Any = request.raw_input_contents[0] if request.raw_input_contents else None
    if data is None:
        if tensor.datatype not in CONTENTS:
            raise Unprocessable(f"{tensor.datatype[:20]} must be in raw_input_contents, or is not known")
        data = list(getattr(tensor.contents, CONTENTS[tensor.datatype]))
    return Tensor(tensor.name, tensor.datatype, list(tensor.shape), data)
