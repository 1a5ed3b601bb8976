# %% [markdown]
# # 3. The cliff
#
# A server that can do 100 texts a second is asked for 95. Everything fits, so everything should be fine.
#
# **Question: how busy may a server be?**
#
# You will predict the answer with three formulas from the theory of queues, all of them simple, and then measure it.

# %%
from lesson import (
    BLUE,
    GREY,
    ORANGE,
    RED,
    capacity,
    claim,
    counters,
    dots,
    line,
    load,
    picture,
    quick,
    serve,
)
from lesson import stop

import math
import signal
import threading
import time

import numpy as np

import checks

# %% [markdown]
# ## The three formulas
#
# $\lambda$ texts arrive a second, one call takes $S$ seconds. The model is busy for the fraction $\rho = \lambda S$ of the
# time: its **utilisation**. People come at random moments, knowing nothing of each other (a *Poisson process*). Then the
# mean time from arrival to answer is
#
# | | when every call takes | mean time $T$ |
# |---|---|---|
# | M/D/1 | the same time $S$ | $S + \frac{\rho S}{2(1-\rho)}$ |
# | M/M/1 | a random time, exponential with mean $S$ | $\frac{S}{1-\rho}$ |
#
# and whatever the arrivals, **Little's law**: $L = \lambda W$. The mean number of those who wait is the arrival rate times
# their mean wait.
#
# (Sources: M/D/1 and M/M/1 are cases of the formula of Pollaczek and Khinchine, in Kleinrock, *Queueing Systems*, vol. 1,
# 1975, ch. 3 and 5. The law: Little, *A Proof for the Queuing Formula L = λW*, Operations Research, 1961. In the names,
# M is for random, D for deterministic, 1 for one server.)


# %%
def md1_s(rho, call_s):
    """Mean time from arrival to answer when all calls take the same time."""
    return call_s + rho * call_s / (2 * (1 - rho))


def mm1_s(rho, call_s):
    """The same when their times are random."""
    return call_s / (1 - rho)


# %% [markdown]
# **Your prediction.** At half load, $\rho = 0.5$, people wait for half a call on average. At $\rho = 0.9$? At 0.95? Guess, then
# look:

# %%
for rho in (0.5, 0.8, 0.9, 0.95, 0.99):
    print(f"{rho:4.0%} busy: {md1_s(rho, 1):5.1f} calls' time, or {mm1_s(rho, 1):5.1f} if calls vary")

# %% [markdown]
# ## Measured
#
# The real server, one text a call. Its queue is long and patient here, so that it says no to nobody. First: what is $S$?
# We ask as hard as we can and divide. The server counts its calls and the time that they took, so we know what part of $S$
# is the model. The rest is HTTP, on the same core.


# %%
def calls_between(before, after):
    """How many calls of the model there were, and how long one took on average."""
    calls = after["model_call_seconds_count"] - before["model_call_seconds_count"]
    return calls, (after["model_call_seconds_sum"] - before["model_call_seconds_sum"]) / calls


server = serve(MAX_QUEUE=100_000, DEADLINE_S=60)
idle = counters(server)
capacity_per_s = capacity(server, quick(3, 8))
_, model_s = calls_between(idle, counters(server))
http_s = max(0.0, 1 / capacity_per_s - model_s)
print(
    f"{capacity_per_s:.0f} texts/s at most: S = {1000 / capacity_per_s:.1f} ms, {model_s * 1000:.1f} of it the model"
)

# %% [markdown]
# Now people at random moments, at a given fraction of that. A machine has moods: at one moment a call takes longer than at
# another. So we don't trust the model's time of a minute ago: what the server counted *during a run* gives the run's own
# $S$ and $\rho = \lambda S$.


# %%
def run_at(fraction):
    """Random arrivals at this fraction of the capacity: the requests, the utilisation, S in seconds."""
    rate, before = fraction * capacity_per_s, counters(server)
    df = load(server, "open", rate_per_s=rate, duration_s=quick(4, 18), limit_s=60, seed=int(fraction * 100))
    calls, model_s = calls_between(before, counters(server))
    call_s, ended_s = model_s + http_s, (df.due_s + df.latency_ms / 1000).max()
    return df, calls * call_s / ended_s, call_s


runs = [run_at(f) for f in quick([0.3, 0.6, 0.85], [0.1, 0.3, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95])]
rhos = [rho for _, rho, _ in runs]
means = [df.latency_ms.mean() / 1000 / s for df, _, s in runs]  # in calls
p99s = [df.latency_ms.quantile(0.99) / 1000 / s for df, _, s in runs]
print("S, ms:", *(f"{s * 1000:.1f}" for _, _, s in runs))

# %%
smooth = np.linspace(0.02, 0.96, 200)
with picture("The cliff", "utilisation ρ", "mean time to the answer, calls", ylim=(0, 20)) as ax:
    line(ax, smooth, md1_s(smooth, 1), "M/D/1: calls alike")
    line(ax, smooth, mm1_s(smooth, 1), "M/M/1: calls random", GREY, linestyle="--")
    dots(ax, rhos, means)

# %% [markdown]
# Flat, flat, flat, wall. Short texts take about the same time, as M/D/1 assumes, but the machine's moods make calls differ,
# as M/M/1 has it: so most dots should lie about between the two lines. One may lie above both. A slow moment lasts for
# many calls, and M/M/1 takes each call for itself.
#
# *Where the formulas fail:* near the wall everything hangs on $1 - \rho$. If $S$ is really 5 % longer than what you measured,
# 95 % is 100 %. A short run also misses the rare, long queues that make up the mean up there. Dots to the right are worth
# little; which is the lesson.

# %% [markdown]
# ## Why 95 % busy is already too late
#
# The mean is the good news. Here is what one client in a hundred sees. For M/M/1 there is a formula for that, too:
# $-\ln(0.01)\,T \approx 4.6\,T$ (Kleinrock, ch. 3).

# %%
with picture("One in a hundred", "utilisation ρ", "time to the answer, calls", ylim=(0, 46)) as ax:
    line(ax, smooth, 4.6 * mm1_s(smooth, 1), "p99 by M/M/1", GREY, linestyle="--")
    line(ax, smooth, md1_s(smooth, 1), "mean by M/D/1")
    dots(ax, rhos, p99s, "p99 measured", RED)
    dots(ax, rhos, means, "mean measured")

# %% [markdown]
# Where texts are more alike than M/M/1 assumes, the red dots stay below the dashed line; in the machine's bad moments they
# don't. They climb the same wall.
#
# And the second reason. A hiccup of one second leaves a backlog of $\lambda$ texts. It melts only with what the server has
# to spare, $\mu - \lambda$ a second, with $\mu = 1/S$. So it takes
# $\lambda / (\mu - \lambda) = \rho / (1 - \rho)$ seconds to be forgotten:

# %%
for rho in (0.5, 0.8, 0.9, 0.95, 0.99):
    print(f"{rho:4.0%} busy: a hiccup of 1 s hurts for {rho / (1 - rho):5.1f} s more")

# %%
low, high = rhos[0], rhos[-1]
growth = md1_s(high, 1) / md1_s(low, 1) if high < 1 else math.inf
claim(
    "95 % utilisation is well-used hardware",
    f"from {low:.0%} to {high:.0%} busy the mean time grew {means[-1] / means[0]:.1f} times and the p99"
    f" {p99s[-1] / p99s[0]:.1f} times (M/D/1 says {growth:.1f} for the mean)",
    "fails: stay below 70–80 % where somebody waits for the answer",
)

# %% [markdown]
# ## Little's law, checked against the server's own counters
#
# `/metrics` counts how many waited (`model_queue_wait_seconds_count`) and how long in sum (`…_sum`). So
# $\lambda = \Delta\mathrm{count}/t$, $W = \Delta\mathrm{sum}/\Delta\mathrm{count}$.
# **Your prediction:** the mean length of the queue, never measured, is $\lambda W = \Delta\mathrm{sum}/t$. Meanwhile a thread looks at the
# queue again and again.

# %%
seen, done = [], threading.Event()


def look():
    """Note the length of the queue ten times a second: more would cost the server time, and lengthen it."""
    while not done.is_set():
        seen.append(counters(server)["model_queue_depth"])
        time.sleep(0.1)


threading.Thread(target=look, daemon=True).start()
seen.clear()
before, began = counters(server), time.perf_counter()
load(server, "open", rate_per_s=0.8 * capacity_per_s, duration_s=quick(5, 20), limit_s=60, seed=1)
seconds, after = time.perf_counter() - began, counters(server)
looked = float(np.mean(seen))
done.set()

# %%
waited_s = after["model_queue_wait_seconds_sum"] - before["model_queue_wait_seconds_sum"]
predicted = waited_s / seconds
print(f"λW = {predicted:.2f} waiting on average; {len(seen)} looks saw {looked:.2f}")

# %% [markdown]
# No assumption about arrivals, calls or order went into it. That is why it is worth so much: two of $L$, $\lambda$, $W$ give the
# third, on any dashboard.
#
# *Where it fails:* when the queue is longer at the end than at the start, it describes the past, not what comes.

# %% [markdown]
# ## Closed and open loops
#
# Most load tests have $N$ users; each waits for an answer before asking again. That is a **closed loop**. Real people do
# not know of each other: an **open loop**. Offer more than the server can do, in both ways.
#
# **Your prediction.** Closed: never more than $N$ are inside, so by Little's law everybody gets an answer after
# $N \cdot S$; for ever. Open at 1.3 times the capacity: the queue grows by $0.3\mu$ a second, so one who comes at $t$
# waits $0.3\,t$.

# %%
users, seconds = 10, quick(3, 8)
closed = load(server, "closed", users=users, duration_s=seconds, limit_s=60)
mu = len(closed) / seconds  # the capacity, measured anew: machines have moods
opened = load(server, "open", rate_per_s=1.3 * mu, duration_s=seconds, limit_s=60)

# %%
with picture("Overload, seen by two load tests", "time of arrival, s", "time to the answer, ms") as ax:
    line(ax, [0, seconds], [users / mu * 1000] * 2, "predicted: N · S", linestyle="--")
    line(ax, [0, seconds], [0, 300 * seconds], "predicted: 0.3 t")
    dots(ax, closed.due_s, closed.latency_ms, "closed, 10 users", BLUE, markersize=3)
    dots(ax, opened.due_s, opened.latency_ms, "open, 1.3 × capacity", ORANGE, markersize=3)

# %% [markdown]
# Same server. The closed loop reports a steady latency, and will do so until the end of time: it never offers more than the
# server can do, as a slow server simply gets fewer questions. The open loop shows what strangers would see. *Where its
# prediction fails:* $\mu$ is what the server did a few seconds before; when it does less now, the dots rise more steeply.

# %% [markdown]
# ## Coordinated omission, with your own eyes
#
# The same mistake hides hiccups. We stop the server's process for one second, in the middle of a run, and let it go
# again. One user in a closed loop, then random arrivals at half of the capacity.
#
# **Your prediction.** The lone user asks once during that second, and waits: *one* slow answer. Of the strangers, all who
# came in that second suffer, and those who came while the backlog melts: about $1 \cdot (1 + \frac{\rho}{1-\rho}) = 2$ seconds' worth of
# them at $\rho = 0.5$.


# %%
def with_hiccup(scenario, seconds, **options):
    """A run in whose middle the server stands still for a second."""
    process = server.process

    def hiccup():
        while counters(server).get("model_queue_wait_seconds_count", 0) < started + 20:
            time.sleep(0.02)
        time.sleep(1)
        process.send_signal(signal.SIGSTOP)
        time.sleep(1)
        process.send_signal(signal.SIGCONT)

    started = counters(server)["model_queue_wait_seconds_count"]
    threading.Thread(target=hiccup).start()
    return load(server, scenario, duration_s=seconds, limit_s=60, **options)


one = with_hiccup("closed", quick(5, 10), users=1)
many = with_hiccup("open", quick(5, 10), rate_per_s=0.5 * mu)

# %%
slow_ms = 10 / mu * 1000
for name, df in (("one user, closed", one), ("strangers, open", many)):
    late = df.latency_ms > slow_ms
    print(f"{name:17} {len(df):5} asked, {late.sum():4} slow, p99 {df.latency_ms.quantile(0.99):5.0f} ms")
print(
    f"prediction: 1 slow, and {2 * 0.5 * mu:.0f}, less those of the last moment, which wait less than {slow_ms:.0f} ms"
)

# %%
with picture("A hiccup of one second", "time of arrival, s", "time to the answer, ms") as ax:
    dots(ax, many.due_s, many.latency_ms, "strangers, open", ORANGE, markersize=3)
    dots(ax, one.due_s, one.latency_ms, "one user, closed", BLUE, markersize=3)
    start = float(many.loc[many.latency_ms.idxmax(), "due_s"])
    t = np.linspace(start, start + 2, 50)
    line(ax, t, 1000 - (t - start) * 500, "predicted for strangers")

# %% [markdown]
# The lone user's report says: p99 as always. It left out all the questions that would have been asked during that second.
# The load test and the server were *coordinated*: while the server stood, the test stood too (the name is Gil Tene's, in
# the talk *How NOT to Measure Latency*, 2013). The cure is in `loadtests/drive.py`: a schedule made beforehand, and the
# latency counted **from when a question was due**, not from when it was sent.

# %%
stop()
claim(
    "Our load test shows a steady latency, so the server copes",
    f"ten users without a pause, in a closed loop, saw a median of {closed.latency_ms.median():.0f} ms and a"
    f" last tenth of {closed.latency_ms.tail(len(closed) // 10).median():.0f} ms; random arrivals at 1.3 times the capacity saw"
    f" {opened.latency_ms.median():.0f} ms and {opened.latency_ms.tail(len(opened) // 10).median():.0f} ms, and growing",
    "fails for closed loops: they hide overload and hiccups",
)

# %% [markdown]
# ## Exercises
#
# **★** Write M/D/1 as a function of the arrival rate and the time of a call. No stable queue: return `math.inf`.


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
assert means[-1] > 1.2 * means[0] and p99s[-1] > p99s[0], "busier is slower"
assert means[0] < 3 * md1_s(rhos[0], 1), "far from the cliff the formula holds"
assert 0.5 < (predicted + 0.2) / (looked + 0.2) < 2, "Little's law"
assert opened.latency_ms.tail(50).median() > 2 * closed.latency_ms.tail(50).median(), (
    "a closed loop hides overload"
)
assert (many.latency_ms > slow_ms).mean() > 5 * (one.latency_ms > slow_ms).mean(), "and hiccups"
assert math.isclose(md1_s(0.5, 1), 1.5) and math.isclose(mm1_s(0.5, 1), 2)
