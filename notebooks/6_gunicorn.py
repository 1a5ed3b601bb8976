# %% [markdown]
# # 6. Gunicorn: sync, gthread, uvicorn, asgi
#
# Gunicorn starts *workers*: processes that each hold the whole app, and so the whole model. There are several kinds of
# them, and much advice on how many to take. The advice comes from web sites that wait for a database. You have a model.
#
# **Question: which worker, and how many?**

# %%
from lesson import (
    BLUE,
    CORES,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    RED,
    SKY,
    bars,
    claim,
    dots,
    line,
    load,
)
from lesson import picture, quick, serve, serve_all, stop

from pathlib import Path

from loadtests import drive
from loadtests.modes import Mode

import checks

# %% [markdown]
# ## Four kinds of workers
#
# A config of this project is what differs from the others. Read two of them.

# %%
for name in ("sync", "gthread"):
    print((Path("..") / "workers" / f"{name}.conf.py").read_text())

# %% [markdown]
# | worker | who waits for the model | copies of the model | at most in a batch |
# |---|---|---|---|
# | sync × 2 | the worker itself, all of it | 2 | 1 |
# | gthread 1 × 8 | one of 8 threads | 1 | 8 |
# | gthread 2 × 4 | one of 4 threads | 2 | 4 |
# | uvicorn × 2 | a coroutine: nearly free | 2 | `BATCH_SIZE` |
# | asgi × 1, uvicorn × 1 (`batch`) | a coroutine | 1 | `BATCH_SIZE` |
# | `instances-2`: uvicorn × 1, two model processes | a coroutine | 2, one queue | `BATCH_SIZE` |
#
# The queue, the loop and the model are the same in all of them (`workers/wsgi.py` runs them behind the first three).
#
# **Your prediction.** Lesson 1 says what memory a process with a model takes, lesson 4 what a batch gains. So: two copies
# take twice the memory of one. On two cores, with torch's threads kept to the cores, they do *not* give twice the texts.

# %%
names = quick(
    ["gthread-1x8", "batch"],
    ["sync-2", "gthread-1x8", "gthread-2x4", "uvicorn-2", "instances-2", "asgi", "batch"],
)
users = 32


def saturate(mode, **settings):
    """Its memory, its texts a second with 32 users, and the largest batch that anybody was in."""
    server = serve(mode, cores=None, **settings)
    # Three times: which worker a connection falls to is luck.
    runs = [load(server, "closed", users=users, duration_s=quick(0.6, 4), limit_s=20) for _ in range(3)]
    memory_mb = server.memory_mb()
    stop(server)
    per_s = sum(drive.throughput_per_s(df, quick(0.2, 1)) for df in runs) / 3  # not counting how it began
    return {"MB": memory_mb, "per_s": per_s, "batch": int(max(df.batch_size.max() for df in runs))}


found = {name: saturate(name, BATCH_SIZE=1 if name == "sync-2" else 32) for name in names}
for name, row in found.items():
    print(f"{name:12} {row['MB']:5.0f} MB  {row['per_s']:4.0f} texts/s  largest batch {row['batch']}")

# %%
one_mb = found["batch"]["MB"]
top = 1.15 * max(row["per_s"] for row in found.values())
with picture(
    "Memory against throughput", "memory, MB", "texts/s, 32 users", xlim=(0, None), ylim=(0, top)
) as ax:
    for copies, style in ((1, "-"), (2, "--")):
        ax.axvline(copies * one_mb, color="black", linestyle=style, label=f"predicted: {copies} × one")
    for (name, row), color in zip(found.items(), (BLUE, ORANGE, SKY, PURPLE, GREY, GREEN, RED)):
        dots(ax, row["MB"], row["per_s"], name, color, markersize=11)
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.22), ncols=2)

# %% [markdown]
# Up and to the left is better. Two copies cost twice the memory; what they give in texts depends on how many of them can
# share a call. A sync worker takes one text at a time, so nothing can be batched. Two copies with large batches, uvicorn × 2
# and instances-2, give most: on two cores two models compute at the same time, though the clients want a share.
#
# *Where the prediction fails:* workers share the pages of the libraries' files, so two of them take a bit less than twice.
# `instances-2` takes more: its web process has imported torch, too.

# %% [markdown]
# ## "You need as many threads as the batch size"
#
# With gthread, a text is in the queue because a thread waits for its answer. 8 threads, 8 texts. **Your prediction:** with
# `BATCH_SIZE=32` and 32 users, the largest batch is at most 8 under gthread 1 × 8 (a thread that reads or writes has no
# text in the queue). On an event loop it is up to 32.

# %%
threads = {"gthread-1x8": 8, "gthread-2x4": 4, "sync-2": 1}
shown = [name for name in found if name in threads or name == "batch"]
with picture("The largest batch", "texts in it", "", xlim=(0, 34)) as ax:
    bars(ax, [threads.get(n, 32) for n in shown], range(len(shown)), "predicted limit")
    dots(ax, [found[n]["batch"] for n in shown], range(len(shown)))
    ax.set_yticks(range(len(shown)), shown)
    ax.set_ylim(-0.6, len(shown) - 0.4)
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=2)

# %%
claim(
    "You need as many threads as the batch size",
    f"32 users, BATCH_SIZE=32: the largest batch under gthread 1 × 8 was {found['gthread-1x8']['batch']}, on one event loop"
    f" {found['batch']['batch']}",
    "holds for gthread; fails for asyncio, where a waiting client needs no thread",
)

# %% [markdown]
# ## "Use (2 × cores) + 1 workers"
#
# It stands in Gunicorn's own documentation ("How Many Workers?", chapter Design), for apps that wait for something else
# half of the time. A model waits for nothing. **Your prediction** for $k$ workers on $c$ cores, each with one torch thread:
# texts a second grow up to $k = c$ and then stay; memory grows with $k$ for ever.

# %%
cores = len(CORES)
numbers = quick([cores, 2 * cores + 1], sorted({1, cores, 2 * cores + 1}))
workers = {
    k: saturate(
        Mode(f"uvicorn-{k}", f"gunicorn -c workers/uvicorn.conf.py --workers {k}"),
        BATCH_SIZE=1,
    )
    for k in numbers
}

# %%
with picture(
    "(2 × cores) + 1 workers",
    "workers",
    f"times what {numbers[0]} worker(s) have",
    xticks=numbers,
    ylim=(0, None),
) as ax:
    least = workers[numbers[0]]
    line(ax, numbers, [min(k, cores) / min(numbers[0], cores) for k in numbers], "texts/s, predicted")
    dots(ax, numbers, [workers[k]["per_s"] / least["per_s"] for k in numbers], "texts/s, measured")
    line(ax, numbers, [k / numbers[0] for k in numbers], "memory, predicted", GREY, linestyle="--")
    memory = [workers[k]["MB"] / least["MB"] for k in numbers]
    ax.plot(numbers, memory, "s", color=ORANGE, fillstyle="none", markersize=12, label="memory, measured")

# %%
most = workers[numbers[-1]]
claim(
    "Use (2 × cores) + 1 workers",
    f"{numbers[-1]} workers on {cores} cores: {most['per_s'] / workers[cores]['per_s']:.2f} times the texts/s of {cores}"
    f" workers, for {most['MB'] / workers[cores]['MB']:.1f} times the memory. One process with batches does"
    f" {found['batch']['per_s'] / most['per_s']:.1f} times the texts/s of all {numbers[-1]} together",
    "fails for a model: it computes, it does not wait",
)

# %% [markdown]
# *Where the prediction fails:* the load generator needs a core, too, and here it takes its share of the same ones. So the
# dots fall short of the line at $k = c$. And workers share no queue: a connection belongs to the one that took it first,
# whatever waits there. Of 32 that come at once, two workers took 11 and 21, 16 and 16, and once in six times 0 and 32:
# then the other one idles.

# %% [markdown]
# ## Threads × threads: oversubscription
#
# Torch uses a thread for each core, unless told otherwise, in *each* process. They work in step: after every layer all wait
# for the slowest. So far we gave it one. **Your prediction:** one process with batches, torch with a thread for each core:
# as many times faster as there are cores? The clients run on the same cores, as a proxy or a second worker would.

# %%
by_threads = {1: found["batch"]["per_s"]}
for threads in quick([cores], [cores, 2 * cores]):
    by_threads[threads] = saturate("batch", TORCH_THREADS=threads, BATCH_SIZE=32)["per_s"]
for threads, per_s in by_threads.items():
    print(
        f"{threads} torch threads: {per_s:4.0f} texts/s, {threads * by_threads[1]:4.0f} if threads were all"
    )

# %%
claim(
    "More torch threads are faster",
    f"one process on {cores} cores that it shares with its clients, texts/s by the number of torch threads: "
    + ", ".join(f"{per_s:.0f} with {threads}" for threads, per_s in by_threads.items()),
    "depends on whether the cores are really free: measure it under load, not on an idle machine",
)

# %% [markdown]
# A thread that waits for the others spins: it burns a core for a while rather than sleep. If something else needs that
# core, all wait for the one thread that did not get it, at every layer. The clients took their share of two threads' gain;
# four on two cores take each other's. So: workers × torch threads never above the cores. Whether one less is better where
# other things run, measure.

# %% [markdown]
# ## A timeout that kills healthy workers
#
# Gunicorn kills a worker that has given no heartbeat for `timeout` seconds. On an event loop the heartbeat is a task like
# any other. **What do you think will happen** with a model on the loop (`OFFLOAD=inline`), a timeout of 6 s, and a
# call of about 10 s? And with the model in a thread?

# %%
short = Mode("timeout-6", "gunicorn -c workers/uvicorn.conf.py --workers 1 --timeout 6")
many = {"BATCH_SIZE": 512, "BATCH_WINDOW_MS": 1000, "MAX_QUEUE": 1000, "DEADLINE_S": 60}
places = ("thread", "inline")
fates, killed, burst = {}, {}, 0
for place, server in zip(places, serve_all(*({"OFFLOAD": place} | many for place in places), mode=short)):
    if not burst:  # as many as keep the model busy for 10 s
        few = load(server, "slow", duration_s=1, burst=32, burst_every_s=5, limit_s=30)
        burst = min(int(10 * 32 / (few.model_ms.median() / 1000)), 500)
    df = load(server, "slow", duration_s=1, burst=burst, burst_every_s=5, limit_s=30, timeout_s=30)
    fates[place] = df.outcome.value_counts().to_dict()
    killed[place] = "WORKER TIMEOUT" in server.log()
    stop(server)
    print(f"{place:7} {fates[place]}  a worker was killed: {killed[place]}")
stop()

# %% [markdown]
# (The timeout is 6 s and not 1 s, because loading counts, too: with 1 s the worker is killed while it loads, again and
# again.)
#
# The inline worker was healthy. It computed what it was asked for, and was shot in the middle: not one client of the batch
# got an answer, and the model has to be loaded again. It happens under load, when batches are large: so it happens again.
# (Who was still in the kernel's backlog may get a 503: from the next worker, which has to load first.)
#
# The rule of `workers/deployment.py`: the timeout is longer than any healthy silence, and the model never sits on the
# loop.

# %% [markdown]
# **The answer.** One worker, an event loop, the model in a thread, batches if they pay (lesson 4). For another core, first
# give torch another thread: that brings most of what a second copy does, without its memory. More copies only where memory
# and a core or a GPU are to spare: `INSTANCES`, on the *same* queue. `gunicorn.conf.py` is the first of these.

# %% [markdown]
# ## Exercises
#
# **★** A machine has 4 cores and 5 GB. One worker with your model takes 1.4 GB and uses one core. How many workers?

# %%
number_of_workers = ...

checks.exercise_6_1(number_of_workers)


# %% [markdown]
# **★★** How many torch threads for each of `workers` processes on `cores` cores, so that none are too many?


# %%
def torch_threads(workers, cores): ...


checks.exercise_6_2(torch_threads)


# %% [markdown]
# **★★★** Two workers with a queue each, and a balancer that deals in turn; or one queue for both. A text takes 10 ms, but
# one in ten takes 200 ms. Who waits longer? Write both: given the arrival times and durations (lists), return the mean
# wait before the work begins, for 2 servers.


# %%
def wait_in_turn(arrivals, durations): ...


def wait_shared(arrivals, durations): ...


checks.exercise_6_3((wait_in_turn, wait_shared))

# %% [markdown]
# ## What must hold

# %%
assert found["gthread-1x8"]["batch"] <= 8 < found["batch"]["batch"], "threads bound the batch"
assert workers[cores]["MB"] > 1.3 * found["batch"]["MB"] or cores == 1, "two copies cost memory"
assert found["batch"]["per_s"] > workers[cores]["per_s"], "one copy with batches beats two without"
assert found["batch"]["per_s"] > most["per_s"], "and many"
assert most["MB"] > 1.5 * workers[cores]["MB"] and most["per_s"] < 1.4 * workers[cores]["per_s"]
assert by_threads[cores] < 0.95 * cores * by_threads[1] or cores == 1, (
    "threads give less than their number says"
)
assert fates["inline"].get("200", 0) < fates["thread"].get("200", 0), (
    "a blocked loop is taken for a dead worker"
)
