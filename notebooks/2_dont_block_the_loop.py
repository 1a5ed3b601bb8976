# %% [markdown]
# # 2. Don't block the loop
#
# An asyncio server does everything in one thread: it takes connections, reads, answers `/health`. A model call is one
# long computation.
#
# **Question: where should the model run, so that the rest of the server stays awake?**
#
# There are three places: on the event loop itself (`OFFLOAD=inline`), in a thread (`thread`, the default), in a process of
# its own (`process`). Same server, same model; one setting differs.

# %%
from lesson import BLUE, GREEN, GREY, ORANGE, TEXT, ask, bars, claim, dots, get, line, load, picture, quick
from lesson import serve_all, stop

import inspect
import json
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

import checks
from workers import offload

PLACES = {"inline": BLUE, "thread": ORANGE, "process": GREEN}
torch.set_num_threads(1)

# %% [markdown]
# ## The three places
#
# This is all the code that differs.

# %%
print(inspect.getsource(offload.Inline.run))
print(inspect.getsource(offload.Thread.run))
print(inspect.getsource(offload.Thread._work))
print(inspect.getsource(offload.answer_with))

# %%
started = serve_all(*({"OFFLOAD": place, "BATCH_SIZE": 32} for place in PLACES))
servers = dict(zip(PLACES, started))

# %% [markdown]
# ## `/health` during a long inference
#
# Every 2 s a burst of long texts arrives: the model is busy for a while. Meanwhile somebody asks `/health` at random
# moments, as a load balancer does.
#
# **Your prediction.** The model runs from $t_0$ to $t_1$. You ask at $t$ in between. On a blocked loop you wait for the
# rest of the call: $t_1 - t$. So the picture is a saw: high at the start of a burst, falling to nothing at its end. If the
# loop is free, you wait about a millisecond, always.

# %%
duration_s, burst = quick(3, 12), quick(8, 24)
runs = {
    place: load(server, "slow", duration_s=duration_s, burst=burst, health_per_s=30, limit_s=20)
    for place, server in servers.items()
}


# %%
def split(df):
    """The health checks, and for each burst when it came and when its last answer did."""
    model = df[df.kind == "model"]
    ends = (model.due_s + model.latency_ms / 1000).groupby(model.due_s).max()
    return df[df.kind == "health"], list(zip(ends.index, ends))


health, bursts = split(runs["inline"])
print("busy from … to, s:", [(round(start, 1), round(end, 1)) for start, end in bursts])

# %%
with picture("/health while the model works", "time, s", "wait for /health, ms", yscale="log") as ax:
    for i, (start, end) in enumerate(bursts):
        t = np.linspace(start, end, 100)
        line(ax, t, np.maximum(1, (end - t) * 1000), "predicted for inline: $t_1 - t$" if i == 0 else None)
    for place, color in PLACES.items():
        probes = split(runs[place])[0]
        dots(ax, probes.due_s, probes.latency_ms, place, color, markersize=4)
    ax.legend(ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.2))

# %%
busy = {}
for place, df in runs.items():
    probes, spans = split(df)
    inside = probes[[any(a <= t < b for a, b in spans) for t in probes.due_s]]
    busy[place] = inside.latency_ms.median()
    alone = (df.batch_size == 1).sum() / df.batch_size.count()
    print(
        f"{place:8} /health while busy: median {busy[place]:6.1f} ms, worst {inside.latency_ms.max():6.0f} ms"
    )
    print(f"{'':8} {alone:.0%} of the texts ran in a batch of their own")

# %% [markdown]
# The saw is there for `inline`, and only there. *Where the formula fails:* between two calls the loop breathes, and with
# `inline` a burst is many calls. A loop takes in few new connections at a turn, and each turn here is a call: so most
# texts run alone, and `inline` loses its batches, too. Who asks `/health` over an open connection waits for one call (the
# dots below the line), who opens a new one waits behind the burst.
#
# Why this matters: a balancer that gets no `/health` within its second thinks that the server is dead. It restarts a
# healthy one, at the worst moment: under load.

# %%
claim(
    "A slow model makes a slow /health",
    f"median wait for /health while the model works: {busy['inline']:.0f} ms inline, {busy['thread']:.1f} ms with a"
    f" thread, {busy['process']:.1f} ms with a process",
    "fails, unless the model sits on the event loop",
)

# %% [markdown]
# ## What the GIL lets through
#
# "Threads don't help in Python: there is the GIL." Only one thread runs Python at a time, true. A thread that computes in
# Python is asked to hand over every `sys.getswitchinterval()`. A C function is asked nothing: either it lets go of the
# lock by itself, or it keeps it until it returns.
#
# **Your prediction.** A metronome thread ticks every millisecond. The main thread works for half a second. What is the
# longest silence of the metronome, if the work is (a) a Python loop, (b) one C call that keeps the lock, (c) torch?

# %%
print("switch interval:", sys.getswitchinterval() * 1000, "ms")


def longest_silence_ms(work):
    """The longest gap between two ticks of a 1 ms metronome while `work()` runs."""
    ticks, done = [time.perf_counter()], threading.Event()

    def metronome():
        while not done.is_set():
            time.sleep(0.001)
            ticks.append(time.perf_counter())

    thread = threading.Thread(target=metronome)
    thread.start()
    began = time.perf_counter()
    work()
    took_ms = (time.perf_counter() - began) * 1000
    done.set()
    thread.join()
    return float(np.diff(ticks).max()) * 1000, took_ms


# %%
def python_loop():
    total = 0
    for i in range(6_000_000):
        total += i


square = torch.rand(1500, 1500)
works = {
    "nobody works": (lambda: time.sleep(0.5), 1),
    "a Python loop": (python_loop, 5),
    "one call of sum()": (lambda: sum(range(20_000_000)), None),
    "torch matmuls": (lambda: [square @ square for _ in range(4)], 1),
}
silences = {name: longest_silence_ms(work) for name, (work, _) in works.items()}

# %%
with picture("The longest silence of a 1 ms metronome", "ms", "", xscale="log") as ax:
    rows = range(len(works))
    predicted = [ms or silences[name][1] for name, (_, ms) in works.items()]
    bars(ax, predicted, rows)
    dots(ax, [silence for silence, _ in silences.values()], rows)
    ax.set_yticks(rows, works)
    ax.set_ylim(-0.6, len(rows) + 0.2)

# %% [markdown]
# The Python loop hands over at every switch interval. `sum` keeps the lock to its end: the metronome is silent for the
# whole call. Torch lets go of the lock in every operation: to the metronome it is almost as if nobody worked.
# *Where the prediction fails:* a tick also needs a core. Where others compete for it, even an idle process misses some.
#
# So a thread is enough for a model. But the *tokenizer's Python part, JSON, a regular expression* hold the lock. That is
# why the server refuses texts that are too large before it touches them.

# %%
idle_ms, loop_ms, sum_ms, matmul_ms = (silence for silence, _ in silences.values())
claim(
    "Threads don't help in Python because of the GIL",
    f"longest silence of another thread: {idle_ms:.0f} ms beside nobody, {matmul_ms:.0f} ms beside torch, {loop_ms:.0f} ms beside a Python loop,"
    f" {sum_ms:.0f} ms beside one C call that keeps the lock",
    "depends on who computes: torch lets go of the lock",
)

# %% [markdown]
# ## A crash contained
#
# What a thread cannot contain is a crash: out of memory, a bug in a kernel, an endless loop. **What do you think will
# happen** when the model's process is killed in the middle of a call?

# %%
server = servers["process"]
*_, victim = sorted(server.processes()[1:], key=lambda process: process.memory_info().rss)
long_text = TEXT + " Or so they say." * 60


def ask_many(n=4):
    """Long texts, so that there is time to kill the model in the middle."""
    with ThreadPoolExecutor(n) as pool:
        return list(pool.map(lambda _: ask(server, long_text), range(n)))


with ThreadPoolExecutor(1) as pool:
    asked = pool.submit(ask_many)
    while json.loads(get(server, "health").body)["running"] == 0:
        time.sleep(0.002)
    victim.kill()
    health_after = get(server, "health")
    in_flight = asked.result()

# %%
print("those in flight:    ", sorted(reply.status for reply in in_flight))
print("/health, at once:   ", health_after.status, f"after {health_after.ms:.0f} ms")
waited_ms = max((reply.ms for reply in in_flight if reply.status == 200), default=0)
print(f"who still queued:     200 after {waited_ms:.0f} ms, the time that a new process takes to load")
server.wait_until_ready()  # until then: 503, and Retry-After says when
next_one = ask(server)
print("the next request:   ", next_one.status, f"after {next_one.ms:.0f} ms")

# %% [markdown]
# The texts that the dead process held get a 500. The server, its queue and its `/health` never stop. Those who still
# queued wait for a new process, and get their answer from it. With a thread, the whole server would be gone, and every
# client with it.
#
# The texts that died are *not* tried again: if one of them is the killer, it would kill the next process too.

# %%
stop()

# %% [markdown]
# ## How to start the process
#
# Python knows three ways. *fork* copies the parent as it is, its locks included, but only the one thread that forks.
# *spawn* starts a new interpreter, which imports and loads everything itself. *forkserver* forks a process that did
# nothing but import. **Your prediction:** fork is the quickest and takes the least memory, as it has everything already.
# And what if the parent has computed with torch before?

# %%
from loadtests import start_methods

starts = start_methods.compare(
    methods=quick(("fork", "spawn"), ("fork", "spawn", "forkserver")),
    parents=quick(("computed with torch",), tuple(start_methods.PARENT)),
    patience_s=quick(6, 20),
)
starts

# %% [markdown]
# A fork after torch has computed never answers. The threads that torch computes with stay behind in the parent, and the
# child waits for them. Nothing fails, it hangs: that is why the server spawns. What a fork would save is the imports, a
# second or two at every start, and the memory that they take.

# %% [markdown]
# ## What each costs per call
#
# **Your prediction.** Inline: nothing. A thread: two hand-overs between threads, some 0.1 ms. A process: two messages
# through a socket, packed and unpacked, some 0.3 ms. Measure with a model that returns at once.

# %%
from functools import partial

from workers import tasks
from workers.metrics import Metrics
from workers.process import Process
from workers.settings import Settings

load = partial(tasks.load_alone, Settings(MODEL="loadtests.bench_apps:Instant"))
places = {
    "inline": offload.Inline(load),
    "thread": offload.Thread(load),
    "process": Process(load, 60.0, Metrics()),
}
calls = quick(200, 2000)


async def cost_ms(place):
    """The median time that a call spends outside the model."""
    await place.start()
    took = []
    for _ in range(calls):
        began = time.perf_counter()
        await place.run([TEXT] * 8)
        took.append(time.perf_counter() - began)
    place.stop()
    return float(np.median(took)) * 1000


costs = {name: await cost_ms(place) for name, place in places.items()}

# %%
guess = {"inline": 0.001, "thread": 0.1, "process": 0.3}
with picture("What a place costs per call of 8 texts", "ms", "", xscale="log", xlim=(1e-4, 20)) as ax:
    rows = range(3)
    bars(ax, [guess[name] for name in costs], rows)
    dots(ax, costs.values(), rows)
    ax.axvline(10, color=GREY, linestyle=":")
    ax.text(9, -0.45, "a small model's call", ha="right", color=GREY)
    ax.set_yticks(rows, costs)
    ax.set_ylim(-0.6, len(rows) + 0.2)

# %%
claim(
    "A process for the model costs too much",
    f"per call of 8 texts: inline {costs['inline']:.3f} ms, thread {costs['thread']:.2f} ms,"
    f" process {costs['process']:.2f} ms",
    "fails for time, holds for memory (lesson 1): a process buys that a crash stays contained",
)

# %% [markdown]
# Did you expect the process to cost so little? Eight short texts are a few hundred bytes. It is weights that are heavy, and
# they stay where they are.
#
# **The rule.** A thread by default. A process if the model may crash or hang, or if it computes in Python. Inline never.

# %% [markdown]
# ## Exercises
#
# **★** A model call takes 800 ms and runs on the event loop. The model is busy 60 % of the time. `/health` is asked at
# random moments. What is its mean wait in ms, over all probes?

# %%
mean_wait_ms = ...

checks.exercise_2_1(mean_wait_ms)


# %% [markdown]
# **★★** A supervisor restarts a server after three health checks **in a row** that took longer than its timeout. Write the
# rule. Then try it on `runs["inline"]`.


# %%
def would_restart(latencies_ms, timeout_ms=1000): ...


checks.exercise_2_2(would_restart)


# %% [markdown]
# **★★★** `answer` blocks the loop. Repair it. But take care: the model must never be called twice at the same time.


# %%
class Blocking:
    """Holds a model: a plain function that takes its time."""

    def __init__(self, model):
        self.model = model

    async def answer(self, text):
        return self.model(text)


checks.exercise_2_3(Blocking)

# %% [markdown]
# ## What must hold

# %%
computed = starts[starts["the parent has"] == "computed with torch"].set_index("start method")["outcome"]
assert "hangs" in computed["fork"] and computed["spawn"] == "answers", "never fork after torch has computed"
assert busy["inline"] > 3 * busy["thread"], "a model on the loop blocks /health, one in a thread does not"
assert busy["inline"] > 3 * busy["process"]
assert {*runs["thread"].outcome, *runs["process"].outcome} == {"200"}, "nobody pays for that with an answer"
assert sum_ms > 3 * matmul_ms, "torch lets go of the lock, a C call need not"
assert 500 in {reply.status for reply in in_flight}, "the killed call's texts get an error"
assert (health_after.status, next_one.status) == (200, 200), "a crash is contained"
assert costs["inline"] < costs["thread"] < 5 and costs["inline"] < costs["process"] < 10
