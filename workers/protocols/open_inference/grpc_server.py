"""The Open Inference Protocol over gRPC, where GRPC_PORT is set: on the same event loop, in the same queue.

    client = tritonclient.grpc.InferenceServerClient("127.0.0.1:50051")

The client's deadline is its budget; a call that is cancelled leaves the queue. Errors have the sentences of HTTP's:
RESOURCE_EXHAUSTED (and a google.rpc.RetryInfo) where the model has no room, UNAVAILABLE while none can be answered,
DEADLINE_EXCEEDED, INVALID_ARGUMENT, NOT_FOUND, UNAUTHENTICATED, INTERNAL. Every call has its x-request-id in the trailing
metadata; each answer has "timing" among its parameters.

ModelStreamInfer: many requests, each on its own as if it had been sent alone; answers come in the order in which they are
done, each with its request's id. An error has that, "status" and, where one should ask again, "retry_after_s" as well. Of a
stream at most MAX_INPUTS requests are unanswered: beyond them it is not read.

grpc.health.v1: "" and "inference.GRPCInferenceService" say what /ready says, "liveness" what /health says. No TLS: put a
proxy in front. Web pages can't ask: browsers speak HTTP/2 over TLS only.
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from workers.protocols.open_inference.grpc_calls import SEND_S, SERVICE, Context, Door
from workers.service import Service

log = logging.getLogger("uvicorn.error")

HEALTH = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
WATCH_S = 0.25
HEADERS_BYTES, MOST_BYTES = (
    16_384,
    2**24,
)  # of metadata, of a message while it isn't known how long bodies may be


@contextlib.asynccontextmanager
async def serving(service: Service) -> AsyncIterator[None]:
    """Answer gRPC calls as long as the context lasts; then end those that are there with an answer."""
    settings = service.settings
    host, _, port = settings.GRPC_PORT.rpartition(":")
    address = f"{host or '127.0.0.1'}:{port}"
    most = 4 * settings.MAX_QUEUE
    door = Door(service)
    options = {
        "grpc.so_reuseport": int(
            settings.WEB_CONCURRENCY > 1
        ),  # each worker listens, the kernel shares connections out
        "grpc.max_receive_message_length": settings.MAX_BODY_BYTES or MOST_BYTES,
        "grpc.max_metadata_size": HEADERS_BYTES,
        "grpc.absolute_max_metadata_size": HEADERS_BYTES,
        "grpc.max_concurrent_streams": most,  # of one connection; more wait at the client
    }
    server = grpc.aio.server(interceptors=[door], options=list(options.items()), maximum_concurrent_rpcs=most)
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(SERVICE, door.methods())])
    health_pb2_grpc.add_HealthServicer_to_server(Health(service, door.stopping), server)
    reflection.enable_server_reflection((SERVICE, HEALTH, reflection.SERVICE_NAME), server)
    try:
        server.add_insecure_port(address)
        await server.start()
        log.info("gRPC on %s", address)
    except RuntimeError:
        more = (
            "; start n workers with WEB_CONCURRENCY=n, not --workers n"
            if settings.WEB_CONCURRENCY == 1
            else ""
        )
        service.exit(3, "no gRPC", f"GRPC_PORT={settings.GRPC_PORT}: cannot listen there; is it taken?{more}")
    yield
    door.stopping.set()
    await service.loop.drain(max(0.0, settings.GRACE_S - 1))
    await server.stop(SEND_S)


class Health(health_pb2_grpc.HealthServicer):  # type: ignore[misc]
    """grpc.health.v1. (That of the package waits for every watcher to read before it takes note of a change.)"""

    def __init__(self, service: Service, stopping: asyncio.Event) -> None:
        self.stopping = stopping
        self.troubles = {"": service.unready, SERVICE: service.unready, "liveness": service.trouble}

    def status(self, name: str) -> Any:
        if name not in self.troubles:
            return health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
        is_well = not self.troubles[name]()
        return (
            health_pb2.HealthCheckResponse.SERVING if is_well else health_pb2.HealthCheckResponse.NOT_SERVING
        )

    async def Check(self, request: Any, context: Context) -> Any:
        if request.service not in self.troubles:
            await context.abort(
                grpc.StatusCode.NOT_FOUND, f"ask for one of {', '.join(map(repr, self.troubles))}"
            )
        return health_pb2.HealthCheckResponse(status=self.status(request.service))

    async def Watch(self, request: Any, context: Context) -> AsyncIterator[Any]:
        said = None
        while not self.stopping.is_set():
            if (status := self.status(request.service)) != said:
                yield health_pb2.HealthCheckResponse(status=(said := status))
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.stopping.wait(), WATCH_S)
