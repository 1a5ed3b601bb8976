# %% [markdown]
# # 5. Saying no
#
# Twice as many people want an answer as you can give. Half of them will not get one. You choose which half, when they
# hear of it, and whether the other half gets anything at all.
#
# **Question: when should a server refuse?**

# %%
from lesson import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    RED,
    SERVER_CORES,
    TEXT,
    ask,
    capacity,
    claim,
    dots,
    line,
    load,
    picture,
)
from lesson import QUICK, quick, serve_all, simulate, stop

import asyncio
import functools
import inspect
from unittest import mock

import numpy as np
import pandas as pd

import checks
from loadtests import drive, planner
from loadtests.planner import CostLaw
from workers import offload, tasks
from workers.admission import Admission
from workers.jobs import ModelFailed
from workers.loop import ModelLoop
from workers.settings import Settings
from workers.tasks.text import Content

# %% [markdown]
# ## Goodput
#
# An answer that comes too late is worth nothing, but it costs as much as any. So count only what arrives in time:
# **goodput** is the right answers within the client's limit, per second. To our clients an answer is worth nothing after
# $l$ = 2 s. Our model does $\mu$ = 50 texts a second.
#
# Four ways to run the same queue:
#
# | | the queue | before the model | **your prediction** for overload $\rho = \lambda/\mu$ over $t$ seconds |
# |---|---|---|---|
# | unbounded | takes all | – | wait grows by $\rho - 1$ s each second: good only for the first $l/(\rho-1)$ seconds |
# | bounded | 256 at most, then 503 | – | everybody waits $256/\mu$ = 5 s: goodput near 0 |
# | deadline | takes all | 504 to whom time has run out | the model runs only what can still be in time |
# | predicted wait | 503 when the wait would be too long | the same | goodput $\mu$ |
#
# The last is what this server does. This is its admission, all of it:

# %%
print(inspect.getsource(Admission.refusal))

# %% [markdown]
# The planner runs this very loop on a virtual clock. For "deadline" alone we blindfold it: it can't foresee any wait.


# %%
class Blindfolded(ModelLoop):
    """The same loop, but it admits everybody."""

    def _refusal(self, *asked):
        return None


LIMIT_S, LAW, SECONDS = 2.0, CostLaw(a_s=0.0, b_s=0.02), quick(30, 80)
POLICIES = {
    "unbounded": {"max_queue": 10**9, "deadline_s": 1e6},
    "bounded": {"max_queue": 256, "deadline_s": 1e6},
    "deadline": {"max_queue": 10**9, "deadline_s": LIMIT_S},
    "predicted wait": {"max_queue": 10**9, "deadline_s": LIMIT_S},
}
COLORS = dict(zip(POLICIES, (BLUE, ORANGE, GREEN, RED)))


def overload(policy, rho):
    """What clients see at `rho` times the capacity."""
    loop = Blindfolded if policy == "deadline" else ModelLoop
    with mock.patch.object(planner, "ModelLoop", loop):
        still = {"overhead_s": 0, "queue_target_s": 0, "duration_s": SECONDS}
        return simulate(LAW, rate_per_s=rho * 50, **still, **POLICIES[policy])


# %%
rhos = quick([0.5, 2, 10], [0.5, 0.9, 1.2, 2, 4, 10])
runs = {(policy, rho): overload(policy, rho) for policy in POLICIES for rho in rhos}
goodput = {key: drive.summary(df, LIMIT_S)["goodput_per_s"] for key, df in runs.items()}

# %%
with picture("Overload", "offered load, times the capacity", "goodput, per s") as ax:
    x = np.geomspace(0.5, 10, 100)
    line(ax, x, np.minimum(x, 1) * 50, "predicted: μ")
    over = x[x > 1.15]
    line(
        ax,
        over,
        50 * np.minimum(1, LIMIT_S / (over - 1) / (SECONDS - LIMIT_S)),
        "predicted: unbounded",
        GREY,
        linestyle="--",
    )
    for policy, color in COLORS.items():
        hollow = {"markersize": 14, "fillstyle": "none", "markeredgewidth": 2}
        style = hollow if policy in ("unbounded", "deadline") else {}
        dots(ax, rhos, [goodput[policy, rho] for rho in rhos], policy, color, **style)
    ax.set_xscale("log")
    ax.set_xticks([0.5, 1, 2, 4, 10], ["0.5", "1", "2", "4", "10"])
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=2)

# %% [markdown]
# Look at *bounded*. A bound of 256 sounds careful. But 256 texts at 50 a second are 5 s of waiting, and an answer is worth
# nothing after 2: the server works flat out, and nobody gets anything. **A queue's bound is a time**, not a number: bound, divided
# by speed, must be below the clients' patience.
#
# (Goodput is counted from $l$ on and while the load lasts: a queue that was empty at first, or is emptied afterwards, is
# no speed. So the last answer in time, at $l/(\rho-1) + l$, comes $l/(\rho-1)$ after the counting began.)
#
# *Where the formulas fail:* the dashed line counts a single FIFO burst from an empty start; the longer the run, the lower
# it gets. An unbounded queue in overload has a goodput of zero; it only takes a while.

# %% [markdown]
# ## When do you hear the no?
#
# *Deadline* and *predicted wait* have about the same goodput. Compare how long those wait who get nothing.

# %%
rows = []
for policy in POLICIES:
    for rho in (2, 10):
        df = runs[policy, rho]
        no, yes = df[df.outcome != "200"], df[df.outcome == "200"]
        rows.append(
            {
                "policy": policy,
                "load": f"{rho}×",
                "goodput/s": round(goodput[policy, rho], 1),
                "503": int((df.outcome == "503").sum()),
                "504": int((df.outcome == "504").sum()),
                "a no takes, s": round(no.latency_ms.median() / 1000, 2),
                "a yes takes, s": round(yes.latency_ms.median() / 1000, 2),
            }
        )
table = pd.DataFrame(rows).set_index(["policy", "load"])
table

# %% [markdown]
# **504** says: you waited, and in vain. **503** says at once: not now, and `Retry-After` says when. The client of a 503 can
# go to another server, or show last week's answer. So refuse early what you can foresee; the 504 is for what you could
# not: a call that took longer than usual, a client with less patience.

# %%
no_503 = table.loc[("predicted wait", "2×"), "a no takes, s"]
no_504 = table.loc[("deadline", "2×"), "a no takes, s"]
claim(
    "A full queue should answer 503, a late one 504",
    f"at twice the capacity: a predicted wait says 503 after {no_503:.2f} s, a deadline alone says 504 after"
    f" {no_504:.2f} s; goodput {goodput['predicted wait', 2]:.0f}/s and {goodput['deadline', 2]:.0f}/s of 50. A queue bounded by"
    f" number (256) had {goodput['bounded', 2]:.0f}/s",
    "holds, if full means 'too long to wait' and not 'so many'",
)

# %% [markdown]
# ## Measured
#
# So far it was the loop on a virtual clock. Now the real server, with long texts so that little load is enough. One takes
# everything and is patient; the other knows that an answer is worth nothing after 2 s. Twice the capacity. (The clients
# hang up after 4 s.)

# %%
patient, careful = serve_all(
    {"MAX_QUEUE": 10**6, "DEADLINE_S": 600, "QUEUE_TARGET_S": 0},
    {"DEADLINE_S": LIMIT_S, "QUEUE_TARGET_S": 0},
    cores=SERVER_CORES,
)
mu = capacity(careful, quick(3, 6), texts="long", users=8)
seconds = quick(5, 15)
twice = quick(3, 2)  # times the capacity; the quick form is short, so it must be more to fill the queue
options = {"rate_per_s": twice * mu, "duration_s": seconds, "texts": "long", "limit_s": LIMIT_S}
real = {
    name: load(server, "open", **options) for name, server in (("patient", patient), ("careful", careful))
}
stop(patient)

# %%
real_goodput = {name: drive.summary(df, LIMIT_S)["goodput_per_s"] for name, df in real.items()}
print(
    f"capacity {mu:.0f}/s; goodput: {real_goodput['patient']:.0f}/s patient, {real_goodput['careful']:.0f}/s careful"
)
print(real["careful"].outcome.value_counts().to_dict())

# %%
with picture("Twice the capacity, for real", "time of arrival, s", "time to the reply, ms") as ax:
    line(ax, [0, seconds], [0, seconds * 1000], "predicted, patient: t", GREY, linestyle="--")
    line(ax, [0, seconds], [LIMIT_S * 1000] * 2, "the clients' limit")
    for name, color in (("patient", BLUE), ("careful", ORANGE)):
        answered = real[name][real[name].outcome == "200"]
        dots(ax, answered.due_s, answered.latency_ms, f"{name}: answered", color, markersize=4)
    no = real["careful"][real["careful"].outcome == "503"]
    ax.plot(no.due_s, no.latency_ms, "x", color=RED, label="careful: 503", markersize=4)
    ax.set_ylim(-200, 2.2 * LIMIT_S * 1000)
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=2)

# %% [markdown]
# The patient server helps those who came first, and then nobody. Who hangs up frees a place, so the wait stays at 4 s: it
# answers to the end, and always too late. The careful one goes on giving answers at its capacity, all just in time, and says no within
# milliseconds. *Where the prediction fails:* saying no is not free, either. It costs a fraction of a millisecond of the
# same core, so at 100 times the capacity the noes alone would fill it.

# %% [markdown]
# ## Retry storms
#
# Refused clients come back. If they come back at once, every no makes a new question. A client asks at most 5 times.
# `honour=1` waits as `Retry-After` says; `honour=0` comes back after 50 ms. **Your prediction.** At 1.7 times the capacity
# $1/1.7$ = 59 % of the clients can get an answer while the overload lasts. The queue that is left at its end, 2 s of work,
# serves $2/(1.7 · 15)$ = 8 % more; and beyond these 67 % only those get one who come back later.

# %%
storms = {
    honour: load(
        careful, "retry", honour=honour, **(options | {"timeout_s": 8.0, "rate_per_s": 0.85 * twice * mu})
    )
    for honour in (1, 0)
}
for honour, df in storms.items():
    clients = (df.attempt == 0).sum()
    print(
        f"honour={honour}: {len(df) / clients:.1f} requests a client,"
        f" {(df.outcome == '503').mean():.0%} of them refused,"
        f" {(df.outcome == '200').sum() / clients:.0%} of the clients got an answer"
    )

# %%
with picture("Who is refused asks again", "time, s", "requests sent in half a second") as ax:
    bins = np.arange(0, max(df.sent_s.max() for df in storms.values()) + 0.5, 0.5)
    ax.axvline(seconds, color=GREY, linestyle=":")
    first = np.histogram(storms[0][storms[0].attempt == 0].sent_s, bins)[0]
    line(ax, bins[:-1], first, "new clients only")
    for honour, color, name in ((1, BLUE, "wait for Retry-After"), (0, ORANGE, "again after 50 ms")):
        dots(ax, bins[:-1], np.histogram(storms[honour].sent_s, bins)[0], name, color)
    ax.set_ylim(0, None)
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=3)

# %% [markdown]
# The impatient spend their five questions within a quarter of a second: a burst of noes at once, more requests in all, and
# fewer of them get an answer: about the 67 %. Those who wait come back later: as long as the overload lasts, the blue dots
# climb too, and when it ends (at the dotted line), the server still has somebody to answer. `Retry-After` is computed from
# the work ahead and the measured speed, so it is true when it is given. *Where it fails:* it moves an overload, it doesn't
# remove it; and if all are told the same second, they come back in the same second. Clients should add a random bit.

# %% [markdown]
# ## The poison text
#
# One text makes the model raise. If it shares a batch with seven innocent ones, who pays? A text without `[MASK]` would
# do it, but the server never lets it that far:

# %%
refused = ask(careful, "no mask here")
print(refused.status, refused.body)
stop()

# %% [markdown]
# So hand it to the real loop behind the real model, past that check. **Your prediction:** the batch of 8 fails, then its 8
# texts run alone, once: 9 calls in place of 1; 7 answers, 1 error.

# %%
copy = offload.Thread(
    functools.partial(tasks.load_alone, Settings(TORCH_THREADS=1, BATCH_SIZE=8, FAST=False))
)
sizes = []


async def counted(queries):
    sizes.append(len(queries))
    return await copy.run(queries)


async def poisoned_batch():
    await copy.start()
    loop = ModelLoop(batch_size=8, window_s=0.2)
    consumer = asyncio.create_task(loop.consume(counted))
    await asyncio.sleep(0)
    texts = [TEXT] * 3 + ["no mask here"] + [TEXT] * 4
    results = await asyncio.gather(
        *(loop.submit(Content(text, {}, [])) for text in texts), return_exceptions=True
    )
    consumer.cancel()
    copy.stop()
    return results


fates = await poisoned_batch()
print("sizes of the calls:", sizes)
print("fates:", [type(fate).__name__ for fate in fates])

# %% [markdown]
# Nobody but the culprit pays with an answer. But all pay with time: the batch ran twice. *Where it fails:* an attacker who
# sends one such text into every batch takes the batching away from everybody. So the check before the queue matters more
# than the cure behind it.

# %%
claim(
    "One bad input fails the whole batch",
    f"a batch of 8 with one text that raises: {sum(not isinstance(f, Exception) for f in fates)} answers, 1 error,"
    f" {len(sizes)} calls of the model",
    "fails here: the others run again, alone, once",
)

# %% [markdown]
# ## Exercises
#
# **★** 40 texts a second, clients that leave after 1.5 s. What is the largest useful bound for the queue?

# %%
largest_bound = ...

checks.exercise_5_1(largest_bound)


# %% [markdown]
# **★★** Write goodput from the rows of a load test: right answers ("200") within `limit_s`, per second.


# %%
def my_goodput(df, limit_s, duration_s): ...


checks.exercise_5_2(my_goodput)


# %% [markdown]
# **★★★** An unbounded queue, empty at first, is offered `rho` times its capacity `mu` for `t` seconds (`rho` > 1), then
# nothing more. How many of the texts get their answer within `limit_s`?


# %%
def good_answers(mu, rho, limit_s, t): ...


checks.exercise_5_3(good_answers)

# %% [markdown]
# ## What must hold

# %%
for rho in (2, 10):
    assert goodput["predicted wait", rho] > 0.8 * 50, "who foresees the wait keeps its goodput"
    assert goodput["predicted wait", rho] > 2 * goodput["unbounded", rho]
    assert goodput["bounded", rho] < 0.6 * goodput["predicted wait", rho], "a bound is a time"
assert no_503 < 0.1 * no_504, "a 503 comes at once, a 504 after the wait"
# The quick form overloads it for five seconds: on a slow machine that is too short.
assert QUICK or real_goodput["careful"] > 1.2 * real_goodput["patient"], "so it is on the real server"
assert (real["careful"].outcome == "503").any()
assert len(storms[0]) / (storms[0].attempt == 0).sum() > len(storms[1]) / (storms[1].attempt == 0).sum()
assert refused.status == 422
assert sum(isinstance(fate, ModelFailed) for fate in fates) == 1 and sizes == [8] + [1] * 8
