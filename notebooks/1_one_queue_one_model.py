# %% [markdown]
# # 1. One queue, one model
#
# You have a function that answers one text. Many people want to call it at once, over HTTP.
#
# **Question: what stands between a function and a server that you can trust?**
#
# You need basic Python. You will start a server that everybody copies, break it in six ways, and repair it.
# Every number below was measured on the machine that ran this notebook. Yours will differ; the relations should not.

# %%
from lesson import BLUE, ORANGE, RED, TEXT, ask, ask_together, claim, dots, get, line, picture, quick
from lesson import serve_all, serve_recipe, stop

import asyncio
import inspect
import time
from concurrent.futures import ThreadPoolExecutor

import torch
from transformers import AutoModelForMaskedLM, pipeline

import checks
from loadtests.modes import ROOT

torch.set_num_threads(1)

# %% [markdown]
# ## From a function …
#
# This is the function. It guesses the word behind `[MASK]`.

# %%
began = time.perf_counter()
pipe = pipeline("fill-mask", model=ROOT / "models" / "minilm-mlm", dtype="float32")
load_s = time.perf_counter() - began
[guess["token_str"] for guess in pipe(TEXT)]

# %% [markdown]
# How long does a call take? Time a few; the middle one is typical.


# %%
def seconds_a_call(call, times=15):
    """The median of some calls."""
    took = []
    for _ in range(times):
        began = time.perf_counter()
        call()
        took.append(time.perf_counter() - began)
    return sorted(took)[times // 2]


call_s = seconds_a_call(lambda: pipe(TEXT))
print(f"loading: {load_s:.1f} s, one call: {call_s * 1000:.0f} ms")

# %%
claim(
    "Loading lazily at the first request is fine",
    f"loading takes as long as {load_s / call_s:.0f} calls, libraries already imported: the first client would wait for it,"
    " and so would everybody behind them",
    "fails: load before you say that you are ready",
)

# %% [markdown]
# ## … to the recipe that everybody copies
#
# The page "Web server inference" in the documentation of Transformers shows a small server: a queue, and one loop that
# takes a text from it, runs the model, and hands the answer back. The idea is right. This is the program, in our words
# and with its mistakes. **Read it. How many mistakes do you find?**

# %%
from recipe import recipe_broken, recipe_fixed

print(inspect.getsource(recipe_broken.endpoint))
print(inspect.getsource(recipe_broken.model_loop))
broken = serve_recipe("recipe_broken")
[guess["token_str"] for guess in ask(broken).json]

# %% [markdown]
# It works. That is why everybody copies it. Here is its twin, which has none of the mistakes. It takes the queue and the
# loop from this project; you will need both servers below.

# %%
print(inspect.getsource(recipe_fixed.endpoint))
print(inspect.getsource(recipe_fixed.lifespan))
fixed = serve_recipe("recipe_fixed")
[guess["token_str"] for guess in ask(fixed).json]

# %% [markdown]
# ## Bug 1: it no longer starts
#
# The original starts its loop from `@app.on_event("startup")`. We had to change that to show you the rest.

# %%
from starlette.applications import Starlette

print("on_event is there:", hasattr(Starlette(), "on_event"))

# %% [markdown]
# Repair: `lifespan`, above. What it does before `yield` happens before the first request, what follows happens after the
# last. `request.state` shows what it yields.

# %% [markdown]
# ## Bug 2: the queue has no end
#
# **Your prediction.** The model takes $S$ seconds for one text. $n$ people ask at the same moment. How long does the
# $k$-th of them wait? Nobody can be served before those in front: $k \cdot S$.

# %%
people = quick(60, 150)
one_ms = seconds_a_call(lambda: ask(broken)) * 1000
print(f"prediction: the last of {people} waits {people * one_ms / 1000:.1f} s")

# %%
crowd = ask_together(broken, [TEXT] * people)
crowd_fixed = ask_together(fixed, [TEXT] * people)
waits = sorted(reply.ms for reply in crowd)
served = sorted(reply.ms for reply in crowd_fixed if reply.status == 200)
refused = sorted(reply.ms for reply in crowd_fixed if reply.status == 503)

# %%
with picture("Everybody at once", "place in the queue", "time to the reply, ms") as ax:
    line(ax, [1, people], [one_ms, people * one_ms], "predicted: k · S")
    dots(ax, range(1, people + 1), waits, "recipe: answered", markersize=5)
    dots(ax, range(1, len(served) + 1), served, "fixed: answered", ORANGE, markersize=5)
    ax.plot(range(len(served) + 1, people + 1), refused, "x", color=RED, label="fixed: 503", markersize=5)

# %% [markdown]
# The recipe's dots follow the line, and the line has no end: twice as many people, twice the wait. Nobody is told
# "no". The fixed twin holds 32 in its queue at most and says 503 to the rest **at once**, so that they can go elsewhere.
# (From about the tenth on, its own dots lie below the line: it serves eight texts in one call. That is lesson 4.)
#
# *Where the formula fails:* it is for people who come in the same instant. Lesson 3 is about people who come at random.

# %% [markdown]
# ## Bug 3: the model sits on the event loop
#
# An asyncio server has one thread. While the model runs in it, nothing else can. A crowd of ten is being served. 30 ms
# later you ask for a page that does not exist; a server needs about 2 ms for its 404. How long do *you* wait?
#
# **Your prediction:** neither `queue.get()` nor `reply.put()` pauses the loop's task while there is something to get and
# room to put it. So it goes from text to text and lets nobody else in before all ten are done: $10\,S$ less the 30 ms.


# %%
def wait_for_404(server, crowd=10):
    """Milliseconds for a 404 asked a moment after `crowd` texts."""
    with ThreadPoolExecutor(1) as pool:
        pool.submit(ask_together, server, [TEXT] * crowd)
        time.sleep(0.03)
        return get(server, "no-such-page").ms


blocked_ms, free_ms = wait_for_404(broken), wait_for_404(fixed)
print(f"prediction: {10 * one_ms - 30:.0f} ms")
print(f"404 after {blocked_ms:.0f} ms from the recipe, {free_ms:.0f} ms from its twin")

# %% [markdown]
# Repair: a thread of its own for the model (`workers.offload.Thread`). Lesson 2 measures what that buys and what it costs.

# %% [markdown]
# ## Bug 4: one bad text silences it for ever
#
# A text without `[MASK]` makes the pipeline raise. **What do you think will happen** to the next, innocent client?

# %%
bad, good = ask(broken, "no mask here", patience_s=1), ask(broken, patience_s=1)
print("recipe: bad text", bad.status or "no reply", "· good text", good.status or "no reply")
bad_fixed, good_fixed = ask(fixed, "no mask here"), ask(fixed)
print("fixed:  bad text", bad_fixed.status, bad_fixed.body, "· good text", good_fixed.status)

# %% [markdown]
# The exception ended the task that runs the loop. Nobody looks at that task, so nobody hears of it. The process stays up,
# takes connections, and answers none of them: a health check on the port says that all is well. It cannot even be
# stopped politely, because uvicorn waits for the open requests.
#
# Repair: whatever the model raises is caught, and given to the one who asked. This is the place in `workers/loop.py`:

# %%
from workers.loop import ModelLoop

print(inspect.getsource(ModelLoop._run))

# %% [markdown]
# ## Bugs 5 and 6: the batching variant loses answers
#
# The page goes on to "dynamic batching": several texts in one call. It says itself that this is pseudocode. It is copied
# all the same. **Two mistakes are in here. Find them before you go on.**

# %%
from recipe import recipe_batching

print(inspect.getsource(recipe_batching.serve_one_batch))

# %% [markdown]
# Give it two texts, then three, and look at what each client gets. A full answer has five guesses.


# %%
async def guesses_for_each(texts):
    """How many guesses each client gets from the variant; 0 where no answer comes."""
    queue, replies = asyncio.Queue(), [asyncio.Queue() for _ in texts]
    for text, reply in zip(texts, replies):
        queue.put_nowait((text, reply))
    await recipe_batching.serve_one_batch(queue, pipe)
    found = [reply.get_nowait() if reply.qsize() else [] for reply in replies]
    return [len(answer) if isinstance(answer, list) else 1 for answer in found]


print("two clients:  ", two := await guesses_for_each([TEXT] * 2))
print("three clients:", three := await guesses_for_each([TEXT] * 3))

# %% [markdown]
# The first client of each batch gets nothing: its text is overwritten before it is kept. And where one text is left, its
# client gets one guess in place of five: `pipe([x])` does not return a list with one answer but the answer itself, and
# `zip` takes it apart. Both are silent. A test with one client shows the first: its answer never comes. The second
# needs a batch that is left with exactly one text.

# %%
print("fixed, one at a time:", len(ask(fixed).json))
print("fixed, ten at once:  ", [len(reply.json) for reply in ask_together(fixed, [TEXT] * 10)])
stop(broken, fixed)

# %% [markdown]
# ## Load once: the memory of one copy and of n
#
# Why one model for everybody? A copy costs memory. **Your prediction:** weights are numbers of 4 bytes each.

# %%
model = AutoModelForMaskedLM.from_pretrained(ROOT / "models" / "minilm-mlm", dtype=torch.float32)
weights_mb = sum(p.numel() for p in model.parameters()) * 4 / 1e6
print(f"prediction: {weights_mb:.0f} MB for every further copy")

# %%
counts = quick([1, 2], [1, 2, 3])


def memory_of(offload):
    """MB of the server with each number of copies."""
    servers = serve_all(*({"OFFLOAD": offload, "INSTANCES": n} for n in counts))
    for n, server in zip(counts, servers):
        ask_together(server, [TEXT] * 4 * n)
    found = [server.memory_mb() for server in servers]
    stop(*servers)
    return found


in_threads, in_processes = memory_of("thread"), memory_of("process")

# %%
with picture(
    "What a copy costs", "copies of the model", "memory of the server, MB", ylim=(0, None), xticks=counts
) as ax:
    line(ax, counts, [in_threads[0] + (n - 1) * weights_mb for n in counts], "predicted: 4 bytes a weight")
    dots(ax, counts, in_threads, "measured, copies in threads", BLUE)
    dots(ax, counts, in_processes, "measured, copies in processes", ORANGE)

# %%
thread_copy_mb = (in_threads[-1] - in_threads[0]) / (counts[-1] - 1)
process_copy_mb = (in_processes[-1] - in_processes[0]) / (counts[-1] - 1)
claim(
    "One copy of the model saves RAM",
    f"{weights_mb:.0f} MB of weights; a second copy takes {thread_copy_mb:.0f} MB in a thread of the same process and"
    f" {process_copy_mb:.0f} MB in a process of its own: an interpreter and torch come with it",
    "holds; for a small model it is the process that costs, not the weights",
)

# %% [markdown]
# *Where the formula fails:* a copy takes more than its weights. Its tokenizer, the working memory of its calls and what
# loading leaves behind come on top.
#
# The surprise is the process. It brings its own Python, its own torch, its own tokenizer: together more than these
# weights. With a model of gigabytes the weights win. Gunicorn with `workers = 9` means nine of these (lesson 6).

# %% [markdown]
# ## "Don't forget no_grad"
#
# Advice that you meet everywhere: `torch.no_grad()` halves the memory and doubles the speed. With gradients on, torch
# keeps what every layer computed, for a backward pass that never comes. **How much is that?** Count it: torch tells each
# tensor that it keeps.

# %%
batch = pipe.tokenizer([TEXT + " So they say." * 10] * 16, return_tensors="pt")
kept = {}


def keep(tensor):
    storage = tensor.untyped_storage()
    kept[storage.data_ptr()] = storage.nbytes()
    return tensor


with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
    model(**batch)
own = {p.untyped_storage().data_ptr() for p in model.parameters()}
kept_mb = sum(size for pointer, size in kept.items() if pointer not in own) / 1e6


def without_grad():
    with torch.no_grad():
        return model(**batch)


with_s, without_s = (
    seconds_a_call(lambda: model(**batch), quick(5, 15)),
    seconds_a_call(without_grad, quick(5, 15)),
)
print("what a pipeline calls its model in:", pipe.get_inference_context().__name__)
claim(
    "no_grad halves the memory and doubles the speed",
    f"16 texts keep {kept_mb:.0f} MB for a backward pass, beside {weights_mb:.0f} MB of weights; without, a call is"
    f" {with_s / without_s:.2f} times as fast; a pipeline switches gradients off by itself",
    "depends on the batch for the memory; fails for the speed; needless around a pipeline",
)

# %% [markdown]
# ## Exercises
#
# Fill in and run. The checker tells you what it thinks; it never stops the notebook.
#
# **★** A server with one model takes 20 ms a text, one at a time. Its clients hang up after 2 s. A call has just begun.
# How many may stand in the queue, so that the last of them still gets an answer in time?

# %%
longest_queue = ...

checks.exercise_1_1(longest_queue)


# %% [markdown]
# **★★** Repair `serve_one_batch`: no text lost, five guesses for everybody, at most `most` texts in a batch, and no
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
# ## What must hold
#
# If one of these fails on your machine, the lesson is wrong there; please tell us.

# %%
assert not hasattr(Starlette(), "on_event")
assert waits[-1] > 5 * waits[0], "in the recipe the last waits for all others"
assert len(served) < people and refused[len(refused) // 2] < waits[-1] / 2, "the twin says no, early"
assert blocked_ms > free_ms, "a model on the event loop delays those who don't want it"
assert bad.status == good.status == 0, "after one bad text the recipe answers nobody"
assert (bad_fixed.status, good_fixed.status) == (500, 200)
assert two == [0, 1] and three == [0, 5, 5], "the variant loses the first, and unwraps a batch of one"
assert process_copy_mb > thread_copy_mb > 0.5 * weights_mb
