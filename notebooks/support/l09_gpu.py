"""For lesson 9 where a GPU is at hand: six pieces of advice, each measured with and without, on one device.

Each function returns (what is counted, without the advice, with it). `device` is a GPU's, such as "cuda:0".
"""

import json
import multiprocessing
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch

WIDTH, BATCH = 768, 8


def make(device):
    """A model of a few layers, as small as those that leave a GPU idle."""
    layers = [torch.nn.Linear(WIDTH, WIDTH) for _ in range(12)]
    return torch.nn.Sequential(*layers).to(device).eval(), torch.rand(BATCH, WIDTH)


def per_s(call, device, seconds=1.0):
    """Calls a second, everything on the device finished; warmed up before."""
    synchronize = torch.get_device_module(device).synchronize
    for _ in range(10):
        call()
    synchronize()
    began, calls = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        call()
        calls += 1
    synchronize()
    return calls / (time.perf_counter() - began)


@torch.inference_mode()
def streams(device, number=4):
    """The same work, in turn on the one default stream or dealt to several streams."""
    backend = torch.get_device_module(device)
    model, batch = make(device)
    batch = batch.to(device)
    several = [backend.Stream() for _ in range(number)]
    backend.synchronize()

    def dealt():
        for stream in several:
            with backend.stream(stream):
                model(batch)

    one = per_s(lambda: [model(batch) for _ in several], device)
    return f"batches/s, 1 or {number} streams", one * number, per_s(dealt, device) * number


def instances(device, number=4, seconds=1.0):
    """One copy that prepares, copies, computes and fetches in turn; or several, each in a thread with its own stream."""
    backend = torch.get_device_module(device)

    def serve(done):
        model, batch = make(device)
        with torch.inference_mode(), backend.stream(backend.Stream()):
            until = time.perf_counter() + seconds
            while time.perf_counter() < until:
                time.sleep(0.004)  # stands for reading and tokenising: the device has nothing to do meanwhile
                model(batch.to(device)).cpu()
                done.append(1)

    def rate(copies):
        done = []
        threads = [threading.Thread(target=serve, args=(done,)) for _ in range(copies)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return len(done) / seconds

    rate(1)
    return f"batches/s, 1 or {number} instances", rate(1), rate(number)


def preallocated(device):
    """A new tensor for each batch; or page-locked memory, made once, and the device's own, copied into."""
    host = torch.rand(256, WIDTH)
    pinned = host.pin_memory() if device != "cpu" else host.clone()
    there = torch.empty_like(host, device=device)

    def into():
        pinned.copy_(host)
        there.copy_(pinned, non_blocking=True)
        torch.get_device_module(device).synchronize()

    return (
        "copies/s of 0.8 MB, new or into place",
        per_s(lambda: host.to(device), device),
        per_s(into, device),
    )


@torch.inference_mode()
def empty_cache(device):
    """Batches a second, with the cache kept or given back after each."""
    model, batch = make(device)
    batch = batch.to(device)

    def clear():
        model(batch)
        torch.cuda.empty_cache()

    return "batches/s, cache kept or cleared", per_s(lambda: model(batch), device), per_s(clear, device)


@torch.inference_mode()
def utilisation(device, pause_s=0.004, seconds=2.0):
    """The share of time in which the device computes, by its own events; and what its driver reports, for the same time."""
    model, batch = make(device)
    batch, spans, told = batch.to(device), [], []
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        model(batch)
        end.record()
        torch.cuda.synchronize()
        spans.append(start.elapsed_time(end) / 1000)
        if len(spans) % 50 == 0:
            told.append(torch.cuda.utilization(device) / 100)  # needs the package nvidia-ml-py
        time.sleep(pause_s)
    return "share busy, by events or by the driver", sum(spans) / seconds, sum(told) / max(1, len(told))


def in_fork(pipe, device):
    """Compute in a child; send what came of it."""
    try:
        torch.ones(8, device=device).sum().item()
        pipe.send("answers")
    except RuntimeError as error:
        pipe.send(str(error).splitlines()[0])


def after_fork(device, patience_s=10.0):
    """What a forked and a spawned child say when their parent has computed on the device; bounded."""
    torch.ones(8, device=device).sum().item()
    said = []
    for method in ("fork", "spawn"):
        context = multiprocessing.get_context(method)
        ours, theirs = context.Pipe()
        process = context.Process(target=in_fork, args=(theirs, device), daemon=True)
        process.start()
        said.append(ours.recv() if ours.poll(patience_s * (1 if method == "fork" else 6)) else "hangs")
        process.kill()
        process.join()
    return "computing on it in a child: fork, spawn", *said


ADVICE = (streams, instances, preallocated, empty_cache, utilisation, after_fork)
CLAIMS = (  # what each judges, and what it takes
    (
        "several streams make one GPU faster",
        "batches/s on one stream and dealt to four, with a model too small to fill it",
    ),
    (
        "instances lift a GPU from 20 % to 80 %",
        "batches/s with one and four copies; above, a stand-in for a device did it",
    ),
    (
        "preallocate the inputs",
        "copies/s into new tensors, and into page-locked memory that is allocated once",
    ),
    ("clear the CUDA cache periodically", "batches/s with and without `empty_cache` between them"),
    (
        "the driver's utilisation says how full a GPU is",
        "the driver's figure beside the time between CUDA events",
    ),
    (
        "CUDA can't be used after a fork",
        "a child forked and one spawned after the parent has computed on the device",
    ),
)


def compare(device="cuda:0"):
    """A row for each piece of advice; one that fails says how."""
    rows = []
    for advice in ADVICE:
        try:
            what, without, with_it = advice(device)
        except Exception as error:
            what, without, with_it = advice.__name__, f"{type(error).__name__}: {error}", ""
        first, second = (round(one, 2) if isinstance(one, float) else one for one in (without, with_it))
        rows.append({"what is measured": what, "without, or the first": first, "with, or the second": second})
    return rows


def measured() -> list[dict[str, Any]]:
    """What `main` finds, in a process of its own; nothing where there is no GPU."""
    if not torch.cuda.is_available():
        return []
    command = [sys.executable, "-m", "notebooks.support.l09_gpu"]
    root = Path(__file__).resolve().parents[2]
    found = subprocess.run(command, check=True, capture_output=True, text=True, timeout=200, cwd=root)
    rows: list[dict[str, Any]] = json.loads(found.stdout.splitlines()[-1])
    return rows


def verdicts(advice: list[dict[str, Any]]) -> list[dict[str, str]]:
    """The claims, for the ledger."""
    if not advice:
        who = "needs a GPU; `notebooks/support/l09_gpu.py` measures it"
        return [
            {"text": text, "who": who, "number": f"it takes {takes}", "verdict": "untested: no GPU"}
            for text, takes in CLAIMS
        ]
    entries = []
    for (text, _), row in zip(CLAIMS, advice, strict=True):
        what, first, second = row.values()
        who = f"{torch.cuda.get_device_name()}: {what}"
        entries.append(
            {"text": text, "who": who, "number": f"{first}; {second}", "verdict": "depends: see the number"}
        )
    return entries


if __name__ == "__main__":
    print(json.dumps(compare()))
