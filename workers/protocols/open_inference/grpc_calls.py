"""Every gRPC call of the protocol: its answer, its errors, its streams. How they are served: grpc_server.py."""

import asyncio
import contextlib
import math
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Iterator
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

from workers.context import RequestContext, request_id
from workers.errors import RETRY_LATER, STOPPING, Malformed, Rejected, Unprocessable
from workers.protocols.open_inference import model_info, tensors, unknown_model
from workers.protocols.open_inference.tensors import ANSWER, VERSION, Output, Tensor
from workers.service import Service
from workers.tasks import Query
from workers.web import replies
from workers.web.access import NO_KEY, AccessControl
from workers.web.checks import QUICK_JSON_BYTES
from workers.web.generation import HuggingFaceEvents
from workers.web.middleware import HOLD_S
from workers.web.replies import CLIENT_GONE, explain

NAME = "GRPCInferenceService"
SERVICE = pb.DESCRIPTOR.services_by_name[NAME].full_name
# Of 503 see `InferenceServicer.failure`; any other is INVALID_ARGUMENT.
CODES = {
    401: grpc.StatusCode.UNAUTHENTICATED,
    404: grpc.StatusCode.NOT_FOUND,
    500: grpc.StatusCode.INTERNAL,
    501: grpc.StatusCode.UNIMPLEMENTED,
    504: grpc.StatusCode.DEADLINE_EXCEEDED,
}
SEND_S = 0.5  # to send the last answers when the server stops
PROBE_S = 1.0  # for the message of a call that needs no key
STREAM_BYTES = 2**26  # of messages and unsent answers that all streams hold together
CONTENTS = {  # the field with a tensor's elements, where they are not in raw_input_contents
    "BYTES": "bytes_contents",
    "BOOL": "bool_contents",
    **dict.fromkeys(("INT8", "INT16", "INT32"), "int_contents"),
    **dict.fromkeys(("UINT8", "UINT16", "UINT32"), "uint_contents"),
    "INT64": "int64_contents",
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
}

# Without a key, like /health and /ready.
OPEN = {
    *(f"/{SERVICE}/{name}" for name in ("ServerLive", "ServerReady", "ModelReady")),
    *(f"/grpc.health.v1.Health/{name}" for name in ("Check", "Watch")),
}

NOT_READ = "the answers were not read in time; read them faster"

Context = Any  # grpc.aio.ServicerContext of bytes
Answering = Callable[[Context], Awaitable[Any]]  # returns a message, or None where it writes by itself
Continuation = Callable[[Any], Awaitable[grpc.RpcMethodHandler]]
Future = asyncio.Future[Any]


class Status(NamedTuple):
    """The gRPC status of a failed call."""

    code: grpc.StatusCode
    sentence: str
    retry_after_s: int = 0

    def details(self) -> tuple[tuple[str, bytes], ...]:
        """Return when to retry, in the metadata where client libraries look for it."""
        if not self.retry_after_s:
            return ()
        status = status_pb2.Status(code=self.code.value[0], message=self.sentence)
        status.details.add().Pack(RetryInfo(retry_delay=Duration(seconds=self.retry_after_s)))
        return (("grpc-status-details-bin", status.SerializeToString()),)


class InferenceServicer(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """The protocol's methods, and the check of keys before them.

    Methods read their messages as bytes and parse them themselves, so that reading has a time limit and every error a sentence.
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
        self.stream_bytes = 0  # of messages and unsent answers

    def methods(self) -> dict[str, grpc.RpcMethodHandler]:
        """Return the handlers of all the protocol's methods."""
        answers: dict[str, Answering] = dict.fromkeys(
            pb.DESCRIPTOR.services_by_name[NAME].methods_by_name, unsupported
        )
        answers |= {
            "ServerLive": self.server_live,
            "ServerReady": self.server_ready,
            "ServerMetadata": self.server_metadata,
            "ModelReady": self.model_ready,
            "ModelMetadata": self.model_metadata,
            "ModelConfig": self.model_config,
            "ModelStatistics": self.model_statistics,
            "RepositoryIndex": self.repository_index,
            "ModelInfer": self.infer,
            "ModelStreamInfer": self.stream,
        }
        return {name: self.handler(name, answer) for name, answer in answers.items()}

    def handler(self, name: str, answer: Answering) -> grpc.RpcMethodHandler:
        """Return the handler of this method."""
        is_stream = name in ("ModelStreamInfer", "Watch")
        kind = grpc.stream_stream_rpc_method_handler if is_stream else grpc.stream_unary_rpc_method_handler
        return kind(partial(self.call, name, answer))

    async def intercept_service(self, continuation: Continuation, details: Any) -> grpc.RpcMethodHandler:
        """Require a key before anything is read."""
        if not self.guard.keys or details.method in OPEN:
            return await continuation(details)
        fields = {
            name.encode(): v if isinstance(v, bytes) else v.encode()
            for name, v in details.invocation_metadata
        }
        if self.guard.knows(fields):
            return await continuation(details)
        name = details.method.removeprefix(f"/{SERVICE}/")
        name = name if name in self.most else "other"  # keep no name that a stranger chose
        return grpc.stream_stream_rpc_method_handler(partial(self.call, name, self.no_key))

    async def no_key(self, context: Context) -> None:
        raise HTTPException(401, NO_KEY)

    # --- every call ---------------------------------------------------------------------------------------------------

    async def call(self, name: str, answer: Answering, _: Any, context: Context) -> bytes | None:
        """Return the answer as bytes, None where `answer` writes by itself. Every error becomes the call's status."""
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
                # Clients that retry at once would keep the core busy with rejections.
                await asyncio.sleep(min(HOLD_S, left_s(context) / 2))
            metadata = (("x-request-id", call_id), *failure.details())
            with contextlib.suppress(TimeoutError):  # the client reads nothing: it ends with the connection
                await self.operate(context.abort(failure.code, failure.sentence, metadata), SEND_S)
            return None
        finally:
            self.open[name] -= 1

    def failure(self, exc: Exception, call_id: str, is_counted: bool) -> Status:
        """Return the status of a call that failed."""
        failure = explain(exc, call_id)
        if is_counted:
            self.count(failure.status).inc()
        code = CODES.get(failure.status, grpc.StatusCode.INVALID_ARGUMENT)
        if failure.status == 503:
            unready = self.service.unready()
            code = grpc.StatusCode.UNAVAILABLE if unready else grpc.StatusCode.RESOURCE_EXHAUSTED
        sentence = failure.sentence.replace(RETRY_LATER, "retry after the time in RetryInfo")
        return Status(code, sentence, failure.retry_after_s)

    async def operate(self, operation: Coroutine[Any, Any, Any], limit_s: float | None, *ends: Future) -> Any:
        """Return the result of `operation`. Raises TimeoutError when that takes too long, or when one of `ends` is done first.

        The operation goes on even so: grpc's core writes into its memory, so it must not be cancelled.
        """
        task = self.keep(operation)
        done, _ = await asyncio.wait({task, *ends}, timeout=limit_s, return_when=asyncio.FIRST_COMPLETED)
        if task not in done:
            raise TimeoutError
        return task.result()

    def keep(self, operation: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Return a task that goes on although nobody awaits it."""
        task = asyncio.create_task(operation)
        self.operations.add(task)
        task.add_done_callback(self.ended)
        return task

    def ended(self, task: asyncio.Task[Any]) -> None:
        self.operations.discard(task)
        if not task.cancelled():
            task.exception()  # asyncio logs exceptions that nobody has read

    async def read(self, context: Context, kind: type[Any], limit_s: float = math.inf) -> Any:
        """Return the one message of a call. Raises HTTPException or Malformed with a sentence; Rejected once the server stops."""
        try:
            limit_s = min(limit_s, self.settings.BODY_TIMEOUT_S)
            raw = await self.operate(context.read(), limit_s, self.stopped)
        except TimeoutError:
            if self.stopping.is_set():
                raise Rejected(STOPPING) from None
            raise HTTPException(408, "the message did not arrive in time; send it faster") from None
        if raw is grpc.aio.EOF:
            raise Malformed("there is no message; send one")
        return parsed(raw, kind)

    async def read_probe(self, context: Context, kind: type[Any]) -> Any:
        """`read` for calls without a key, which must not wait for long: their number has no other limit."""
        return await self.read(context, kind, PROBE_S)

    async def write(self, context: Context, reply: Any) -> None:
        """Write one message of a stream. Raises HTTPException 408 where the client does not read."""
        try:
            await self.operate(context.write(reply.SerializeToString()), self.settings.BODY_TIMEOUT_S)
        except TimeoutError:
            raise HTTPException(408, NOT_READ) from None

    # --- what is served -----------------------------------------------------------------------------------------------

    async def server_live(self, context: Context) -> Any:
        return pb.ServerLiveResponse(live=not self.service.trouble())

    async def server_ready(self, context: Context) -> Any:
        return pb.ServerReadyResponse(ready=not self.service.unready())

    async def server_metadata(self, context: Context) -> Any:
        return pb.ServerMetadataResponse(**model_info.server())

    async def model_ready(self, context: Context) -> Any:
        """ModelReady: false for any other model, as over HTTP and as Triton's clients expect."""
        request = await self.read_probe(context, pb.ModelReadyRequest)
        is_known = self.is_known(request.name, request.version)
        return pb.ModelReadyResponse(ready=is_known and not self.service.unready())

    async def model_metadata(self, context: Context) -> Any:
        await self.read_for_model(context, pb.ModelMetadataRequest)
        return pb.ModelMetadataResponse(**model_info.metadata(self.service))

    async def model_config(self, context: Context) -> Any:
        await self.read_for_model(context, pb.ModelConfigRequest)
        return pb.ModelConfigResponse(config=model_info.config(self.service))

    async def model_statistics(self, context: Context) -> Any:
        request = await self.read(context, pb.ModelStatisticsRequest)
        if request.name:  # else those of all models
            self.check_model(request.name, request.version)
        return pb.ModelStatisticsResponse(**model_info.statistics(self.service))

    async def repository_index(self, context: Context) -> Any:
        await self.read(context, pb.RepositoryIndexRequest)
        return pb.RepositoryIndexResponse(models=model_info.index(self.service))

    async def read_for_model(self, context: Context, kind: type[Any]) -> None:
        """Read a message that names a model. Raises HTTPException 404 where it is another one."""
        request = await self.read(context, kind)
        self.check_model(request.name, request.version)

    def check_model(self, name: str, version: str) -> None:
        """Raise HTTPException 404 where that is not the model that is served."""
        if not self.is_known(name, version):
            raise HTTPException(404, unknown_model(self.settings))

    def is_known(self, name: str, version: str) -> bool:
        """Return whether that is the model that is served."""
        return name == self.settings.model_name and version in ("", VERSION)

    # --- inference ----------------------------------------------------------------------------------------------------

    async def infer(self, context: Context) -> Any:
        """ModelInfer: rejected before it is read while the model has no room."""
        asked = self.arrival(context)
        if rejected := self.loop.rejection(asked.budget_s):
            raise rejected
        request = await self.read(context, pb.ModelInferRequest)
        return await self.answered(request, await self.queries(request, asked), asked)

    def arrival(self, context: Context) -> RequestContext:
        """Return the context of a request that has arrived now."""
        return RequestContext({}, "", budget_s=min(left_s(context), self.loop.budget_s))

    async def queries(self, request: Any, asked: RequestContext) -> list[Query]:
        """Return the checked inputs of a request, whose time limit counts from now on. Raises what `Service.check` raises."""
        service = self.service
        self.check_model(request.model_name, request.model_version)
        n_bytes = request.ByteSize()
        inputs, parameters, limit_s = await service.checks.run(
            asked, n_bytes, partial(prepared, request, service), QUICK_JSON_BYTES
        )
        asked.budget_s = min(asked.budget_s, limit_s)
        return await service.check(asked, inputs, parameters, n_bytes)

    async def answered(self, request: Any, queries: list[Query], asked: RequestContext) -> Any:
        """Return the model's answer to each element of the tensor."""
        contents, sizes = [query.content for query in queries], [query.size for query in queries]
        answers = await self.loop.submit_all(contents, sizes, budget_s=asked.left_s)
        timing = pb.InferParameter(string_param=replies.timing(answers))
        return reply_to(request, tensors.output(answers, self.service), timing=timing)

    async def pieces(self, request: Any, queries: list[Query], asked: RequestContext) -> AsyncIterator[Any]:
        """Yield what follows a prompt as it is written, each message an event of `POST /`; the last one says that it is."""
        if len(queries) > 1:
            raise Malformed('"stream" takes one prompt; send one per request')
        generation, prompt = self.service.generating(), queries[0].content
        events = HuggingFaceEvents(generation.task, prompt)
        (stream,) = generation.submit([prompt], asked.left_s)
        async with stream:
            async for piece in stream:
                texts = [replies.rendered(one) for one in events.contents(piece)]
                is_last = pb.InferParameter(bool_param=bool(piece.reason))
                yield reply_to(request, tensors.of_texts(texts), triton_final_response=is_last)

    async def stream(self, context: Context) -> None:
        """ModelStreamInfer: many requests, each answered by itself."""
        await Stream(self, context).run()

    @contextlib.contextmanager
    def held(self, n_bytes: int) -> Iterator[None]:
        """Count the bytes that a stream holds while the context lasts."""
        self.stream_bytes += n_bytes
        try:
            yield
        finally:
            self.stream_bytes -= n_bytes

    async def replied(self, raw: bytes, context: Context) -> AsyncGenerator[Any]:
        """Yield the reply to one request of a stream, an error too; of text that streams, piece by piece."""
        request, asked = pb.ModelInferRequest(), self.arrival(context)
        try:
            request = parsed(raw, pb.ModelInferRequest)
            if rejected := self.loop.rejection(asked.budget_s):
                raise rejected
            queries = await self.queries(request, asked)
            if self.service.generation and queries[0].content.stream:
                async for piece in self.pieces(request, queries, asked):
                    yield pb.ModelStreamInferResponse(infer_response=piece)
            else:
                reply = await self.answered(request, queries, asked)
                yield pb.ModelStreamInferResponse(infer_response=reply)
            self.count(200).inc()
        except asyncio.CancelledError:
            self.count(CLIENT_GONE).inc()
            raise
        except Exception as exc:
            status = self.failure(exc, dict(context.trailing_metadata())["x-request-id"], True)
            yield error_to(request, status)


def reply_to(request: Any, output: Output, **parameters: Any) -> Any:
    """Return the reply with this tensor."""
    return pb.ModelInferResponse(
        model_name=request.model_name,
        model_version=VERSION,
        id=request.id,
        parameters=parameters,
        outputs=[{"name": ANSWER, "datatype": output.datatype, "shape": output.shape}],
        raw_output_contents=[output.raw],
    )


def error_to(request: Any, status: Status) -> Any:
    """Return the message of a stream that says why this request of it failed."""
    # Triton clients show only the message of an error.
    sentence = f"request {request.id}: {status.sentence}" if request.id else status.sentence
    fields = {"status": pb.InferParameter(string_param=status.code.name)}
    if status.retry_after_s:
        fields["retry_after_s"] = pb.InferParameter(int64_param=status.retry_after_s)
    response = pb.ModelInferResponse(id=request.id, model_name=request.model_name, parameters=fields)
    return pb.ModelStreamInferResponse(error_message=sentence, infer_response=response)


class Stream:
    """One ModelStreamInfer call."""

    def __init__(self, servicer: InferenceServicer, context: Context) -> None:
        self.servicer, self.context = servicer, context
        self.unanswered: set[asyncio.Task[None]] = set()
        self.failed: Future = asyncio.get_running_loop().create_future()
        self.writing, self.rejected = asyncio.Lock(), asyncio.Event()

    async def run(self) -> None:
        """Read requests until the client ends the stream; return when all are answered."""
        servicer = self.servicer
        try:
            with contextlib.suppress(TimeoutError):  # failed or stopped
                while (raw := await self.read()) is not grpc.aio.EOF:
                    task = servicer.keep(self.answer(raw))
                    self.unanswered.add(task)
                    task.add_done_callback(self.unanswered.discard)
                    await asyncio.sleep(0)  # let it count its bytes
                    while self.is_full():
                        await asyncio.wait(self.unanswered, return_when=asyncio.FIRST_COMPLETED)
                    if self.rejected.is_set():  # the client sends too much: let it wait
                        await asyncio.sleep(HOLD_S)
                        self.rejected.clear()
            while self.unanswered:
                await asyncio.wait(self.unanswered)
        finally:
            for task in self.unanswered:
                task.cancel()
        if self.failed.done():
            raise self.failed.result()
        if servicer.stopping.is_set():
            raise Rejected(STOPPING)

    async def read(self) -> Any:
        """Return the next message. Raises TimeoutError once the stream has failed or the server stops."""
        operation = self.context.read()
        return await self.servicer.operate(operation, None, self.failed, self.servicer.stopped)

    def is_full(self) -> bool:
        """Return whether the stream must not be read for now. It may always have one request."""
        is_over = self.servicer.stream_bytes > STREAM_BYTES
        is_long = len(self.unanswered) >= self.servicer.settings.MAX_INPUTS
        return bool(self.unanswered) and (is_over or is_long)

    async def answer(self, raw: bytes) -> None:
        """Answer one request, unless the client has stopped reading."""
        servicer = self.servicer
        with servicer.held(len(raw)):
            async with contextlib.aclosing(servicer.replied(raw, self.context)) as replies:
                async for reply in replies:
                    if "retry_after_s" in reply.infer_response.parameters:
                        self.rejected.set()
                    if not await self.write(reply):
                        return

    async def write(self, reply: Any) -> bool:
        """Write one message; return whether the client still reads."""
        servicer = self.servicer
        with servicer.held(reply.ByteSize()):
            async with self.writing:
                if self.failed.done():
                    return False
                try:
                    await servicer.write(self.context, reply)
                except HTTPException as exc:
                    self.failed.set_result(exc)
        return not self.failed.done()


def prepared(request: Any, service: Service) -> tuple[list[Any], dict[str, Any], float]:
    """Return the task's inputs and parameters, and how long the request may take. Raises Malformed or Unprocessable."""
    fields = {
        name: getattr(p, p.WhichOneof("parameter_choice") or "", None)
        for name, p in request.parameters.items()
    }
    for output in request.outputs:
        tensors.check_output(output.name, output.parameters)
    limit_s = tensors.time_limit_s(fields, service)
    return tensors.inputs(the_input(request), service), tensors.parameters(fields), limit_s


async def unsupported(context: Context) -> None:
    raise HTTPException(501, "this server serves one model, without shared memory, tracing and log settings")


def parsed(raw: bytes, kind: type[Any]) -> Any:
    """Return the message. Raises Malformed with a sentence."""
    try:
        return kind.FromString(raw)
    except DecodeError:
        raise Malformed(f"the message is not a valid {kind.DESCRIPTOR.full_name}; send one") from None


def id_of(context: Context) -> str:
    """Return the client's own request id if it is short and plain, else a new one."""
    value = dict(context.invocation_metadata()).get("x-request-id", "")
    return request_id(value if isinstance(value, bytes) else value.encode())


def left_s(context: Context) -> float:
    """Return the seconds until the call's deadline."""
    left = context.time_remaining()
    return math.inf if left is None else left


def the_input(request: Any) -> Tensor:
    """Return the request's one tensor."""
    if len(request.inputs) != 1 or len(request.raw_input_contents) > 1:
        raise Malformed(f"there are {len(request.inputs)} inputs; send one tensor")
    tensor = request.inputs[0]
    if tensor.parameters:
        raise Malformed("the tensor has parameters; leave them out, shared memory too")
    if not all(0 <= one < 2**31 for one in tensor.shape):
        raise Malformed("the shape must have whole numbers of at least 0")
    data: Any = request.raw_input_contents[0] if request.raw_input_contents else None
    if data is None:
        if tensor.datatype not in CONTENTS:
            raise Unprocessable(
                f"{tensor.datatype[:20]} is not a known datatype, or must be in raw_input_contents"
            )
        data = list(getattr(tensor.contents, CONTENTS[tensor.datatype]))
    return Tensor(tensor.name, tensor.datatype, list(tensor.shape), data)
