# %% [markdown]
# # 6. Gunicorn
#
# Gunicorn starts *workers*: processes that each hold the whole app, and so the whole model. There are several kinds of
# them, and much advice on how many to take. The advice comes from web sites that wait for a database. You have a model.
#
# **Question: which worker, and how many?**
#
# Afterwards you can choose the kind and the number of workers, threads and copies for your own model, and say what they
# cost.
#
# It takes about 3.5 minutes (the quick form one), two cores and 5 GB of memory. [What all lessons need](README.md).

# %%
# "No module named 'lesson'"? Open this notebook where it lies, in the project's notebooks/, or by `make learn`.
from lesson import BLUE, CORES, GREY, ORANGE, PURPLE, bars, claim, compare, dots, guessed, holds
from lesson import line, picture, quick, said, score, table, tell, whose

import math

import checks
from loadtests.load import generator
from loadtests.modes import Mode
from support import l06_crowd, l06_requests, l06_workers

# %% [markdown]
# ## Four kinds of workers
#
# Behind all of them are the same queue, the same loop, the same model. They differ in who waits for the model meanwhile: a process,
# a thread, or nobody.
#
# | worker | who waits for an answer | in one batch, at most |
# |---|---|---|
# | `sync` | the whole process; others wait in the kernel, where no queue of ours sees them | 1 |
# | `gthread` with 8 threads | one of the threads | 8 |
# | `asgi`, Gunicorn's own, or uvicorn's worker | a coroutine ([glossary](glossary.md)): nearly free | `BATCH_SIZE` |
#
# `workers/gunicorn/sync.conf.py`, `gthread.conf.py`, `asgi.conf.py` and `uvicorn.conf.py` are the settings for these. Each holds
# only what differs from the others.
#
# (There is one more thing, `workers/gunicorn/dirty.conf.py`. Newer Gunicorns can keep *dirty* workers beside the web workers: a
# pool of processes for work that takes long, each with a model, called over a socket. The name is borrowed from
# Erlang's "dirty schedulers"; nothing about them is unclean. They are a beta. Their queue has no bound and makes no
# batches. So this lesson leaves them out.)

# %% [markdown]
# ## "Gunicorn supports only gevent for async", "as many threads as the batch size"
#
# 32 clients ask again and again. The model takes 0.1 s a call, however many texts are in it (it only sleeps, so we know
# its speed). `BATCH_SIZE` is 32, and there is one worker. **Your guess:** how many texts a second does `gthread` with 8
# threads answer?

# %%
guess_threads = ...  # texts per second, by gthread with 8 threads

# %% [markdown]
# **Prediction.** A text is in the server because somebody waits for its answer. If only $k$ can wait at the same time,
# at most $k$ texts share a call: that is $k$ texts in 0.1 s, if all of them come back at once and the loop holds the batch until
# they do ([anticipation](glossary.md), lesson 4).
#
# A greedy loop does not hold it. The first text back starts a call alone, and the others gather meanwhile. So two batches in a row
# share the $k$ texts: the largest one has $k - 1$, and the mean is $k/2$. The last server below is greedy, to compare. (For
# `sync`, $k$ = 1, it is one text a call.)

# %%
USERS, CALL_S = 32, 0.1
SLEEPS = {"MODEL": "loadtests.bench.apps:Sleeps", "SLEEP_S": CALL_S, "BATCH_SIZE": USERS}
can_wait = quick({}, {"sync": 1}) | {"gthread": 8, "asgi": USERS, "uvicorn": USERS}
can_wait["greedy"] = USERS  # uvicorn again, with a loop that holds no batch
runs = l06_workers.each_kind(can_wait, USERS, SLEEPS)
largest = {name: int(df.batch_size.max()) for name, df in runs.items()}
per_s = {name: generator.throughput_per_s(df, quick(0.4, 0.8)) for name, df in runs.items()}
mean_batch = {name: l06_workers.mean_batch(df) for name, df in runs.items()}
in_call = {name: k / 2 if name == "greedy" else k for name, k in can_wait.items()}  # predicted
expected = {name: n / CALL_S for name, n in in_call.items()}

# %%
from gunicorn.workers import SUPPORTED_WORKERS

tell(f"The kinds of workers that Gunicorn knows by name: {', '.join(SUPPORTED_WORKERS)}.")
title, limits = "Speed grows with the number of those who can wait", (0, 1.15 * USERS / CALL_S)
with picture(title, "texts per second", "", xlim=limits, ylim=(-0.6, len(runs) - 0.4)) as ax:
    rows = range(len(runs))
    bars(ax, list(expected.values()), rows)
    dots(ax, list(per_s.values()), rows)
    guessed(ax, guess_threads, list(runs).index("gthread"))
    ax.set_yticks(rows, runs)

# %%
columns = "worker | largest batch | mean, predicted | mean | texts/s, predicted | texts/s"
rows = ((name, largest[name], f"{in_call[name]:g}", f"{mean_batch[name]:.1f}") for name in runs)
table(columns, *((*row, f"{expected[row[0]]:.0f}", f"{per_s[row[0]]:.0f}") for row in rows))
formula, measured = expected["gthread"], per_s["gthread"]
compare("texts/s with 8 threads", guess=guess_threads, formula=formula, measured=measured)
said(
    mean_batch["uvicorn"] < 0.9 * USERS,
    f"Behind uvicorn's worker the batches held {mean_batch['uvicorn']:.0f} of {USERS} texts: some clients came back after the hold had ended.",
)

# %%
claim(
    "Gunicorn supports only gevent for async",
    who=f"one worker of each kind, a model that sleeps {CALL_S} s a call, {USERS} clients, no gevent in the server",
    number=f"Gunicorn's own `asgi` worker answers {per_s['asgi']:.0f} texts/s in batches of up to {largest['asgi']}, uvicorn's"
    f" worker {per_s['uvicorn']:.0f} in up to {largest['uvicorn']}",
    verdict='fails: `worker_class = "asgi"`, or uvicorn\'s worker',
)
claim(
    "You need as many threads as the batch size",
    who=f"one worker of each kind, a model that sleeps {CALL_S} s a call, {USERS} clients, BATCH_SIZE={USERS}",
    number=f"gthread with 8 threads: batches of up to {largest['gthread']}, {per_s['gthread']:.0f} texts/s; one event loop: up"
    f" to {largest['uvicorn']}, {per_s['uvicorn']:.0f} texts/s",
    verdict="holds for gthread; fails for asyncio, where a waiting client needs no thread",
)

# %% [markdown]
# So with `gthread` you need as many threads as the batch size. Where an event loop waits, you need none.
#
# *Where the formula fails:* it assumes that all clients come back together. The loop needs some calls to learn that they do. A
# client that comes back after the hold has ended misses the batch and waits for the next one. The greedy server's clients come back
# just as fast, but the first of them starts a call that the others miss.
#
# ## "Then take 1,024 threads"
#
# So more threads, larger batches. 1,024 of them? People say that this is far too many. **Your guess:** how many MB of
# memory does a thread take that only waits? (Linux reserves an address range of 8 MB for each.)

# %%
guess_thread_mb = ...  # MB for each waiting thread

# %% [markdown]
# **Prediction.** Reserved is not used. So start 200 threads here that only wait, and see how much memory this
# notebook's own process gains. 1,000 threads take five times that.
#
# Then 1,000 clients, all waiting at the same time, behind `gthread` with 1,024 threads and behind one event loop. The
# model sleeps 0.1 s a call and takes 64 texts at once. So it does 640 a second, if the server can keep up. Meanwhile
# somebody asks for `/health`.

# %%
thread_mb = l06_crowd.waiting_thread_mb()
tell(f"A waiting thread took {thread_mb * 1000:.0f} kB here. 1,000 of them: {thread_mb * 1000:.0f} MB.")
CROWD = 1000
patient = {"BATCH_SIZE": 64, "MAX_QUEUE": 4000, "QUEUE_TARGET_S": 0, "DEADLINE_S": 30}
command = "gunicorn -c workers/gunicorn/gthread.conf.py --threads 1024 --worker-connections 4000"
threads_1024 = Mode("1,024 threads", command)
event_loop = Mode("an event loop", "gunicorn -c workers/gunicorn/uvicorn.conf.py --workers 1")
crowds = [l06_crowd.measure(mode, CROWD, **(SLEEPS | patient)) for mode in (threads_1024, event_loop)]
with_threads, with_loop = crowds
l06_crowd.show(crowds, CROWD, 64 / CALL_S)

# %%
more, title = "MB more than before the crowd", "Waiting takes little memory, even in threads"
axes = {"xlim": (0, 1100), "ylim": (0, None)}
with picture(title, "clients who wait", "MB more than without them", **axes) as ax:
    line(ax, [0, CROWD], [0, CROWD * thread_mb], "predicted, threads")
    dots(ax, [CROWD], [with_threads[more]], "1,024 threads", ORANGE)
    dots(ax, [CROWD], [with_loop[more]], "an event loop")
    guessed(ax, 50, 50 * guess_thread_mb, "your guess, for 50")
formula, measured = CROWD * thread_mb, with_threads[more]
compare("MB for 1,000 waiting threads", guess=CROWD * guess_thread_mb, formula=formula, measured=measured)

# %%
health = "/health, median ms"
claim(
    "1,024 threads are too many",
    who=f"one gthread worker with 1,024 threads, {CROWD:,} clients at the same time, a model that sleeps {CALL_S} s a call of 64",
    number=f"{with_threads['answers/s']:.0f} answers/s, /health after {with_threads[health]:.0f} ms (median),"
    f" {with_threads[more]:.0f} MB for the waiting; an event loop: {with_loop['answers/s']:.0f}/s,"
    f" {with_loop[health]:.0f} ms, {with_loop[more]:.0f} MB",
    verdict=f"fails for memory; {l06_crowd.speed_verdict(crowds, CROWD)}",
)

# %% [markdown]
# Threads that wait cost little memory. What costs is to wake them: look at the switches from thread to thread. A
# request goes from a thread to the event loop, and its answer comes back the same way (`workers/gunicorn/wsgi.py`). Each switch
# is a wait, for the core or for Python's lock.
#
# *Where the formula fails:* a request is more than its thread. Its buffers, its text and its place in the queue take
# memory, too. The event loop's dot shows how much: it has the requests without the threads.
#
# ## "A model server serialises: one execution at a time"
#
# 16 clients ask in the same moment. The model takes 0.1 s a call. **Your guess:** after how many seconds has the last
# of them its answer, by default?

# %%
guess_last_s = ...  # seconds

# %% [markdown]
# **Prediction.** One copy of a model does one call at a time. With $k$ copies on the same queue and up to $B$ texts in
# a call, $n$ texts take $\lceil n / (k B) \rceil$ rounds of 0.1 s. (A first text goes alone: the model is free, and these clients were
# not just answered, so the loop has no reason to hold it. So with batches it is one round more.)

# %%
choices = {"default": (1, 1), "2 copies": (2, 1), "4 copies": (4, 1), "batches of 8": (1, 8)}
last_s = l06_workers.last_of_16(choices, SLEEPS)
rounds = {name: math.ceil(16 / (k * most)) + (most > 1) for name, (k, most) in choices.items()}
title, axis = "One copy, one call at a time", "s until the last of 16 has its answer"
with picture(title, axis, "", xlim=(0, 1.9), ylim=(-0.6, 3.6)) as ax:
    bars(ax, [CALL_S * n for n in rounds.values()], range(4), "_")
    ax.text(CALL_S * rounds["2 copies"], 1.35, "predicted", ha="center")
    dots(ax, list(last_s.values()), range(4))
    guessed(ax, guess_last_s, 0)
    ax.set_yticks(range(4), choices)

# %%
compare(axis, guess=guess_last_s, formula=16 * CALL_S, measured=last_s["default"])
claim(
    "A model server serialises by default, one execution at a time",
    who=f"this server around a model that sleeps {CALL_S} s a call, 16 clients in the same moment",
    number=", ".join(f"{name}: {seconds:.2f} s for all" for name, seconds in last_s.items()),
    verdict="holds for each copy; a batch gives one execution many texts, `INSTANCES` gives more copies",
)

# %% [markdown]
# That it serialises is no flaw. A model that computes uses its core fully, so a second call beside it would only slow
# down the first. More copies pay where there are more cores or devices for them.
#
# ## "Use (2 × cores) + 1 workers"
#
# Gunicorn's documentation says so ("How Many Workers?", chapter Design), for apps that wait for something else
# half of the time. Now it is the bundled model again, and 32 clients. One `sync` worker for each core answers some
# texts per second. **Your guess:** how many times as many do (2 × cores) + 1 of them answer?

# %%
guess_more = ...  # times the texts/s

# %% [markdown]
# **Prediction** for $k$ workers on $c$ cores, each with one torch thread. A model waits for nothing: it computes. So texts
# per second grow until $k = c$, and then stay. Memory grows with $k$ forever.
#
# And batches? One event loop with `BATCH_SIZE=32`, then one for each core, then as many as the rule says. Like is
# compared with like: `sync` workers run one text at a time, the event loops all run batches.

# %%
cores = len(CORES)
rule, which_model = quick(cores + 1, 2 * cores + 1), quick(SLEEPS, {})
said(
    which_model,
    "The quick form has no time to load the bundled model so often. It takes the one that sleeps.",
)
numbers = sorted({1, cores, rule})
plan = [("sync", k, 1) for k in numbers[1:]] + [("uvicorn", k, 32) for k in numbers]
found, shares = l06_workers.by_workers(plan, USERS, which_model)
names = {("sync", cores): f"sync × {cores}", ("uvicorn", 1): "event loop"}
names |= {("uvicorn", cores): f"event loop × {cores}"}
names |= quick({}, {"gthread-1x8": "gthread, 8 threads", "instances-2": "event loop, 2 copies"})

# %%
sync, many, loops = found["sync", cores], found["sync", rule], {k: found["uvicorn", k] for k in numbers}
memory = [found["sync", k]["MB"] / sync["MB"] for k in numbers[1:]]
sync_speed = [found["sync", k]["per_s"] / sync["per_s"] for k in numbers[1:]]
loop_speed = [loops[k]["per_s"] / loops[cores]["per_s"] for k in numbers]
highest = max(*memory, *sync_speed, *loop_speed, rule / cores, guess_more)
axes = {"xticks": numbers, "xlim": (0.8, rule + 0.2), "ylim": (0, 1.2 * highest)}
title = "(2 × cores) + 1: more memory, not more speed"
with picture(title, "workers", f"times what {cores} workers have", **axes) as ax:
    line(ax, numbers, [k / cores for k in numbers], "memory", GREY, linestyle="--")
    dots(ax, numbers[1:], memory, "_", GREY)
    line(ax, numbers, [min(k, cores) / cores for k in numbers], "texts/s, predicted")
    dots(ax, numbers[1:], sync_speed, "texts/s, sync")
    ax.plot(numbers, loop_speed, "D", color=ORANGE, label="texts/s, in batches")
    guessed(ax, rule, guess_more)

# %%
columns = "workers | texts in a call, mean | texts/s | memory, MB | of which each process, MB"
called = {key: f"{key[0]} × {key[1]}" if isinstance(key, tuple) else names[key] for key in found}
rows = (
    (f"{row['batch']:.1f}", f"{row['per_s']:.0f}", f"{row['MB']:.0f}", " + ".join(row["each"]))
    for row in found.values()
)
table(columns, *((called[key], *row) for key, row in zip(found, rows)))
dealt = " | ".join(["32 connections at once, try", *(f"worker {n}" for n in range(1, len(shares[0]) + 1))])
table(dealt, *((i, *each) for i, each in enumerate(shares, 1)))

# %%
slower = loops[rule]["per_s"] < 0.9 * loops[cores]["per_s"]
said(
    slower,
    f"{rule} event loops are slower than {cores}: their batches hold {loops[rule]['batch']:.0f} texts in place of"
    f" {loops[cores]['batch']:.0f}, because each has a queue of its own, and {rule} models take turns on {cores} cores.",
)

faster = many["per_s"] / sync["per_s"]
compare("times the texts/s with the rule, sync", guess=guess_more, formula=1, measured=faster)

# %%
fails = "fails for a model: it computes, it does not wait"
claim(
    "Use (2 × cores) + 1 workers",
    who=f"{'a model that sleeps' if which_model else 'the bundled model'} on {cores} cores, shared with {USERS} clients; {rule} workers against {cores}",
    number=f"sync, one text a call: {faster:.2f} times the texts/s for {many['MB'] / sync['MB']:.1f} times the"
    f" memory; event loops with batches: {loops[rule]['per_s'] / loops[cores]['per_s']:.2f} times for"
    f" {loops[rule]['MB'] / loops[cores]['MB']:.1f} times; {cores} loops against one:"
    f" {loops[cores]['per_s'] / loops[1]['per_s']:.2f} times",
    verdict=fails if faster < 1.4 else "untested: other programs took the cores in this run",
)

# %% [markdown]
# *Where the formula fails:*
#
# - The load generator needs a core, too, and takes its share of the same ones. So the step from one worker to one for
#   each core is smaller than predicted.
# - Workers share no queue. A connection belongs to the one that accepted it first, whatever waits there. If the kernel
#   tossed a coin for each, 16 of 32 would fall to either worker, give or take 3. The second table shows what it did.
#
# ## Memory against speed
#
# **Your guess:** how many MB do two workers with the model take?

# %%
guess_two_mb = ...  # MB

# %% [markdown]
# **Prediction:** twice what one takes. (In the picture, up and to the left is better.)

# %%
one_mb, top = loops[1]["MB"], 1.25 * max(found[key]["per_s"] for key in names)
title, axes = "Batches give speed, copies cost memory", {"xlim": (0, None), "ylim": (0, top)}
with picture(title, "memory, MB", "texts/s, 32 users", **axes) as ax:
    for copies, name in ((1, " one"), (2, " twice one")):
        ax.axvline(copies * one_mb, color="black", linestyle=":")
        ax.text(copies * one_mb, 2, name, fontsize=11)
    for key, name in names.items():
        dots(ax, found[key]["MB"], found[key]["per_s"], name, ORANGE if key[0] == "sync" else BLUE)
    guessed(ax, guess_two_mb, loops[cores]["per_s"] / 2)
compare("MB of two workers", guess=guess_two_mb, formula=2 * one_mb, measured=loops[cores]["MB"])
separate = found.get("instances-2", {"MB": 0})["MB"] / one_mb
said(separate, f"One web process with two copies in processes of their own: {separate:.2f} times.")

# %% [markdown]
# *Where the formula fails:* hardly. Workers share the pages of the libraries' files, and shared pages are counted once.
# So two take a little less than twice. Two copies in processes of their own have a third process beside them, the one
# that speaks HTTP. It doesn't load torch, so it is small: see the last column of the table above.
#
# ## Threads × threads
#
# Torch computes with several threads of its own, by default one for each core, in *each* process. They work in step:
# after every operation all wait for the slowest. This server looks at the cores once a second, and takes only as many
# threads as nobody else uses (`workers/tasks/threads.py`). Here we take that off, and call the model directly. Beside it
# there is nothing; then another program that keeps one core busy. **Your guess:** how many times as fast as one thread
# are two, beside that program?

# %%
guess_beside = ...  # times as fast

# %% [markdown]
# **Prediction.** $n$ threads on as many free cores: $n$ times as fast. If another program wants one of the cores, the
# thread there gets half of it. All wait for the slowest. So two threads on two cores are $2 \cdot \frac12 = 1$ times as
# fast as one.

# %%
scenes = {"nothing else": [], "one core busy": [1.0]}
hows = {"1": "1 thread", str(cores): f"{cores} threads"}
hows |= quick({}, {str(2 * cores): f"{2 * cores} threads", "ours": "as the server chooses"})
speeds = l06_workers.by_threads(scenes, hows)
rows = ((scene, hows[how], f"{per_s:.0f}", f"{ms:.1f}") for (scene, how), (per_s, ms) in speeds.items())
table("beside it | torch threads | texts/s | processor time of a text, ms", *rows)

# %%
all_of_them, four = str(cores), str(2 * cores)
(one_per_s, one_ms), (all_per_s, all_ms) = (speeds["one core busy", how] for how in ("1", all_of_them))
said(
    speeds.get(("one core busy", four), (0, 0))[0] > 1.1 * all_per_s,
    f"Beside a busy core {four} threads are faster than {cores}: the kernel shares its time per thread, so {four} threads beside one neighbour"
    f" get {four} fifths of all cores where {cores} get two thirds. That takes from the neighbour, and works until it does the same.",
)

tell(
    f"Beside a busy core a text takes {one_ms:.1f} ms of processor time with one thread, {all_ms:.1f} ms with {cores}."
    f" {'So they spin: what is added is waiting.' if all_ms > 1.3 * one_ms else 'So they mostly sleep.'}"
)

# %%
alone = speeds["nothing else", all_of_them][0] / speeds["nothing else", "1"][0]
beside, what = all_per_s / one_per_s, "two threads beside a busy core, times one"
compare(what, guess=guess_beside, formula=cores / 2, measured=beside)
claim(
    "More torch threads are faster",
    who=f"the bundled model in batches of 32, called in a loop, {cores} cores",
    number=f"{cores} threads against one: {alone:.2f} times the texts/s on an idle machine, {beside:.2f} times"
    " while another program keeps one core busy",
    verdict="depends on whether the cores are free: workers × torch threads must not exceed the free cores",
)

# %% [markdown]
# *Where the formula fails:* "half of a core" is not half of every moment. The kernel gives the core to one of them for
# some milliseconds, then to the other. An operation of the model is much shorter. So all threads stand still until the
# one without a core gets it back. Do they sleep meanwhile, or do they spin, which is to look again and again? A spinning
# thread keeps its core busy. So the processor time of a text tells, above.
#
# ## A timeout that kills healthy workers
#
# Gunicorn kills a worker that has given no sign of life, no *heartbeat*, for `timeout` seconds. On an event loop the
# heartbeat is a task like any other. The timeout is 2 s, and a call of the model takes 5 s. Two servers: the model in a
# thread, and on the event loop. **Your guess:** which status does the client of the second get? (0 for none.)

# %%
guess_status = ...

# %% [markdown]
# **Prediction.** In a thread: 200 after 5 s. On the loop: no heartbeat for 5 s. Gunicorn's *master*, the process that
# started the worker, kills it after 2 to 4 s, in the middle of the call.

# %%
slow = SLEEPS | {"SLEEP_S": 5, "BATCH_SIZE": 1}
replies, killed = l06_workers.ask_slow(("thread", "inline"), slow)
where = {"thread": "in a thread", "inline": "on the event loop"}
statuses = {place: reply.status or "none: the connection was closed" for place, reply in replies.items()}
rows = ((where[one], statuses[one], f"{reply.ms / 1000:.1f}", killed[one]) for one, reply in replies.items())
table("the model is | status | after, s | Gunicorn killed the worker", *rows)
tell(f"You guessed {guess_status} for the second.")

# %% [markdown]
# The worker was healthy. It computed what it was asked for, and was shot in the middle. Its clients get nothing, and
# the model has to be loaded again. It happens under load, when batches are large: so it happens again.
#
# The rule of `workers/gunicorn/common.py`: the timeout is longer than any healthy silence, and the model never sits on the
# loop.
#
# ## "100,000 requests per second per core"
#
# Such figures are on the front pages of web frameworks. Take a bare Starlette handler. It reads the body and returns
# 500 bytes of JSON. **Your guesses:** how many requests a second does it answer on one core? And this server, in batches
# of 32, if its model took no time?

# %%
guess_bare, guess_instant = ..., ...  # requests per second

# %% [markdown]
# **Prediction.** Call the bare app as uvicorn does, but without any network, here in the notebook. It takes some
# microseconds. A core can't answer more than one second ÷ that.

# %%
app_us = min([await l06_requests.call_s(500) for _ in range(quick(3, 10))]) * 1e6
instant = {"MODEL": "loadtests.bench.apps:Instant"}
rates = {
    "bare Starlette": l06_requests.per_s("bare", "loadtests.bench.apps:bare"),
    "this server, batches of 32": l06_requests.per_s("batch", "server:app", BATCH_SIZE="32", **instant),
    "this server, one by one": l06_requests.per_s("single", "server:app", BATCH_SIZE="1", **instant),
}

# %%
with picture("One core in Python is far from 100,000", "requests per second", "", xlim=(0, 110_000)) as ax:
    bars(ax, [1e6 / app_us], [0], "_")
    ax.text(1e6 / app_us - 1500, 0.35, "predicted, at most")
    dots(ax, list(rates.values()), range(3), "_")
    ax.text(list(rates.values())[2] + 2500, 2, "measured", color=BLUE, va="center")
    guessed(ax, [guess_bare, guess_instant], [0, 1], "_")
    ax.text(guess_instant + 2500, 1, whose("your guess"), color=PURPLE, va="center")
    ax.axvline(100_000, color=GREY, linestyle=":")
    ax.text(98_000, 1.5, "the claim", rotation=90, ha="right", va="center", color=GREY)
    ax.set_yticks(range(3), rates)
    ax.set_xticks([0, 50_000, 100_000], ["0", "50,000", "100,000"])
    ax.set_ylim(-0.6, 2.6)

# %%
bare_per_s, batched_per_s, single_per_s = rates.values()
compare("requests/s of a bare handler", guess=guess_bare, formula=1e6 / app_us, measured=bare_per_s)
claim(
    "100,000 requests per second per core",
    who="one core of the server, 32 connections that stay open, on another core: bare Starlette on uvicorn, and this server around a model"
    " that returns at once",
    number=f"{bare_per_s:,.0f}/s; {batched_per_s:,.0f}/s in batches, {single_per_s:,.0f}/s one by one. Without any network the bare app"
    f" takes {app_us:.0f} µs, which allows {1e6 / app_us:,.0f}/s",
    verdict="fails for Starlette on uvicorn" if bare_per_s < 5e4 else "holds on this machine",
)

# %% [markdown]
# *Where the formula fails:* the bar is what Starlette alone would allow. HTTP comes on top: reading from the socket,
# taking the headers apart, writing the reply. For each request that is at least two calls into the kernel.
#
# And does it matter? The bundled model does some hundred texts a second on this core. The server around it could do
# some thousands. Look for speed where the time goes.
#
# ## The answer
#
# One worker, an event loop, the model in a thread, batches if they pay (lesson 4): that is `gunicorn.conf.py`. Another core? Give
# torch another thread first, if the core is free. It costs no memory. More copies only where memory and a core or a GPU
# are to spare, and then `INSTANCES`, on the *same* queue.
#
# ## Exercises
#
# Fill in and run. The checker tells you what it thinks; it never stops the notebook. Solutions are in
# `notebooks/solutions/`.
#
# **★** A machine has 4 cores and 5 GB. One worker with your model takes 1.4 GB and uses one core. How many workers?

# %%
number_of_workers = ...

checks.exercise_6_1(number_of_workers)

# %% [markdown]
# **★★** `workers` processes share `cores` cores. How many torch threads may each have? All together must not be more than
# the cores. But each process needs at least one.


# %%
def torch_threads(workers, cores): ...


checks.exercise_6_2(torch_threads)

# %% [markdown]
# **★★★** Two workers with a queue each, and a balancer that deals in turn; or one queue for both. A text takes 10 ms,
# but one in ten takes 200 ms. Who waits longer? Write both: given the arrival times and durations (lists), return the
# mean wait before the work begins, for 2 servers.


# %%
def wait_in_turn(arrivals, durations): ...


def wait_shared(arrivals, durations): ...


checks.exercise_6_3((wait_in_turn, wait_shared))

# %% [markdown]
# ## In the lab
#
# 24 clients, a model that takes 24 texts per call. Choose the number of threads of one gthread worker, so that a call holds
# at least 19 on average. One number. It starts the real server and judges what it measures.

# %%
import labs

threads = ...

labs.lab_6(threads)

# %% [markdown]
# ## Ten questions
#
# Answer them aloud, then open the answers.
#
# 1. Why do k threads bound the batch at k?
# 2. Why does an event loop need no threads for waiting?
# 3. Why are 1,024 threads cheap in memory?
# 4. Why (2 × cores) + 1 for web sites and not for models?
# 5. Why are five event loops slower than two?
# 6. Why do connections fall unevenly?
# 7. Why do torch's threads hate a busy neighbour?
# 8. Why is a heartbeat lost under inline?
# 9. Why must a timeout exceed the longest healthy silence?
# 10. Why ignore requests per second of frameworks?
#
# <details><summary>Answers</summary>
#
# 1. A text is inside only while somebody waits for its answer.
# 2. A waiting coroutine is a small object, not a stack that has to be woken.
# 3. Reserved is not used: a thread that waits touches some pages.
# 4. A web handler waits half of its time; a model computes.
# 5. Five queues make five small batches, and five models share the cores.
# 6. A worker that is awake accepts several at once; the kernel deals no turns.
# 7. They work in step: all wait for the one without a core.
# 8. It is a task of the loop, and the loop computes.
# 9. Else healthy workers are killed in the middle of large batches.
# 10. The model takes hundreds of times as long as the framework.
# </details>
#
# ## How far off were you? And what must hold

# %%
score()
assert largest["gthread"] <= 8, "threads bound the batch"
assert replies["inline"].status == 0 and killed["inline"], "a blocked loop is taken for a dead worker"
holds(min(largest["asgi"], largest["uvicorn"]) > 8, "an event loop doesn't")
holds(per_s["uvicorn"] > max(1.5 * per_s["gthread"], 1.4 * per_s["greedy"]), "all who can wait fill a batch")
holds(with_threads["threads"] > 500 > with_loop["threads"], "each waiting client had its thread")
holds(with_threads[more] < 300, "and it took little memory")
holds(last_s["default"] > 1.6 * last_s["2 copies"], "one call at a time, unless there are copies")
holds(last_s["default"] > 3 * last_s["batches of 8"], "or batches")
holds(many["MB"] > 1.5 * sync["MB"] and faster < 1.4, "copies cost memory; more than cores don't help")
holds(loops[rule]["per_s"] < 1.4 * loops[cores]["per_s"], "with batches neither")
holds(loops[1]["per_s"] > sync["per_s"], "one copy with batches beats a copy for each core without")
holds(beside < alone or cores == 1, "threads need free cores")
holds(replies["thread"].status == 200 and not killed["thread"], "a model in a thread lets the heart beat")
holds(single_per_s < bare_per_s < 1e6 / app_us, "HTTP costs more than the framework")

# %% [markdown]
# ## Take away
#
# - One event loop, one model, one queue. A client that waits there costs nearly nothing, and all that wait can share a batch.
# - A model computes. So workers × torch threads must not exceed the cores that are really free, and each worker costs a
#   whole model.
# - A timeout must be longer than any healthy silence, and the model must not sit on the event loop.
#
# Next: [Lesson 7](7_your_own_model.ipynb). The same for a model of your own.
