# %% [markdown]
# # 3. The cliff
#
# A server can answer 100 texts a second. It is asked for 95. Everything fits, so everything should be fine.
#
# **Question: how busy may a server be?**
#
# Afterwards you can decide how much of a server's capacity to use, and you know what a load test hides from you.
#
# It takes about 3.5 minutes (the quick form 35 s), two cores, 1 GB of memory and Linux: it pins the server to a core and
# reads `/proc`. Elsewhere run it in a container.
#
# `quick(short, full)` is the first value in the quick form (`QUICK=1`) and the second one otherwise. The quick form is too
# short to measure well. It only shows that the lesson runs.

# %%
from lesson import BLUE, GREY, ORANGE, RED, capacity, claim, counters, dots, get, guessed, holds, line, load
from lesson import picture, quick, serve, stop, table, tell, way

import checks

# %% [markdown]
# ## How long do people wait?
#
# Everything here happens in one box: the [queue](glossary.md). People come at random moments and know nothing of each
# other. The model takes one text at a time. Whoever finds it busy waits.

# %%
way(changed=["queue"])

# %% [markdown]
# The model is busy for a part of the time. That part is the [**utilisation**](glossary.md). When the server can answer 100
# texts a second and 95 come, it is 95 %.
#
# **Guess.** A server is 95 % busy. How long does a text wait in the queue, on average? Say it in calls: 1 is the time that
# the model takes for one text. Change the number before you go on.

# %%
guess_wait = 2  # calls, at 95 % utilisation

# %% [markdown]
# **Prediction.** $\lambda$ texts come a second (the [offered load](glossary.md)). One call takes $S$ seconds (the
# [service time](glossary.md)). Then the utilisation is $\rho = \lambda S$. The theory of queues has a formula for the mean
# wait, measured in calls:
#
# | | when every call takes | mean wait, in calls |
# |---|---|---|
# | M/D/1 | the same time | $\frac{\rho}{2(1-\rho)}$ |
# | M/M/1 | a random time (exponential: many short, a few long) | $\frac{\rho}{1-\rho}$ |
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


table(
    [
        {
            "utilisation": f"{rho:.0%}",
            "wait, calls alike": f"{md1_wait(rho):.1f}",
            "wait, calls random": f"{mm1_wait(rho):.1f}",
        }
        for rho in (0.5, 0.8, 0.9, 0.95, 0.99)
    ]
)

# %% [markdown]
# ## Measured: what is S?
#
# The real server, one text a call. We tell it never to say no, so that its queue may grow (`QUEUE_TARGET_S=0` and a large
# `MAX_QUEUE`; lesson 5 is about saying no). First we ask as hard as we can, and count the answers a second: that is the
# capacity. $S$ is one second divided by the capacity. The server's own counters say how much of $S$ is the model. The rest
# lies between two calls: the answer is handed over, and the next text is taken.


# %%
def calls_between(before, after):
    """How many calls of the model there were, and the seconds of one on average."""
    calls = after["model_call_seconds_count"] - before["model_call_seconds_count"]
    return calls, (after["model_call_seconds_sum"] - before["model_call_seconds_sum"]) / calls


def saturate(seconds):
    """The capacity in texts a second, and the seconds between two calls."""
    before = counters(server)
    per_s = capacity(server, seconds)
    _, model_s = calls_between(before, counters(server))
    return per_s, max(0.0, 1 / per_s - model_s)


server = serve(MAX_QUEUE=100_000, DEADLINE_S=600, QUEUE_TARGET_S=0)
per_s, between_s = saturate(quick(2, 5))
tell(
    f"At most {per_s:.0f} texts/s. So S is {1000 / per_s:.1f} ms: {1000 / per_s - between_s * 1000:.1f} ms in the model,"
    f" {between_s * 1000:.1f} ms between two calls."
)

# %% [markdown]
# Now people come at random moments, in each run at another share of the capacity. A machine has moods: at times the same work
# takes longer. So we measure the capacity anew before each run, and take each call's own time from the server's answer. (It
# says in the header `Server-Timing` how long a text waited, and how long its call took.)

# %%
import numpy as np

RUN_S = quick(2, 14)


def strangers(rate_per_s, between_s, seed):
    """Random arrivals: a row for each text that was answered, with its call's time; S and ρ of the whole run."""
    df = load(server, "open", rate_per_s=rate_per_s, duration_s=RUN_S, limit_s=60, seed=seed)
    df = df[df.outcome == "200"].sort_values("sent_s", ignore_index=True)
    df["call_s"] = df.model_ms / 1000 + between_s
    df.attrs |= {"S": df.call_s.mean(), "rho": len(df) / RUN_S * df.call_s.mean()}
    return df


def run_at(fraction):
    """Strangers at this fraction of the capacity of just now."""
    per_s, between_s = saturate(quick(0.5, 1.5))
    df = strangers(fraction * per_s, between_s, seed=int(fraction * 100))
    df.attrs["capacity"] = per_s
    return df


fractions = quick([0.3, 0.6, 0.9], [0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95])
runs = [run_at(fraction) for fraction in fractions]
rhos = [df.attrs["rho"] for df in runs]

# %%
mixed = []
for df in runs:
    fresh = df.queue_ms < 1  # the model was free when they came
    mixed.append((df.model_ms[fresh].mean(), df.model_ms[~fresh].mean()))
table(
    [
        {
            "of the capacity": f"{fraction:.0%}",
            "capacity just before, texts/s": f"{df.attrs['capacity']:.0f}",
            "S in the run, ms": f"{df.attrs['S'] * 1000:.1f}",
            "a call after a pause, ms": f"{fresh_ms:.1f}",
            "a call right behind another, ms": f"{behind_ms:.1f}" if behind_ms == behind_ms else None,
            "utilisation ρ = λS": f"{df.attrs['rho']:.0%}",
        }
        for fraction, df, (fresh_ms, behind_ms) in zip(fractions, runs, mixed)
    ]
)

# %% [markdown]
# The first and the last column should be the same. Where they differ, $S$ in the run is not the $S$ of the seconds before.
# There are two causes. The machine itself is faster or slower than it was a moment ago. And a call after a pause does not
# take as long as one right behind another. The fourth and the fifth column compare these two kinds of calls
# within the same run, so the machine's moods can't hide the difference.

# %%
pause = np.nanmedian([fresh_ms / behind_ms for fresh_ms, behind_ms in mixed])
tell(
    f"Here a call after a pause takes {pause:.2f} times as long as one right behind another (the median of the runs). So"
    f" “capacity” is a statement about a server that never rests. Near the top, where the cliff is, ρ = λS moves with S:"
    f" if S grows by {1 / 0.95 - 1:.0%}, 95 % is 100 %."
)

# %% [markdown]
# ## The wait
#
# How near can a run of some seconds come to the formula? Near the cliff a queue takes long to build up, and each run starts
# with an empty one. So before we compare, we simulate runs *as short as ours*, in a world where the formula is exactly right.
# A queue is five lines of Python:


# %%
def waits_of(arrive_s, call_s):
    """How long each waits who comes at these times, when one call of these follows the other."""
    waits, free_s = [], 0.0
    for at_s, takes_s in zip(arrive_s, call_s):
        starts_s = max(at_s, free_s)
        waits.append(starts_s - at_s)
        free_s = starts_s + takes_s
    return np.array(waits)


def short_runs(rho):
    """Mean waits, in calls, of many simulated runs as long as ours. All calls take the same time."""
    n, rng = int(rho * RUN_S / typical_s), np.random.default_rng(0)
    return [waits_of(rng.exponential(1 / rho, n).cumsum(), np.ones(n)).mean() for _ in range(quick(20, 60))]


typical_s = np.median([df.attrs["S"] for df in runs])
grid = np.array([0.05, 0.2, 0.4, 0.6, 0.7, 0.8, 0.85, 0.9, 0.93, 0.96, 0.98, 0.999])
least, most = np.array([np.quantile(short_runs(rho), (0.05, 0.95)) for rho in grid]).T
waits = [df.queue_ms.mean() / 1000 / df.attrs["S"] for df in runs]  # in calls

# %%
top = 1.15 * max(*waits, guess_wait, 12)
smooth = np.linspace(0.02, 0.995, 400)
alike, random = (np.array([wait(rho) for rho in smooth]) for wait in (md1_wait, mm1_wait))
title = "Flat, flat, flat, wall"
with picture(
    title, "utilisation ρ", "mean wait, calls", xlim=(0, 1.03 * max(1, *rhos)), ylim=(-0.03 * top, top)
) as ax:
    ax.fill_between(grid, least, most, color=GREY, alpha=0.25, linewidth=0)
    ax.text(0.72, 0.4 * top, f"grey: runs of {RUN_S} s,\nsimulated", ha="right", color=GREY, fontsize=12)
    line(ax, smooth[random < top], random[random < top], "calls random", GREY, linestyle="--")
    line(ax, smooth[alike < top], alike[alike < top], "calls alike")
    dots(ax, rhos, waits)
    guessed(ax, 0.95, guess_wait)

# %% [markdown]
# Black and dashed are the two formulas. We simulated runs that are as short as ours, with calls all alike: nine in ten of them
# lie in the grey area. Near the wall much of it lies far below the black line: the queue needs minutes to become as long
# as the formula says, and a run of seconds ends before. A measured dot may lie there without contradicting anything.
#
# *Where the formula fails.* The machine's calls are not all alike, and its slow moments can last for many calls. So take
# from each run when people really came and how long each call really took, and give both to the five lines from above. First
# with the calls in a random order, then in their own order.

# %%
rng = np.random.default_rng(0)
played = []
for df in runs:
    S = df.attrs["S"]
    shuffled = [waits_of(df.sent_s, rng.permutation(df.call_s)).mean() / S for _ in range(20)]
    played.append((np.mean(shuffled), waits_of(df.sent_s, df.call_s).mean() / S))


def in_calls(wait):
    return f"{wait:.1f}" if wait < 1e3 else "without end"


table(
    [
        {
            "utilisation ρ": f"{rho:.0%}",
            "M/D/1": in_calls(md1_wait(rho)),
            "own arrivals, calls shuffled (simulated)": in_calls(shuffled),
            "own arrivals and calls (simulated)": in_calls(in_order),
            "measured": in_calls(wait),
        }
        for rho, (shuffled, in_order), wait in zip(rhos, played, waits)
    ]
)

# %%
busiest = int(np.argmax(rhos))
S_ms = runs[busiest].attrs["S"] * 1000
shuffled, in_order = played[busiest]
moods = in_order - shuffled
tell(
    f"Mean waits in calls. At {rhos[busiest]:.0%} M/D/1 says {in_calls(md1_wait(rhos[busiest]))}. With the people and the calls of"
    f" this very run it is {in_calls(shuffled)} when the calls are shuffled, and {in_calls(in_order)} in their own order."
    f" Measured: {in_calls(waits[busiest])}. So the order alone, slow calls in a row, "
    f"{'adds' if moods > 0 else 'takes away'} {abs(moods):.1f} calls here."
)

# %% [markdown]
# Read the table from right to left. Each column knows less. The last simulated column knows all: who came when, and how long
# each call took. It gives about what was measured, so nothing else happened in the queue. The column before it does not know
# the order of the calls. M/D/1 also leaves out that calls differ, that a run is short, and who came when.
#
# That is what a formula can do near the cliff. It tells you that there is a wall, and about where. It does not tell you
# the height at which you will hit it.

# %% [markdown]
# ## What the client adds
#
# The formula speaks of the queue. A client also waits for HTTP, on both sides, and for its own turn on its core.

# %%
parts = [
    {
        "utilisation ρ": f"{df.attrs['rho']:.0%}",
        "sent late by the client": (df.sent_s - df.due_s).mean() * 1000,
        "queue": df.queue_ms.mean(),
        "model": df.model_ms.mean(),
        "HTTP, both sides": (
            df.latency_ms - (df.sent_s - df.due_s) * 1000 - df.queue_ms - df.model_ms
        ).mean(),
        "all, ms": df.latency_ms.mean(),
    }
    for df in (runs[0], runs[busiest])
]
table([{key: one if isinstance(one, str) else f"{one:.1f}" for key, one in row.items()} for row in parts])

# %% [markdown]
# Where nobody waits, HTTP and the client are a visible part of the time, and no formula for queues knows of them. Near the
# wall they vanish beside the queue. So from here on “calls” counts the server's part: queue and model.

# %% [markdown]
# ## One in a hundred
#
# The mean is the good news. One client in a hundred waits longer than the [p99](glossary.md).
#
# **Guess.** The server is 95 % busy again. How many calls is the p99 of the time from arrival to answer?

# %%
guess_p99 = 10  # calls, at 95 % utilisation

# %% [markdown]
# **Prediction.** There is a formula for the p99, too. With random calls it is $\frac{4.6}{1-\rho}$ calls (Kleinrock, ch. 3; 4.6
# is $-\ln 0.01$).

# %%
p99s = [((df.queue_ms + df.model_ms) / 1000 / df.attrs["S"]).quantile(0.99) for df in runs]
means = [wait + 1 for wait in waits]
top = 1.15 * max(*p99s, guess_p99, 40)
p99_random = 4.6 / (1 - smooth)
title = "One in a hundred meets the wall first"
with picture(title, "utilisation ρ", "time to the answer, calls", xlim=(0, 1.03 * max(1, *rhos))) as ax:
    line(
        ax, smooth[p99_random < top], p99_random[p99_random < top], "p99, calls random", GREY, linestyle="--"
    )
    dots(ax, rhos, means, "mean measured")
    dots(ax, rhos, p99s, "p99 measured", RED)
    guessed(ax, 0.95, guess_p99)
    ax.set_ylim(0, top)

# %% [markdown]
# The dashed line is for calls that differ at random. Dots below it come from calls that are more alike, or from a run that
# was too short to see the rare long queue. Dots above it come from slow moments.

# %% [markdown]
# ## Where to stop
#
# “Not too busy” is no number. So say first what you can bear, and turn the formula around. A mean wait of $w$ calls allows
#
# $$\rho = \frac{2w}{1+2w} \text{ when calls are alike}, \qquad \rho = \frac{w}{1+w} \text{ when they are random.}$$
#
# And there is a second reason to stay away from the wall. A hiccup of one second leaves a [backlog](glossary.md) of $\lambda$
# texts. Let $\mu = 1/S$ be the capacity. The backlog melts only with what the server has to spare, $\mu - \lambda$ texts a
# second. So a hiccup of one second hurts for $\frac{\lambda}{\mu-\lambda} = \frac{\rho}{1-\rho}$ seconds more.

# %%
table(
    [
        {
            "bearable wait, calls": w,
            "utilisation, calls random": f"{w / (1 + w):.0%}",
            "utilisation, calls alike": f"{2 * w / (1 + 2 * w):.0%}",
            "a hiccup of 1 s then hurts, s more": f"{w:.1f} to {2 * w:.1f}",
        }
        for w in (0.5, 1, 2, 5, 10)
    ]
)
bearable = np.interp(2, np.maximum.accumulate(waits), rhos)
tell(
    f"Whoever bears two calls of waiting may go to {2 / 3:.0%} or {4 / 5:.0%}, depending on the calls. Measured here, the"
    f" wait passes two calls "
    + (f"at about {bearable:.0%}." if max(waits) > 2 else f"nowhere up to {max(rhos):.0%}.")
)

# %%
claim(
    "95 % utilisation is well-used hardware",
    who="one copy of the model behind HTTP, random arrivals of short texts",
    number=f"at {rhos[busiest]:.0%} a text waits {in_calls(waits[busiest])} calls on average, and one in a hundred needs"
    f" {p99s[busiest]:.0f} calls to its answer; at {rhos[0]:.0%} {waits[0]:.1f} and {p99s[0]:.1f}. At 95 % M/D/1 says"
    f" {md1_wait(0.95):.1f} calls and M/M/1 {mm1_wait(0.95):.1f}; by its formula a hiccup of 1 s hurts for 19 s more",
    verdict="fails where somebody waits for the answer: two calls of waiting allow 67 to 80 %",
)

# %% [markdown]
# ## Little's law
#
# One law needs no assumption at all, [Little's law](glossary.md): $L = \lambda W$. The mean number of those who wait is the
# rate at which they come times their mean wait. (Little, *A Proof for the Queuing Formula L = λW*, Operations Research, 1961.)
#
# We ask for 80 % of the capacity. Ten times a second somebody looks at the queue (`/health` tells its length) and notes how
# many wait.
#
# **Guess.** How many wait, on average?

# %%
guess_waiting = 1  # texts in the queue

# %% [markdown]
# **Prediction.** `/metrics` counts how many have waited (`model_queue_wait_seconds_count`) and how long in sum (`…_sum`).
# Say that these grow by $\Delta\text{count}$ and $\Delta\text{sum}$ in $t$ seconds. Then $\lambda = \Delta\text{count}/t$ and
# $W = \Delta\text{sum}/\Delta\text{count}$. So $\lambda W = \Delta\text{sum}/t$: the queue's mean length, though nobody has
# looked at it.

# %%
import threading
import time

seen, done = [], threading.Event()


def look():
    """Note the length of the queue ten times a second: more often would cost the server time, and lengthen it."""
    while not done.wait(0.1):
        seen.append(get(server, "health").json["queue_depth"])


per_s, between_s = saturate(quick(0.5, 1.5))
threading.Thread(target=look, daemon=True).start()
before, began = counters(server), time.perf_counter()
df = strangers(0.8 * per_s, between_s, seed=1)
seconds, after, looked = time.perf_counter() - began, counters(server), float(np.mean(seen))
done.set()

# %%
waited_s = after["model_queue_wait_seconds_sum"] - before["model_queue_wait_seconds_sum"]
little, rho, rate_per_s = waited_s / seconds, df.attrs["rho"], len(df) / seconds
tell(f"λW = {little:.2f} waiting on average. {len(seen)} looks saw {looked:.2f}.")

# %% [markdown]
# The two are about the same, whatever the arrivals, the calls and the order were. (They can't be quite the same: a look ten
# times a second misses what happens between.) That is why the law is worth so much: two of $L$, $\lambda$ and $W$ give the
# third, on any dashboard.
#
# M/D/1 is another matter. Multiply its wait, in seconds, by $\lambda$, and it also says how many wait:
# $\frac{\rho^2}{2(1-\rho)}$. The picture begins at the bottom, with what one knew before the run. Each bar above knows more of
# what happened in it.

# %%
S, asked_s = df.attrs["S"], waits_of(df.sent_s, df.call_s)
shuffled_s = [waits_of(df.sent_s, rng.permutation(df.call_s)).mean() for _ in range(20)]
steps = {
    "M/D/1 at 80 %": 0.8 * md1_wait(0.8),
    f"M/D/1 at the run's ρ, {rho:.0%}": rho * md1_wait(rho) if rho < 1 else np.nan,
    "own arrivals, calls shuffled": rate_per_s * np.mean(shuffled_s),
    "own arrivals and calls": rate_per_s * asked_s.mean(),
    "Little: λW": little,
}
with picture("Little's law counts those who wait", "waiting on average", "", xlim=(0, None)) as ax:
    ax.barh(range(len(steps)), list(steps.values()), color="#CCCCCC")
    dots(ax, [looked], [len(steps)], None)
    guessed(ax, [guess_waiting], [len(steps) + 1], None)
    ax.set_yticks(range(len(steps) + 2), [*steps, "seen", "your guess"])
tell("Waiting on average: " + "; ".join(f"{name}: {in_calls(value)}" for name, value in steps.items()) + ".")

# %% [markdown]
# Read it from below. The lowest bar is what you could have said before. The next one knows how fast the machine really was.
# The third knows when people came and how much calls differ. The fourth also knows which calls came in a row. Each step adds
# something that the formula does not know. Little's law needs none of them, because it does not predict: it reads one
# measurement off another.
#
# *Where Little's law fails:* it counts the waits of those who have been served. When the queue is much longer at the end than
# at the start, many still wait and are not counted.

# %% [markdown]
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
guess_last_s = 0.5  # seconds

# %% [markdown]
# **Prediction.** Closed: never more than $N$ are inside. So by Little's law everybody gets an answer after $N \cdot S$, for
# ever. Open: each second brings half a second's work too much. So one who comes at $t$ waits $t/2$.

# %%
from loadtests.load import generator

users = 10
closed = load(server, "closed", users=users, duration_s=seconds, limit_s=60)
mu = generator.throughput_per_s(closed)  # the capacity, measured anew
opened = load(server, "open", rate_per_s=1.5 * mu, duration_s=seconds, limit_s=60)

# %%
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
tell(
    f"The last twentieth of the strangers waited {last_s:.2f} s; t/2 says {seconds / 2:.2f} s. In that run"
    f" {offered:.0f} texts/s came and the server could do {mu_then:.0f}: {offered / mu_then:.2f} times its capacity"
    f" instead of 1.5. With that number the line ends at {max(0, offered / mu_then - 1) * seconds:.2f} s."
)

# %% [markdown]
# It is the same server. The closed loop reports a steady time, and will do so until the end of days: a slow server simply
# gets fewer questions. The open loop shows what strangers would see.
#
# *Where the prediction fails:* it takes the capacity of some seconds before. The line climbs by $\rho - 1$ seconds
# a second: by what comes too much. That is a small number, so when the server is a few per cent slower than before, it grows
# by many per cent.

# %% [markdown]
# ## Coordinated omission, with your own eyes
#
# The same mistake hides hiccups. We stop the server's process for one second, in the middle of a run, and let it go again.
# We do it once with one user in a closed loop, and once with strangers at half of the capacity.
#
# **Guess.** The server goes on after one second. For how many seconds more do strangers wait longer than usual?

# %%
guess_after_s = 0.2  # seconds

# %% [markdown]
# **Prediction.** The lone user asks once during that second, and waits: *one* slow answer. Of the strangers all suffer who
# come in that second or while the backlog melts. It melts for $\frac{\rho}{1-\rho}$ seconds more. That is one second at
# $\rho = 0.5$.


# %%
import signal

HICCUP_RUN_S = quick(3, 8)


def with_hiccup(scenario, **options):
    """A run in whose middle the server stands still for a second."""
    process = server.process

    def hiccup():
        while counters(server).get("model_queue_wait_seconds_count", 0) < started + 10:
            time.sleep(0.02)
        time.sleep(1)
        process.send_signal(signal.SIGSTOP)
        time.sleep(1)
        process.send_signal(signal.SIGCONT)

    started = counters(server)["model_queue_wait_seconds_count"]
    thread = threading.Thread(target=hiccup)
    thread.start()
    df = load(server, scenario, duration_s=HICCUP_RUN_S, limit_s=60, **options)
    thread.join()
    return df


mu, between_s = saturate(quick(0.5, 1.5))
one = with_hiccup("closed", users=1)
many = with_hiccup("open", rate_per_s=0.5 * mu)

# %%
slow_ms = 10 / mu * 1000
stopped_s = float(many.loc[many.latency_ms.idxmax(), "due_s"])
# The median: one call was in the model while the process stood still.
rho = len(many) / HICCUP_RUN_S * (many.model_ms.median() / 1000 + between_s)
hurt_s = 1 + rho / (1 - rho) if rho < 1 else float("inf")
came = many[(many.due_s >= stopped_s) & (many.due_s < stopped_s + hurt_s * (1 - slow_ms / 1000))]
table(
    [
        {
            "load test": name,
            "asked": len(df),
            f"slower than ten calls ({slow_ms:.0f} ms)": int((df.latency_ms > slow_ms).sum()),
            "predicted": predicted,
            "p99, ms": f"{df.latency_ms.quantile(0.99):.0f}",
        }
        for name, df, predicted in (("one user, closed", one, 1), ("strangers, open", many, len(came)))
    ]
)
hurt = many[many.due_s.between(stopped_s, stopped_s + hurt_s)]
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
# server stood, the test stood too. (The name is Gil Tene's, in the talk *How NOT to Measure Latency*, 2013.) The cure is in
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
# the queue grows for ever return `math.inf`.


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
# ## What must hold

# %%
assert md1_wait(0.5) == 0.5 and mm1_wait(0.5) == 1
holds(waits[busiest] > 3 * waits[0] and p99s[busiest] > p99s[0], "busier is slower")
holds(waits[0] < 1, "far from the cliff hardly anybody waits")
holds(
    all(0.6 < (in_order + 0.3) / (wait + 0.3) < 1.6 for (_, in_order), wait in zip(played, waits)),
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
