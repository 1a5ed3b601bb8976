"""What the server adds to its model, as ratios measured side by side: `make bench`.

    1. Requests per second with a model that returns at once, as a fraction of a bare Starlette handler.
    2. Texts per second over HTTP, saturated, as a fraction of calling the same model in a bare loop.
    3. p99 of /health while saturated: thread, and inline for contrast.
    4. Correct responses per second under overload, as a fraction of those without.
    5. The same call over gRPC, as a fraction of HTTP's: the Open Inference Protocol by Triton's own clients.

The server runs on the first core, the client on the last. Rounds are short and interleaved;
medians are printed, with the quartiles of the ratios.
"""

import argparse
import asyncio
import contextlib
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Coroutine, Iterator
from functools import partial
from multiprocessing.connection import Connection as Pipe
from typing import Any

from tqdm import tqdm

from loadtests import arguments
from loadtests.bench import grpc_calls
from loadtests.load import generator
from loadtests.load.raw_client import Connection, Crowd, http, on_core
from loadtests.modes import MODES, Mode, Server, free_port, start
from loadtests.plan.planner import markdown

SERVER_CPU, CLIENT_CPU = min(os.sched_getaffinity(0)), max(os.sched_getaffinity(0))


class Client(Connection):
    """Sends one request again and again over one connection; notes when each reply was complete."""

    ended = False

    def __init__(self, request: bytes) -> None:
        self.request = request
        self.done_at: list[float] = []
        self.errors = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.ask(self.request, self.again)

    def again(self, status: int) -> None:
        self.errors += status != 200
        self.done_at.append(time.perf_counter())
        self.ask(self.request, self.again)


def texts(n: int) -> list[str]:
    """Texts of different lengths, as real ones are; every one has its mask."""
    return ["Paris is the [MASK] of France." + " Or so they say." * (i % 3) for i in range(n)]


async def ask(url: str, requests: list[bytes], duration_s: float, client: type[Client] = Client) -> float:
    """Return requests per second of users that ask without a pause, each with a request of its own."""
    loop = asyncio.get_running_loop()
    host, port = url.split("/")[2].split(":")
    askers = [client(request) for request in requests]
    for connection in askers:
        await loop.create_connection(lambda c=connection: c, host, int(port))  # type: ignore[misc]
    await asyncio.sleep(duration_s / 5)  # warm
    began = time.perf_counter()
    await asyncio.sleep(duration_s)
    ended = time.perf_counter()
    for asker in askers:
        asker.ended = True
        asker.transport.abort()
    await asyncio.sleep(0)  # or the transports outlive the loop
    if errors := sum(asker.errors for asker in askers):
        raise RuntimeError(f"{errors} replies were not 200")
    done = sum(began <= at < ended for asker in askers for at in asker.done_at)
    return done / (ended - began)


def measure(server: Server, users: int, duration_s: float) -> float:
    """`ask` on a core of its own; returns when the server has done what was left."""
    requests = [http(server.url, text) for text in texts(users)]
    rate = on_core(CLIENT_CPU, ask(server.url, requests, duration_s))
    server.wait_until_idle()
    return rate


def bare_loop(batch_size: int, pipe: Pipe) -> None:
    """For every duration from the pipe: texts per second of calling the model in a loop, nothing around it."""
    os.sched_setaffinity(0, {SERVER_CPU})
    from workers import tasks
    from workers.settings import Settings

    task = tasks.make(settings := Settings(BATCH_SIZE=batch_size))
    model, queries = tasks.load(task, settings), [task.check(text, {}).content for text in texts(batch_size)]
    while duration_s := pipe.recv():
        done, began = 0, time.perf_counter()
        while (elapsed := time.perf_counter() - began) < duration_s:
            model(queries)
            done += batch_size
        pipe.send(done / elapsed)


@contextlib.contextmanager
def calling_the_model(batch_size: int) -> Iterator[Callable[[float], float]]:
    """`bare_loop` in a process of its own, as a function of the duration."""
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    process = spawn.Process(target=bare_loop, args=(batch_size, theirs), daemon=True)
    process.start()
    theirs.close()  # or its death would not close the pipe

    def rate(duration_s: float) -> float:
        ours.send(duration_s)
        return float(ours.recv())

    yield rate
    ours.send(0)
    process.join()


@contextlib.contextmanager
def serving(name: str, users: int, app: str = "server:app", **env: str) -> Iterator[Callable[[float], float]]:
    """A server on one core, without an access log, as a function: requests per second in a duration."""
    with start(Mode(name, f"uvicorn {app} --no-access-log", env), cpus={SERVER_CPU}) as server:
        yield lambda duration_s: measure(server, users, duration_s)


Rates = dict[str, list[float]]


def side_by_side(measures: dict[str, Callable[[float], float]], rounds: int, duration_s: float) -> Rates:
    """Measure each in turn, for a short time, again and again: a neighbour's noise meets all of them alike."""
    for measure_rate in measures.values():
        measure_rate(duration_s)  # warm
    rates: Rates = {name: [] for name in measures}
    for _ in range(rounds):
        for name, measure_rate in measures.items():
            rates[name].append(measure_rate(duration_s))
    return rates


def row(what: str, rates: Rates, measured: str, against: str) -> dict[str, str]:
    """Medians of the rates, and of the rounds' ratios with their quartiles."""
    ratios = [one / other for one, other in zip(rates[measured], rates[against])]
    low, middle, high = statistics.quantiles(ratios) if len(ratios) > 1 else ratios * 3
    return {
        "what": what,
        "measured": f"{statistics.median(rates[measured]):,.0f}",
        "against": f"{statistics.median(rates[against]):,.0f} {against}",
        "ratio": f"{middle:.2f} ({low:.2f} to {high:.2f})",
    }


def overhead(rounds: int, duration_s: float) -> list[dict[str, str]]:
    """Requests per second of the server around a no-op model, against a bare handler."""
    instant, names = {"MODEL": "loadtests.bench.apps:Instant"}, ("batch 1", "batch 32")
    with (
        serving("bare", 32, "loadtests.bench.apps:bare") as bare,
        serving("batch 1", 32, BATCH_SIZE="1", **instant) as batch_1,
        serving("batch 32", 32, BATCH_SIZE="32", **instant) as batch_32,
    ):
        measures = {"bare Starlette": bare, "batch 1": batch_1, "batch 32": batch_32}
        rates = side_by_side(measures, rounds, duration_s)
    return [row(f"requests/s, no-op model, {name}", rates, name, "bare Starlette") for name in names]


def saturated(rounds: int, duration_s: float) -> list[dict[str, str]]:
    """Texts per second over HTTP against a bare loop around the same model."""
    with (
        calling_the_model(32) as bare,
        serving("batch", 96, BATCH_SIZE="32", QUEUE_TARGET_S="0") as over_http,
    ):
        rates = side_by_side({"in a bare loop": bare, "over HTTP": over_http}, rounds, duration_s)
    return [row("texts/s over HTTP, batch 32", rates, "over HTTP", "in a bare loop")]


def health_under_load(duration_s: float) -> list[dict[str, str]]:
    """p99 of /health, asked 40 times a second on a schedule, while 96 users keep the model busy with batches."""
    rows = []
    for mode in ("thread", "inline"):
        with (
            start(MODES[mode], {"BATCH_SIZE": "32"}, cpus={SERVER_CPU}) as server,
            generator.generator({CLIENT_CPU}) as locust,
        ):
            df = locust.run(
                server.url,
                "closed",
                users=96,
                duration_s=duration_s,
                health_per_s=40,
                limit_s=10,
                timeout_s=20,
            )
            p99_ms = df[df["kind"] == "health"]["latency_ms"].quantile(0.99)
            call_ms = df["model_ms"].median()
            rows.append(
                {
                    "what": f"/health p99 while saturated, {mode}",
                    "measured": f"{p99_ms:,.1f} ms",
                    "against": f"{call_ms:.0f} ms a model call",
                    "ratio": f"{p99_ms / call_ms:.2f}",
                }
            )
    return rows


def crowd(server: Server, duration_s: float, load: Callable[[Crowd], Coroutine[Any, Any, None]]) -> Crowd:
    """What a crowd got that asked the server from the other core."""
    crowd = Crowd(server.url, texts(32))
    on_core(CLIENT_CPU, crowd.run(duration_s, lambda: asyncio.create_task(load(crowd))))
    server.wait_until_idle()
    return crowd


def overload(rounds: int, duration_s: float) -> list[dict[str, str]]:
    """Correct responses per second within 1 s, of which the clients say nothing, against as many as 96 patient users get."""
    loads: dict[str, Callable[..., Coroutine[Any, Any, None]]] = {
        "2 x": lambda crowd, capacity: crowd.arrive(2 * capacity),
        "10 x": lambda crowd, capacity: crowd.arrive(10 * capacity),
        "400 who ask again after 20 ms": lambda crowd, capacity: crowd.insist(400, 0.02),
    }
    crowds: dict[str, list[Crowd]] = {name: [] for name in ("96 users", *loads)}
    with start(
        Mode("batch", "uvicorn server:app --no-access-log", {"BATCH_SIZE": "32"}), cpus={SERVER_CPU}
    ) as server:
        for _ in range(rounds):
            crowds["96 users"].append(crowd(server, duration_s, lambda crowd: crowd.insist(96, 1.0)))
            capacity = crowds["96 users"][-1].right_per_s
            for name, load in loads.items():
                crowds[name].append(crowd(server, duration_s, partial(load, capacity=capacity)))
    rates = {name: [crowd.right_per_s for crowd in some] for name, some in crowds.items()}
    rows = []
    for name in loads:
        health_ms = statistics.median(crowd.health_p99_s for crowd in crowds[name]) * 1000
        refused = statistics.median(crowd.refused / crowd.seconds for crowd in crowds[name])
        what = f"answers/s within 1 s, {name}; {refused:,.0f} refused/s, /health p99 {health_ms:.0f} ms"
        rows.append(row(what, rates, name, "96 users"))
    return rows


def over_grpc(rounds: int, duration_s: float) -> list[dict[str, str]]:
    """Requests per second, milliseconds and bytes of the same call over gRPC, against HTTP."""
    env = {"MODEL": grpc_calls.MODEL, "GRPC_PORT": str(free_port())}
    command = Mode("gRPC", "uvicorn server:app --no-access-log", env)
    with start(command, cpus={SERVER_CPU}) as server:
        rates = side_by_side(grpc_calls.measures(server, CLIENT_CPU), rounds, duration_s)
        compared = grpc_calls.compared(rates, server, CLIENT_CPU)
    return [
        row(f"requests/s over gRPC, connections: {n}", rates, f"gRPC, {n}", f"HTTP, {n}") for n in (1, 32)
    ] + [
        {
            "what": what,
            "measured": f"{found['gRPC']:,.2f}",
            "against": f"{found['HTTP']:,.2f} HTTP",
            "ratio": f"{found['gRPC'] / found['HTTP']:.2f}",
        }
        for what, found in compared.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--quick", action="store_true", help="one short round: shows that it runs, measures nothing"
    )
    quick = parser.parse_args().quick
    rounds = 1 if quick else 15
    parts: dict[str, Callable[[], list[dict[str, str]]]] = {
        "requests/s around a no-op model": lambda: overhead(rounds, 1.0),
        "texts/s over HTTP": lambda: saturated(rounds, 2.0),
        "/health while saturated": lambda: health_under_load(4.0 if quick else 8.0),
        "gRPC beside HTTP": lambda: over_grpc(rounds, 1.0),
        "overload": lambda: overload(1 if quick else 3, 4.0),
    }
    print(
        f"Five measurements, about {2 if quick else 8} minutes on two idle cores.",
        file=sys.stderr,
        flush=True,
    )
    rows: list[dict[str, str]] = []
    try:
        for name, part in (progress := tqdm(parts.items(), file=sys.stderr)):
            progress.set_description(name)
            rows += part()
    finally:  # what was measured before Ctrl-C is kept
        if rows:
            print(markdown(rows))


if __name__ == "__main__":
    arguments.run(main)
