# %% [markdown]
# # 3. The cliff
#
# A server can answer 100 texts per second. It is asked for 95. Everything fits, so everything should be fine.
#
# **Question: how busy may a server be?**
#
# Afterwards you can decide how much of a server's capacity to use, and you know what a load test hides from you.
#
# It takes about 3.5 minutes (the quick form 35 s), two cores and 1 GB of memory. [What all lessons need](README.md).

# %%
# "No module named 'lesson'"? Open this notebook where it lies, in the project's notebooks/, or by `make learn`.
from lesson import BLUE, GREY, ORANGE, RED, claim, compare, dots, guessed, holds, line, load
from lesson import picture, quick, said, score, serve, simulate, stop, table, tell

import checks
from support import l03_runs

# %% [markdown]
# ## How long do people wait?
#
# Everything here happens in the [queue](glossary.md). People come at random moments and know nothing of each other. The model
# takes one text at a time. A text that finds it busy waits.
#
# The model is busy for a part of the time. That part is the [**utilisation**](glossary.md). When the server can answer 100
# texts per second and 95 come, it is 95 %.
#
# **Guess.** A server is 95 % busy. How long does a text wait in the queue, on average? Say it in calls: 1 is the time that
# the model takes for one text.

# %%
guess_wait = ...  # calls, at 95 % utilisation

# %% [markdown]
# **Prediction.** It takes one law and one look.
#
# *The law.* [Little's law](glossary.md) says $L = \lambda W$: the mean number that wait is the rate at which they come times
# their mean wait. Why? Let each waiting text pay one coin per second. Counted at the queue, $L$ coins come in per second.
# Counted by the texts, $\lambda$ of them come per second and each pays $W$ coins. It is the same money. Nothing is assumed about
# who comes, or when. (Little, *A Proof for the Queuing Formula L = λW*, Operations Research, 1961.)
#
# *The look.* You come at a random moment. $\lambda$ texts come per second (the [offered load](glossary.md)), and a call takes $S$
# seconds (the [service time](glossary.md)). So the utilisation is $\rho = \lambda S$. In front of you wait $L$ texts, and each will
# take $S$. And with a chance of $\rho$ a call is running. When calls are alike, half of it is left on average. So
#
# $$W = L\,S + \rho\,\tfrac{S}{2} \quad\text{and}\quad L = \lambda W \quad\Rightarrow\quad W = \rho\,W + \rho\,\tfrac{S}{2}
# \quad\Rightarrow\quad W = \frac{\rho}{2(1-\rho)}\,S.$$
#
# When calls take random times (exponential: many short, a few long), a running call has no memory: however long it has run, a whole
# mean call is left. Put $S$ for $\tfrac S2$ above:
#
# | | when each call takes | mean wait, in calls |
# |---|---|---|
# | M/D/1 | the same time | $\frac{\rho}{2(1-\rho)}$ |
# | M/M/1 | a random time | $\frac{\rho}{1-\rho}$ |
#
# In the names the first letter is for the arrivals and the second for the calls. M stands for random, D for always the same,
# and 1 for one model. The time to the answer is the wait and one call more. (Both are cases of the formula of Pollaczek and
# Khinchine: Kleinrock, *Queueing Systems*, vol. 1, 1975, ch. 3 and 5.)


# %%
def md1_wait(rho):
    """Mean wait in calls when all calls take the same time."""
    return rho / (2 * (1 - rho)) if rho < 1 else float("inf")


def mm1_wait(rho):
    """The same when their times are random."""
    return 2 * md1_wait(rho)


# %% [markdown]
# ## A clean cliff
#
# Is that so? First in a world without dirt: this server's own loop runs on a virtual clock for an hour. Each call takes 100 ms
# exactly, and strangers come at random moments. That is what "simulated" means in these lessons.

# %%
from loadtests.plan.planner import CostLaw

CALL_S = 0.1
ENDLESS = {"max_queue": 10**6, "deadline_s": 1e6, "queue_target_s": 0, "overhead_s": 0}


def an_hour(rho):
    """What an hour of strangers sees, simulated: waits in calls."""
    df = simulate(CostLaw(0, CALL_S), rate_per_s=rho / CALL_S, duration_s=quick(300, 3600), seed=7, **ENDLESS)
    return df.queue_ms / 1000 / CALL_S


rhos_clean = [0.1, 0.3, 0.5, 0.7, 0.8, 0.85, 0.9, 0.93, 0.95, 0.97]
hours = {rho: an_hour(rho) for rho in rhos_clean}

# %%
import numpy as np

smooth = np.linspace(0.02, 0.985, 400)
alike, random = (np.array([wait(rho) for rho in smooth]) for wait in (md1_wait, mm1_wait))
means, hollow = [hours[rho].mean() for rho in rhos_clean], {"fillstyle": "none"}
top = 1.15 * max(guess_wait, 18)
axes = {"xlim": (0, 1.03), "ylim": (-0.5, top)}
with picture("Flat, flat, flat, cliff", "utilisation ρ", "mean wait, calls", **axes) as ax:
    line(ax, smooth[random < top], random[random < top], "calls random", GREY, linestyle="--")
    line(ax, smooth[alike < top], alike[alike < top], "calls alike")
    dots(ax, rhos_clean, means, "simulated", **hollow)
    guessed(ax, 0.95, guess_wait)
compare("the wait at 95 %, in calls", guess=guess_wait, formula=md1_wait(0.95), measured=hours[0.95].mean())

# %% [markdown]
# From 10 to 50 % next to nothing happens. From 90 to 95 % the wait doubles, and it doubles again to 97 or 98 %. What runs away is
# not the work; it is $1 - \rho$, the time in which a queue can shrink. (The highest dots still scatter: near the cliff even an hour is a
# short run.)
#
# ## One in a hundred
#
# The mean is the good news. One client in a hundred waits longer than the [p99](glossary.md).
#
# **Guess.** The server is 95 % busy again. How many calls is the p99 of the time from arrival to answer?

# %%
guess_p99 = ...  # calls, at 95 % utilisation

# %% [markdown]
# **Prediction.** With random calls the time to the answer is exponential, too, with a mean of $\frac{1}{1-\rho}$ calls. Beyond $x$
# means of an exponential lies a share of $e^{-x}$. One hundredth lies beyond $-\ln 0.01 = 4.6$ means. So the p99 is
# $\frac{4.6}{1-\rho}$ calls. That holds for calls alike, too, with half the mean wait: about $1 + 4.6\,\frac{\rho}{2(1-\rho)}$ where the
# queue is long.

# %%
clean_p99 = {rho: waits.quantile(0.99) + 1 for rho, waits in hours.items()}
p99_alike, p99_random = 1 + 4.6 * alike, 4.6 / (1 - smooth)
top = 1.15 * max(guess_p99, *clean_p99.values())
with picture("One in a hundred meets the cliff first", "utilisation ρ", "time to the answer, calls") as ax:
    line(ax, smooth[p99_random < top], p99_random[p99_random < top], "p99, random", GREY, linestyle="--")
    line(ax, smooth[p99_alike < top], p99_alike[p99_alike < top], "p99, alike")
    dots(ax, rhos_clean, [wait + 1 for wait in means], "mean", **hollow)
    dots(ax, rhos_clean, list(clean_p99.values()), "p99", RED, **hollow)
    guessed(ax, 0.95, guess_p99)
    ax.set(xlim=(0, 1.03), ylim=(0, top))
formula = 1 + 4.6 * md1_wait(0.95)
compare("the p99 at 95 %, in calls", guess=guess_p99, formula=formula, measured=clean_p99[0.95])

# %% [markdown]
# At 50 % the p99 is a few calls. If you can bear that, the mean won't tell you when it ends: the p99 leaves the ground first.
#
# ## Measured: what is S?
#
# Now the real server, one text per call. We tell it never to reject, so that its queue may grow (`QUEUE_TARGET_S=0` and a large
# `MAX_QUEUE`; lesson 5 is about rejecting). First we ask as hard as we can, and count the answers per second: that is the
# capacity. $S$ is one second divided by the capacity. The server's own counters say how much of $S$ is the model. The rest
# lies between two calls: the answer is handed over, and the next text is taken.

# %%
server = serve(MAX_QUEUE=100_000, DEADLINE_S=600, QUEUE_TARGET_S=0)
per_s, between_s = l03_runs.saturate(server, quick(2, 5))
tell(
    f"At most {per_s:.0f} texts/s. So S is {1000 / per_s:.1f} ms: {1000 / per_s - between_s * 1000:.1f} ms in the model,"
    f" {between_s * 1000:.1f} ms between two calls."
)

# %% [markdown]
# Strangers come, in each run at another share of the capacity. The capacity is measured again before each run, and each call's own
# time is taken from the server's answer: the header `Server-Timing` says how long a text waited and how long its call took.

# %%
RUN_S, fractions = quick((2, [0.3, 0.6, 0.9]), (14, [0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95]))
runs = [l03_runs.run_at(server, fraction, RUN_S) for fraction in fractions]
facts = [df.attrs for df in runs]
rhos = [fact["rho"] for fact in facts]
table(
    "asked for | texts, asked for | texts that came | S before, ms | S in the run, ms | utilisation ρ = λS",
    *zip(
        [f"{fraction:.0%}" for fraction in fractions],
        [f"{one['asked']:.0f} ± {one['asked'] ** 0.5:.0f}" for one in facts],
        [len(df) for df in runs],
        [f"{1000 / one['capacity']:.1f}" for one in facts],
        [f"{one['S'] * 1000:.1f}" for one in facts],
        [f"{rho:.0%}" for rho in rhos],
    ),
)

# %% [markdown]
# The first and the last column should be the same. Where they differ there are three causes. *Chance:* strangers don't come by
# count. Of $n$ that are expected, $n \pm \sqrt n$ come, the second column. *The machine* is faster or slower than it was a moment ago.
# *Pauses:* a call after a pause does not take as long as one right behind another.

# %%
waits = [df.queue_ms.mean() / 1000 / df.attrs["S"] for df in runs]  # in calls
pause = l03_runs.pause_factor(runs)
tell(
    f"Here a call after a pause takes {pause:.2f} times as long as one right behind another (the median of the runs). So"
    f" “capacity” is a statement about a server that never rests. Near the top, where the cliff is, ρ = λS moves with S:"
    f" if S grows by {1 / 0.95 - 1:.0%}, 95 % is 100 %."
)

# %% [markdown]
# ## The cliff, measured
#
# How near can a run of some seconds come to the formula? Near the cliff a queue takes long to build up, and each run starts
# with an empty one. So we also simulate runs *as short as ours*, in a world where the formula is exactly right.
# A queue is five lines of Python:


# %%
def waits_of(arrive_s, call_s):
    """How long each text waits that comes at these times, when one call of these follows the other."""
    waits, free_s = [], 0.0
    for at_s, takes_s in zip(arrive_s, call_s):
        starts_s = max(at_s, free_s)
        waits.append(starts_s - at_s)
        free_s = starts_s + takes_s
    return np.array(waits)


grid = [0.05, 0.2, 0.4, 0.6, 0.7, 0.8, 0.85, 0.9, 0.93, 0.96, 0.98, 0.999]
least, most = l03_runs.band(waits_of, grid, texts=RUN_S / np.median([df.attrs["S"] for df in runs]))

# %%
top = 1.15 * max(*waits, guess_wait, 12)
with picture("The same cliff over HTTP", "utilisation ρ", "mean wait, calls", ylim=(-0.03 * top, top)) as ax:
    ax.fill_between(grid, least, most, color=GREY, alpha=0.25, linewidth=0)
    ax.text(0.72, 0.4 * top, f"grey: runs of {RUN_S} s,\nsimulated", ha="right", color=GREY, fontsize=12)
    line(ax, smooth[alike < top], alike[alike < top], "calls alike")
    clean = [rho for rho in rhos_clean if hours[rho].mean() < top]
    ax.plot(clean, [hours[rho].mean() for rho in clean], "o", color=GREY, fillstyle="none", label="_")
    dots(ax, rhos, waits)
    guessed(ax, 0.95, guess_wait)
    ax.set_xlim(0, 1.03 * min(1.3, max(1, *rhos)))

# %% [markdown]
# Hollow dots are the hour from above, filled ones are measured. Of simulated runs as short as ours, nine in ten lie in the grey area.
# Near the cliff much of it lies far below the line: the queue needs minutes to become as long as the formula says, and a run of
# seconds ends before. A measured dot may lie there without contradicting anything.
#
# *Where the formula fails.* The machine's calls are not all alike, and its slow moments can last for many calls. So take
# from each run when people really came and how long each call really took, and give both to the five lines from above.

# %%
played = [waits_of(df.sent_s, df.call_s).mean() / df.attrs["S"] for df in runs]
table(
    "utilisation ρ | M/D/1 | own arrivals and calls (simulated) | measured",
    *(
        (f"{rho:.0%}", *map(l03_runs.in_calls, (md1_wait(rho), own, wait)))
        for rho, own, wait in zip(rhos, played, waits)
    ),
)
busiest = int(np.argmax(rhos))
said(
    all(0.6 < (own + 0.3) / (wait + 0.3) < 1.6 for own, wait in zip(played, waits)),
    "The five lines, told who came when and how long each call took, give about what was measured: nothing else happened in the"
    " queue. M/D/1 knows neither.",
    "The five lines don't give what was measured: in this run something else happened in the queue.",
)

# %% [markdown]
# That is what a formula can do near the cliff. It tells you that there is one, and about where. It does not tell you
# the height at which you will hit it.
#
# ## What the client adds
#
# The formula speaks of the queue. A client also waits for HTTP, on both sides, and for its own turn on its core.

# %%
both = [l03_runs.parts_ms(df) for df in (runs[0], runs[busiest])]
rows = zip((rhos[0], rhos[busiest]), both)
table(
    "utilisation ρ | sent late by the client | queue | model | HTTP, both sides | all, ms",
    *((f"{rho:.0%}", *(f"{ms:.1f}" for ms in row.values())) for rho, row in rows),
)
shares = [1 - (row["queue"] + row["model"]) / row["all, ms"] for row in both]
said(
    shares[1] < shares[0],
    f"Where hardly anybody waits, HTTP and the client are {shares[0]:.0%} of the time, and no formula for queues knows of them. In"
    f" the busiest run they are {shares[1]:.0%}. So from here on “calls” counts the server's part: queue and model.",
)
p99s = [((df.queue_ms + df.model_ms) / 1000 / df.attrs["S"]).quantile(0.99) for df in runs]

# %% [markdown]
# ## Where to stop
#
# “Not too busy” is not a number. So say first what you can bear, and turn the formula around. A mean wait of $w$ calls allows
#
# $$\rho = \frac{2w}{1+2w} \text{ when calls are alike}, \qquad \rho = \frac{w}{1+w} \text{ when they are random.}$$
#
# And there is a second reason to stay away from the wall. A hiccup of one second leaves a [backlog](glossary.md) of $\lambda$
# texts. Let $\mu = 1/S$ be the capacity. The backlog melts only with what the server has to spare, $\mu - \lambda$ texts a
# second. So a hiccup of one second hurts for $\frac{\lambda}{\mu-\lambda} = \frac{\rho}{1-\rho}$ seconds more.

# %%
table(
    "bearable wait, calls | utilisation, calls random | utilisation, calls alike | a hiccup of 1 s then hurts, s more",
    *(
        (w, f"{w / (1 + w):.0%}", f"{2 * w / (1 + 2 * w):.0%}", f"{w:.1f} to {2 * w:.1f}")
        for w in (0.5, 1, 2, 5, 10)
    ),
)
bearable = np.interp(2, np.maximum.accumulate(waits), rhos)
tell(
    f"If you can bear a wait of two calls, you may run at {2 / 3:.0%} or {4 / 5:.0%}, depending on the calls. Measured here, the"
    f" wait passes two calls "
    + (f"at about {bearable:.0%}." if max(waits) > 2 else f"nowhere up to {max(rhos):.0%}.")
)

# %%
claim(
    "95 % utilisation is well-used hardware",
    who="this server's loop for an hour on a virtual clock, calls alike; and one instance behind HTTP, strangers with short texts",
    number=f"at 95 % a text waits {hours[0.95].mean():.1f} calls on average, and one in a hundred needs {clean_p99[0.95]:.0f} calls to its"
    f" answer, at 50 % {hours[0.5].mean():.1f} and {clean_p99[0.5]:.1f} (simulated); measured at {rhos[busiest]:.0%} {l03_runs.in_calls(waits[busiest])} and"
    f" {p99s[busiest]:.0f}; by the formula a hiccup of 1 s hurts for 19 s more at 95 %",
    verdict="fails where somebody waits for the answer: by the formulas two calls of waiting allow 67 to 80 %",
)

# %% [markdown]
# ## Little's law, checked
#
# Little's law needs no assumption at all. We ask for 80 % of the capacity. Ten times per second somebody looks at the queue
# (`/health` tells its length) and notes how many wait.
#
# **Guess.** How many wait, on average?

# %%
guess_waiting = ...  # texts in the queue

# %% [markdown]
# **Prediction.** `/metrics` counts how many have waited (`model_queue_wait_seconds_count`) and how long in sum (`…_sum`).
# Say that these grow by $\Delta\text{count}$ and $\Delta\text{sum}$ in $t$ seconds. Then $\lambda = \Delta\text{count}/t$ and
# $W = \Delta\text{sum}/\Delta\text{count}$. So $\lambda W = \Delta\text{sum}/t$: the queue's mean length, though nobody has
# looked at it.

# %%
per_s, between_s = l03_runs.saturate(server, quick(0.5, 1.5))
with l03_runs.Looks(server) as looks:
    df = l03_runs.strangers(server, 0.8 * per_s, between_s, RUN_S, seed=1)
looked, little, rho = float(np.mean(looks.seen)), looks.little, df.attrs["rho"]
compare("texts in the queue", guess=guess_waiting, formula=little, measured=looked)
tell(
    f"The mean is of {len(looks.seen)} looks. M/D/1 at the run's utilisation of {rho:.0%} says"
    f" {l03_runs.in_calls(rho * md1_wait(rho))}."
)

# %% [markdown]
# $\lambda W$ and the looks should agree, whatever the arrivals, the calls and the order were. (They can't be quite the same: a look
# ten times per second misses what happens between.) That is why the law is worth so much: two of $L$, $\lambda$ and $W$ give the
# third, on any dashboard. M/D/1 is another matter: it is a prediction, made without the run. Little's law does not predict. It reads
# one measurement off another.
#
# *Where Little's law fails:* it counts the waits of texts that have been served. When the queue is much longer at the end than
# at the start, many still wait and are not counted.
#
# ## Closed and open loops
#
# Most load tests have $N$ users. Each waits for an answer before asking again. That is a
# [**closed loop**](glossary.md). Real people know nothing of each other, and come whether or not others have been answered.
# That is an [**open loop**](glossary.md). We offer more than the server can do in both ways: ten users without a pause, and
# strangers at 1.5 times the capacity.
#
# **Guess.** How many seconds does the last of the strangers wait, after 8 s of this?

# %%
seconds = quick(3, 8)
guess_last_s = ...  # seconds

# %% [markdown]
# **Prediction.** Closed: never more than $N$ are inside. So by Little's law everybody gets an answer after $N \cdot S$,
# forever. Open: each second brings half a second's work too much. So one who comes at $t$ waits $t/2$.

# %%
from loadtests.load import generator

users = 10
closed = load(server, "closed", users=users, duration_s=seconds, limit_s=60)
mu = generator.throughput_per_s(closed)  # the capacity, measured anew
opened = load(server, "open", rate_per_s=1.5 * mu, duration_s=seconds, limit_s=60)
with picture("A closed loop hides overload", "time of arrival, s", "time to the answer, s") as ax:
    line(ax, [0, seconds], [users / mu] * 2, "N · S", linestyle="--")
    line(ax, [0, seconds], [0, seconds / 2], "t / 2")
    dots(ax, closed.due_s, closed.latency_ms / 1000, "closed, 10 users", BLUE, markersize=3)
    dots(ax, opened.due_s, opened.latency_ms / 1000, "open, 1.5 × capacity", ORANGE, markersize=3)
    guessed(ax, seconds, guess_last_s)

# %%
mu_then = 1000 / (opened.model_ms.mean() + between_s * 1000)
offered = len(opened) / seconds
last_s = opened.latency_ms.tail(max(1, len(opened) // 20)).mean() / 1000
compare("the last of the strangers, s", guess=guess_last_s, formula=seconds / 2, measured=last_s)
tell(
    f"The last twentieth of the strangers waited {last_s:.2f} s; t/2 says {seconds / 2:.2f} s. In that run"
    f" {offered:.0f} texts/s came and the server could do {mu_then:.0f}: {offered / mu_then:.2f} times its capacity"
    f" instead of 1.5. With that number the line ends at {max(0, offered / mu_then - 1) * seconds:.2f} s."
)

# %% [markdown]
# It is the same server. The closed loop reports a steady time, and will do so forever: a slow server simply
# gets fewer questions. The open loop shows what strangers would see.
#
# *Where the prediction fails:* it takes the capacity of some seconds before. The line climbs by $\rho - 1$ seconds
# a second: by what comes too much. That is a small number, so when the server is a few per cent slower than before, it grows
# by many per cent.
#
# ## Coordinated omission, with your own eyes
#
# The same mistake hides hiccups. We stop the server's process for one second, in the middle of a run, and let it go again.
# We do it once with one user in a closed loop, and once with strangers at half of the capacity.
#
# **Guess.** The server goes on after one second. For how many seconds more do strangers wait longer than usual?

# %%
guess_after_s = ...  # seconds

# %% [markdown]
# **Prediction.** The lone user asks once during that second, and waits: *one* slow answer. Every stranger suffers who
# comes in that second or while the backlog melts. It melts for $\frac{\rho}{1-\rho}$ seconds more. That is one second at
# $\rho = 0.5$.

# %%
HICCUP_RUN_S = quick(3, 8)
mu, between_s = l03_runs.saturate(server, quick(0.5, 1.5))
one = l03_runs.with_hiccup(server, "closed", users=1, duration_s=HICCUP_RUN_S)
many = l03_runs.with_hiccup(server, "open", rate_per_s=0.5 * mu, duration_s=HICCUP_RUN_S)
stopped_s = float(many.loc[many.latency_ms.idxmax(), "due_s"])
# The median: one call was in the model while the process stood still.
rho = len(many) / HICCUP_RUN_S * (many.model_ms.median() / 1000 + between_s)
hurt_s = 1 + rho / (1 - rho) if rho < 1 else float("inf")
slow_ms = 10 / mu * 1000
came = many[(many.due_s >= stopped_s) & (many.due_s < stopped_s + hurt_s * (1 - slow_ms / 1000))]
hurt = many[many.due_s.between(stopped_s, stopped_s + hurt_s)]

# %%
rows = ("one user, closed", one, 1), ("strangers, open", many, len(came))
table(
    f"load test | asked | slower than ten calls ({slow_ms:.0f} ms) | predicted | p99, ms",
    *(
        (name, len(df), sum(df.latency_ms > slow_ms), predicted, round(df.latency_ms.quantile(0.99)))
        for name, df, predicted in rows
    ),
)
tell(
    f"The strangers' ρ was {rho:.0%} in this run, so the hiccup should hurt for {hurt_s:.1f} s. {len(hurt)} came in that time."
    f" The last of them wait for less than ten calls and don't count: {len(came)} are left."
)

# %%
with picture("One user sees one slow answer", "time of arrival, s", "time to the answer, ms") as ax:
    dots(ax, many.due_s, many.latency_ms, "strangers, open", ORANGE, markersize=3)
    dots(ax, one.due_s, one.latency_ms, "one user, closed", BLUE, markersize=3)
    ends_s = stopped_s + min(hurt_s, many.due_s.max() - stopped_s)
    line(ax, [stopped_s, ends_s], [1000, 1000 * (1 - (ends_s - stopped_s) / hurt_s)], None)
    guessed(ax, stopped_s + 1 + guess_after_s, 0, None)

# %% [markdown]
# The star is your guess, the black line the prediction. The lone user's report says: p99 as always. It left out all the
# questions that others would have asked during that second. The load test and the server were *coordinated*: while the
# server stood still, so did the test. (The name is Gil Tene's, in the talk *How NOT to Measure Latency*, 2013.) The cure is in
# `loadtests/load/generator.py`: a schedule made beforehand, and the time counted **from when a question was due**, not from when it
# was sent.

# %%
stop()
tenth = len(closed) // 10, len(opened) // 10
claim(
    "Our load test shows a steady latency, so the server copes",
    who=f"the same server, ten users in a closed loop and random arrivals at {offered / mu_then:.1f} times its capacity",
    number=f"closed: median {closed.latency_ms.median():.0f} ms, the last tenth {closed.latency_ms.tail(tenth[0]).median():.0f} ms;"
    f" open: median {opened.latency_ms.median():.0f} ms, the last tenth {opened.latency_ms.tail(tenth[1]).median():.0f} ms",
    verdict="fails for closed loops: they hide overload and hiccups",
)

# %% [markdown]
# ## Exercises
#
# Solutions are in `notebooks/solutions/`.
#
# **★** Write M/D/1 as a function of the arrival rate and the time of a call: the mean time from arrival to answer. Where
# the queue grows forever return `math.inf`.


# %%
def mean_time_s(rate_per_s, call_s): ...


checks.exercise_3_1(mean_time_s)

# %% [markdown]
# **★★** From two readings of `/metrics`, `seconds` apart, tell the mean number of *busy* models (the utilisation) and the
# mean number of those *waiting*. Names: `model_call_seconds_sum`, `model_queue_wait_seconds_sum`.


# %%
def busy_and_waiting(before, after, seconds): ...


checks.exercise_3_2(busy_and_waiting)

# %% [markdown]
# **★★★** Turn M/D/1 around: what is the highest arrival rate at which the mean time stays within `limit_s`?


# %%
def highest_rate_per_s(call_s, limit_s): ...


checks.exercise_3_3(highest_rate_per_s)

# %% [markdown]
# ## In the lab
#
# Your `highest_rate_per_s` from above, or any function of `call_s` and `limit_s`: the server runs at that rate for 10 s.
# The mean time must stay within four calls, and the server must be at least 60 % busy. (Chance and moods are in it: what
# would you leave to spare?) It starts the real server and judges what it measures.

# %%
import labs

rate_for = ...

labs.lab_3(rate_for)

# %% [markdown]
# ## Ten questions
#
# Answer them aloud, then open the answers.
#
# 1. Why does the wait explode near 100 %?
# 2. Why does Little's law need no assumption?
# 3. Why is M/M/1 twice M/D/1?
# 4. Why does a test of some seconds flatter a server at 95 %?
# 5. Why is capacity measured at saturation the wrong number?
# 6. Why do measured runs miss their load?
# 7. Why does a closed loop hide overload?
# 8. Why does one user see one slow answer of a second's hiccup?
# 9. Why count from when a request was due?
# 10. Why scale before the mean moves?
#
# <details><summary>Answers</summary>
#
# 1. A queue can shrink only in the idle time, 1 - ρ, and that goes to zero.
# 2. It counts the same seconds in two ways: by the queue and by the texts.
# 3. A random call that runs has its whole mean left; one of fixed length half of it.
# 4. The queue needs minutes to become as long as it will be.
# 5. A server that never rests has warm caches; calls after a pause take longer.
# 6. Chance (√n), the machine's moods, and calls after pauses.
# 7. A slow server gets fewer questions: the test slows down with it.
# 8. It asks nothing while it waits. All others that would have asked are left out.
# 9. Else the time that the client itself was late is lost.
# 10. The p99 leaves the ground first.
# </details>
#
# ## How far off were you?

# %%
score()

# %% [markdown]
# ## What must hold

# %%
assert md1_wait(0.5) == 0.5 and mm1_wait(0.5) == 1
assert hours[0.95].mean() > 5 * hours[0.5].mean(), "there is a cliff"
holds(0.7 < hours[0.95].mean() / md1_wait(0.95) < 1.4, "and the formula knows where")
holds(waits[busiest] > 3 * waits[0] and p99s[busiest] > p99s[0], "busier is slower")
holds(waits[0] < 1, "far from the cliff hardly anybody waits")
holds(
    all(0.6 < (own + 0.3) / (wait + 0.3) < 1.6 for own, wait in zip(played, waits)),
    "arrivals and calls explain the wait",
)
holds(0.5 < (little + 0.2) / (looked + 0.2) < 2, "Little's law")
holds(
    opened.latency_ms.tail(50).median() > 2 * closed.latency_ms.tail(50).median(),
    "a closed loop hides overload",
)
holds((many.latency_ms > slow_ms).mean() > 5 * (one.latency_ms > slow_ms).mean(), "and hiccups")

# %% [markdown]
# ## Take away
#
# 1. The wait grows like $\frac{\rho}{1-\rho}$: say which wait you can bear, and read off how busy you may be.
# 2. Near the wall no formula gives the height. The machine's own slow moments and the length of your test decide.
# 3. Test with arrivals that don't wait for answers, and count from when a question was due.
#
# Next: [Lesson 4, to batch or not to batch](4_to_batch_or_not.ipynb).
