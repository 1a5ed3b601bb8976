# %% [markdown]
# # 15. A fleet
#
# One server is understood. Now there are twenty, behind a load balancer. Most of what you know still holds. Some of it turns around:
# a rare thing happens all the time, help makes it worse, and an overload can outlive its cause.
#
# **Question: how many replicas, and what makes all of them fail at once?**
#
# Afterwards you can say how many replicas a load needs, choose a balancing policy, a hedge and a retry budget, and name the signal that an
# autoscaler should watch.
#
# It takes about 1.5 minutes (the quick form 30 s) and two cores. Nearly all of it is simulated with the project's own
# `loadtests/plan/fleet.py`; two points are checked against two real replicas behind HAProxy, where that is installed.
# [What all lessons need](README.md).

# %%
# "No module named 'lesson'"? Open this notebook where it lies, in the project's notebooks/, or by `make learn`.
from lesson import BLUE, claim, compare, dots, guessed, holds, line, load, picture, quick, said, score
from lesson import serve, stop, table, tell

import math
from dataclasses import replace

import numpy as np

import checks
from loadtests.load import generator
from loadtests.plan import fleet
from loadtests.plan.fleet import Fleet, Retries, replicas_for
from support import l15_fleet
from support.l15_fleet import EVEN, UNEVEN

# %% [markdown]
# ## How many?
#
# A text takes 20 ms on average; one in ten takes nine times as long as the others. 99.9 % are to be answered within half a second. At
# 50 texts per second one replica has just enough work, and two are needed: one of two is idle. At 5,000 per second 100 replicas have just
# enough work.
#
# **Guess.** How many does 5,000 per second need?

# %%
guess_replicas = ...

# %% [markdown]
# **Prediction.** $R = \lambda S$ is the work that comes, in replicas. It fluctuates, and the sum of many independent streams fluctuates
# relatively less: by $\sqrt R$. So the spare replicas grow with the root, not with the load:
#
# $$N = R + c\,\sqrt R.$$
#
# That is *square-root staffing*. The constant $c$ says how seldom anybody may be late. We take it from the small load and predict the large
# ones: $N = 2$ at $R = 1$ says $c = 1$, at most.

# %%
rates = [50, 200, 1000, 5000]
needed = [replicas_for(Fleet(UNEVEN, deadline_s=0.5), rate, 0.001) for rate in rates]
work = np.array(rates) * 0.02
staffed = np.ceil(work + np.sqrt(work))
COLUMNS = "texts/s", "at least", "R + √R", "simulated", "busy"
table(
    dict(zip(COLUMNS, (rate, f"{r:.0f}", f"{n:.0f}", found, f"{r / found:.0%}")))
    for rate, r, n, found in zip(rates, work, staffed, needed)
)
compare("replicas for 5,000 texts/s", guess=guess_replicas, formula=staffed[-1], measured=needed[-1])

# %%
with picture(
    "The larger the fleet, the busier it may be", "texts per second", "busy, %", ylim=(0, 105)
) as ax:
    line(ax, rates, 100 * work / staffed, "R + √R")
    dots(ax, rates, 100 * work / needed, "simulated")
    guessed(ax, 5000, 100 * work[-1] / guess_replicas)
    ax.set_xscale("log")
    ax.set_xticks(rates, [f"{rate:,}" for rate in rates])
    ax.minorticks_off()
claim(
    "Keep every server below 70 %",
    who="the fleet simulator: 99.9 % of uneven texts of 20 ms within 0.5 s, least connections",
    number=", ".join(f"{n} replicas {r / n:.0%} busy" for n, r in zip(needed, work)),
    verdict="depends on how many there are: one of two must idle, a hundred need hardly any spare",
)

# %% [markdown]
# *Where the formula fails:* it takes $c$ from one point, and rounding at two replicas is coarse: the larger fleets need a little less
# than it says. And it knows nothing of a replica that dies. Add the one that may.
#
# ## Which replica?
#
# A balancer chooses a replica for each request: in turn (*round robin*), the shorter-looking of *two at random*, or the one with the
# *least connections*. One *shared queue* is what none of them can be. 20 replicas, uneven texts.
#
# **Guess.** At 80 % load, how many times as long is the p99 with round robin as with a shared queue?

# %%
guess_round_robin = ...

# %% [markdown]
# **Prediction.** Lesson 9's formula is for means, and says that a queue per replica waits $\frac{c_a^2 + c_s^2}{2}\cdot\frac{\rho}{1-\rho}$
# calls. One of 20 gets each 20th text: $c_a^2 = \frac1{20}$. The texts have $c_s^2 \approx 1.8$. At $\rho = 0.8$ that is a mean of
# 3.7 calls of 20 ms, and the p99 of an exponential is 4.6 means: about 340 ms, and the text's own time. In a shared queue of 20 next to
# nobody waits: the p99 is the long text itself, 100 ms.

# %%
loads = quick([0.8], [0.5, 0.7, 0.8, 0.9, 0.95])
COLOR = dict(zip(fleet.POLICIES, ("#D55E00", "#E69F00", BLUE, "#999999")))


def p99_ms(policy, load):
    """Of 20 replicas."""
    one = Fleet(UNEVEN, 20, policy, deadline_s=5.0)
    return fleet.simulate(one, rate_per_s=load * 1000, duration_s=quick(10, 40)).summary()["p99_ms"]


p99s = {policy: [p99_ms(policy, load) for load in loads] for policy in fleet.POLICIES}
at_80 = {policy: ms[loads.index(0.8)] for policy, ms in p99s.items()}
times = {policy: ms / at_80["shared queue"] for policy, ms in at_80.items()}
robin = times["round robin"]
compare("round robin's p99, times a shared queue's", guess=guess_round_robin, formula=3.4, measured=robin)

# %%
with picture("Least connections is close to one shared queue", "load, %", "p99, ms", ylim=(0, None)) as ax:
    for policy, ms in p99s.items():
        ax.plot([100 * load for load in loads], ms, "o-", color=COLOR[policy], label=policy)
    guessed(ax, 80, guess_round_robin * at_80["shared queue"])
    ax.set_xlim(right=100)

# %% [markdown]
# So take least connections? It needs to know all connections. One balancer does. Ten balancers each know their own tenth. Or they read a
# dashboard that is refreshed now and then. Let each choice be made by what the queues looked like up to some time ago.
#
# **Guess.** The view is refreshed every 0.1 s; a call takes 0.02 s. What is the p99 of "the least busy", in ms?

# %%
guess_stale_ms = ...

# %% [markdown]
# **Prediction.** The replica that looks idle looks idle to everybody until the next refresh. In 0.1 s 80 texts come, of 20 ms each. If
# a few look idle and share all 80, say four of them, each has 0.4 s of work at the end. Two choices can't herd so: a replica is only chosen
# when it is drawn, so at most two in twenty of the texts fall on any.

# %%
ages_s = quick([0.0, 0.1], [0.0, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0])
stale = {
    policy: [l15_fleet.stale_p99_ms(policy, age_s, seconds=quick(10, 60)) for age_s in ages_s]
    for policy in ("least connections", "two choices")
}
old = ages_s.index(0.1)
compare("the herd's p99, ms", guess=guess_stale_ms, formula=400, measured=stale["least connections"][old])

# %%
with picture("An old view makes a herd of the clever", "age of the view, ms", "p99, ms", yscale="log") as ax:
    for policy, ms in stale.items():
        ax.plot([1000 * age for age in ages_s], ms, "o-", color=COLOR[policy], label=policy)
    guessed(ax, 100, guess_stale_ms)
look, two = stale["least connections"], stale["two choices"]
said(
    look[0] < two[0] and two[old] < look[old],
    f"With a fresh view the look at all is better: {look[0]:.0f} ms for {two[0]:.0f}. With one of 0.1 s it is worse: {look[old]:.0f} for {two[old]:.0f}.",
)
claim(
    "Two random choices are as good as a look at all",
    who="20 simulated replicas at 80 %, uneven texts, p99",
    number=f"fresh view: {two[0]:.0f} against {look[0]:.0f} ms; a view of up to 0.1 s ago: {two[old]:.0f} against {look[old]:.0f} ms",
    verdict="depends on the view: worse where it is fresh, far better where it is old",
)

# %% [markdown]
# ## One in a hundred, a hundred times
#
# Now a page asks for 100 parts at once, each from some replica, and needs the last of them. One answer in a hundred is slow (here it is the
# server: a hiccup, whatever the text).
#
# **Guess.** What share of the pages is slow?

# %%
guess_slow_pages = ...

# %% [markdown]
# **Prediction.** A page is fast if all of its parts are: $0.99^{100}$. So $1 - 0.99^{100} = 63\,\%$ are slow.

# %%
times_ms = l15_fleet.answer_times_ms()
slow_ms = np.quantile(times_ms, 0.99)
parts = [1, 2, 5, 10, 20, 50, 100]
share = [float((l15_fleet.fan_out(times_ms, n) > slow_ms).mean()) for n in parts]
with picture("A part's p99 is a page's median", "parts of a page", "slow pages, %", ylim=(0, 100)) as ax:
    line(ax, parts, [100 * (1 - 0.99**n) for n in parts], "1 - 0.99ⁿ")
    dots(ax, parts, [100 * one for one in share], "simulated")
    guessed(ax, 100, 100 * guess_slow_pages)
compare("share of slow pages", guess=guess_slow_pages, formula=1 - 0.99**100, measured=share[-1])
claim(
    "The tail is the business of one in a hundred",
    who="answers of 20 simulated replicas with hiccups; pages that need all of their parts",
    number=f"slower than the p99 are {share[0]:.0%} of the pages with one part and {share[-1]:.0%} of those with 100",
    verdict="fails where an answer is made of many",
)

# %% [markdown]
# ## Asking twice
#
# A *hedged* request is sent a second time, to another replica, when its answer has not come after some time; the first answer counts. After
# the p95, say.
#
# **Guess.** By how many per cent does that raise the load?

# %%
guess_more_load = ...  # %

# %% [markdown]
# **Prediction.** Only those are sent again that have no answer by the p95: 5 %. And an answer is slow only if both are: $0.01^2$.

# %%
after_ms = float(np.quantile(times_ms, 0.95))
hedged_ms, more = l15_fleet.hedged(times_ms, after_ms)
plain_p999, hedged_p999 = (float(np.quantile(ms, 0.999)) for ms in (times_ms, hedged_ms))
compare("more load by hedging, %", guess=guess_more_load, formula=5, measured=100 * more)
tell(f"Sent again after {after_ms:.0f} ms. The p99.9 falls from {plain_p999:.0f} to {hedged_p999:.0f} ms.")
claim(
    "Hedged requests double the load",
    who="answers of 20 simulated replicas with hiccups, half busy; sent again after the p95",
    number=f"{more:.1%} more requests; p99.9 {hedged_p999:.0f} ms in place of {plain_p999:.0f}",
    verdict="fails: only the late ones are sent again",
)

# %% [markdown]
# *Where it fails:* the second try is drawn independently. That is right for a hiccup. A *text* that takes long takes long everywhere: there a
# hedge costs twice and gains nothing. And in an overload all are late, so all are sent twice. So a hedge needs a budget, as a retry does.
#
# ## The storm that stays
#
# Four replicas, 85 % busy. For three seconds four times as many requests come. Rejected clients ask again after about 0.1 s, until they
# are answered. A rejection costs a replica 2 ms. Then the load is back at 85 %.
#
# **Guess.** How many seconds after the rush do the replicas answer at 85 % of their capacity again?

# %%
guess_calm_s = ...

# %% [markdown]
# **Prediction.** In the rush $3 \cdot (4 \cdot 0.85 - 1) \cdot 200 \approx 1{,}400$ clients get no answer. Each asks ten times per second:
# 14,000 rejections per second of 2 ms, 28 s of work per second, for four replicas. So nearly all of their time goes into rejecting. What
# is left is less than the 85 % that still come, so those join the crowd. It never ends: the cause has gone, the state stays. That is a
# *metastable* failure.
#
# Three cures: a *budget* (retries at most a tenth of the requests), `Retry-After: 10`, or giving up after three.

# %%
seconds = quick(20, 40)
CURES = {
    "no retries": Retries(),
    "until answered, after 0.1 s": Retries(10**6, 0.1),
    "… within a budget of 10 %": Retries(10**6, 0.1, 0.1),
    "… after 10 s, as told": Retries(10**6, 10.0),
    "three times, after 0.1 s": Retries(3, 0.1),
}
after = {name: l15_fleet.storm(retries, seconds=seconds) for name, retries in CURES.items()}
late = {name: float(answers[15:].mean()) for name, answers in after.items()}
table(
    {"clients ask again": name, "answered after the rush, of the capacity": f"{one:.0%}"}
    for name, one in late.items()
)

# %%
shown = {
    "until answered, after 0.1 s": "#D55E00",
    "… within a budget of 10 %": BLUE,
    "three times, after 0.1 s": "#009E73",
}
with picture("The cause is gone, the storm stays", "time, s", "answers, % of capacity", ylim=(0, 110)) as ax:
    ax.axvspan(10, 13, color="#EEEEEE")
    ax.text(11.5, 104, "rush", ha="center", fontsize=12)
    for name, color in shown.items():
        ax.plot(np.arange(seconds) + 0.5, 100 * after[name], color=color, label=name.strip("… "))
    line(ax, [13, seconds], [85, 85], "_", linestyle=":")
    guessed(ax, 13 + guess_calm_s, 85, None)
stays = late["until answered, after 0.1 s"]
said(stays < 0.7, f"{seconds - 13} s later it is still there: {stays:.0%} answered, of 85 % that are asked.")

# %%
claim(
    "An overload ends when its cause does",
    who="four simulated replicas at 85 %, three seconds of four times the load, a rejection costs 2 ms",
    number=f"answered afterwards, of the capacity: {late['no retries']:.0%} without retries, {stays:.0%} with clients that ask until they are"
    f" answered, {late['… within a budget of 10 %']:.0%} with a budget",
    verdict="fails where nothing bounds the retries",
)
claim(
    "Three retries make a client robust",
    who="the same, with at most three retries after 0.1 s",
    number=f"{late['three times, after 0.1 s']:.0%} of the capacity are answered afterwards, {late['no retries']:.0%} without retries",
    verdict="depends on the rejection's price: three retries are four times the requests while it is overloaded; a budget costs nothing",
)

# %% [markdown]
# *Where the prediction fails:* it does not say at which level the storm settles. Some clients are answered, so the crowd shrinks, until as
# many leave as join. This server's rejection takes well below a millisecond (lesson 5), and it holds rejections back when there are very
# many. That moves the edge; it does not remove it.
#
# *Jitter* is in all of these: each pause is drawn between half and one and a half of its mean. Without it a crowd that was rejected
# in one moment comes back in one moment.
#
# ## Which signal?
#
# An autoscaler needs a number that says how many replicas are wanted. Four are offered: the share of time busy (CPU or GPU), requests
# inside a replica, the wait in the queue, rejections.
#
# **Guess.** Twice as many requests come as four replicas can do. What does "busy" say, in per cent?

# %%
guess_busy = ...  # %

# %% [markdown]
# **Prediction.** Busy can't exceed 100 %. It asks for $\frac{100}{\text{target}}$ times the replicas, and no more: with a target of 80 %
# for five in place of four, then again, step by step. What counts is what came: arrivals per second times $S$, rejected ones included.

# %%
dashboard = {load: l15_fleet.signals(load) for load in (0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 1.1, 1.5, 2.0)}
table(
    {"load": f"{load:.0%}", "busy": f"{s['busy']:.0%}"}
    | {name: f"{s[name]:.1f}" for name in ("inside, per replica", "wait, ms")}
    | {"rejected": f"{s['rejected']:.0%}", "wanted, by arrivals": math.ceil(4 * load / 0.8)}
    for load, s in dashboard.items()
)
compare("busy at twice the load, %", guess=guess_busy, formula=100, measured=100 * dashboard[2.0]["busy"])
claim(
    "Scale on CPU utilisation",
    who="four simulated replicas; a load of 95 % and of 200 %",
    number=f"busy {dashboard[0.95]['busy']:.0%} and {dashboard[2.0]['busy']:.0%}, wait {dashboard[0.95]['wait, ms']:.0f} and"
    f" {dashboard[2.0]['wait, ms']:.0f} ms, rejected {dashboard[0.95]['rejected']:.0%} and {dashboard[2.0]['rejected']:.0%}",
    verdict="depends on the side: below the capacity it is linear, above it is blind",
)

# %% [markdown]
# Below the capacity *busy* is the best of them: it is linear, and the wait still sleeps. Above it is blind, and so is the wait, which the
# queue target holds. Then only arrivals tell: those answered and those rejected. So scale on arrivals per second over what a replica can do.
#
# ## Headroom
#
# The autoscaler looks every 5 s and wants `headroom` times the replicas that the load needs. A replica takes 60 s to start. The load doubles
# within two minutes.
#
# **Guess.** Which headroom is enough, so that no more than one request in a thousand is rejected?

# %%
guess_headroom = ...

# %% [markdown]
# **Prediction.** What is ordered now is there in a cold start, and it may take one look more until it is ordered. By then the load has grown.
# So headroom must cover the growth in that time: $1 + \frac{60 + 5}{120} = 1.54$ at the start of the rush.

# %%
scenes = quick([(60, 120)], [(10, 120), (30, 120), (60, 120), (60, 300)])
found = {scene: l15_fleet.least_headroom(*scene) for scene in scenes}
formula = {(cold_s, over_s): 1 + min(1, (cold_s + 5) / over_s) for cold_s, over_s in scenes}
table(
    [
        {
            "cold start, s": cold,
            "doubles within, s": over,
            "formula": f"{formula[cold, over]:.2f}",
            "simulated": f"{h:.2f}",
        }
        for (cold, over), h in found.items()
    ]
)
compare("headroom", guess=guess_headroom, formula=formula[60, 120], measured=found[60, 120])

# %% [markdown]
# *Where the formula fails:* it is on the safe side. A replica that is a little too busy does not reject at once, replicas come in whole
# numbers, and the growth is largest in relation to the load only at the start. Headroom costs money all day. A shorter cold start does not:
# that is why lesson 12 takes one apart.
#
# ## What does a million answers cost?
#
# A replica costs 1 per hour, in whatever money. It does 50 texts per second.
#
# **Guess.** What do a million answers cost, from the fleet above at 50 texts per second, and at 5,000? (The first is asked.)

# %%
guess_price = ...

# %% [markdown]
# **Prediction.** One replica, always busy, gives $50 \cdot 3600 = 180{,}000$ answers for 1: a million cost 5.56. Divide by how busy the fleet
# may be.

# %%
price = 1e6 / (50 * 3600)
prices = [price * n / r for n, r in zip(needed, work)]
table(
    [
        {"texts/s": rate, "busy": f"{r / n:.0%}", "a million answers": f"{p:.2f}"}
        for rate, r, n, p in zip(rates, work, needed, prices)
    ]
)
compare("a million answers at 50/s", guess=guess_price, formula=price / (1 / 2), measured=prices[0])

# %% [markdown]
# Being small is dear: not because of the machine, because of the idle half. Batches (lesson 4) divide this price by their gain, and no
# balancer does.
#
# ## Two points, measured
#
# Is the simulator right? Two real replicas behind HAProxy, whose model sleeps 20 ms per text. 80 texts per second come, then 140, which is too
# much.

# %%
import shutil

from loadtests.bench.apps import SLEEP_S

rates_2 = (80, 140)
law = replace(EVEN, b_s=SLEEP_S)
two = Fleet(law, 2, overhead_s=0.0007, deadline_s=1.0)
told = {rate: fleet.simulate(two, rate_per_s=rate, duration_s=60).summary() for rate in rates_2}
measured = {}
if shutil.which("haproxy"):
    server = serve("haproxy-2", cores=None, MODEL="loadtests.bench.apps:Sleeps", DEADLINE_S=1.0)
    for rate in rates_2:
        df = load(server, "open", rate_per_s=rate, duration_s=quick(1.5, 8), limit_s=1.0, timeout_s=3.0)
        measured[rate] = generator.summary(df, 1.0)["goodput_per_s"], df.queue_ms.mean()
    stop()

# %%
table(
    [
        {
            "texts/s": rate,
            "answered in time, simulated": f"{told[rate]['goodput_per_s']:.0f}",
            "measured": f"{measured[rate][0]:.0f}" if measured else None,
            "mean wait, simulated, ms": f"{told[rate]['mean_wait_ms']:.0f}",
            "measured, ms": f"{measured[rate][1]:.0f}" if measured else None,
        }
        for rate in rates_2
    ]
)
if not measured:
    tell("HAProxy isn't installed here (`apt-get install haproxy`), so nothing was measured.")

# %% [markdown]
# *Where the simulation fails:* it has no network, its replicas are alike, and its clients never leave. It is for orders of magnitude and
# for comparisons: which policy, which budget, how much headroom.
#
# ## Exercises
#
# Fill in and run. The checker tells you what it thinks; it never stops the notebook. Solutions are in `notebooks/solutions/`.
#
# **★** 900 texts per second, 100 ms each. How many replicas by square-root staffing, with $c = 1$?

# %%
replicas = ...

checks.exercise_15_1(replicas)

# %% [markdown]
# **★★** A page asks for `parts` parts. One part in a hundred is slow. Each is hedged, and the second try is independent. What share of
# the pages is slow? (Two lines.)


# %%
def slow_pages(parts): ...


checks.exercise_15_2(slow_pages)

# %% [markdown]
# **★★★** Write a retry budget. `came()` is called for each new request and earns `share` of a retry, up to ten. `may_retry()` says whether
# one may be made now, and spends it. (About eight lines.)


# %%
class Budget:
    def __init__(self, share): ...

    def came(self): ...

    def may_retry(self): ...


checks.exercise_15_3(Budget)

# %% [markdown]
# ## In the lab
#
# Choose `Retries(most, pause_s, budget)` for the clients of the storm, so that it ends, and retries are still made.

# %%
import labs

retries = ...

labs.lab_15(retries)

# %% [markdown]
# ## Ten questions
#
# Answer them aloud, then open the answers.
#
# 1. Why do spare replicas grow with the root?
# 2. Why is a small fleet dear?
# 3. Why is round robin the worst with uneven texts?
# 4. Why does the look at all become a herd?
# 5. Why can two choices not herd?
# 6. Why is the p99 of a part the median of a page?
# 7. Why is a hedge cheap?
# 8. When is a hedge useless?
# 9. Why does a storm stay?
# 10. Why not scale on busy?
#
# <details><summary>Answers</summary>
#
# 1. Independent fluctuations add by their squares.
# 2. It has to idle for the same safety.
# 3. It sends a text behind a long one while others are idle.
# 4. With an old view all choose the one that looked idle.
# 5. A replica gets only the texts for which it was drawn.
# 6. A page of a hundred parts almost surely has a slow one.
# 7. Only the late ones are sent again: after the p95, one in twenty.
# 8. Where the request itself is slow, or all are.
# 9. Rejecting takes the time in which the crowd could be answered.
# 10. It can't exceed 100 %: above the capacity it says nothing.
# </details>

# %% [markdown]
# ## How far off were you?

# %%
score()

# %% [markdown]
# ## What must hold

# %%
assert needed[-1] / work[-1] < 1.2 < needed[0] / work[0], "a large fleet needs little to spare"
assert times["round robin"] > 1.5 > times["least connections"], "round robin is blind"
assert stale["two choices"][old] < stale["least connections"][old], "an old view makes herds"
assert share[-1] > 0.5 > 0.02 > share[0], "a page of many parts meets the tail"
assert more < 0.06 and hedged_p999 < plain_p999, "a hedge is cheap"
assert stays < 0.7 < late["… within a budget of 10 %"], "a budget cures the storm"
assert dashboard[2.0]["busy"] < 1.05, "busy is blind above the capacity"
if measured:
    holds(0.7 < measured[140][0] / told[140]["goodput_per_s"] < 1.3, "the simulator knows two replicas")

# %% [markdown]
# ## Take away
#
# - Spare replicas grow with the root of the load. Small fleets idle, large ones need not.
# - Least connections, where one balancer sees all; two random choices, where views are old. Hedge and retry within a budget, or a rush stays
#   when its cause is gone.
# - Scale on arrivals over what a replica can do. Headroom is the growth in one cold start.
#
# That was the last lesson. All claims and their verdicts are in the [ledger](claims.md).
