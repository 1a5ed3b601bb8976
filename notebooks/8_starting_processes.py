# %% [markdown]
# # 8. Starting processes
#
# A model that crashes must not take its server down with it, and one copy is not enough any more. So you start a process for
# it. Much advice is about that, and some of it makes servers that hang once a night.
#
# **Question: how do you start a process that holds a model?**
#
# Afterwards you can choose a start method, say why a forked child may hang, and tell what a process costs in seconds and in MB.
#
# It takes about 2 minutes (the quick form half a minute), two cores and 2 GB of memory. [What all lessons need](README.md).

# %%
# "No module named 'lesson'"? Open this notebook where it lies, in the project's notebooks/, or by `make learn`.
from lesson import BLUE, GREEN, bars, claim, compare, dots, guessed, holds, line, picture, quick, score
from lesson import table, tell, way

import checks

way(("clients", "server.py", "queue", "loop", "process", "model"), changed={"process"})

# %% [markdown]
# ## Three ways to start a process
#
# - **fork** makes a copy of the process that asks for it, as it is at that moment, with everything that it has in memory.
#   But of its threads only one comes along: the one that forks.
# - **spawn** starts a new Python. It knows nothing, so it has to import everything again.
# - **forkserver** starts one helper process when you ask for the first time. The helper does nothing but fork: each new process
#   is a copy of the helper. You can tell the helper what to import beforehand: that is *preload*.
#
# An article has these figures, and many quote them: "fork 0.12 s, forkserver 0.18, spawn 0.35". Before we measure: how long
# does *spawn* take here, if the new process has nothing to import?

# %%
guess_spawn_s = ...  # seconds until a new process says its first word

# %% [markdown]
# **Prediction.** A fork copies no memory, only the tables that say where it is: a few milliseconds. Spawn takes as long as
# starting Python. Forkserver takes both for its first process, and a fork for each further one. So measure one part: how long
# does Python take to start, and how long to start and import torch?

# %%
import subprocess
import sys
import time

from notebooks.support.l08_start_methods import measure_afresh


def seconds_of(code):
    """The shortest of some runs of a new Python with this code."""
    took = []
    for _ in range(quick(1, 3)):
        began = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
        took.append(time.perf_counter() - began)
    return min(took)


# %%
python_s = seconds_of("import multiprocessing.spawn")
torch_s = seconds_of("import torch") - python_s
METHODS = ("fork", "forkserver", "spawn")
model_s = seconds_of("import torch, transformers") - python_s
bare = {method: measure_afresh(method, child="answers at once", preload=()) for method in METHODS}

# %%
table(
    {
        "start method": method,
        "the first process, s": f"{bare[method]['first answer, s']:.2f}",
        "the next, s": f"{bare[method]['the next process, s']:.2f}",
        "the next, predicted, s": f"{predicted:.2f}",
        "you guessed": f"{guess_spawn_s:g}" if method == "spawn" else None,
    }
    for method, predicted in {"fork": 0.0, "forkserver": 0.0, "spawn": python_s}.items()
)
tell(f"Python starts in {python_s:.2f} s. `import torch` takes {torch_s:.1f} s more.")

# %%
nexts_s = [bare[method]["the next process, s"] for method in METHODS]
order_holds = "depends: the order holds" if nexts_s == sorted(nexts_s) else "fails, the order too"
claim(
    "fork 0.12 s, forkserver 0.18, spawn 0.35",
    who="a child that needs nothing; the second process that the same parent starts",
    number=", ".join(f"{method} {bare[method]['the next process, s']:.2f} s" for method in METHODS)
    + f"; `import torch` takes {torch_s:.1f} s in a Python of its own",
    verdict=f"{order_holds}; the figures say little, as the imports of a model cost far more than the start",
)

# %% [markdown]
# ## Who has imported torch already?
#
# Now each child needs torch: it computes one product of two matrices. How long does a *forkserver with torch preloaded*
# take for its next process?

# %%
guess_preloaded_s = ...  # seconds

# %% [markdown]
# **Prediction.** What is in memory already when the process is forked is free. The rest is paid again:
# time = start of the process + import of torch, unless it is there. In the code below the parent has only imported torch in
# the first row, and has done nothing in the last. In all others it has computed with torch.

# %%
from concurrent.futures import ThreadPoolExecutor

patience_s = quick(3, 8)
COMPUTES = "notebooks.support.l08_computes"
kinds = {  # name: method, what the parent did, what is preloaded
    "fork, torch imported": ("fork", "imported torch", ()),
    "forkserver, torch preloaded": ("forkserver", "computed with torch", ("torch",)),
    "forkserver, no preload": ("forkserver", "computed with torch", ()),
    "spawn": ("spawn", "computed with torch", ()),
    "fork, torch has computed": ("fork", "computed with torch", ()),
    "fork, torch has computed on one thread": ("fork", "computed on one thread", ()),
    "forkserver, the preload computes": ("forkserver", "nothing", (COMPUTES,)),
}
left_out = quick({"forkserver, no preload", "forkserver, the preload computes"}, set())
names = [name for name in kinds if name not in left_out]


# %%
def start(name):
    """Two processes, one after the other, each computing once with torch; the second one counts."""
    method, parent, preload = kinds[name]
    return measure_afresh(method, parent, child="computes with torch", preload=preload, patience_s=patience_s)


with ThreadPoolExecutor(quick(2, 1)) as pool:
    starts = dict(zip(names, pool.map(start, names)))

# %%
answered = [name for name in names[:4] if starts[name]["outcome"] == "answers"]
bare_s = {method: bare[method]["the next process, s"] for method in METHODS}
predicted_s = {
    name: bare_s[kinds[name][0]] + torch_s * (name == "spawn" or "no preload" in name) for name in answered
}
took_s = [starts[name]["the next process, s"] for name in answered]
right = max(took_s[-1], predicted_s["spawn"])

# %%
with picture(
    "What is in memory already is free", "seconds to the first product", "", xlim=(0.001, 100)
) as ax:
    ax.set_xscale("log")
    rows = range(len(answered))
    bars(ax, list(predicted_s.values()), rows, None)
    dots(ax, took_s, rows, None)
    guessed(ax, guess_preloaded_s, answered.index("forkserver, torch preloaded"))
    for name, color in (("measured", BLUE), ("predicted", "black")):  # written where no mark is hidden
        ax.plot([right], [rows[-1]], label=name, color=color, alpha=0)
    ax.set_xticks([0.001, 0.01, 0.1, 1, 10], ["0.001", "0.01", "0.1", "1", "10"])
    ax.set_yticks(rows, [name.replace(", ", ",\n") for name in answered])
    ax.set_ylim(-0.6, len(answered) - 0.4)

# %%
table(
    {
        "start method": name,
        "next process, s": f"{found['the next process, s']:.2f}" if found["outcome"] == "answers" else None,
        "its own memory, MB": f"{found.get('its own memory, MB', '-')}",
        "threads of the parent": found["threads of the parent"],
        "threads of the child": found["threads of the child"],
        "what comes of it": found["outcome"],
    }
    for name, found in starts.items()
)

# %% [markdown]
# *Where the formula fails:* the bare fork had a small parent. A parent with torch has larger tables to copy, and the child computes a
# product, too. And the import in a child doesn't take quite what it took in the Python that we timed.
#
# The same rule holds for memory. What was imported before the fork belongs to both, until one of them writes to it. So a
# forked child has little of its own. A spawned one has a torch of its own.
#
# ## What a fork breaks: torch that has computed
#
# Look at the last rows of the table. A child that is forked after torch has computed never answers. It does not fail, it
# hangs. Why? Torch shares a large product among several threads and keeps these for the next one. Only the thread that forks
# comes along. The child's torch believes that it still has the others, gives them work, and waits.
#
# Is that really the reason? If it is, then nothing hangs where torch has computed on **one** thread: there were no others.
# That row answers. And a forkserver is no shelter by itself. If a module that it preloads computes as soon as it is
# imported, each child inherits the same hole. Modules that load a model when they are imported do that.

# %%
hung = [name for name, found in starts.items() if "hangs" in found["outcome"]]
claim(
    "always spawn for PyTorch",
    who="a child that computes once with torch, by start method and by what the parent did before",
    number=f"answer: {'; '.join(name for name in starts if name not in hung)}. Hang: {'; '.join(hung)}",
    verdict="depends on what was done before the fork: importing torch is harmless, computing on several threads is not;"
    " a clean forkserver is as safe as spawn and starts sooner",
)

# %% [markdown]
# ## "Set the start method before importing torch"
#
# Does the import of torch fix the start method, so that it is too late afterwards? Ask Python after the import, and choose
# after a product.

# %%
guess_too_late = ...  # is it too late after the import?

# %% [markdown]
# **Prediction.** Python fixes the method when somebody chooses it, or starts a process. An import of torch does neither.

# %%
code = """
import multiprocessing
import torch
said = [str(multiprocessing.get_start_method(allow_none=True))]
torch.ones(512, 512) @ torch.ones(512, 512)
multiprocessing.set_start_method("spawn")
said.append(multiprocessing.get_start_method())
try:
    multiprocessing.set_start_method("fork")
except RuntimeError as error:
    said.append(str(error))
print(*said, sep="; ")
"""

# %%
order = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=100)
after_import, chosen_later, again = order.stdout.strip().split("; ")
tell(
    f"After `import torch` the start method is {after_import}: nobody has chosen one. You guessed that it is"
    f" {'too late' if guess_too_late else 'not too late'} then."
)
tell(f"Chosen after torch has computed: {chosen_later}. Chosen a second time: “{again}”.")

# %%
claim(
    "set the start method before importing torch",
    who="a new Python that imports torch, computes, and only then chooses spawn; and a child spawned after that",
    number=f"after the import: {after_import}; chosen later: {chosen_later}; chosen twice: “{again}”; the child:"
    f" {starts['spawn']['outcome']}",
    verdict="fails: what counts is that nothing has been started before, and that nobody chooses twice;"
    " `get_context('spawn')` needs no choice at all",
)

# %% [markdown]
# ## What a fork breaks: a lock that somebody holds
#
# Torch is only one case. Python has many locks: a queue has one, a counter has one, a pool of connections has one. A thread
# takes such a lock for a moment. If another thread forks in that moment, the child gets a lock that is taken, and no
# thread that would ever let go of it.
#
# In our experiment a thread holds a lock for three tenths of the time. Meanwhile processes are forked at random moments. How
# many of 100 can never take the lock?

# %%
guess_stuck = ...  # of 100 forks

# %% [markdown]
# **Prediction.** A fork at a random moment meets the lock held as often as it is held. So the share of the children that hang
# is the share of the time for which the lock is held. With spawn and forkserver it is none: they don't copy this process.

# %%
from notebooks.support.l08_locks import stuck

shares = quick([0.3], [0.05, 0.3, 0.6, 0.8])
with ThreadPoolExecutor(4) as pool:  # they sleep for most of the time
    forked = list(pool.map(lambda share: stuck("fork", share, quick(40, 200)), shares))
others = {method: stuck(method, 0.8, quick(4, 20)) for method in ("forkserver", "spawn")}

# %%
HELD, HANG = "share of the time for which a thread holds the lock, %", "children that hang, %"
with picture("A fork hangs as often as the lock is held", HELD, HANG, xlim=(0, 100), ylim=(-4, 104)) as ax:
    line(ax, [0, 100], [0, 100])
    for found, color in ((forked, BLUE), (others.values(), GREEN)):
        hang = [100 * f["stuck"] / f["started"] for f in found]
        dots(ax, [100 * f["share"] for f in found], hang, None, color)
    ax.plot([55], [42], label="fork", color=BLUE, alpha=0)
    ax.plot([60], [12], label="spawn, forkserver", color=GREEN, alpha=0)
    guessed(ax, 30, guess_stuck)

# %%
claim(
    "fork deadlocks with threads",
    who="children that need a lock which a thread of their parent holds for a share of the time",
    number="; ".join(f"held {f['share']:.0%}: {f['stuck'] / f['started']:.0%} hang" for f in forked)
    + "; spawn and forkserver: "
    + " and ".join(f"{found['stuck']} of {found['started']}" for found in others.values()),
    verdict="holds, as often as a lock is held at the moment of the fork; threads that hold none do no harm",
)

# %% [markdown]
# This is why it passes every test. A lock that is held for a thousandth of the time stops one child in a thousand: at night,
# in production, without a message. Python's own `logging` repairs its locks in the child. Those of others stay as they are.
#
# ## Is forkserver the better spawn?
#
# This project's server starts a new Python for each model process, which is what spawn does. A forkserver that has torch and
# transformers imported could start the next one sooner. Compare them with the real model: loading it, and one answer. (The
# quick form takes a child that needs nothing.) How many seconds sooner does the next copy answer?

# %%
guess_sooner_s = ...  # seconds

# %% [markdown]
# **Prediction.** A forkserver's next process saves the imports of torch and transformers, which were timed above, and no more: weights
# and tokenizer are loaded after the fork.

# %%
child, preload = quick("answers at once", "loads the model"), quick((), ("torch", "transformers"))
model = {
    method: measure_afresh(method, "nothing", child=child, preload=preload)
    for method in ("spawn", "forkserver")
}

# %%
HELPER = "the helper's memory with its share, MB"
table(
    {
        "start method": method,
        "first answer, s": f"{found['first answer, s']:.1f}",
        "the next process, s": f"{found['the next process, s']:.1f}",
        "one copy, MB": found["with its share, MB"] + found[HELPER],
        "each further copy, MB": found["its own memory, MB"],
        "the kernel's parent of the model": found["child of"].replace("the parent", "the server"),
    }
    for method, found in model.items()
)

# %%
saved_s = model["spawn"]["the next process, s"] - model["forkserver"]["the next process, s"]
saved_mb = model["spawn"]["its own memory, MB"] - model["forkserver"]["its own memory, MB"]
one_more_mb = (
    model["forkserver"]["with its share, MB"]
    + model["forkserver"][HELPER]
    - model["spawn"]["with its share, MB"]
)
compare("seconds sooner", guess=guess_sooner_s, formula=model_s, measured=saved_s)
first_s = model["forkserver"]["first answer, s"] - model["spawn"]["first answer, s"]
tell(
    f"The first start {'costs' if first_s > 0 else 'saves'} {abs(first_s):.1f} s with a forkserver: the helper imports too. Each further copy takes {saved_mb:.0f} MB less. With a single copy all of"
    f" it takes {abs(one_more_mb):.0f} MB {'more' if one_more_mb > 0 else 'less'}."
)

# %% [markdown]
# Transformers imports most of itself only when a pipeline is made, after the fork: to preload its name saves little of that.
#
# So forkserver wins this table. Why does the server not use it?
#
# - It saves at the *next* start, not at the first. A server starts its copies once, and again when one has crashed.
# - The model becomes the helper's child. The server can no longer tell the kernel "end my model when I die", and it can't
#   see how its model ended: that is known to the parent alone.
# - The helper must stay clean forever. One preloaded module that computes, and every model hangs (the last row of the table
#   under "Who has imported torch already?").
#
# Take a forkserver where processes come and go: a pool that is renewed after every hundred calls, many copies of a small
# model. For one or two copies that live for weeks, a new Python promises less and keeps it.

# %% [markdown]
# ## Exercises
#
# Fill in and run. The checker tells you what it thinks; it never stops the notebook. Solutions are in `notebooks/solutions/`.
#
# **★** A metrics library holds a lock for 2 % of the time. A program forks 50 times a day, at random moments, and each child
# counts something. What is the chance that at least one child hangs on a day?

# %%
chance = ...

checks.exercise_8_1(chance)


# %% [markdown]
# **★★** Libraries take `libraries_mb`, weights `weights_mb`. What do `n` processes with a model take together? A `"spawn"` shares
# nothing. A `"forkserver"` has the libraries once, in its helper, and each of its children has weights of its own. A `"fork"` of a
# process that has loaded the model shares both.


# %%
def memory_mb(n, method, libraries_mb, weights_mb): ...


checks.exercise_8_2(memory_mb)

# %% [markdown]
# **★★★** A model process has died; seconds until the next one answers? A Python starts in `python_s`, the libraries take `imports_s`, the
# weights `load_s`. A `"forkserver"` has its helper, with the libraries, unless the helper has died, too (`helper_died`).


# %%
def next_answer_s(method, python_s, imports_s, load_s, helper_died=False): ...


checks.exercise_8_3(next_answer_s)

# %% [markdown]
# ## In the lab
#
# The real server with `OFFLOAD=process`: its model lives in a process of its own, started by spawn. We kill that process with `kill -9`.
# After how many seconds does the server answer again? You have measured the parts. One number, within a third of what is measured.

# %%
import labs

back_after_s = ...

labs.lab_8(back_after_s)

# %% [markdown]
# ## Ten questions
#
# Answer them aloud, then open the answers.
#
# 1. Why does a forked child hang after torch has computed?
# 2. Why is importing torch harmless?
# 3. Why does a fork hang as often as a lock is held?
# 4. Why does such a bug pass every test?
# 5. Why does this server spawn?
# 6. Why does a child that is forked after torch has computed on one thread answer?
# 7. Why is a forkserver no shelter if a module that it preloads computes?
# 8. Why does a spawned process take more memory of its own than a forked one?
# 9. When is a forkserver worth its helper?
# 10. Why does it not matter whether you choose the start method before or after importing torch?
#
# <details><summary>Answers</summary>
#
# 1. It inherits the belief in threads that did not come along.
# 2. No threads, no locks held: nothing is broken by the copy.
# 3. The child copies the lock as it is at that moment, without its holder.
# 4. A lock held for a thousandth of the time stops one child in a thousand.
# 5. A new Python promises less and keeps it, and copies live for weeks.
# 6. There were no other threads to miss.
# 7. Each child inherits what the helper has broken.
# 8. It imports everything again, and nothing of that is shared.
# 9. Where processes come and go, or where there are many copies.
# 10. The import neither chooses one nor starts a process.
# </details>

# %% [markdown]
# ## How far off were you?

# %%
score()

# %% [markdown]
# ## What must hold
#
# If one of these fails on your machine, the lesson is wrong there: open an issue, please.

# %%
assert "hangs" in starts["fork, torch has computed"]["outcome"], (
    "never fork after torch has computed on threads"
)
assert starts["fork, torch has computed on one thread"]["outcome"] == "answers", "it is the threads"
assert starts["spawn"]["outcome"] == "answers"
assert (after_import, chosen_later) == ("None", "spawn"), "the import chooses nothing"
assert not any(found["stuck"] for found in others.values()), "spawn and forkserver copy no lock of ours"
sooner_s, spawn_s = (starts[name]["the next process, s"] for name in ("forkserver, torch preloaded", "spawn"))
computes = starts.get("forkserver, the preload computes", {"outcome": "hangs"})["outcome"]

# %%
holds(bare_s["fork"] < bare_s["spawn"] < python_s + 0.5, "a spawn is a new Python")
holds(sooner_s < spawn_s / 3, "what is in memory already is free")
holds("hangs" in computes, "a preload must not compute")
stuck_as_held = [abs(f["stuck"] / f["started"] - f["share"]) < 0.15 for f in forked]
holds(all(stuck_as_held), "a fork hangs as often as the lock is held")
holds(saved_s > 0, "a forkserver's next process comes sooner")

# %% [markdown]
# ## Take away
#
# - A fork copies locks and not the threads that hold them. Importing torch is harmless, computing with it is not.
# - Start a model by spawn, or from a forkserver that has done nothing but import.
# - The start of a process is cheap. Its imports are what you wait for, and what you pay memory for.
#
# Next: [Lesson 9](9_sharing_the_work.ipynb). Several copies are there. Who gets which text?
