"""What the server adds to its model, as ratios measured side by side: `make bench`.

    1. Requests per second with a model that returns at once, as a fraction of a bare Starlette handler.
    2. Texts per second over HTTP, saturated, as a fraction of calling the same model in a bare loop.
    3. p99 of /health while saturated: thread, and inline for contrast.

The server runs on the first core, the client on the last. Rounds are interleaved; medians are printed.
"""

import argparse
import asyncio
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable

import pandas as pd
import uvloop

from loadtests.modes import MODES, Mode, Server, start

SERVER_CPU, CLIENT_CPU = min(os.sched_getaffinity(0)), max(os.sched_getaffinity(0))
TEXT = "Paris is the [MASK] of France."


class Connection(asyncio.Protocol):
    """Sends one request again and again over one connection; notes when each reply was complete, and its latency."""

    def __init__(self, request: bytes, pause_s: float = 0.0) -> None:
        self.request, self.pause_s = request, pause_s
        self.done_at: list[float] = []
        self.latencies_s: list[float] = []
        self.errors = 0
        self.buffer = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        self.send()

    def send(self) -> None:
        self.sent_at = time.perf_counter()
        self.transport.write(self.request)  # type: ignore[attr-defined]

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        head, separator, body = self.buffer.partition(b"\r\n\r\n")
        if not separator:
            return
        length = int(head.lower().partition(b"content-length:")[2].split(b"\r\n", 1)[0])
        if len(body) < length:
            return
        now = time.perf_counter()
        self.buffer = b""
        self.errors += not head.startswith(b"HTTP/1.1 200")
        self.done_at.append(now)
        self.latencies_s.append(now - self.sent_at)
        if self.pause_s:
            asyncio.get_running_loop().call_later(self.pause_s, self.send)
        else:
            self.send()


def http(url: str, method: str, path: str, body: str = "") -> bytes:
    host = url.split("/")[2]
    head = f"{method} {path} HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(body.encode())}\r\n\r\n"
    return (head + body).encode()


async def drive(url: str, users: int, duration_s: float, health: bool) -> tuple[float, list[float]]:
    """Return requests per second of `users` that ask without a pause, and the latencies of a /health asker beside."""
    loop = asyncio.get_running_loop()
    host, port = url.split("/")[2].split(":")
    # Texts of different lengths, as real ones are; every one has its mask.
    texts = [TEXT + " Or so they say." * (i % 3) for i in range(users)]
    askers = [Connection(http(url, "POST", "/", text)) for text in texts]
    prober = Connection(http(url, "GET", "/health"), pause_s=0.01)
    for connection in [*askers, *([prober] if health else [])]:
        await loop.create_connection(lambda c=connection: c, host, int(port))
    await asyncio.sleep(duration_s / 5)  # warm
    began = time.perf_counter()
    await asyncio.sleep(duration_s)
    ended = time.perf_counter()
    if errors := sum(asker.errors for asker in askers):
        raise RuntimeError(f"{errors} replies were not 200")
    done = sum(began <= at < ended for asker in askers for at in asker.done_at)
    return done / (ended - began), [s for at, s in zip(prober.done_at, prober.latencies_s) if at >= began]


def measure(server: Server, users: int, duration_s: float, health: bool = False) -> tuple[float, list[float]]:
    """`drive` on a core of its own."""
    os.sched_setaffinity(0, {CLIENT_CPU})
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(drive(server.url, users, duration_s, health))


def bare_loop(batch_size: int, duration_s: float, results: "multiprocessing.SimpleQueue[float]") -> None:
    """Texts per second of calling the same model object in a loop, nothing around it."""
    os.sched_setaffinity(0, {SERVER_CPU})
    from workers.model import Model, Query
    from workers.settings import Settings

    model = Model(Settings(BATCH_SIZE=batch_size))
    queries = [Query(TEXT + " Or so they say." * (i % 3)) for i in range(batch_size)]
    done, began = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - began) < duration_s:
        model(queries)
        done += batch_size
    results.put(done / elapsed)


def in_process(function: Callable[..., None], *arguments: float) -> float:
    """Run `function` in a process of its own and return what it puts into the queue."""
    spawn = multiprocessing.get_context("spawn")
    results = spawn.SimpleQueue()
    process = spawn.Process(target=function, args=(*arguments, results))
    process.start()
    process.join()
    return float(results.get())


def on_one_core(name: str, app: str = "server:app", **env: str) -> dict[str, object]:
    """Arguments of `start` for a server on one core, without an access log (its cost is the same for both)."""
    return {"mode": Mode(name, f"uvicorn {app} --no-access-log", env), "cpus": {SERVER_CPU}}


def overhead(rounds: int, duration_s: float) -> list[dict[str, object]]:
    """Requests per second of the server around an instant model, against a bare handler."""
    rates: dict[str, list[float]] = {"bare": [], "batch 1": [], "batch 32": []}
    for _ in range(rounds):
        for name in rates:
            app = "loadtests.bench_apps:" + ("bare" if name == "bare" else "instant")
            with start(
                **on_one_core(name, app, BATCH_SIZE=name.split()[-1] if name != "bare" else "1")
            ) as server:  # type: ignore[arg-type]
                rates[name].append(measure(server, 32, duration_s)[0])
    bare = statistics.median(rates["bare"])
    return [
        {
            "what": f"requests/s, instant model, {name}",
            "measured": f"{statistics.median(found):,.0f}",
            "against": f"{bare:,.0f} bare Starlette",
            "ratio": f"{statistics.median(found) / bare:.2f}",
        }
        for name, found in rates.items()
        if name != "bare"
    ]


def saturated(rounds: int, duration_s: float) -> list[dict[str, object]]:
    """Texts per second over HTTP against a bare loop around the same model; /health beside it."""
    over_http, bare = [], []
    for _ in range(rounds):
        bare.append(in_process(bare_loop, 32, duration_s))
        with start(**on_one_core("batch", BATCH_SIZE="32")) as server:  # type: ignore[arg-type]
            over_http.append(measure(server, 96, duration_s)[0])
    return [
        {
            "what": "texts/s over HTTP, batch 32",
            "measured": f"{statistics.median(over_http):,.0f}",
            "against": f"{statistics.median(bare):,.0f} in a bare loop",
            "ratio": f"{statistics.median(over_http) / statistics.median(bare):.2f}",
        }
    ]


def health_under_load(duration_s: float) -> list[dict[str, object]]:
    """p99 of /health while 32 users keep the model busy with batches."""
    rows = []
    for mode in ("thread", "inline"):
        with start(MODES[mode], {"BATCH_SIZE": "32"}, cpus={SERVER_CPU}) as server:
            rate, latencies_s = measure(server, 96, duration_s, health=True)
            p99_ms = statistics.quantiles(latencies_s, n=100)[98] * 1000
            call_ms = 32 / rate * 1000
            rows.append(
                {
                    "what": f"/health p99 while saturated, {mode}",
                    "measured": f"{p99_ms:.1f} ms",
                    "against": f"{call_ms:.0f} ms a model call",
                    "ratio": f"{p99_ms / call_ms:.2f}",
                }
            )
    return rows


def markdown(rows: list[dict[str, object]]) -> str:
    """A Markdown table of rows with the same keys."""
    table = pd.DataFrame(rows)
    lines = [list(table.columns), ["---"] * len(table.columns), *table.values.tolist()]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--quick", action="store_true", help="one short round: shows that it runs, measures nothing"
    )
    quick = parser.parse_args().quick
    rounds, duration_s = (1, 1.0) if quick else (3, 4.0)
    rows = (
        overhead(rounds, duration_s)
        + saturated(rounds, duration_s)
        + health_under_load(max(4.0, duration_s * 2))
    )
    print(markdown(rows))


if __name__ == "__main__":
    main()
