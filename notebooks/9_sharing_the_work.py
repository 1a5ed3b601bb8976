# %% [markdown]
# # 9. Sharing the work
#
# You have several copies of a model: on two cores, on two GPUs. Now each text has to find a copy, and each answer its caller. Services
# that do this are copied again and again, with their mistakes.
#
# **Question: how do you share the texts among several copies of a model?**
#
# Afterwards you can say whether several devices need one queue or several, and which figure tells how busy a device is.
#
# It takes about 2 minutes (the quick form half a minute), two cores and 2 GB of memory. [What all lessons need](README.md).

# %%
# "No module named 'lesson'"? Open this notebook where it lies, in the project's notebooks/, or by `make learn`.
from lesson import BLUE, GREY, ORANGE, RED, bars, claim, compare, counters, dots, guessed, holds
from lesson import line, picture, quick, score, serve_all, stop, table, tell, way

import math
import time


import checks

# %% [markdown]
# ## The bug hunt: several devices behind one `predict`
#
# This is the heart of a service for several GPUs that is copied again and again, in our words. `self.inputs` has a queue for
# each device. `self.replies` is one queue for all of them. A device here is a thread that runs `work`. It sleeps as long as its
# text says, so that you see the service and nothing else. **Read it. Which mistakes do you find?**

# %%
import inspect

from support import l09_devices as service

for part in (service.Broken.work, service.Broken.choose, service.Broken.predict):
    print(inspect.getsource(part))
way(
    ("caller A", "queue 0", "device 0", "replies", "A or B?"),
    ("caller B", "queue 1", "device 1", "the same", "B or A?"),
    changed={"replies", "the same", "A or B?", "B or A?"},
)

# %% [markdown]
# We found three in it. We take them one after the other.
#
# ## Bug 1: a reply for somebody else
#
# All replies come out of one queue. `predict` takes the next one. If it is somebody else's, `predict` throws it away and waits
# on. Two callers ask one text after the other, up to 100 each. The texts take random times. How many right answers do the
# two get together, before both wait forever?

# %%
guess_answers = ...  # of 200

# %% [markdown]
# **Prediction.** Two callers wait; one of the two replies comes first. Python gives it to whoever has waited longest. With
# probability 1/2 it is theirs. If it is the other's, it is thrown away, and the other one waits forever. The first now waits
# for his own reply, but the other one stands in front of him, takes it, and throws it away. So one mistake ends it all. No
# answer at all: a chance of 1/2. One answer: 1/4. Two: 1/8. The mean is **one** answer.
#
# With one caller nothing goes wrong. And if all texts take the same time, replies come in the order of the questions: then
# the one who waits longest gets his own.

# %%
import random
from statistics import mean


def random_s():
    """The seconds that a text takes: 5 ms on average, exponential."""
    return random.expovariate(200)


uneven = service.trials(quick(40, 200), service.Broken, random_s, calls=100, patience_s=0.3)
same = service.trials(10, service.Broken, lambda: 0.04, calls=quick(8, 50), late_s=0.02, patience_s=0.5)
together = [fate.right for fate in uneven]
all_same = 2 * quick(8, 50)

# %%
with picture(
    "Two callers, and soon nobody gets an answer",
    "right answers before both wait for ever",
    "",
    xscale="log",
    xlim=(0.3, 3000),
) as ax:
    bars(ax, [1, all_same], [0, 1])
    dots(ax, [mean(together), mean(fate.right for fate in same)], [0, 1])
    guessed(ax, guess_answers, 0)
    ax.set_yticks([0, 1], ["random times", f"equal times\n({all_same} asked)"])
    ax.set_ylim(-0.6, 1.5)

# %%
compare("right answers of the two", guess=guess_answers, formula=1, measured=mean(together))
tell(
    f"With random times the two got {mean(together):.2f} right answers on average in {len(uneven)} trials. In"
    f" {together.count(0) / len(uneven):.0%} of the trials they got none at all (predicted 50 %), in"
    f" {together.count(1) / len(uneven):.0%} one (25 %), in {together.count(2) / len(uneven):.0%} two (12.5 %). At the end of"
    f" {sum(fate.lost == 2 for fate in uneven)} of {len(uneven)} trials both waited for ever. With equal times"
    f" {sum(fate.lost == 0 for fate in same)} of {len(same)} trials got through."
)

# %% [markdown]
# (Two hundred trials leave the mean uncertain by a tenth.) Why does nobody notice the mistake? The author tested it with one caller, or with the same text again and again. Even there a
# hiccup of the machine, half a call long, is enough to change the order.
#
# Its older version has no numbers at all: `predict` returns whatever comes. Then nobody waits forever. **What do you
# think**: of 100 answers, how many belong to somebody else's text?

# %%
guess_wrong = ...  # a share

# %% [markdown]
# **Prediction.** One half, by the same argument? No: more. A mistake drags the next one along. The caller that got the wrong reply asks
# again, and its old reply is still on the way: the other one gets that. So each time that the coin falls on "wrong", *two*
# answers are wrong: of three answers, two.

# %%
many = {"calls": quick(30, 100), "patience_s": 1.0}
mixed, kept = (
    service.total(service.trials(10, kind, random_s, **many))
    for kind in (service.TakesWhatComes, service.Repaired)
)
lossy = service.total(uneven)

# %%
ROWS = {"throws others' replies away": lossy, "takes whatever comes": mixed, "one queue, repaired": kept}
table(
    {
        "service": name,
        "answers": fate.right + fate.wrong,
        "somebody else's": f"{fate.wrong / max(1, fate.right + fate.wrong):.0%}",
        "predicted": "67%" if fate is mixed else "0%",
        "you guessed": f"{guess_wrong:.0%}" if fate is mixed else None,
        "callers who wait for ever": fate.lost,
    }
    for name, fate in ROWS.items()
)

# %% [markdown]
# The repaired service stands in the last row. Here is what its devices do, and what a caller does. Each text carries a place
# for its answer, a *future*, and only its own caller waits there. No numbers, no queue of replies, and no balancer: whoever is
# free takes the next text.

# %%
print(inspect.getsource(service.Repaired.work))
print(inspect.getsource(service.Repaired.predict))
way(
    ("callers", "one queue", "device 0", "own future"),
    ("", "", "device 1", "own future"),
    changed={"one queue", "own future"},
)

# %% [markdown]
# ## Bug 2: a device dies and keeps its queue
#
# One text raises an exception. The thread of its device ends; that is what an exception does to a thread. There are two
# devices. Of the next 20 texts, how many does the broken service answer?

# %%
guess_after_bad = ...  # of 20

# %% [markdown]
# **Prediction.** Dealt in turn, every second text falls into a queue that nobody empties: 10. Where the exception is
# handed to its caller and the queue is shared: 20.

# %%
kinds = (service.Broken, service.Repaired)
after_bad = {kind.__name__: service.answered_after_a_bad_text(kind) for kind in kinds}
tell(
    f"Answered of 20: {after_bad['Broken']} by the broken service (your guess: {guess_after_bad}),"
    f" {after_bad['Repaired']} by the repaired one."
)

# %% [markdown]
# ## One queue, or one for each device?
#
# Bug 3 is no bug of the code: it is its idea. It has a queue for each device and deals the texts **round robin**, in turn.
# Is that good enough? Two devices, each busy for four fifths of the time ([utilisation](glossary.md) 0.8). Texts come at random
# moments. How long does a text wait on average, in units of the time of one text, with *round robin*, if one text in
# ten takes ten times as long as the others?

# %%
guess_wait = ...  # times the mean time of a text

# %% [markdown]
# **Prediction.** Three things make texts wait: they come irregularly, they are uneven, and the devices are crowded. One formula
# for the mean wait shows all three (Kingman, *The single server queue in heavy traffic*, 1961; for several devices Allen,
# *Probability, Statistics, and Queueing Theory*, 1990):
#
# $$W \approx \frac{c_a^2 + c_s^2}{2} \cdot \text{crowd} \cdot S$$
#
# - $S$ is the mean time of a text.
# - $c_a^2$ says how irregularly texts come: 1 for strangers; $1/n$ where only each $n$-th of them comes here (round robin).
# - $c_s^2$ says how uneven the texts are: 0 if they are alike, about 2 for ours.
# - The crowd is $\rho/(1-\rho)$ for a device with a queue of its own, and $\rho^2/(1-\rho^2)$ for two devices with one queue.
#
# With texts alike this is M/D/1 for a queue of one's own with strangers (lesson 3), and M/D/2 for the shared one. For
# "least loaded", which sends each text to the device with the fewest, there is no simple formula.

# %%
from support import l09_queues as queues

S, RHO, DEVICES = 0.02, 0.8, 2
POLICIES = ("at random", "round robin", "least loaded", "one shared queue")
own, shared = RHO / (1 - RHO), RHO**2 / (1 - RHO**2)
UNEVENNESS = {"alike": 0.0, "uneven": 10.9 / 1.9**2 - 1}  # (0.9 · 1² + 0.1 · 10²) / (0.9 · 1 + 0.1 · 10)² - 1


def formula(policy, kind):
    """The mean wait, in units of S; NaN where there is no simple formula."""
    irregular = {"round robin": 1 / DEVICES, "least loaded": math.nan}.get(policy, 1)
    crowd = shared if policy == "one shared queue" else own
    return (irregular + UNEVENNESS[kind]) / 2 * crowd


# %% [markdown]
# The measurement uses the real server. One has two copies and one queue (`INSTANCES=2`). Against it stand two pairs of
# servers with one copy each: the first pair gets its texts round robin, the second by least load. The model sleeps for 20 ms on
# average, so cores don't matter. All three get the same texts at the same times.

# %%
patient = {"MAX_QUEUE": 100_000, "DEADLINE_S": 60, "QUEUE_TARGET_S": 0}
nap = {"MODEL": "notebooks.support.l09_queues:Nap"}
A, B, MOST = 0.008, 0.001, 32  # for later: a call with n texts takes A + B n seconds
settings = [
    {**nap, **patient, "INSTANCES": DEVICES},
    *[nap | patient] * 2 * DEVICES,
    {**nap, **patient, "BATCH_SIZE": MOST, "NAP_A_S": A, "NAP_B_S": B},
]
both, *singles, batching = serve_all(*settings)
pairs = {
    "round robin": [server.url for server in singles[:DEVICES]],
    "least loaded": [server.url for server in singles[DEVICES:]],
    "one shared queue": [both.url],
}

# %%
seconds = quick(3, 20)
arrivals = queues.strangers(DEVICES * RHO / S, seconds)
waits = []
for kind, texts in (("alike", queues.alike), ("uneven", queues.uneven)):
    takes = texts(S, len(arrivals))
    fleets = [queues.Fleet(urls, policy) for policy, urls in pairs.items()]
    took = dict(zip(pairs, queues.replay(fleets, arrivals, takes)))
    for policy in POLICIES:
        row = {"texts": kind, "policy": policy, "formula": formula(policy, kind)}
        row["simulated"] = mean(queues.waits_s(arrivals, takes, DEVICES, policy)) / S
        waited = [t - s for t, s in zip(took.get(policy, ()), takes)]
        waits.append(row | {"measured": mean(waited) / S if waited else None})


# %%
with picture(
    "Round robin is blind to uneven texts", "mean wait, in texts of 20 ms", "", xlim=(0, None)
) as ax:
    for kind, color, above in (("alike", BLUE, 0.2), ("uneven", ORANGE, -0.2)):
        some = [row for row in waits if row["texts"] == kind and row["measured"] is not None]
        places = [POLICIES.index(row["policy"]) + above for row in some]
        bars(ax, [row["formula"] for row in some], places, None)
        ax.plot([row["simulated"] for row in some], places, "D", color=GREY, fillstyle="none")
        dots(ax, [row["measured"] for row in some], places, None, color)
    queues.names_beside(ax, waits, POLICIES)
    guessed(ax, guess_wait, 0.8, "guess")
    ax.set_yticks(range(1, 4), POLICIES[1:])
    ax.set_ylim(0.4, 3.6)

# %%
found = {(row["texts"], row["policy"]): row for row in waits}


def ratio(kind, policy, column="measured"):
    """How many times longer texts wait than in one shared queue."""
    return found[kind, policy][column] / found[kind, "one shared queue"][column]


robin = found["uneven", "round robin"]
compare("round robin, uneven, in S", guess=guess_wait, formula=robin["formula"], measured=robin["measured"])
tell(
    f"Round robin waits {ratio('alike', 'round robin'):.1f} times as long as one shared queue with texts alike,"
    f" {ratio('uneven', 'round robin'):.1f} times with uneven ones; least loaded {ratio('alike', 'least loaded'):.1f}"
    f" and {ratio('uneven', 'least loaded'):.1f} times."
)

# %% [markdown]
# A filled dot is measured, a hollow mark simulated, a bar the formula.
#
# With texts alike, round robin is not only good enough: it is the same as one queue. Whoever is next in turn is always the
# one who is free first. (Beside the simulation the formula is a little pessimistic there; it was made for long waits.) With uneven texts that
# ends. Round robin makes the *arrivals* at a device more regular; it does nothing about the *texts*. A short text that is dealt
# to the device with the long one waits, while the other device may be idle. One queue can't do that: nobody waits while a
# device is free.
#
# *Where the formula fails:* it gives the mean over an endless time. A run of some seconds has the long texts that it
# happens to have. The simulation gets the very same texts, so compare the measurement with that. What is left of the difference
# is HTTP, some milliseconds, and a nap that lasts longer than it should. At this utilisation a little more time makes much more
# waiting (lesson 3).
#
# And with more devices? Simulated, with uneven texts, each device busy for four fifths of the time:

# %%
for_long = queues.strangers(RHO / S, quick(200, 2000))  # for one device; n devices get n times as many
rows = []
for n in (1, 2, 4, 8):
    comes = [at / n for at in for_long]
    takes = queues.uneven(S, len(comes))
    rows.append({"devices": n} | {p: mean(queues.waits_s(comes, takes, n, p)) / S for p in POLICIES})
table(
    {name: value if name == "devices" else f"{value:.1f} × S" for name, value in row.items()} for row in rows
)

# %%
claim(
    "round robin is good enough",
    who="mean wait at utilisation 0.8, two servers with round robin against one with two copies on one queue",
    number=f"{ratio('alike', 'round robin'):.1f} times as long with texts alike,"
    f" {ratio('uneven', 'round robin'):.1f} times where one in ten takes ten times as long; simulated with eight devices"
    f" {rows[-1]['round robin'] / rows[-1]['one shared queue']:.0f} times",
    verdict="depends on the texts: the same as one queue if they are alike, and further behind one queue with every device if they are not",
)

# %% [markdown]
# ## "Average batch over maximum batch is utilisation"
#
# A dashboard divides the average batch by `BATCH_SIZE` and calls it the utilisation of the device: "6 %, so there is a lot of
# room". Our model now takes 8 ms for a call and 1 ms more for each text, and up to 32 texts go into a call. 100 texts
# come each second. For what share of the time is it busy?

# %%
guess_busy = ...  # a share of the time

# %% [markdown]
# **Prediction.** While it is not always busy, most texts come alone: a call takes $a+b$, and the busy time is
# $\lambda\,(a+b)$. Above that it is busy all the time, and batches grow until they keep up: $n = \lambda\,(a + b\,n)$, so
# $n = \lambda a/(1-\lambda b)$. What the server *could* do is $32/(a + 32\,b)$ texts a second.

# %%
rates = quick([50, 200], [25, 50, 100, 200, 400])
measured = []
for rate in rates:
    before, began = counters(batching), time.perf_counter()
    times = queues.strangers(rate, quick(1.5, 5))
    queues.replay([queues.Fleet([batching.url])], times, queues.alike(0, len(times)))
    spent, after = time.perf_counter() - began, counters(batching)
    calls, texts, busy_s = (
        after[name] - before[name]
        for name in ("model_call_seconds_count", "model_batch_size_sum", "model_call_seconds_sum")
    )
    measured.append((100 * busy_s / spent, 100 * texts / calls / MOST))
stop()

# %%
import numpy as np

most_per_s = MOST / (A + MOST * B)
smooth = np.linspace(1, 600, 300)
with picture(
    "Busy all the time with a small average batch", "texts a second", "%", xlim=(0, 620), ylim=(0, 108)
) as ax:
    line(ax, smooth, np.minimum(100, 100 * smooth * (A + B)), "busy")
    line(ax, smooth, 100 * smooth / most_per_s, "of what it can do", GREY, linestyle="--")
    line(ax, smooth, 100 * np.maximum(1, smooth * A / (1 - smooth * B)) / MOST, "batch / maximum", RED)
    dots(ax, rates, [busy for busy, _ in measured], None)
    dots(ax, rates, [batch for _, batch in measured], None, RED)
    guessed(ax, 100, 100 * guess_busy)

# %%
at = rates.index(200)
claim(
    "average batch over maximum batch is GPU utilisation",
    who="the server with a stand-in model that sleeps 8 ms + 1 ms a text, 200 texts/s, BATCH_SIZE=32",
    number=f"busy {measured[at][0]:.0f} % of the time, average over maximum batch {measured[at][1]:.0f} %,"
    f" {200 / most_per_s:.0%} of the texts that it can do",
    verdict="fails: three different figures, and only the last says how much room is left",
)

# %% [markdown]
# The busy time is no better guide. It is near 100 % long before the server is full, as batches grow when they must. What says
# how much room is left is neither: it is the load over the capacity, and the capacity has to be measured (lesson 4).
#
# *Where the formula fails:* around the bend of the line. The line lets each text come alone until that is too much. In truth
# texts meet long before, and share a call. So the model is less busy there than the line says, and batches are larger than
# one. And it is never busy for the whole time: between two calls there is a moment without one.
#
# ## Several instances on one device
#
# "Our GPU was busy for 20 % of the time. We started four instances on it, and now it is 80 %." Can that be? A text is read and
# tokenised, 8 ms; then the device computes, 2 ms. Our device is a lock, so it does one thing at a time. How busy is it
# with four instances?

# %%
guess_four = ...  # a share of the time

# %% [markdown]
# **Prediction.** One instance: 2 of 10 ms, 20 %. With $k$ instances that don't get into each other's way: $k \cdot 20\,\%$, and
# never more than 100 %.


# %%
def busy_with(k):
    """For what share of the time the device is busy when k instances feed it, in %."""
    device = queues.Lane()

    def run(text):
        time.sleep(0.008)
        device.run(0.002)

    took_s = service.crowded(service.Repaired(k, run), k, quick(50, 200))
    return 100 * device.busy_s / took_s


instances = quick([1, 4], [1, 2, 4, 6, 8])
busy = [busy_with(k) for k in instances]

# %%
with picture(
    "More instances keep the device busy", "instances", "device busy, %", xticks=instances, ylim=(0, 108)
) as ax:
    line(ax, [1, 5, 8], [20, 100, 100])
    dots(ax, instances, busy)
    guessed(ax, 4, 100 * guess_four)
compare(
    "share busy with four instances", guess=guess_four, formula=0.8, measured=busy[instances.index(4)] / 100
)
tell("Busy: " + ", ".join(f"{share:.0f} % with {k}" for k, share in zip(instances, busy)) + ".")

# %% [markdown]
# It can be, for one reason: most of a text's time was spent elsewhere. *Where the formula fails:* near the top. Instances that
# come at the same moment wait for each other, and then the device has gaps at another time.
#
# Whether a real GPU does the same is another question. It may run two small things at once, and the copies share its memory.
#
# ## Where a GPU is at hand
#
# These six measurements need one: several streams, several instances, page-locked memory that is allocated once, a cache that
# is cleared, the driver's utilisation beside the time that is really busy, CUDA after a fork. They stand in
# `support/l09_gpu.py`, a few lines each.

# %%
from support import l09_gpu

advice = l09_gpu.measured()
if advice:
    table(advice)
else:
    tell("No GPU here, so nothing is measured. The ledger says what each claim would take.")
    table({"untested here": text, "it takes": takes} for text, takes in l09_gpu.CLAIMS)
for entry in l09_gpu.verdicts(advice):
    claim(**entry, shown=bool(advice))

# %% [markdown]
# ## Exercises
#
# Fill in and run. The checker tells you what it thinks; it never stops the notebook. Solutions are in `notebooks/solutions/`.
#
# **★** 50 texts per second come, and each takes a device 60 ms. How many devices do you need at least, if none may be busy for more
# than four fifths of the time?

# %%
devices = ...

checks.exercise_9_1(devices)

# %% [markdown]
# **★★** The devices are processes, so a future can't travel to them: a number must. Write `hand_out(replies, waiting)`. It takes
# pairs `(number, answer)` from the queue `replies` until it gets `None`. `waiting` maps each number to the future where its
# caller waits: take it out and give it its answer; if the answer is an exception, set it as one. A number that nobody waits
# for is left alone.


# %%
def hand_out(replies, waiting): ...


checks.exercise_9_2(hand_out)


# %% [markdown]
# **★★★** Write "least loaded" for `n` devices with a queue each: each text goes to the device with the fewest texts that are not
# finished; among equals, to the first of them. A text that ends at the very moment when another comes is finished. Return the
# mean wait.


# %%
def wait_least_loaded(arrivals, durations, n): ...


checks.exercise_9_3(wait_least_loaded)

# %% [markdown]
# ## In the lab
#
# 80 texts per second, 20 ms each. Choose the fewest instances with which a text waits less than one call on average. One
# number. It starts the real server and judges what it measures.

# %%
import labs

instances_wanted = ...

labs.lab_9(instances_wanted)

# %% [markdown]
# ## Ten questions
#
# Answer them aloud, then open the answers.
#
# 1. Why do two callers on one reply queue end after one answer?
# 2. Why are two of three answers wrong where replies are taken as they come?
# 3. Why is round robin fine for texts alike?
# 4. Why does one queue beat a queue per device?
# 5. Why is average batch over maximum not utilisation?
# 6. Why does the repaired service give each text a future of its own?
# 7. Why does one bad text cost the broken service half of the texts?
# 8. Why is a simulation nearer to the measurement than the formula?
# 9. Why are instances on one device more than one of them worth?
# 10. What says how much room is left?
#
# <details><summary>Answers</summary>
#
# 1. One mistake throws away the other's reply, and then both wait for the wrong one.
# 2. A wrong one drags the next along.
# 3. The next in turn is the one that is free first.
# 4. Nobody waits while a device is free.
# 5. Batches grow only when they must; a busy device can run small ones.
# 6. Whatever order the answers come in, each finds its own caller.
# 7. The exception ends the device's thread, and its queue is filled on.
# 8. It gets the very same texts; the formula speaks of an endless time.
# 9. While one reads and tokenises, another one computes.
# 10. The load over the capacity, and the capacity has to be measured.
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
assert kept.wrong == kept.lost == 0 < mixed.wrong and lossy.wrong == 0 < lossy.lost
assert after_bad == {"Broken": 10, "Repaired": 20}
holds(0.5 < mean(together) < 1.7, "two callers get one answer")
holds(0.55 < mixed.wrong / (mixed.wrong + mixed.right) < 0.8, "two of three belong to somebody else")
holds(ratio("uneven", "round robin") > 1.2, "round robin is blind to uneven texts")
holds(ratio("alike", "round robin") < ratio("uneven", "round robin"), "and good enough for texts alike")
holds(measured[at][0] > 60 and measured[at][1] < 20, "the average batch is no utilisation")
holds(busy[0] < 30 and busy[instances.index(4)] > 55, "more instances keep a device busy")

# %% [markdown]
# ## Take away
#
# - One queue for all copies, and for each text a place of its own for the answer: no balancer, nothing mixed up.
# - Round robin is as good as one queue where texts are alike, and only there.
# - Busy time and average batch don't say how much room is left. Load over measured capacity does.
#
# Next: [Lesson 10](10_faster_runtimes.ipynb). Before you pay for more devices: can one of them do more?
