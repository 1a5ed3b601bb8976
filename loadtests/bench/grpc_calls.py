"""The same call over gRPC and over HTTP, for bench.py: the Open Inference Protocol, by Triton's own asyncio clients.

Both ends are Python's: at 32 connections the clients' core may be the one that is full.
"""

import asyncio
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import grpc
import numpy as np
import tritonclient.grpc.aio
import tritonclient.http.aio

from loadtests.load.raw_client import on_core
from loadtests.modes import Server

MODEL = "loadtests.bench.apps:Instant"
TEXT = b"Paris is the [MASK] of France."
CALLS = 100  # of which the bytes are counted
KINDS = {"gRPC": tritonclient.grpc.aio, "HTTP": tritonclient.http.aio}


def client(kind: str, address: str) -> Any:
    own = {"channel_args": [("grpc.use_local_subchannel_pool", 1)]} if kind == "gRPC" else {}
    return KINDS[kind].InferenceServerClient(address, **own)


def a_text(kind: str) -> Any:
    tensor = KINDS[kind].InferInput("text", [1], "BYTES")
    tensor.set_data_from_numpy(np.array([TEXT], object))
    return tensor


async def ask(kind: str, address: str, users: int, duration_s: float) -> float:
    """Requests per second of users that ask without a pause, each over a connection of its own."""
    clients = [client(kind, address) for _ in range(users)]
    ends_at, done = 0.0, 0

    async def user(client: Any) -> int:
        done, tensor = 0, a_text(kind)
        while time.perf_counter() < ends_at:
            await client.infer(MODEL, [tensor])
            done += 1
        return done

    ends_at = time.perf_counter() + duration_s / 5  # warm
    await asyncio.gather(*map(user, clients))
    ends_at = time.perf_counter() + duration_s
    done = sum(await asyncio.gather(*map(user, clients)))
    for one in clients:
        await one.close()
    return done / duration_s


async def count_bytes(kind: str, address: str) -> float:
    """Bytes of a call, both ways, what its connection costs shared out."""
    host, port = address.split(":")
    counted, ended = 0, asyncio.Event()

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal counted
        while some := await reader.read(65_536):
            counted += len(some)
            writer.write(some)
        writer.close()

    async def between(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there = await asyncio.open_connection(host, int(port))
        await asyncio.gather(pump(reader, there[1]), pump(there[0], writer))
        ended.set()

    async with await asyncio.start_server(between, "127.0.0.1", 0) as proxy:
        one = client(kind, "{}:{}".format(*proxy.sockets[0].getsockname()))
        for _ in range(CALLS):
            await one.infer(MODEL, [a_text(kind)])
        await one.close()
        await ended.wait()
    return counted / CALLS


def addresses(server: Server) -> dict[str, str]:
    """Where it speaks each protocol."""
    port = server.processes()[0].environ()["GRPC_PORT"]
    return {"gRPC": f"127.0.0.1:{port}", "HTTP": server.url.split("/")[2]}


def measures(server: Server, cpu: int) -> dict[str, Callable[[float], float]]:
    """Requests per second in a duration, by protocol and number of connections."""
    with grpc.insecure_channel(addresses(server)["gRPC"]) as channel:
        grpc.channel_ready_future(channel).result(timeout=30)

    def rate(kind: str, users: int, duration_s: float) -> float:
        return on_core(cpu, ask(kind, addresses(server)[kind], users, duration_s))

    return {f"{kind}, {users}": partial(rate, kind, users) for users in (1, 32) for kind in KINDS}


def compared(rates: dict[str, list[float]], server: Server, cpu: int) -> dict[str, dict[str, float]]:
    """Milliseconds and bytes of a call, by protocol."""
    ms = {kind: 1000 / statistics.median(rates[f"{kind}, 1"]) for kind in KINDS}
    n_bytes = {kind: on_core(cpu, count_bytes(kind, addresses(server)[kind])) for kind in KINDS}
    return {"ms a call, connections: 1": ms, "bytes a call, both ways": n_bytes}
