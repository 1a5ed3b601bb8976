"""The same call over gRPC and over HTTP: how many a second, and what each costs either side. Clients: Triton's own, asyncio.

visit(server, "gRPC", duration_s=1.0, cpu=1, model="minilm-mlm")["per_s"]
"""

import asyncio
import http.client
import json
import statistics
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import uvloop
from lesson import apart

from loadtests.bench import grpc_calls
from loadtests.modes import Server

TEXT = grpc_calls.TEXT.decode()


async def unary(kind: str, address: str, model: str, users: int, until: Callable[[], float]) -> int:
    """Users that ask one text a call without a pause, each over a connection of its own."""
    clients = [grpc_calls.client(kind, address) for _ in range(users)]

    async def user(client: Any) -> int:
        done, tensor = 0, grpc_calls.a_text(kind)
        while time.perf_counter() < until():
            await client.infer(model, [tensor])
            done += 1
        return done

    done = sum(await asyncio.gather(*map(user, clients)))
    for client in clients:
        await client.close()
    return done


async def stream(kind: str, address: str, model: str, in_flight: int, until: Callable[[], float]) -> int:
    """One gRPC stream, on which so many texts are under way."""
    client, tensor = grpc_calls.client(kind, address), grpc_calls.a_text(kind)
    room, done = asyncio.Semaphore(in_flight), 0

    async def requests() -> AsyncIterator[dict[str, Any]]:
        while time.perf_counter() < until():
            await room.acquire()
            yield {"model_name": model, "inputs": [tensor]}

    async for _, error in client.stream_infer(requests()):
        if error:
            raise error
        room.release()
        done += 1
    await client.close()
    return done


async def lines(kind: str, address: str, model: str, in_flight: int, until: Callable[[], float]) -> int:
    """One HTTP connection: lists of so many texts, each answered by a line as soon as it is done."""
    connection, done = http.client.HTTPConnection(address, timeout=30), 0
    body = json.dumps({"inputs": [TEXT] * in_flight})
    headers = {"Content-Type": "application/json", "Accept": "application/x-ndjson"}
    while time.perf_counter() < until():
        connection.request("POST", "/", body, headers)
        done += sum(1 for line in connection.getresponse() if b'"answer"' in line)
    connection.close()
    return done


WAYS = {"one a call": unary, "one stream": stream, "lists": lines}


def visit(
    server: Server,
    kind: str,
    way: str = "one a call",
    *,
    in_flight: int = 1,
    duration_s: float = 1.0,
    cpu: int,
    model: str,
) -> dict[str, float]:
    """Texts a second, and the processor ms of a text on the server's and on the client's side."""
    address = grpc_calls.addresses(server)[kind]
    ends_at = 0.0

    def until() -> float:
        return ends_at

    async def work() -> dict[str, float]:
        nonlocal ends_at
        ends_at = time.perf_counter() + duration_s / 5  # warm
        await WAYS[way](kind, address, model, in_flight, until)
        server_s, client_s, began = server.cpu_s(), time.process_time(), time.perf_counter()
        ends_at = began + duration_s
        done = await WAYS[way](kind, address, model, in_flight, until)
        took_s = time.perf_counter() - began
        return {
            "per_s": done / took_s,
            "ms": 1000 * took_s / done,
            "server_ms": 1000 * (server.cpu_s() - server_s) / done,
            "client_ms": 1000 * (time.process_time() - client_s) / done,
        }

    return apart(lambda: uvloop.run(work()), {cpu})


def bytes_of(server: Server, kind: str, cpu: int) -> float:
    """Bytes of a call of the instant model, both ways."""
    address = grpc_calls.addresses(server)[kind]
    return apart(lambda: uvloop.run(grpc_calls.count_bytes(kind, address)), {cpu})


def in_turn(server: Server, kinds: Sequence[str], rounds: int, **options: Any) -> dict[str, dict[str, float]]:
    """`visit` all kinds in turn, again and again: the median of each figure, by kind."""
    found: dict[str, list[dict[str, float]]] = {kind: [] for kind in kinds}
    for _ in range(rounds):
        for kind in kinds:
            found[kind].append(visit(server, kind, **options))
    return {
        kind: {key: statistics.median(one[key] for one in some) for key in some[0]}
        for kind, some in found.items()
    }
