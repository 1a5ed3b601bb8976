"""Every gRPC call of the protocol: its answer and its errors. Its messages: grpc_messages.py; how calls are served: grpc_server.py."""

import asyncio
import contextlib
import math
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from functools import partial
from typing import Any

import grpc
from starlette.exceptions import HTTPException

# The protocol's messages, as its clients have them: two sets of the same names in one process would collide.
from tritonclient.grpc import service_pb2 as pb

from workers.context import RequestContext, request_id
from workers.errors import STOPPING, Malformed, Rejected
from workers.protocols.open_inference import model_info, tensors, unknown_model
from workers.protocols.open_inference.grpc_messages import CODES, Status, error_to, parsed, prepared, reply_to
from workers.protocols.open_inference.grpc_stream import Context, Future, Stream
from workers.protocols.open_inference.tensors import VERSION
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
SEND_S = 0.5  # to send the last answers when the server stops
PROBE_S = 1.0  # for the message of a call that needs no key
# Without a key, like /health and /ready.
OPEN = {
    *(f"/{SERVICE}/{name}" for name in ("ServerLive", "ServerReady", "ModelReady")),
    *(f"/grpc.health.v1.Health/{name}" for name in ("Check", "Watch")),
}

NOT_READ = "the answers were not read in time; read them faster"

Answering = Callable[[Context], Awaitable[Any]]  # returns a message, or None where it writes by itself
Continuation = Callable[[Any], Awaitable[grpc.RpcMethodHandler]]


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
        return Status(code, failure.sentence, failure.retry_after_s)

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


async def unsupported(context: Context) -> None:
    raise HTTPException(501, "this server serves one model, without shared memory, tracing and log settings")


def id_of(context: Context) -> str:
    """Return the client's own request id if it is short and plain, else a new one."""
    value = dict(context.invocation_metadata()).get("x-request-id", "")
    return request_id(value if isinstance(value, bytes) else value.encode())


def left_s(context: Context) -> float:
    """Return the seconds until the call's deadline."""
    left = context.time_remaining()
    return math.inf if left is None else left
