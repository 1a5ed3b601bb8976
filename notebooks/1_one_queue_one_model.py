# %% [markdown]
# # 1. One queue, one model
#
# You have a function that answers one text. Many people want to call it at once, over HTTP.
#
# **Question: what stands between a function and a server that you can trust?**
#
# *Afterwards you can* read a small model server, find what will break in it, and say what another instance of the model costs.
#
# It takes about 2 minutes (the quick form 40 s), two cores and 5 GB of memory. [What all lessons need](README.md).
#
# You need basic Python. You will start a server that everybody copies, meet six bugs (five in it, one in its start), and repair them.
# Each time you guess first, then a formula predicts, then the machine tells. Every number was measured on the machine that ran this
# notebook. Yours will differ; the relations should not. Words that are new to you are in the [glossary](glossary.md).

# %%
# "No module named 'lesson'"? Open this notebook where it lies, in the project's notebooks/, or by `make learn`.
from lesson import BLUE, GREY, ORANGE, RED, TEXT, ask, ask_together, claim, compare, dots, guessed, holds
from lesson import line, picture, quick, score, serve_recipe, stop, table, tell, way

import inspect
import time

import checks
from starlette.applications import Starlette
from support import l01_measure

# %% [markdown]
# ## From a function …
#
# This is the function. It guesses the word behind `[MASK]`.

# %%
import torch
from transformers import pipeline
from loadtests.modes import ROOT

torch.set_num_threads(1)
began = time.perf_counter()
pipe = pipeline("fill-mask", model=ROOT / "models" / "minilm-mlm", dtype="float32")
load_s = time.perf_counter() - began
[found["token_str"] for found in pipe(TEXT)]

# %% [markdown]
# Before the first call the model must be loaded. "Load it lazily," some say, "at the first request." The libraries are
# imported already. **How many calls long is the loading?** Write down your guess, whatever you think. It will stand
# beside the measurement.

# %%
guess_calls = ...  # how many calls fit into the time that loading takes

# %%
call_s = l01_measure.median_s(lambda: pipe(TEXT))
columns = "one call, ms | loading, ms | loading, in calls | your guess, in calls"
table(columns, (f"{call_s * 1000:.0f}", f"{load_s * 1000:.0f}", f"{load_s / call_s:.0f}", guess_calls))
claim(
    "Loading lazily at the first request is fine",
    who="this model in the stock pipeline, libraries already imported",
    number=f"loading takes {load_s * 1000:.0f} ms, as long as {load_s / call_s:.0f} calls; with the libraries, lesson 12: seconds",
    verdict="fails: the first client waits for it; load before you say that you are ready",
)

# %% [markdown]
# ## … to the recipe that everybody copies
#
# This is the path a request takes, from left to right. Many clients ask at once. The *door* reads what they send. A
# *queue* keeps the texts in order. A *loop* takes a text from the queue, has the model answer it, and takes the next one.
# So the model is there once, and does one thing at a time. In this project's own server the door is `server.py`.
#
# ## Ten lines on async
#
# Such a server is written with `async` and `await`. They are these ideas, and no more:
#
# - `async def` makes a *coroutine*: a function that can pause in the middle and go on later.
# - It pauses at `await`, until what it waits for is there: bytes from a client, a timer, an answer.
# - The *event loop* runs all coroutines in one thread. It runs one until that pauses, then another that can go on.
# - A *task* is a coroutine that the loop has been given to run. A web framework makes one for each request.
# - Nothing else switches. A coroutine that computes and doesn't pause has the loop to itself.
# - `lifespan` is a coroutine of the framework: what stands before its `yield` runs at the start of the server, what stands after it at the
#   end.
#
# Watch it. *health* answers four times, 10 ms apart. *model* waits for 30 ms, as for a thread that computes.

# %%
import asyncio

from support import l01_trace


async def health():
    for _ in range(4):
        await asyncio.sleep(0.01)


async def model_elsewhere():
    await asyncio.sleep(0.03)  # waits: the loop goes on


l01_trace.show(l01_trace.trace(health=health, model=model_elsewhere), "Whoever waits gives the loop away")

# %% [markdown]
# The turns are short, and the two take them as their waits end. Now *model* computes for those 30 ms on the loop itself. **Before you
# run it: when will health have its second turn?**

# %%
guess_turn_ms = ...


# %%
async def model_here():
    time.sleep(0.03)  # computes: the loop stands still


stalled = l01_trace.trace(health=health, model=model_here)
l01_trace.show(stalled, "Whoever computes keeps it")
second_ms = [turn.from_ms for turn in stalled if turn.task == "health"][1]
compare("the second turn of health, ms", guess=guess_turn_ms, formula=30, measured=second_ms)

# %% [markdown]
# You will make this mistake. Everyone does. The rest of this lesson shows it, and others, in a real server.
#
# ## The recipe
#
# The page "Web server inference" in the documentation of Transformers shows such a server. The idea is right. This is the
# program, in our words and with its mistakes. The `endpoint` is the door, `model_loop` is the loop, and `lifespan` starts
# both. **Read it. How many mistakes do you find?**

# %%
import minimal
from support import l01_broken

for function in (l01_broken.endpoint, l01_broken.model_loop, l01_broken.lifespan):
    print(inspect.getsource(function))
guess_mistakes = ...  # in these three functions

# %% [markdown]
# <details><summary>Our count (open it when you have yours)</summary>
#
# We count five in these functions. The queue has no end (`lifespan`). The model computes on the event loop (`model_loop`).
# One exception ends the loop, and nobody looks (`model_loop`, `lifespan`). The server says that it has started before
# the model is loaded (`model_loop` loads it). The model works for clients that have left (`endpoint`).
#
# Bugs 2, 3 and 4 below show the first three, which do the most harm. Bug 1 was in the original's start. Bugs 5 and 6 are in
# the page's second program. The repaired one still works for clients that have left, but for 5 s at most; `server.py`
# notices a client that leaves.
# </details>
#
# It works, and so everybody copies it. Here is the recipe, repaired: this project's [`minimal.py`](../minimal.py), which also
# gives the model a thread. Its queue, its loop and its batches are one class. You will need both servers.

# %%
tell(f"Your count: {guess_mistakes}. Ours: 5.")
broken, repaired = serve_recipe("l01_broken"), serve_recipe("minimal")
print([found["token_str"] for found in ask(broken).json])
boxes = ("clients", "door", "queue", "loop")
title = "The recipe, and the recipe, repaired"
way((*boxes, "model"), (*boxes, "thread", "model"), changed={"thread"}, title=title)
print(inspect.getsource(minimal.ModelLoop))

# %% [markdown]
# ## Bug 1: it no longer starts
#
# The original starts its loop from `@app.on_event("startup")`, which Starlette no longer has (the last cell checks it). We had to
# change that to show you the rest. Repair: the `lifespan` of `minimal.py`. What stands before its `yield` happens before the first
# request. What stands after it happens after the last.
#
# ## Bug 2: the queue has no end
#
# The model takes $S$ seconds for one text. This is its *service time*. Many people ask in the same moment. **How long does
# the last of them wait?**

# %%
people = quick(60, 150)
one_ms = l01_measure.median_s(lambda: ask(broken)) * 1000
tell(f"One text, asked alone: S = {one_ms:.0f} ms. {people} people are about to ask.")
guess_last_s = ...  # how long the last one waits for the recipe's answer, in seconds

# %% [markdown]
# **Prediction.** Nobody is served before those in front. So the $k$-th waits $k \cdot S$.

# %%
crowd, crowd_repaired = (ask_together(server, [TEXT] * people) for server in (broken, repaired))
waits = sorted(reply.ms for reply in crowd)
served = sorted(reply.ms for reply in crowd_repaired if reply.status == 200)
refused = sorted(reply.ms for reply in crowd_repaired if reply.status == 503)
with picture(
    "The recipe lets everybody wait", "place in the queue", "time to the reply, ms", ylim=(0, None)
) as ax:
    line(ax, [1, people], [one_ms, people * one_ms], "k · S")
    guessed(ax, [people], [guess_last_s * 1000])
    dots(ax, range(1, people + 1), waits, "recipe", markersize=5)
    dots(ax, range(1, len(served) + 1), served, "repaired: answer", ORANGE, markersize=5)
    ax.plot(range(len(served) + 1, people + 1), refused, "x", color=RED, label="repaired: 503", markersize=5)

# %%
last_s, formula_s = waits[-1] / 1000, people * one_ms / 1000
compare("the last one's wait, s", guess=guess_last_s, formula=formula_s, measured=last_s)
tell(f"In the crowd a text took {waits[-1] / people:.0f} ms; alone it took {one_ms:.0f} ms.")
taken = len(served) - minimal.MAX_QUEUE
why = (
    f"When it said 503 for the last time, 64 stood in the queue. So the model had taken {taken} out of it by then."
    if taken > 0
    else "So few people came that its queue was never full."
)
tell(f"It answered {len(served)}. {why}")

# %% [markdown]
# The recipe's dots follow the line, and the line has no end: twice as many people, twice the wait. Nobody is rejected.
# The repaired one has a bound of 64: so many may stand in its queue. It answers 503 to the rest **at once**, and they can
# go elsewhere.
#
# *Where the formula fails:* the repaired one's later answers lie below the line. It takes up to eight texts from the queue
# into one call. That is a *batch*, and lesson 4 is about it. And more than 64 were answered.
#
# The first text found an idle model and went in alone. While it was computed 64 queued up, and the others were
# rejected. If people still come when the next call begins, there is room again: the call takes eight out of the queue, and
# eight more get in. Then the sum is 1 + 8 + 64 = 73. Where the crowd takes longer to come in, it grows further.
#
# *The formula also needs this:* all come in the same moment. Lesson 3 is about people who come when they like.

# %% [markdown]
# ## Bug 3: the model sits on the event loop
#
# An asyncio server has one thread, and in it one *event loop*. The loop goes round: it looks who has sent something, then
# it runs each piece of work that is ready, then it looks again. While the model computes in this thread, the loop stands
# still.
#
# A crowd of ten comes at once. 30 ms later two strangers ask for a page that does not exist. For such a 404 no model is
# needed. One stranger has asked before and has kept the connection *open*. The other opens a *new* one. **How long does each
# wait?**

# %%
guess_open_ms = ...  # the stranger with the open connection
guess_new_ms = ...  # the stranger with the new connection

# %% [markdown]
# **Prediction.** New connections stand outside until the loop *accepts* them. This loop (uvloop) accepts one each time it
# goes round. Each of the ten brings a call of the model into the round. So the new connection waits for all of the ten,
# $10\,S$ less the 30 ms. The open connection is inside already. Its request is read when the call that runs has ended and
# the loop goes round. In that round the next call may stand before it. So it waits for less than two calls, $2\,S$. (That is for a
# crowd of new connections. Over ten open ones all requests are inside at once, and a stranger waits for the whole group: see below.)
#
# Linux counts the connections that stand outside, and `crowd_at` reads that count (in `/proc/net/tcp`) every 3 ms. So you
# can watch the door.

# %%
from support.l01_crowd import crowd_at

outside = crowd_at(broken, TEXT, 10, inside=False, after_s=0.03)
inside = crowd_at(broken, TEXT, 10, inside=True, after_s=0.03)
free = crowd_at(repaired, TEXT, 10, inside=False, after_s=0.03)
with picture("The recipe's door opens once per call", "time, ms", "people", ylim=(-0.7, 12)) as ax:
    ax.step(*zip(*outside.outside), where="post", color=RED, label="outside")
    ax.step([0, *outside.answers_ms], range(11), where="post", color=BLUE)
    ax.text(outside.answers_ms[4] - 8, 5.5, "answered", color=BLUE, ha="right", va="center", fontsize=12)
    ax.step([0, *inside.answers_ms], range(11), where="post", color=GREY, label="answered, all inside")

# %% [markdown]
# The red-brown stairs go down as the blue ones go up: one gets in, one gets an answer. So the ten answers come one after the
# other. (They climb first, while the ten arrive, and never reach ten: by then some are inside.)
#
# The grey line is the same crowd with ten connections that were opened before. These have no door in front of them. The
# loop reads all that has come at once, and puts it into the queue. Then the model's task goes from text to text and never
# pauses: neither `queue.get()` nor `reply.put()` waits while there is something to get and room to put it. The answers are
# ready one by one, but they leave together, when the queue is empty. So the crowd is answered in a few groups: those who came
# first, and then all who came while the model worked for them. Anyone who arrives meanwhile waits for the whole group,
# even on an open connection.

# %%
open_ms, new_ms = 2 * one_ms, 10 * one_ms - 30
compare("a new connection's wait, ms", guess=guess_new_ms, formula=new_ms, measured=outside.new_404_ms)
what = "an open connection's wait, ms (formula: at most)"
compare(what, guess=guess_open_ms, formula=open_ms, measured=outside.open_404_ms)
table(
    "the 404 over | formula, ms | recipe, ms | repaired, ms",
    ("an open connection", f"< {open_ms:.0f}", f"{outside.open_404_ms:.0f}", f"{free.open_404_ms:.0f}"),
    ("a new connection", f"{new_ms:.0f}", f"{outside.new_404_ms:.0f}", f"{free.new_404_ms:.0f}"),
)
tell(
    f"The ten answers came after {outside.listed} ms: a call took {outside.answers_ms[-1] / 10:.0f} ms. With that S the formula"
    f" for the new connection says {outside.answers_ms[-1] - 30:.0f} ms. With ten open connections they came after"
    f" {inside.listed} ms, and the stranger with an open connection waited {inside.open_404_ms:.0f} ms."
)

# %% [markdown]
# *Where the formula may fail:* it knows $S$ from a text that was asked alone. In a crowd of new connections a call can take
# longer.
#
# Repair: a thread of its own for the model (`workers.offload.Thread`). The loop goes on while the thread computes. Lesson 2
# measures what that buys and what it costs.
#
# ## Bug 4: one bad text silences it forever
#
# A text without `[MASK]` makes the pipeline raise an exception. **What does the next, innocent client get?**

# %%
guess_status = ...  # the innocent client's status from the recipe: 200, 500, or 0 for no reply at all

# %%
bad, good = ask(broken, "no mask here", patience_s=1), ask(broken, patience_s=1)
bad_repaired, good_repaired = ask(repaired, "no mask here"), ask(repaired)
table(
    "who | your guess | recipe | repaired",
    ("with the bad text", "-", bad.status, bad_repaired.status),
    ("the next one", guess_status, good.status, good_repaired.status),
)
tell("0 means: no reply within a second.")
from workers.loop import ModelLoop

source = inspect.getsource(ModelLoop._run)
print(source[source.index("        try:") : source.index("        finally:")])

# %% [markdown]
# The exception ended the task that runs the loop. Nobody looks at that task, so nobody hears of it. The process stays up,
# takes connections, and answers none of them: a health check on the port says that all is well. You can't even stop it
# politely, because uvicorn waits for the open requests.
#
# Repair: catch whatever the model raises, and give it to the client that asked. The lines above, from `workers/loop.py`, do that.
#
# ## Bugs 5 and 6: the batching variant loses answers
#
# The page goes on to "dynamic batching": several texts in one call. It says itself that this is pseudocode. People copy it
# all the same. There are two mistakes in it. A full answer is a list of five words. Two clients ask, then three. **How many
# words does each get?**

# %%
from support import l01_batching

print(inspect.getsource(l01_batching.serve_one_batch))
guess_two, guess_three = ..., ...  # for each client; 0: no answer

# %%
two, three = [
    await l01_measure.words_for_each(l01_batching.serve_one_batch, pipe, clients) for clients in (2, 3)
]
ten_repaired = [len(reply.json) for reply in ask_together(repaired, [TEXT] * 10)]
table(
    "clients | your guess | words for each",
    (2, guess_two, two),
    (3, guess_three, three),
    ("10, recipe, repaired", "-", ten_repaired),
)
stop(broken, repaired)

# %% [markdown]
# Bug 5: the first client of each batch gets nothing. Its text is overwritten before it is kept. Bug 6: where one text is
# left, its client gets one word in place of five. `pipe([x])` does not return a list with one answer but the answer
# itself, and `zip` takes it apart. Both are silent. A test with one client shows bug 5: the answer never comes. Bug 6
# needs a batch that is left with exactly one text.
#
# ## Load once: what another instance costs
#
# Why one model for everybody? Another instance of it takes memory. Instances can live in threads of one process, or each in a process of
# its own. **How many MB does each further instance take?**
#
# *Memory* means the same in all lessons (`server.memory_mb()`): what all processes of the server hold. A page that several
# processes share is divided among them, so nothing counts twice. Linux calls that PSS.

# %%
guess_thread_mb = ...  # a further instance in a thread
guess_process_mb = ...  # a further instance in a process

# %% [markdown]
# **Prediction.** Weights are numbers of 4 bytes each. A call only reads them, so threads can share one set: this server lets them. Processes
# can't, each loads its own.

# %%
model = pipe.model
weights_mb = sum(p.numel() for p in model.parameters()) * 4 / 1e6
tell(f"Predicted for every further instance: 0 MB in a thread, {weights_mb:.0f} MB in a process.")
counts = quick([1, 2], [1, 2, 3])
in_threads, in_processes = l01_measure.memory_mb(counts), l01_measure.memory_mb(counts, OFFLOAD="process")
thread_mb, process_mb = ((found[-1] - found[0]) / (counts[-1] - 1) for found in (in_threads, in_processes))

# %%
most, title = counts[-1], "Threads share the weights, processes do not"
axes = {"ylim": (0, None), "xticks": counts}
with picture(title, "instances", "memory of the server, MB", **axes) as ax:
    line(ax, counts, [in_processes[0] + (n - 1) * weights_mb for n in counts], "weights again")
    pairs = ((in_threads, guess_thread_mb), (in_processes, guess_process_mb))
    guessed(ax, [most] * 2, [found[0] + (most - 1) * guess for found, guess in pairs])
    dots(ax, counts, in_threads, "in threads", BLUE)
    dots(ax, counts, in_processes, "in processes", ORANGE)

# %% [markdown]
# *Where the formula fails:* a process takes far more than the weights. There are two suspects. This project's fast path keeps the
# weights a second time, in the order that the processor likes. And a process brings its own Python and its own libraries.
# Test each alone: `FAST=0` takes the stock model, which threads load again each, and a process that only imports the libraries has no model at all.

# %%
first, second = l01_measure.memory_mb([1, 2], FAST="0")
stock_mb, bare_mb = second - first, l01_measure.libraries_mb()
first_mb = in_threads[0] - bare_mb
table(
    "what | your guess, MB | formula, MB | measured, MB",
    ("a further instance in a thread, weights shared", guess_thread_mb, 0, f"{thread_mb:.0f}"),
    ("a further instance in a thread, loaded again", "-", f"{weights_mb:.0f}", f"{stock_mb:.0f}"),
    ("the libraries alone, no model", "-", "-", f"{bare_mb:.0f}"),
    ("the first instance, without the libraries", "-", f"{2 * weights_mb:.0f}", f"{first_mb:.0f}"),
    ("a further instance in a process", guess_process_mb, f"{bare_mb + first_mb:.0f}", f"{process_mb:.0f}"),
)

# %%
what = "an instance that is loaded again, MB"
compare(what, guess=guess_thread_mb, formula=weights_mb, measured=stock_mb)
what = "a further instance in a process, MB"
compare(what, guess=guess_process_mb, formula=bare_mb + first_mb, measured=process_mb)
claim(
    "One copy of the model saves RAM",
    who=f"this server with 1 to {most} instances; memory of all its processes (PSS)",
    number=f"{weights_mb:.0f} MB of weights; a further instance takes {thread_mb:.0f} MB in a thread that shares them,"
    f" {stock_mb:.0f} MB in one that loads them again, and {process_mb:.0f} MB in a process, of which the libraries alone"
    f" are {bare_mb:.0f} MB",
    verdict="holds; threads can share one, and with a small model it is the process that costs, not the weights",
)

# %% [markdown]
# Both suspects are guilty. The fast path keeps most of the weights twice. An instance in its own process brings the
# libraries along, and pays the first one's price again.
# One that a thread loads again takes more than its weights, too. It also has a tokenizer, and memory to compute in. We have
# not measured these by themselves.
#
# So share the weights where threads will do. For a small model it is the process that costs. With a model of gigabytes the weights win.
# Gunicorn with `workers = 9` means nine of these processes (lesson 6).
#
# ## "Don't forget no_grad"
#
# You meet this advice everywhere: `torch.no_grad()` halves the memory and doubles the speed. With gradients on, torch keeps
# what every layer computed, for a backward pass that never comes. Take 16 texts in one call. **How many MB does torch
# keep, and how many times as fast is the call without gradients?**

# %%
guess_kept_mb = ...  # what torch keeps for the backward pass
guess_times = ...  # speed without gradients over speed with them

# %% [markdown]
# **Prediction.** A layer keeps what goes into each of its steps. For each token that is about 16 times the model's width:
# the query, key and value (3), what attention gave (1), two sums before their norms and two after them (4), and the wide
# middle before and after its activation (4 + 4). So tokens × layers × 16 × width × 4 bytes. As for the speed: the same
# multiplications are done with and without. So 1 times as fast.

# %%
batch = pipe.tokenizer([TEXT + " So they say." * 10] * 16, return_tensors="pt")
width, layers = model.config.hidden_size, model.config.num_hidden_layers
formula_mb, kept_mb = (
    batch["input_ids"].numel() * layers * 16 * width * 4 / 1e6,
    l01_measure.kept_mb(model, batch),
)
with_s = l01_measure.median_s(lambda: model(**batch))
without_s = l01_measure.median_s(torch.no_grad()(lambda: model(**batch)))

# %%
compare("MB kept for a backward pass", guess=guess_kept_mb, formula=formula_mb, measured=kept_mb)
compare("times as fast without gradients", guess=guess_times, formula=1, measured=with_s / without_s)
tell(f"A pipeline calls its model inside `{pipe.get_inference_context().__name__}` by itself.")
claim(
    "no_grad halves the memory and doubles the speed",
    who="this model by itself, 16 texts in a call, with gradients and without",
    number=f"{kept_mb:.0f} MB kept for a backward pass, beside {weights_mb:.0f} MB of weights; without, a call is"
    f" {with_s / without_s:.2f} times as fast; a pipeline switches gradients off by itself",
    verdict="fails for the speed; for the memory one batch was measured; needless around a pipeline",
)

# %% [markdown]
# ## Exercises
#
# Fill in and run. The checker tells you what it thinks; it never stops the notebook. If you are stuck: a solution to each
# exercise of all lessons is in `notebooks/solutions/`.
#
# **★** A server with one model takes 20 ms a text, one at a time. Its clients hang up after 2 s. A call has just begun.
# How many may stand in the queue, so that the last of them still gets an answer in time?

# %%
longest_queue = ...

checks.exercise_1_1(longest_queue)

# %% [markdown]
# **★★** Repair `serve_one_batch`: no text lost, five words for everybody, at most `most` texts in a batch, and no
# waiting for texts that have not come.


# %%
async def serve_one_batch(queue, pipe, most=8): ...


checks.exercise_1_2(serve_one_batch)

# %% [markdown]
# **★★★** One printed version of the page begins its loop like this. What happens at the first request, and why does
# nobody see it? Give the name of the exception that ends the task.
#
# ```python
# async def server_loop(q):
#     pipeline = pipeline(task="fill-mask", model=…)
# ```

# %%
exception = ...

checks.exercise_1_3(exception)

# %% [markdown]
# ## In the lab
#
# Choose `MAX_QUEUE` so that 100 people who ask in the same moment are all answered, with no target and no deadline. One
# number. It starts the real server and judges what it measures.

# %%
import labs

max_queue = ...

labs.lab_1(max_queue)

# %% [markdown]
# ## Ten questions
#
# Answer them aloud, then open the answers.
#
# 1. Why does a queue need a bound?
# 2. Why does a crowd get its answers together and not one by one when all are on open connections?
# 3. Why does a 404, which needs no model, wait for the model?
# 4. Why is a new connection worse off than an open one?
# 5. Why does one exception silence the server?
# 6. Why does a health check on the port not notice?
# 7. Why did two bugs of the batching variant survive?
# 8. Why load the model before saying ready?
# 9. Why does a second instance cost more in a process than in a thread?
# 10. Why doesn't no_grad double the speed?
#
# <details><summary>Answers</summary>
#
# 1. Without one the last waits for everybody, and nobody is told. A bound turns endless waiting into a quick rejection.
# 2. The model's task never pauses while there is work, so the event loop doesn't run and sends nothing until the queue is
#    empty.
# 3. The same thread computes the model and serves all connections.
# 4. The loop accepts one new connection per round, and each round holds a call of the model.
# 5. It ends the task of the loop. Nobody awaits that task, so nobody sees it; the port stays open.
# 6. The process lives and accepts. Only an answer proves that the loop runs.
# 7. One client alone doesn't show them, or shows a wait that looks like slowness. Test with two and three.
# 8. Else the first client waits for the loading, and everybody behind it.
# 9. It brings its own Python and libraries, and pays the first one's price again; threads share the weights.
# 10. The same products are computed. It saves what is kept for a backward pass, and a pipeline does it by itself.
# </details>
#
# ## How far off were you?

# %%
score()

# %% [markdown]
# ## What must hold
#
# If one of these fails on your machine, the lesson is wrong there: open an issue, please.

# %%
assert not hasattr(Starlette(), "on_event")
assert bad.status == good.status == 0, "after one bad text the recipe answers nobody"
assert (bad_repaired.status, good_repaired.status) == (500, 200)
assert two == [0, 1] and three == [0, 5, 5], "the variant loses the first, and unwraps a batch of one"
assert ten_repaired == [5] * 10, "the repaired one does not"
holds(len(served) + len(refused) == people, "the repaired one answers or refuses")
holds(waits[-1] > 5 * waits[0], "in the recipe the last waits for all others")
holds(len(served) < people and refused[len(refused) // 2] < waits[-1] / 2, "the repaired one says no, early")
holds(outside.new_404_ms > 2 * outside.open_404_ms, "who is outside waits longer than who is inside")
holds(outside.new_404_ms > 2 * free.new_404_ms, "a model on the event loop delays those who don't want it")
holds(outside.answers_ms[4] < 0.7 * outside.answers_ms[-1], "outside: one after the other")
holds(inside.answers_ms[4] > 0.8 * inside.answers_ms[-1], "inside: together")
holds(process_mb > stock_mb > 0.5 * weights_mb, "a process costs more than a thread that loads again")
holds(thread_mb < 0.5 * weights_mb, "threads share the weights")
holds(with_s < 1.5 * without_s, "no_grad does not double the speed")

# %% [markdown]
# ## Take away
#
# - A queue and one loop give many clients one model. The queue needs a bound, or it makes everybody wait.
# - The model must not compute on the event loop. A client outside waits longest, even for a page without a model.
# - Whatever the model raises belongs to the one who asked. If the loop dies, the server still looks healthy.
#
# Next: [Lesson 2](2_dont_block_the_loop.ipynb), on where the model should run instead.
