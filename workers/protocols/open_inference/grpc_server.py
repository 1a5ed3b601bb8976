"""The Open Inference Protocol over gRPC, where GRPC_PORT is set: on the same event loop, in the same queue.

    client = tritonclient.grpc.InferenceServerClient("127.0.0.1:50051")

The call's deadline is its time limit; a cancelled call leaves the queue. Errors carry the same sentences as over HTTP:
RESOURCE_EXHAUSTED with a google.rpc.RetryInfo for a rejection, without one for a message that is too large, UNAVAILABLE
while no call can be answered, DEADLINE_EXCEEDED, INVALID_ARGUMENT, NOT_FOUND, UNAUTHENTICATED, UNIMPLEMENTED, INTERNAL.
Every call has its x-request-id in the trailing metadata; every answer has "timing" among its parameters.

ModelStreamInfer carries many requests, each answered as if it had been sent alone, in the order of completion, with its id.
An error also has "status" and, for a rejection, "retry_after_s". A stream is not read while MAX_INPUTS of its requests are
unanswered, or while all streams together hold more than STREAM_BYTES of messages and answers that wait to be sent.

grpc.health.v1: "" and "inference.GRPCInferenceService" follow /ready, "liveness" follows /health. No TLS: put a proxy in
front. Web pages can't call it: browsers speak HTTP/2 over TLS only. With several worker processes, each listens on the
port, and a client stays with the one that took its connection.
"""

import asyncio
import contextlib
import logging
import os
import resource
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from functools import partial
from typing import Any

import grpc
from grpc._cython import cygrpc
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection, reflection_pb2
from starlette.exceptions import HTTPException

from workers.errors import Rejected
from workers.protocols.open_inference.grpc_calls import SEND_S, SERVICE, InferenceServicer
from workers.protocols.open_inference.grpc_stream import Context
from workers.service import Service

log = logging.getLogger("uvicorn.error")

HEALTH = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
POLL_S, LOADING_POLL_S = 0.25, 0.02
MAX_METADATA_BYTES = 16_384
IDLE_S = 30  # a connection without a call is closed; clients connect again by themselves
WATCH_S = 600  # the longest Health/Watch
MAX_WATCHES = {"connection": 16, "address": 64, "all": 256}


@contextlib.asynccontextmanager
async def serving(service: Service) -> AsyncIterator[None]:
    """Answer gRPC calls while the context lasts; then finish the calls in progress within the grace time."""
    servicer = InferenceServicer(service)
    servers: list[grpc.aio.Server] = []
    # grpc would log a traceback for each message that it can't parse; failures of our own calls are logged by `explain`.
    logging.getLogger("grpc._cython.cygrpc").setLevel(logging.CRITICAL)
    running = asyncio.create_task(run(service, servicer, servers), name="gRPC")
    running.add_done_callback(partial(ended, service))
    try:
        yield
    finally:
        running.cancel()
        servicer.stopping.set()
        await service.loop.drain(max(0.0, service.settings.GRACE_S - 1))
        await asyncio.gather(*(server.stop(SEND_S) for server in servers))


async def run(service: Service, servicer: InferenceServicer, servers: list[grpc.aio.Server]) -> None:
    """Listen until cancelled; add the server to `servers` once it does."""
    settings, address = service.settings, address_of(service)
    while not has_task(service):  # which decides how long a message may be
        await asyncio.sleep(LOADING_POLL_S)
    server = make_server(service, servicer)
    try:
        server.add_insecure_port(address)
    except RuntimeError:
        hint = "" if settings.WEB_CONCURRENCY > 1 else "; of several workers each needs WEB_CONCURRENCY"
        details = f"cannot listen on GRPC_PORT={settings.GRPC_PORT}; is it taken?{hint}"
        # 3 tells Gunicorn that another worker could not be started either.
        return service.exit(3, "gRPC cannot listen", details)
    await server.start()
    servers.append(server)
    log.info("gRPC on %s", address)
    # Cancelled itself, the wait would cancel the server's own end.
    await asyncio.shield(server.wait_for_termination())
    raise RuntimeError("grpc's server has ended by itself")


def ended(service: Service, running: asyncio.Task[None]) -> None:
    """End the process if `run` has failed: it must not stay up unable to answer over gRPC."""
    if not running.cancelled() and (error := running.exception()):
        log.error("gRPC has ended", exc_info=error)
        service.exit(1, "gRPC has ended; this is a bug")


def has_task(service: Service) -> bool:
    """Return whether the task is known already."""
    with contextlib.suppress(Rejected):
        return bool(service.task)
    return False


def address_of(service: Service) -> str:
    """Return where to listen: on loopback, as HTTP does by default, unless GRPC_PORT names a host."""
    host, _, port = service.settings.GRPC_PORT.rpartition(":")
    return f"{host or '127.0.0.1'}:{port}"


def shares_port(service: Service) -> bool:
    """Return whether other processes listen on this port: workers, or a successor that starts while this one still answers.

    Gunicorn and `make cluster` have one at SIGHUP, and set SERVER_SOFTWARE.
    """
    return service.settings.WEB_CONCURRENCY > 1 or bool(os.environ.get("SERVER_SOFTWARE"))


class RegisteredMethodsServer(cygrpc.AioServer):  # type: ignore[misc]
    """grpc's own server, without calls of unknown methods.

    grpc decodes the path of such a call as UTF-8 in its main loop, and where that fails the server ends for everybody. Paths
    of registered methods are compared as bytes. So take an unknown call and drop it: its client gets CANCELLED.
    """

    async def _request_call(self) -> None:
        while True:
            await super()._request_call()


def make_server(service: Service, servicer: InferenceServicer) -> grpc.aio.Server:
    """Return a gRPC server with all services, and a limit on everything that grpc can limit."""
    settings = service.settings
    options = {
        # Without it a port that is taken is an error; with it the kernel distributes the connections.
        "grpc.so_reuseport": int(shares_port(service)),
        "grpc.max_receive_message_length": service.in_flight.most_bytes,
        "grpc.max_metadata_size": MAX_METADATA_BYTES,
        "grpc.absolute_max_metadata_size": MAX_METADATA_BYTES,
        "grpc.max_concurrent_streams": 4 * settings.MAX_QUEUE,  # per connection; more wait in the client
        "grpc.max_allowed_incoming_connections": max_connections(),
        "grpc.http2.bdp_probe": 0,  # windows stay small: what a stream sends ahead waits in the client
        "grpc.max_connection_idle_ms": int(IDLE_S * 1000),
        "grpc.server_handshake_timeout_ms": int(settings.HEADERS_TIMEOUT_S * 1000),
    }
    server = grpc.aio.server()
    arguments = (server._loop, None, (), [servicer], tuple(options.items()), None)
    server._server = RegisteredMethodsServer(*arguments)
    for name, handlers in services(service, servicer).items():
        server.add_registered_method_handlers(name, handlers)
    return server


def max_connections() -> int:
    """Return how many connections may be open: half of the process's file descriptors, at most 1,024."""
    descriptors, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 1024 if descriptors == resource.RLIM_INFINITY else min(1024, max(1, descriptors // 2))


def services(service: Service, servicer: InferenceServicer) -> dict[str, dict[str, grpc.RpcMethodHandler]]:
    """Return the handlers of every method, by service."""
    health = Health(service, servicer)
    names = (SERVICE, HEALTH, reflection.SERVICE_NAME)
    reflect = grpc.stream_stream_rpc_method_handler(
        reflection.aio.ReflectionServicer(names).ServerReflectionInfo,
        reflection_pb2.ServerReflectionRequest.FromString,
        reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    return {
        SERVICE: servicer.methods(),
        HEALTH: {
            "Check": servicer.handler("Check", health.check),
            "Watch": servicer.handler("Watch", health.watch),
        },
        # v1 has the same messages; grpcurl asks for it first.
        "grpc.reflection.v1alpha.ServerReflection": {"ServerReflectionInfo": reflect},
        "grpc.reflection.v1.ServerReflection": {"ServerReflectionInfo": reflect},
    }


class Health:
    """grpc.health.v1, without a key. (The package's own waits for every watcher to read before it notes a change.)"""

    def __init__(self, service: Service, servicer: InferenceServicer) -> None:
        self.servicer = servicer
        self.reasons = {"": service.unready, SERVICE: service.unready, "liveness": service.trouble}
        self.watches: Counter[str] = Counter()

    def status(self, name: str) -> Any:
        response = health_pb2.HealthCheckResponse
        if name not in self.reasons:
            return response.SERVICE_UNKNOWN
        return response.NOT_SERVING if self.reasons[name]() else response.SERVING

    async def check(self, context: Context) -> Any:
        """Check: the status now."""
        name = (await self.servicer.read_probe(context, health_pb2.HealthCheckRequest)).service
        if name not in self.reasons:
            raise HTTPException(404, f"unknown service; send one of {', '.join(map(repr, self.reasons))}")
        return health_pb2.HealthCheckResponse(status=self.status(name))

    async def watch(self, context: Context) -> None:
        """Watch: the status now and whenever it changes, for WATCH_S. A watch beyond MAX_WATCHES gets the first only."""
        name = (await self.servicer.read_probe(context, health_pb2.HealthCheckRequest)).service
        with self.counted(context) as is_within_limits:
            ends_at = asyncio.get_running_loop().time() + (WATCH_S if is_within_limits else 0)
            sent, is_last = None, False
            while not is_last:
                is_last = self.servicer.stopping.is_set() or asyncio.get_running_loop().time() >= ends_at
                if (status := self.status(name)) != sent:
                    await self.servicer.write(context, health_pb2.HealthCheckResponse(status=status))
                    sent = status
                if not is_last:
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(self.servicer.stopping.wait(), POLL_S)

    @contextlib.contextmanager
    def counted(self, context: Context) -> Iterator[bool]:
        """Count a watch while the context lasts; give whether its connection, its address and all have not too many."""
        connection = context.peer()  # such as ipv4:127.0.0.1:57014
        keys = {"connection": connection, "address": connection.rpartition(":")[0], "all": ""}
        self.watches.update(keys.values())
        try:
            yield all(self.watches[key] <= MAX_WATCHES[what] for what, key in keys.items())
        finally:
            self.watches.subtract(keys.values())
            self.watches += Counter()  # keeps what is above zero
