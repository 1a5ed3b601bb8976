# %% [markdown]
# # 2. Don't block the loop
#
# An asyncio server does everything in one thread. Its *event loop* goes round: take connections, read, answer `/health`. A
# model call is one long computation.
#
# **Question: where should the model run, so that the rest of the server stays awake?**
#
# *Afterwards you can* choose between the event loop, a thread and a process for your own model, and say what each costs.
#
# It takes about 2 minutes (the quick form 40 s), two cores and 3 GB of memory. [What all lessons need](README.md).

# %%
# "No module named 'lesson'"? Open this notebook where it lies, in the project's notebooks/, or by `make learn`.
from lesson import BLUE, GREEN, GREY, ORANGE, TEXT, ask, ask_together, claim, compare, dots, guessed, holds
from lesson import line, load, picture, quick, said, score, serve, serve_all, stop, table, tell, way

import inspect
import time

import numpy as np

import checks
from workers import offload

# %% [markdown]
# ## The three places
#
# There are three places: on the event loop itself (`OFFLOAD=inline`), in a thread (`thread`, the default), in a process of
# its own (`process`). Same server, same model; one setting differs.

# %%
way(
    ("clients", "server.py", "queue", "loop", "model"),
    ("clients", "server.py", "queue", "loop", "thread", "model"),
    ("clients", "server.py", "queue", "loop", "process", "model"),
    changed={"thread", "process"},
    title="inline, thread, process",
)

# %% [markdown]
# In the first row the loop itself computes the model. In code the difference is one line. `await` means: until the answer is
# there, the event loop does something else.


# %%
def lines_with(function, words):
    return [row.strip() for row in inspect.getsource(function).splitlines() if words in row]


print("inline:", *lines_with(offload.Inline.run, "self.model("))
print("thread:", *lines_with(offload.Thread.run, "self.model("))
PLACES = {"inline": BLUE, "thread": ORANGE, "process": GREEN}
started = serve_all(*({"OFFLOAD": place, "BATCH_SIZE": 32} for place in PLACES))
servers = dict(zip(PLACES, started))
for server in started:
    ask_together(server, [TEXT] * 4)
memory_mb = {place: server.memory_mb() for place, server in servers.items()}

# %% [markdown]
# ## `/health` while the model works
#
# Every 2 s a burst of long texts arrives. Then the model is busy for a while. All the time somebody asks `/health`, as a
# load balancer does.

# %%
from loadtests.load import texts

long_text = texts.corpus("long")[0].text
long_ms = float(np.median([ask(servers["inline"], long_text).ms for _ in range(7)]))
burst = max(4, min(quick(8, 24), int(1000 / long_ms)))  # a slow machine has to be done before the next one
tell(f"One long text: S = {long_ms:.0f} ms. A burst is {burst} of them.")

# %% [markdown]
# **With the model on the event loop: how long is the longest wait for `/health`?**

# %%
guess_inline_ms = ...  # the longest wait with inline
guess_thread_ms = ...  # the longest wait with a thread

# %% [markdown]
# **Prediction.** The burst keeps the loop for $n$ texts, $n \cdot S$. A probe that arrives $t$ after the start waits for the rest:
# $n \cdot S - t$. So the picture is a sawtooth: high at the start of a burst, falling to nothing at its end. With a thread or a
# process the loop is free: a millisecond or two, most of the time. (The longest of hundreds of waits can be longer: the loop shares its
# core with the model, and the operating system gives the core to each for some milliseconds.)

# %%
duration_s = quick(3, 8)
runs = {
    place: load(server, "slow", duration_s=duration_s, burst=burst, health_per_s=30, limit_s=20)
    for place, server in servers.items()
}
health = {place: df[df.kind == "health"] for place, df in runs.items()}

# %%
with picture("A model on the loop turns /health into a sawtooth", "time, s", "wait for /health, ms") as ax:
    top, starts = burst * long_ms, np.arange(0, duration_s, 2)
    saw = [(start + at, height) for start in starts for at, height in ((0, 0), (0, top), (top / 1000, 0))]
    line(ax, *zip(*saw, (duration_s, 0)), "formula, inline")
    guessed(ax, [0], [guess_inline_ms])
    for place, color in PLACES.items():
        dots(ax, health[place].due_s, health[place].latency_ms, place, color, markersize=4)

# %%
from support.l02_health import while_busy

found = {place: while_busy(df) for place, df in runs.items()}
busy_ms, worst_ms, alone = ({place: found[place][i] for place in PLACES} for i in range(3))
table(
    "while the model works | your guess, longest, ms | longest wait, ms | median wait, ms | texts in a batch of their own",
    *(
        (place, guess, f"{worst_ms[place]:.0f}", f"{busy_ms[place]:.1f}", f"{alone[place]:.0%}")
        for place, guess in zip(PLACES, (guess_inline_ms, guess_thread_ms, "-"))
    ),
)

# %%
what, longest_ms = "the longest wait for /health, inline, ms", worst_ms["inline"]
compare(what, guess=guess_inline_ms, formula=burst * long_ms, measured=longest_ms)
said(
    worst_ms["thread"] > 5 * busy_ms["thread"],
    f"With a thread the typical wait is {busy_ms['thread']:.1f} ms and the longest {worst_ms['thread']:.0f} ms: there the loop was awake, but it"
    " had no core, because the model's thread had it.",
)

# %% [markdown]
# The sawtooth is there for `inline`, and only there.
#
# *Where the formula fails:* many dots lie far below the line. A burst is many calls, and between two of them the loop goes
# round once. It takes in one new connection each time (lesson 1, bug 3). So a probe over a new connection waits behind the
# burst. Over an open one the wait is a call or two. That is also why most texts run alone with `inline`: the others are
# still outside. So `inline` loses its batches, too. Let us check that: the same burst, and two strangers.

# %%
from support.l01_crowd import crowd_at

door = crowd_at(servers["inline"], long_text, burst, inside=False, after_s=0.03)
table(
    "a stranger with | formula, ms | waited, ms",
    ("an open connection", f"less than {2 * long_ms:.0f}", f"{door.open_404_ms:.0f}"),
    ("a new connection", f"{burst * long_ms - 30:.0f}", f"{door.new_404_ms:.0f}"),
)
most = max(count for _, count in door.outside)
tell(
    f"Most that stood outside at a time: {most} of {burst}. A burst of {1000 / long_ms:.0f} such texts keeps a new connection waiting"
    " for a whole second."
)

# %% [markdown]
# Why this matters: others judge a server by `/health`. A load balancer takes a server out of rotation that does not answer
# in time. An orchestrator restarts it; Kubernetes waits for one second by default, and restarts after the third failure in
# a row. So a busy server is taken for a dead one, at the worst moment: under load.
#
# "Blocking matters only above 1 s an inference," some say. But look at the longest wait beside the time of one call: a row of
# short calls blocks as one long call does. [Lesson 5](5_saying_no.ipynb) puts that claim to the test, under overload.

# %%
claim(
    "A slow model makes a slow /health",
    who=f"this server, bursts of {burst} long texts, /health asked 30 times a second",
    number=f"median wait while the model works: {busy_ms['inline']:.0f} ms inline, {busy_ms['thread']:.1f} ms with a"
    f" thread, {busy_ms['process']:.1f} ms with a process",
    verdict="fails, unless the model sits on the event loop",
)

# %% [markdown]
# ## What the GIL lets through
#
# "Threads don't help in Python: there is the GIL." The GIL is a lock. Only the thread that holds it runs Python. So it is true
# that only one thread runs Python at a time. A thread that computes in Python has to hand the lock over after a while. A C
# function need not. Either it lets go of the lock by itself, or it keeps it until it returns.
#
# A metronome thread ticks every millisecond. The main thread works. **How long is the longest silence of the metronome**
# while the work is (a) a Python loop, (b) one call of `sum`, which is C and keeps the lock, (c) torch?

# %%
guess_loop_ms = ...
guess_sum_ms = ...
guess_torch_ms = ...

# %% [markdown]
# **Prediction.** (a) A Python loop hands over when the *switch interval* has passed: a tick and that interval. (b) `sum`
# keeps the lock for the whole call. To know how long that is, we time the sum of a tenth of the numbers, and multiply by ten.
# (c) torch lets go: a tick, as if nobody worked.

# %%
import sys

import torch

torch.set_num_threads(1)
switch_ms = sys.getswitchinterval() * 1000
numbers = 20_000_000
began = time.perf_counter()
sum(range(numbers // 10))
tenth_ms = (time.perf_counter() - began) * 1000
tell(f"The switch interval is {switch_ms:.0f} ms. A tenth of the sum takes {tenth_ms:.0f} ms.")

# %%
from support.l02_silence import silences_ms


def python_loop():
    for _ in range(6_000_000):
        pass


square = torch.rand(1500, 1500)
works = {  # what is done, the formula, the guess
    "nobody works": (lambda: time.sleep(0.5), 1, None),
    "torch": (lambda: [square @ square for _ in range(4)], 1, guess_torch_ms),
    "Python loop": (python_loop, 1 + switch_ms, guess_loop_ms),
    "one sum()": (lambda: sum(range(numbers)), 10 * tenth_ms, guess_sum_ms),
}

# %%
found = {name: silences_ms(work) for name, (work, _, _) in works.items()}
typical, silences = ({name: both[at] for name, both in found.items()} for at in (0, 1))
mark = {"linestyle": "none", "marker": "_", "markersize": 16, "markeredgewidth": 3}
with picture("Who keeps the lock silences the others", "", "longest silence, ms", yscale="log") as ax:
    columns = range(len(works))
    line(ax, columns, [ms for _, ms, _ in works.values()], "formula", **mark)
    guessed(ax, columns, [guess or np.nan for _, _, guess in works.values()])
    dots(ax, columns, silences.values())
    ax.set_xticks(columns, works)
    ax.set(xlim=(-0.5, len(works) - 0.5), ylim=(0.5, 1000))

# %%
columns = "who works beside the metronome | your guess, ms | formula, ms | longest silence, ms | typical silence, ms"
rows = [(name, guess or "-", f"{formula:.0f}") for name, (_, formula, guess) in works.items()]
table(columns, *((*row, f"{silences[row[0]]:.1f}", f"{typical[row[0]]:.1f}") for row in rows))
_, torch_ms, _, sum_ms = silences.values()
began = time.perf_counter()
square @ square
product_ms = (time.perf_counter() - began) * 1000
said(
    product_ms > 2 * torch_ms,
    f"One of torch's products takes {product_ms:.0f} ms, far longer than the longest silence beside it: the metronome ticked while torch"
    " computed.",
)

# %%
compare("the longest silence beside sum(), ms", guess=guess_sum_ms, formula=10 * tenth_ms, measured=sum_ms)
claim(
    "Threads don't help in Python because of the GIL",
    who="the silences of a 1 ms metronome in another thread",
    number=f"the typical one is {typical['nobody works']:.1f} ms beside nobody, {typical['torch']:.1f} ms beside torch,"
    f" {typical['Python loop']:.1f} ms beside a Python loop; the longest is {torch_ms:.0f} ms beside torch, {sum_ms:.0f} ms"
    " beside one C call that keeps the lock",
    verdict="depends on what computes: torch lets go of the lock",
)

# %% [markdown]
# `sum` keeps the lock to its end: the metronome is silent for the whole call. The Python loop hands over at every switch
# interval. Torch lets go of the lock in every operation.
#
# *Where the prediction fails:* a tick also needs a core, and the operating system shares those out. So even beside nobody
# some silences are longer than a millisecond. And this is the longest of hundreds. The typical silence, the median, says it
# better: beside torch it is as short as beside nobody, beside a Python loop it is the switch interval and a tick.
#
# So a thread is enough for a model. But *the tokenizer's Python part, JSON, a regular expression* hold the lock. That is
# why the server rejects texts that are too large before it touches them.

# %% [markdown]
# ## A crash contained
#
# A thread can't contain a crash: out of memory, a bug in a C library, an endless loop. So now the model is in a process. Four
# long texts are sent at once, and in the middle of a call we kill the model's process. **How many of the four does it take
# with it? What does `/health` say? And how long is it until the server answers texts again?**

# %%
guess_lost = ...  # texts that get an error 500
guess_health = ...  # the status of /health, asked at once after the kill: 200, 503, or 0 for no reply
guess_back_s = ...  # seconds until a text gets an answer again

# %% [markdown]
# **Prediction.** Only what was inside the model dies with it: the first text, which went in alone. The other three stand in
# the queue, in the server's own process, which lives. A new process has to load what the first one loaded. How long that takes we
# measure now, with another server: from its start until it is ready. The three may wait for 10 s (the server's `DEADLINE_S`). If
# loading takes less, they are answered in the end.

# %%
stop(*(servers[place] for place in ("inline", "thread")))
began = time.monotonic()
stop(serve("thread", OFFLOAD="process", BATCH_SIZE=32))
load_s = time.monotonic() - began
tell(f"Start to ready, alone on the core: {load_s:.1f} s.")

# %%
from support.l02_crash import kill_in_a_call

server = servers["process"]
crash = kill_in_a_call(server, long_text, texts=4)
next_one = ask(server)

# %%
statuses = [reply.status for reply in crash.replies]
lost, back_s, health_reply = statuses.count(500), crash.back_s, crash.health
table(
    "after the kill | your guess | formula | measured",
    ("of four texts: error 500", guess_lost, 1, lost),
    ("/health", guess_health, 200, f"{health_reply.status} after {health_reply.ms:.0f} ms"),
    ("seconds until it answers texts", guess_back_s, f"{load_s:.1f}", f"{back_s:.1f}"),
)

# %%
compare("seconds until it answers texts", guess=guess_back_s, formula=load_s, measured=back_s)
tell(
    f"The four got {', '.join(map(str, sorted(statuses)))}; the next text, when it was ready again, {next_one.status}."
)
said(
    statuses.count(200) == 3 and lost == 1,
    "The text that the dead process held gets a 500. The three in the queue wait for the new process and get their answers: they have paid"
    " with time only.",
    "The text that the dead process held gets a 500. What stood in the queue is answered when a new process is there in time, and gets a"
    " 503 when it is not.",
)

# %% [markdown]
# The server, its queue and its `/health` never stop. With a thread the whole server would be gone, and the requests of all clients
# with it. (A text whose deadline ends before the new model can be there gets a 503 at once, with `Retry-After`. Lower `DEADLINE_S` to
# 2 and run it again: that is this lesson's lab exercise.)
#
# *Where the formula may fail:* it timed the server and its model together. Here the server stands already, and only the model's
# process starts.
#
# The text that died is not tried again: if it killed the process, it would kill the next one too. Lesson 5 says
# [what becomes of such an input](5_saying_no.ipynb), and lesson 8 [how a process is best started](8_starting_processes.ipynb).
#
# ## What each place costs
#
# A process must be told the texts and must send back the answers. **What does a call cost beside the model itself, in ms?**
# We ask a model that returns at once, eight texts a call.

# %%
guess_ms = ...

# %% [markdown]
# **Prediction.** Inline hands nothing over. A thread is handed the texts and hands the answers back: the event loop, which
# sleeps meanwhile, must be woken. With a process all goes through a socket, packed and unpacked. We time these ways by
# themselves: a helper, thread or process, only sends back what it gets.

# %%
from support.l02_handover import by_socket, by_thread, median_ms, places

eight, times = [TEXT] * 8, quick(200, 2000)
thread_ms, process_ms = await by_thread(eight, times), await by_socket(eight, times)
formula_ms = {"inline": 0.001, "thread": thread_ms, "process": process_ms}


# %%
async def cost_ms(place):
    """The median time that a call spends outside the model."""
    await place.start()
    found = await median_ms(lambda: place.run(eight), times)
    place.stop()
    return found


stop()
costs = {name: await cost_ms(place) for name, place in places().items()}

# %%
with picture("A hand-over is small beside a model's call", "", "ms a call", yscale="log") as ax:
    columns = range(3)
    line(ax, columns, formula_ms.values(), "formula", **mark)
    guessed(ax, columns, guess_ms.values())
    dots(ax, columns, costs.values())
    ax.axhline(long_ms, color=GREY, linestyle=":")
    ax.text(-0.4, long_ms * 0.75, "one long text's call", va="top", color=GREY)
    ax.set_xticks(columns, costs)
    ax.set_xlim(-0.5, 2.5)

# %%
columns = "place | your guess, ms | formula, ms | measured, ms | memory of the server, MB"
found = ((f"{formula_ms[place]:.3f}", f"{costs[place]:.3f}", f"{memory_mb[place]:.0f}") for place in PLACES)
table(columns, *((place, guess_ms[place], *row) for place, row in zip(PLACES, found)))
said(
    formula_ms["process"] < 0.5 * costs["process"],
    f"The bare hand-over is {formula_ms['process'] / costs['process']:.0%} of what a process costs, and"
    f" {formula_ms['thread'] / costs['thread']:.0%} of what a thread costs. The rest is the server's own bookkeeping around a call.",
)

# %%
formula, measured = formula_ms["process"], costs["process"]
compare("a call's hand-over to a process, ms", guess=guess_ms["process"], formula=formula, measured=measured)
claim(
    "A process for the model costs too much",
    who="a call of 8 texts to a model that returns at once; memory of this server with its own model (PSS)",
    number=f"inline {costs['inline']:.3f} ms, thread {costs['thread']:.2f} ms, process {costs['process']:.2f} ms;"
    f" {memory_mb['thread']:.0f} MB with a thread, {memory_mb['process']:.0f} MB with a process",
    verdict="fails for one copy; each further process costs what lesson 1 says",
)

# %% [markdown]
# *Where the formula fails:* it leaves out what this server does around each hand-over: a time limit for the call, a look at
# what the model raised, and packing on the other side of the socket, too.
#
# Did you expect the process to cost so little? Eight short texts are a few hundred bytes. It is weights that are heavy, and
# they stay where they are. The memory is counted as in lesson 1. With a process the server itself needs no torch: only the
# model's process loads it. So one process costs hardly more than one thread. Each *further* one costs a whole torch more
# than a further thread does.
#
# **The rule.** A thread by default. A process if the model may crash or hang, or if it computes in Python. Never inline.

# %% [markdown]
# ## Exercises
#
# Solutions, if you are stuck: `notebooks/solutions/`.
#
# **★** A model call takes 800 ms and runs on the event loop. The model is busy 60 % of the time. `/health` is asked at
# random moments. What is its mean wait in ms, over all probes?

# %%
mean_wait_ms = ...

checks.exercise_2_1(mean_wait_ms)

# %% [markdown]
# **★★** An orchestrator restarts a server after three health checks **in a row** that took longer than its timeout. Write
# the rule. Then try it on `health["inline"].latency_ms`, with the timeout of 1000 ms and with shorter ones.


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
# ## In the lab
#
# Choose a deadline, in seconds, so that those who wait for a killed process are told so at once (503) and don't wait for
# the new one. One number; the server's own `Retry-After` knows how long loading takes. It starts the real server and judges
# what it measures.

# %%
import labs

deadline_s = ...

labs.lab_2(deadline_s)

# %% [markdown]
# ## Ten questions
#
# Answer them aloud, then open the answers.
#
# 1. Why is the wait for /health a sawtooth?
# 2. Why are short calls in a row as bad as a long one?
# 3. Why does a busy server get restarted?
# 4. Why can a thread help at all, with the GIL?
# 5. Why is `sum` worse than a Python loop?
# 6. Why look at the median silence and not the longest?
# 7. Why does a crash cost one text and not four?
# 8. Why is the text that died not tried again?
# 9. Why does a process cost so little per call?
# 10. When is inline right?
#
# <details><summary>Answers</summary>
#
# 1. A burst keeps the loop for n S. A probe that comes t later waits for the rest.
# 2. Between two calls the loop goes round once, and takes in one new connection.
# 3. A probe that times out looks like a dead server, and that happens under load.
# 4. Torch lets go of the lock while it computes.
# 5. A C call can keep the lock to its end. Python hands it over after the switch interval.
# 6. The longest of hundreds is an accident of the operating system.
# 7. Only the text in the model's process dies. The others wait in the server's.
# 8. If it is the killer, it would kill the next process too.
# 9. A few hundred bytes cross a socket. The weights stay where they are.
# 10. Never for a model that takes longer than you would let all others wait.
# </details>
#
# ## How far off were you?

# %%
score()

# %% [markdown]
# ## What must hold

# %%
assert (crash.health.status, next_one.status) == (200, 200), "a crash is contained"
holds({*runs["thread"].outcome, *runs["process"].outcome} == {"200"}, "nobody pays with an answer")
holds(lost == 1, "the killed call's text gets an error, and no other")
holds(load_s > 9 or statuses.count(200) == 3, "who stands in the queue is answered")
holds(busy_ms["inline"] > 3 * busy_ms["thread"], "on the loop a model blocks /health, in a thread not")
holds(busy_ms["inline"] > 3 * busy_ms["process"], "nor in a process")
holds(door.new_404_ms > 2 * door.open_404_ms, "who is outside waits longer than who is inside")
holds(alone["inline"] > 2 * alone["thread"], "inline loses its batches")
holds(sum_ms > 3 * torch_ms, "torch lets go of the lock, a C call need not")
holds(costs["inline"] < costs["thread"] < 5, "a thread costs a little")
holds(costs["inline"] < costs["process"] < 10, "so does a process")

# %% [markdown]
# ## Take away
#
# - On the event loop a model blocks everything else, `/health` first. Many short calls in a row are as bad as a long one.
# - A thread is enough: torch lets go of the GIL. Python code in the model holds it, and makes the others wait.
# - A process contains a crash. A call costs hardly more, and memory only counts from the second copy on.
#
# Next: [Lesson 3](3_the_cliff.ipynb), on why 95 % busy is already too late.
