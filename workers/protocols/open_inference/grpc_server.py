"""The Open Inference Protocol over gRPC, where GRPC_PORT is set: on the same event loop, in the same queue.

    client = tritonclient.grpc.InferenceServerClient("127.0.0.1:50051")

The client's deadline is its budget; a call that is cancelled leaves the queue. Errors have the sentences of HTTP's:
RESOURCE_EXHAUSTED with a google.rpc.RetryInfo where the model has no room, without one where the message is too large,
UNAVAILABLE while none can be answered, DEADLINE_EXCEEDED, INVALID_ARGUMENT, NOT_FOUND, UNAUTHENTICATED, INTERNAL. Every
call has its x-request-id in the trailing metadata; each answer has "timing" among its parameters.

ModelStreamInfer: many requests, each on its own as if it had been sent alone; answers come in the order in which they are
done, each with its request's id. An error has that, "status" and, where one should ask again, "retry_after_s" as well. Of a
stream at most MAX_INPUTS requests are unanswered: beyond them it is not read.

grpc.health.v1: "" and "inference.GRPCInferenceService" say what /ready says, "liveness" what /health says. No TLS: put a
proxy in front. Web pages can't ask: browsers speak HTTP/2 over TLS only. Of several worker processes each listens, and a
client stays with the one that took its connection.
"""

import asyncio
import contextlib
import logging
import os
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from workers.errors import Rejected
from workers.protocols.open_inference.grpc_calls import SEND_S, SERVICE, Context, InferenceServicer
from workers.service import Service

log = logging.getLogger("uvicorn.error")

HEALTH = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
WATCH_S, SOON_S = 0.25, 0.02
HEADERS_BYTES = 16_384  # of metadata
IDLE_S = 300  # a connection without a call


@contextlib.asynccontextmanager
async def serving(service: Service) -> AsyncIterator[None]:
    """Answer gRPC calls as long as the context lasts; then end those that are there with an answer."""
    door = InferenceServicer(service)
    servers: list[Any] = []
    # It would print a traceback for each message of a stranger that it can't read; what fails in our calls, we log.
    logging.getLogger("grpc._cython.cygrpc").setLevel(logging.CRITICAL)
    running = asyncio.create_task(run(service, door, servers), name="gRPC")
    running.add_done_callback(partial(ended, service))
    try:
        yield
    finally:
        running.cancel()
        door.stopping.set()
        await service.loop.drain(max(0.0, service.settings.GRACE_S - 1))
        await asyncio.gather(*(server.stop(SEND_S) for server in servers))


async def run(service: Service, door: InferenceServicer, servers: list[Any]) -> None:
    """Listen until cancelled. `servers` are those that still have calls.

    grpc's server ends for good at a call whose path is no UTF-8, and anybody can send one: then there is a new one. The calls
    that the old one has are answered.
    """
    settings, address = service.settings, address_of(service)
    while not is_known(service):  # nor is how long a message may be
        await asyncio.sleep(SOON_S)
    code = 3  # tells Gunicorn that another worker could not be started either
    while True:
        server = made(service, door)
        try:
            server.add_insecure_port(address)
        except RuntimeError:
            hint = "" if settings.WEB_CONCURRENCY > 1 else "; of several workers each needs WEB_CONCURRENCY"
            details = f"cannot listen on GRPC_PORT={settings.GRPC_PORT}; is it taken?{hint}"
            return service.exit(code, "gRPC cannot listen", details)
        await server.start()
        servers.append(server)
        code = 1
        log.info("gRPC on %s", address)
        while server._server.is_running():
            await asyncio.sleep(WATCH_S)
        log.warning("gRPC has ended, as it does at a path that is no UTF-8; starting it again")
        door.keep(retire(server, servers, settings.DEADLINE_S))


def ended(service: Service, running: asyncio.Task[None]) -> None:
    """End the process if `run` has failed: it must not stay up unable to answer over gRPC."""
    if not running.cancelled() and (error := running.exception()):
        log.error("gRPC has ended", exc_info=error)
        service.exit(1, "gRPC has ended; this is a bug")


async def retire(server: Any, servers: list[Any], within_s: float) -> None:
    """End it when its calls have ended."""
    await server.stop(within_s)
    servers.remove(server)


def is_known(service: Service) -> bool:
    """Whether there is a task."""
    with contextlib.suppress(Rejected):
        return bool(service.task)
    return False


def address_of(service: Service) -> str:
    """Loopback, like HTTP's default, unless GRPC_PORT names a host."""
    host, _, port = service.settings.GRPC_PORT.rpartition(":")
    return f"{host or '127.0.0.1'}:{port}"


def has_successor() -> bool:
    """Return whether a new server starts while this one still answers: Gunicorn's and `make cluster`'s do, at SIGHUP."""
    return bool(os.environ.get("SERVER_SOFTWARE"))


def made(service: Service, door: InferenceServicer) -> Any:
    """A gRPC server with all services, bounded in all that a client could have too much of."""
    settings, most = service.settings, 4 * service.settings.MAX_QUEUE
    options = {
        # Each worker listens, and the kernel shares the connections out; else a port that is taken is an error.
        "grpc.so_reuseport": int(settings.WEB_CONCURRENCY > 1 or has_successor()),
        "grpc.max_receive_message_length": service.in_flight.most_bytes,
        "grpc.max_metadata_size": HEADERS_BYTES,
        "grpc.absolute_max_metadata_size": HEADERS_BYTES,
        "grpc.max_concurrent_streams": most,  # of one connection; more wait at the client
        "grpc.max_allowed_incoming_connections": most // 2,
        "grpc.http2.bdp_probe": 0,  # windows stay small: what a stream sends ahead waits at the client, not here
        "grpc.max_connection_idle_ms": IDLE_S * 1000,
        "grpc.server_handshake_timeout_ms": int(settings.HEADERS_TIMEOUT_S * 1000),
    }
    server = grpc.aio.server(interceptors=[door], options=list(options.items()), maximum_concurrent_rpcs=most)
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(SERVICE, door.methods())])
    health_pb2_grpc.add_HealthServicer_to_server(Health(service, door.stopping), server)
    reflection.enable_server_reflection((SERVICE, HEALTH, reflection.SERVICE_NAME), server)
    return server


class Health(health_pb2_grpc.HealthServicer):  # type: ignore[misc]
    """grpc.health.v1. (That of the package waits for every watcher to read before it takes note of a change.)"""

    def __init__(self, service: Service, stopping: asyncio.Event) -> None:
        self.stopping = stopping
        self.troubles = {"": service.unready, SERVICE: service.unready, "liveness": service.trouble}

    def status(self, name: str) -> Any:
        if name not in self.troubles:
            return health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
        said = health_pb2.HealthCheckResponse
        return said.NOT_SERVING if self.troubles[name]() else said.SERVING

    async def Check(self, request: Any, context: Context) -> Any:
        if request.service not in self.troubles:
            known = ", ".join(map(repr, self.troubles))
            await context.abort(grpc.StatusCode.NOT_FOUND, f"ask for one of {known}")
        return health_pb2.HealthCheckResponse(status=self.status(request.service))

    async def Watch(self, request: Any, context: Context) -> AsyncIterator[Any]:
        said, is_last = None, False
        while not is_last:
            is_last = self.stopping.is_set()
            if (status := self.status(request.service)) != said:
                yield health_pb2.HealthCheckResponse(status=(said := status))
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.stopping.wait(), WATCH_S)
