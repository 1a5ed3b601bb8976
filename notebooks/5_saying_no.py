# %% [markdown]
# # 5. Saying no
#
# Twice as many people want an answer as you can give. Half of them will get none. You choose which half, and when they
# hear of it. You even choose whether the other half gets anything.
#
# **Question: when should a server reject?**
#
# Afterwards you can choose a bound, a deadline and a queue target for your own model, and say what your users will see.
#
# It takes about 2.5 minutes (the quick form 40 s), two cores and 2 GB of memory. [What all lessons need](README.md).

# %%
# "No module named 'lesson'"? Open this notebook where it lies, in the project's notebooks/, or by `make learn`.
from lesson import BLUE, GREY, ORANGE, SERVER_CORES, bars, capacity, claim, compare, dots, guessed, holds
from lesson import line, load, picture, quick, said, score, serve_all, simulate, stop, table, tell

import numpy as np

import checks
from loadtests.load import generator
from loadtests.plan import planner
from support import l05_overload, l05_poison
from support.l05_rules import LIMIT_S, MU, SECONDS, goodput, median_s, overload

# %% [markdown]
# ## Goodput
#
# An answer that comes too late is worth nothing, but it costs as much as any other. So count only what comes in time.
# The right answers within the client's limit, per second, are the **goodput** ([glossary](glossary.md)). Our clients'
# limit is $l$ = 2 s. Our model takes $S$ = 20 ms a text, so it does $\mu$ = 50 texts a second.
#
# On its way a request passes two places that can reject:
#
# - The **door** looks at the queue before it reads a single byte of the text. It rejects with a *503*: not now.
# - The **loop** looks once more, when it takes a batch. It rejects with a *504*: you have waited in vain.
#
# Which rules should they follow? We try them on the planner first. It runs this project's own loop on a virtual clock:
# a minute passes in a second, and the model takes 20 ms exactly (`overload`, in `support/l05_rules.py`). We call that a
# **simulation**. Below, the real server has its turn.
#
# ## A queue of 256
#
# The simplest rule: at most 256 may wait. It is a common default, and it sounds careful. Texts come at twice the
# speed of the model. **Your guess:** how many right answers in time does the server give per second? It can do 50.

# %%
guess_goodput = ...  # right answers within 2 s, per second, of 50 possible

# %% [markdown]
# **Prediction.** The last to join a queue of $n$ waits for $n$ calls, and then for its own: $(n+1)\,S$.
#
# - If that is at most $l$, everybody who is let in is in time. The model never rests, so the goodput is $\mu$.
# - If it is more, the full queue is worth nothing. Only the first ones are in time, while the queue still fills. It
#   grows by $\rho - 1$ seconds of work each second ($\rho$ is the load, as a multiple of the capacity). So a text that comes at
#   $t$ waits $(\rho-1)\,t$, and the good time is over after $l/(\rho-1)$ seconds.
#
# Goodput is counted from second $l$ to the end of the run: a queue that is empty at first flatters everybody. In a run
# of $T$ seconds the full queue gives $\mu \cdot l/(\rho-1)$ answers in time, in the $T - l$ seconds that count.

# %%
bounds = quick([2, 99, 105, 256, 10**6], [1, 2, 5, 10, 25, 50, 80, 99, 105, 128, 256, 512, 10**6])
runs = {n: overload(2, max_queue=n) for n in bounds}
in_time_of = {n: int(generator.good(df, LIMIT_S).sum()) for n, df in runs.items()}
goodputs = {n: goodput(df) for n, df in runs.items()}
finite = [n for n in bounds if n < 10**6]
x, lost = np.geomspace(finite[0] / MU, finite[-1] / MU, 400), LIMIT_S / (2 - 1) / (SECONDS - LIMIT_S) * MU
title, seconds_of_work = "A queue's bound is a time, not a number", "bound, in seconds of work (bound ÷ 50)"
with picture(title, seconds_of_work, "right answers in time, per s", ylim=(0, 58), xscale="log") as ax:
    line(ax, x, np.where(x * MU + 1 <= LIMIT_S * MU, MU, lost), "predicted")
    dots(ax, [n / MU for n in finite], [goodputs[n] for n in finite], "simulated")
    guessed(ax, 256 / MU, guess_goodput)
    ax.axvline(LIMIT_S, color=GREY, linestyle=":")
    ax.text(LIMIT_S * 0.92, 30, "the clients' limit", rotation=90, ha="right", va="center", color=GREY)
    ax.set_xticks([0.02, 0.1, 0.5, 2, 10], ["0.02", "0.1", "0.5", "2", "10"])

# %%
compare("goodput with a bound of 256, per s", guess=guess_goodput, formula=lost, measured=goodputs[256])
tell(
    f"In {SECONDS} s {in_time_of[256]} texts are answered in time with a bound of 256, and {in_time_of[10**6]} without any bound."
    f" {'Not one more' if in_time_of[256] == in_time_of[10**6] else 'Hardly more'}. A bound of 99 gives {in_time_of[99]}."
)

# %% [markdown]
# (These are all that were in time. The formula's answers are those after second 2, where the count of goodput begins.)
#
# **A bound that is too large is exactly as bad as none.** 256 texts at 50 a second are five seconds of waiting, and an
# answer is worth nothing after two. The server works all the time. But after the first seconds every answer is too
# late.
#
# So a bound is a time: *bound ÷ speed* must stay below the clients' patience. The model's speed is on no configuration
# page, and it changes with the texts. A bound in pieces can't be right for long.
#
# *Where the formula fails:* at the left end. With one place in the queue the model sometimes finds nobody when it
# becomes free. But a few places are enough. A queue is there to bridge gaps, and gaps are short.
#
# ## When do you hear of it?
#
# Three better rules look at time instead of number:
#
# | rule | the door | the loop |
# |---|---|---|
# | deadline | lets all in | 504 to those whose time has run out |
# | predicted wait | 503 if the answer would come too late | the same |
# | queue target | also 503 while there is always a queue, if the wait is above a target | the same |
#
# This project's server uses the last. Twice the capacity comes again. **Your guesses:** with the predicted wait, how
# long until an answer, for those who get one? And with a deadline alone, how long until the rejection?

# %%
guess_yes_s = ...  # seconds to an answer, with "predicted wait"
guess_no_s = ...  # seconds to a rejection, with "deadline"

# %% [markdown]
# **Prediction.** Under overload the queue grows until a rule holds it. So whoever is let in waits about as long as the
# rule allows.
#
# - *Deadline*: the queue holds 2 s of work. An answer comes after just under 2 s, and so does a rejection.
# - *Predicted wait*: the door multiplies its forecast by a safety margin. The loop learns how long calls take, and how
#   wrong its forecasts were. The margin is 1.1 plus that error. Our model is always on time, so the margin is 1.1, and
#   a yes comes after 2 ÷ 1.1 s.
# - *Queue target*: `QUEUE_TARGET_S` is 0.5 s, then the text's own 20 ms.

# %%
rules = {
    "no rule": {},
    "bound of 256": {"max_queue": 256},
    "deadline": {"deadline_s": LIMIT_S, "door": False},
    "predicted wait": {"deadline_s": LIMIT_S},
    "queue target": {"deadline_s": LIMIT_S, "queue_target_s": 0.5},
}
by_rule = {name: overload(2, **settings) for name, settings in rules.items()}
expected_yes_s = {"deadline": 2.0, "predicted wait": 2 / 1.1, "queue target": 0.52}

# %%
yes_s = {name: median_s(df, "200") for name, df in by_rule.items()}
no_504_s = median_s(by_rule["deadline"], "504")
rejected = {"no rule": "nobody hears one", "deadline": f"{no_504_s:.2f} s"}
counts = {name: df.outcome.value_counts() for name, df in by_rule.items()}
columns = "rule | right answers in time, per s | a yes after, s | 503s | 504s | a rejection after"
rows = [(name, f"{goodput(df):.1f}", f"{yes_s[name]:.2f}") for name, df in by_rule.items()]
codes = [
    (counts[name].get("503", 0), counts[name].get("504", 0), rejected.get(name, "at once")) for name in rules
]
table(columns, *(row + code for row, code in zip(rows, codes)))

# %%
names = list(expected_yes_s)
with picture(
    "Whoever is let in waits as long as the rule allows", "s until an answer", "", xlim=(0, 2.3)
) as ax:
    bars(ax, list(expected_yes_s.values()), range(3))
    dots(ax, [yes_s[name] for name in names], range(3), "simulated")
    guessed(ax, guess_yes_s, 1)
    ax.set_yticks(range(3), names)
    ax.set_ylim(-0.6, 2.6)
measured, kept = yes_s["predicted wait"], ", ".join(f"{goodput(by_rule[name]):.1f}" for name in names)
compare("s to an answer, predicted wait", guess=guess_yes_s, formula=2 / 1.1, measured=measured)
compare("s to a rejection, deadline", guess=guess_no_s, formula=LIMIT_S, measured=no_504_s)
tell(f"All three rules keep the goodput: {kept} a second.")

# %% [markdown]
# All three serve equally many. They differ in what the others hear, and when:
#
# - A *504* says: you have waited for two seconds, and in vain.
# - A *503* says at once: not now. `Retry-After` in its headers says when. Its client can ask another server, or show
#   last week's answer.
#
# So reject early what you can predict. The 504 is for what nobody could predict: a call that took longer than usual, a client
# that became impatient.
#
# ## A burst is no overload
#
# Why does the queue target count only "while there is always a queue"? Because a short queue limit alone hurts bursts.
# Every five seconds 60 texts come in the same moment, and nothing in between. That is $60 \cdot 20\,\text{ms} = 1.2\,\text{s}$ of
# work: all of it could be done in time. Compare a bound of 25 texts, half a second of work, with a queue target of half a second. **Your
# guess:** what share of the texts is answered with the bound?

# %%
guess_share = ...  # of the texts, with a bound of 25; all is 1

# %% [markdown]
# **Prediction.** The door has to decide about all 60 before the model has done anything. It lets the first in, whom the
# model takes, and then as many as there are places: 25 of 60 wait, and one or two more slip through. The target lets
# all of them in: the queue was empty a moment ago, so this is a burst, and a burst that can be done in time is welcome.
#
# And a queue that stays? The server's rule: it has not been empty for two targets, a whole second. At twice the load
# the wait has then grown to a second, too. Now the door lets in nobody until the wait has fallen to the target. It
# falls by one second a second. So a text that comes between 1.0 s and 1.5 s is rejected, and whoever is let in later waits half
# a second.

# %%
bursts = [second for second in range(0, quick(10, 40), 5) for _ in range(60)]
tested = {"bound of 25": {"max_queue": 25}, "queue target": rules["queue target"]}
after_burst = {name: overload(0, arrivals_s=bursts, **settings) for name, settings in tested.items()}
share = {name: float(generator.good(df, LIMIT_S).mean()) for name, df in after_burst.items()}
bound_25 = share["bound of 25"]
compare("share answered with a bound of 25", guess=guess_share, formula=26 / 60, measured=bound_25)
tell(
    f"Of a burst of 60, the bound of 25 lets {bound_25:.0%} be answered in time (predicted: {25 / 60:.0%} and a little). The queue"
    f" target: {share['queue target']:.0%}."
)

# %% [markdown]
# This idea is called *CoDel*, for "controlled delay". It was made for the buffers of routers ([Nichols and Jacobson,
# 2012](https://doi.org/10.1145/2208917.2209336)): a good queue absorbs a burst and drains. A bad queue only stands
# there, and makes everybody late.
#
# ## Measured
#
# Now the real server, over HTTP, at twice its capacity. So that its speed is known, its model does not compute: it
# sleeps for 20 ms a call (`Sleeps` in `loadtests/bench/apps.py`). Four servers:
#
# - *patient* takes everything, and has no deadline;
# - *careful* is this project's default, but for a deadline of 2 s;
# - *blocked* is careful, but its model runs on the event loop (`OFFLOAD=inline`);
# - *stuck* has a model that never returns, so it rejects all. We need it to find out what a rejection costs.
#
# **Your guess:** what is the goodput of the patient server?

# %%
guess_patient = ...  # right answers within 2 s, per second

# %%
sleeps = {"MODEL": "loadtests.bench.apps:Sleeps"}
patient, careful, blocked, stuck = serve_all(
    sleeps | {"MAX_QUEUE": 10**6, "DEADLINE_S": 600, "QUEUE_TARGET_S": 0},
    sleeps | {"DEADLINE_S": LIMIT_S},
    sleeps | {"DEADLINE_S": LIMIT_S, "OFFLOAD": "inline"},
    {"MODEL": "loadtests.bench.apps:Stuck", "MAX_QUEUE": 1, "DEADLINE_S": 1000},
    cores=SERVER_CORES,
)
mu, seconds = capacity(careful, quick(1.5, 4), users=8), quick(3, 15)
twice = {"rate_per_s": 2 * mu, "duration_s": seconds, "limit_s": LIMIT_S, "health_per_s": 10}
real = {"patient": load(patient, "open", **twice), "careful": load(careful, "open", **twice)}
model = {name: df[df.kind == "model"] for name, df in real.items()}
real_goodput = {name: goodput(df) for name, df in real.items()}

# %%
formula, measured = mu * min(1, LIMIT_S / (seconds - LIMIT_S)), real_goodput["patient"]
tell(
    f"The capacity is {mu:.0f} texts/s: calls of 20 ms, and what HTTP adds. Patient: {formula:.0f}/s predicted, as above, {measured:.0f}/s"
    f" measured. Careful: {mu:.0f}/s predicted, {real_goodput['careful']:.0f}/s measured."
)
compare("the patient server's goodput", guess=guess_patient, formula=formula, measured=measured)
l05_overload.draw_arrivals(model, mu, seconds, guess_patient)

# %% [markdown]
# The patient server helps those who come in the first seconds, and then nobody. Its clients hang up after 4 s. That
# frees their places, so its queue stays as long as their patience: it works to the end, and always too late.
#
# The careful one gives answers at its full speed all the time. (The picture goes by the time of arrival: all of the first second
# are let in, so most of the next are rejected.) Here is how long its clients wait:

# %%
answered = model["careful"][model["careful"].outcome == "200"]
shown_s = min(seconds, 6)  # nothing changes afterwards
options = {"rate_per_s": 2 * mu, "duration_s": seconds, "deadline_s": LIMIT_S, "overhead_s": 0}
same = simulate(planner.CostLaw(0.0, 1 / mu), **options)
title = "A burst is let in, a queue that stays is not"
with picture(title, "time of arrival, s", "time to the answer, s", ylim=(0, 2.1)) as ax:
    line(ax, [0, 1], [1 / mu, 1], "_")
    line(ax, [1.5, shown_s], [0.5 + 1 / mu] * 2, "predicted")
    yes = same[(same.outcome == "200") & (same.due_s < shown_s)]
    ax.plot(yes.due_s, yes.latency_ms / 1000, ".", color=GREY, markersize=3, label="simulated")
    early = answered[answered.due_s < shown_s]
    dots(ax, early.due_s, early.latency_ms / 1000, "measured", markersize=3)

# %%
refused = model["careful"][model["careful"].outcome == "503"]
no_ms, yes_ms = refused.latency_ms.median(), answered[answered.due_s > seconds / 2].latency_ms.median()
claim(
    "A full queue should answer 503, a late one 504",
    who=f"the server around a model that sleeps 20 ms, at twice its capacity of {mu:.0f}/s, clients' limit 2 s",
    number=f"its 503 comes after {no_ms:.0f} ms, and {real_goodput['careful']:.0f}/s are answered in time; a server that takes"
    f" all: {real_goodput['patient']:.0f}/s. Simulated: a deadline alone says 504 after {no_504_s:.1f} s; a bound of 256"
    f" has {goodput(by_rule['bound of 256']):.1f}/s in time, no bound {goodput(by_rule['no rule']):.1f}/s",
    verdict="holds, if full means that it would take too long, and not that so many wait",
)

# %% [markdown]
# *Where the formula fails:* it is for the mean. Arrivals are random, so the queue of one run may become longer than the line says, or
# stay shorter.
#
# ## What a rejection costs
#
# A rejection is not free. The server has to wake up, read the headers and write the reply. **Your guess:** for how many
# microseconds does one rejection keep the server's core busy?

# %%
guess_no_us = ...  # microseconds of the server's core, for one 503

# %% [markdown]
# **Prediction.** A rejection costs $c$ seconds. We find $c$ at the lowest load. Then $\lambda$ rejections per second take the share
# $\lambda c$ of a core. The *stuck* server does nothing but reject, and Linux counts the processor time of each
# process.

# %%
load(stuck, "open", rate_per_s=100, duration_s=0.5, timeout_s=0.5)  # one is in the model; and to warm up
rates = quick((200, 800), (200, 400, 800))
noes = [l05_overload.rejections_at(stuck, rate, quick(1, 5)) for rate in rates]
no_us, most = noes[0][1] / noes[0][0] * 1e6, noes[-1][0]
title = "A rejection is cheap, and cheaper in a crowd"
with picture(title, "rejections per second", "share of a core, %", ylim=(0, None)) as ax:
    line(ax, [0, most], [0, most * no_us / 1e4])
    dots(ax, [rate for rate, *_ in noes], [100 * share for _, share, _ in noes])
    guessed(ax, noes[0][0], noes[0][0] * guess_no_us / 1e4)

# %%
table(
    "rejections per second | µs of the core for each | the event loop wakes up for each",
    *((f"{rate:.0f}", f"{share / rate * 1e6:.0f}", f"{wakings:.1f} times") for rate, share, wakings in noes),
)
last_us = noes[-1][1] / noes[-1][0] * 1e6
tell(
    f"You guessed {guess_no_us:g} µs. An answer of this model takes {1e6 / mu:,.0f} µs. At {last_us:.0f} µs each,"
    f" {1e6 / last_us:,.0f} rejections per second would fill a core: {1e6 / last_us / mu:.0f} times the capacity."
)

# %% [markdown]
# *Where the formula fails:* a rejection gets cheaper in a crowd. The event loop wakes up less often for each of them, because several wait
# when it looks: see the last column.
#
# ## To reject you must be awake
#
# "A model may block the event loop, as long as it takes less than a second." Ours takes 20 ms. The *blocked* server has
# the same rules as the careful one. But the model sits on the event loop, where the door does its work, too.
#
# Twice the capacity again, now from strangers. Each comes with a connection of its own, and leaves after some seconds
# (`PATIENCE_S`). Ten times a second somebody else asks for `/health`. **Your guess:** what share of the
# strangers gets a quick rejection, a 503? A good server would reject about half of them.

# %%
guess_refused = ...  # of all strangers

# %% [markdown]
# **Prediction.** This loop takes in one new connection, calls the model for 20 ms, takes in the next (lesson 1, bug 3).
# So it never finds a queue, and the door has nothing to reject. The queue is elsewhere: in the kernel, where new
# connections wait until somebody accepts them. No rule of ours sees it. It grows as if there were no rule at all: who
# comes at $t$ waits $(\rho-1)\,t$. Whoever asks for `/health` stands in the same line.

# %%
met = {
    name: l05_overload.strangers(server, 2 * mu)
    for name, server in (("careful", careful), ("blocked", blocked))
}
patience_s, stranger_s = l05_overload.PATIENCE_S, l05_overload.STRANGER_S
title, t = "On a blocked loop /health waits with all others", np.arange(10 * stranger_s) / 10
with picture(title, "time, s", "wait for /health, s", ylim=(-0.1, patience_s + 0.3)) as ax:
    line(ax, t, np.minimum((2 - 1) * t, patience_s))  # /health costs no time of the model
    for name, color in (("blocked", ORANGE), ("careful", BLUE)):
        dots(ax, t, met[name].health_s, name, color, markersize=4)

# %%
most_waiting = int(
    stranger_s * (2 * mu + 10) / 2
)  # the other half was served; a client that has left stays in line
waits_s = {name: float(np.median(one.health_s)) for name, one in met.items()}
columns = "server | answered | of these within 2 s | rejected at once | left without a word | most in the kernel's line"
rows = ((name, one.share(200), one.in_time, one.share(503), one.share(0)) for name, one in met.items())
table(columns, *((name, *(f"{share:.0%}" for share in row), met[name].waiting) for name, *row in rows))
tell(
    f"Predicted for the kernel's line of the blocked server: {most_waiting}. You guessed that {guess_refused:.0%} are rejected."
)

# %%
blocks, awake = met["blocked"], met["careful"]
claim(
    "Blocking the event loop matters only above 1 s an inference",
    who=f"two servers around a model that sleeps 20 ms a call; strangers at twice the capacity of {mu:.0f}/s, for {stranger_s} s",
    number=f"the model on the event loop: {blocks.share(503):.0%} are rejected, {blocks.share(0):.0%} leave after {patience_s:g} s,"
    f" /health takes {waits_s['blocked']:.1f} s (median); in a thread: {awake.share(503):.0%}, {awake.share(0):.0%} and"
    f" {waits_s['careful'] * 1000:.0f} ms",
    verdict="fails: under load many short calls block as one long call does",
)

# %% [markdown]
# The last column is the proof. There is the queue that no rule of ours can see.
#
# The blocked server may answer more of them than the careful one, because it rejects nobody; but many of these answers come too
# late. *Where the formula fails:* it is for new connections. Over connections that stay open the door would find a queue (not
# measured here).
#
# ## Clients that ask again
#
# Rejected clients come back. A client here asks five times at most. Some wait as `Retry-After` says, a second or more.
# Others come back after 50 ms. The load is 1.7 times the capacity. **Your guess:** what share of the clients gets an
# answer in the end, if all of them wait as they are told?

# %%
guess_answered = ...  # of the clients

# %% [markdown]
# **Prediction.** The overload lasts for $T$ seconds; $1.7\,\mu T$ clients come.
#
# - The impatient have spent their five questions within a fraction of a second. So only those are served who find room
#   while the overload lasts: $\mu T$ of them, and the half second of work that is left in the queue. That is $(T +
#   0.5)/(1.7\,T)$.
# - Those who wait ask four times more, a second apart or a little more. So the last of them come about four seconds after
#   the overload. If the server has work all that time, it is $(T + 4)/(1.7\,T)$.

# %%
crowd_s = quick(2, 15)
options = {"rate_per_s": 1.7 * mu, "duration_s": crowd_s, "limit_s": LIMIT_S, "timeout_s": 8.0}
storms = {honour: load(careful, "retry", honour=honour, **options) for honour in (1, 0)}
formula = {1: min(1, (crowd_s + 4) / (1.7 * crowd_s)), 0: (crowd_s + 0.5) / (1.7 * crowd_s)}
clients = {honour: int((df.attempt == 0).sum()) for honour, df in storms.items()}
per_client = {honour: len(df) / clients[honour] for honour, df in storms.items()}
share_of = {honour: float((df.outcome == "200").sum()) / clients[honour] for honour, df in storms.items()}
names = {1: "waits as told", 0: "asks again after 50 ms"}
rows = ((names[i], f"{per_client[i]:.1f}", f"{formula[i]:.0%}", f"{share_of[i]:.0%}") for i in storms)
table("a rejected client | requests a client | answered, predicted | answered", *rows)
l05_overload.draw_retries(storms)

# %%
measured, impatient = share_of[1], share_of[0]
compare("share of the clients answered", guess=guess_answered, formula=formula[1], measured=measured)
said(
    measured > impatient and abs(per_client[0] - per_client[1]) < 1,
    f"Both ask about as often: {per_client[1]:.1f} and {per_client[0]:.1f} requests per client. But those that wait come back, in part,"
    f" when the overload is over, and the server has time for them: {measured:.0%} of them are answered, and {impatient:.0%} of the"
    " impatient.",
    f"Answered: {measured:.0%} of those that wait, {impatient:.0%} of the impatient.",
)

# %% [markdown]
# `Retry-After` is computed from the work ahead and the measured speed, so it is true when it is given. But it only
# *moves* an overload. And a crowd that was rejected in one moment would come back in one moment: a good client adds a
# random bit to what it is told (*jitter*).
#
# Five retries end by themselves, and a rejection is cheap. So this crowd is no danger. A storm is a crowd whose retries never end: it can
# keep a fleet down when its cause is gone. [Lesson 15](15_a_fleet.ipynb) makes one, and cures it in three ways.
#
# ## The poison input
#
# One text makes the model raise. It shares a batch with seven innocent ones. Who pays? A text without `[MASK]` would do
# it, but the task checks every text before the queue, and such a client gets a 422 at once. So we carry the text past that check,
# into the real loop. The model is the bundled one, in Transformers' own pipeline (`FAST=False`). If a batch raises, the loop runs
# each of its texts alone, once. **Your guesses:** how many calls of the model are that in all? And how many times as long does the
# batch take as one without the bad text?

# %%
guess_calls = ...  # calls of the model
guess_times = ...  # times as long

# %% [markdown]
# **Prediction.** One call with 8, then 8 calls with one: 9 calls. By lesson 4's law a call with $n$ texts takes $a + b
# n$. So the time grows from $a + 8b$ to $(a + 8b) + 8\,(a + b)$.

# %%
stop()
refused_with = l05_poison.rejected_because("no mask here")
batch = await l05_poison.poison(quick(2, 6))
times, formula = batch.poisoned_ms / batch.clean_ms, (batch.clean_ms + 8 * batch.alone_ms) / batch.clean_ms
table(
    " | guessed | predicted | measured",
    ("calls of the model", guess_calls, 9, len(batch.calls)),
    ("times as long", guess_times, f"{formula:.1f}", f"{times:.1f}"),
    ("the call with all 8, that failed, ms", "-", f"{batch.clean_ms:.0f}", f"{batch.failed_ms:.0f}"),
    ("a call with one, ms", "-", "-", f"{batch.alone_ms:.0f}"),
)
fate = ["an error" if isinstance(fate, Exception) else "an answer" for fate in batch.fates]
tell(f"The eight get: {', '.join(fate)}. Before the queue the client would get: “{refused_with}”.")
assert refused_with and fate.count("an error") == 1 and [n for n, _ in batch.calls] == [8] + [1] * 8

# %%
claim(
    "One bad input fails the whole batch",
    who="the server's loop around the bundled model, 8 texts, one of which raises",
    number=f"{fate.count('an answer')} answers, {fate.count('an error')} error, {len(batch.calls)} calls of the model,"
    f" {times:.1f} times the time",
    verdict="fails here: the others run again, alone, once; they pay with time",
)

# %% [markdown]
# Only the culprit loses its answer. But all lose time. *Where the formula fails:* the call that failed did not take as
# long as a good one. The pipeline finds that the mask is missing while it tokenises, before it computes: look at the
# third row. The same goes for the bad text's own call. A model that fails in its last layer would cost all of it.
#
# An attacker who sends such a text into every batch takes the batching away from everybody. So the check before the
# queue matters more than the cure behind it.
#
# ## Quarantine: three deaths open the switch
#
# Some inputs do worse than raise: they end the process. Then a new process must load, and meanwhile nobody is answered.
# A client that doesn't know better sends it again. The model runs in a process of its own here; it is a small class that does nothing
# but die when it is told to.
#
# You send a text that ends the process, eight times, and each time wait until the server is ready again. **Guess:** how many
# times does the process die?

# %%
guess_deaths = ...

# %% [markdown]
# **Prediction.** In electricity a *circuit breaker* cuts the current after a fault. In software: after some failures don't
# try again (*open*), after a while try (*half open*), and after a success go on as before (*closed*). This server keeps one
# for each input, its *quarantine*: three deaths in a row open it, an answer or ten minutes close it. So three deaths, each
# as long as the process needs to load; then a 422 at once.

# %%
from workers.isolation.quarantine import DEATHS

seen, deaths = l05_poison.killings(8)
stop()
compare("deaths of the process", guess=guess_deaths, formula=DEATHS, measured=deaths)
down_ms = seen[0][1]  # the first death tells what each costs
with picture("Three deaths open the breaker", "attempt", "time until it is ready again, ms") as ax:
    line(ax, [1, DEATHS, DEATHS + 1, len(seen)], [down_ms, down_ms, 0, 0])
    dots(ax, range(1, len(seen) + 1), [ms for _, ms, _ in seen])
    guessed(ax, guess_deaths, down_ms, "your guess: the last death")
columns = "attempt | the killer's status | ready again after, ms | an innocent text"
table(columns, *((i, status, f"{ms:.0f}", innocent) for i, (status, ms, innocent) in enumerate(seen, 1)))

# %% [markdown]
# (How long it is until the process is ready again is seen by asking every 50 ms, so it comes in steps of that.)
#
# ## Exercises
#
# Fill in and run. The checker tells you what it thinks; it never stops the notebook. Solutions are in
# `notebooks/solutions/`.
#
# **★** 40 texts a second, clients that leave after 1.5 s. What is the largest useful bound for the queue?

# %%
largest_bound = ...

checks.exercise_5_1(largest_bound)

# %% [markdown]
# **★★** Write goodput from the rows of a load test: right answers ("200") within `limit_s`, per second. `df` is a pandas
# table with a row for each request. Two of its columns are `outcome` and `latency_ms`.


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
# ## In the lab
#
# Choose `MAX_QUEUE`, `DEADLINE_S`, `QUEUE_TARGET_S`, a dictionary, so that at twice the capacity at least 40 of 50 per
# second are in time (2 s), and a burst of 60 loses nobody. It starts the real server and judges what it measures.

# %%
import labs

settings_5 = ...

labs.lab_5(settings_5)

# %% [markdown]
# ## Ten questions
#
# Answer them aloud, then open the answers.
#
# 1. Why is a bound of 256 as bad as none?
# 2. Why is a bound a time?
# 3. Why is a 503 better than a 504?
# 4. Why does a queue target wait before it rejects?
# 5. Why does the patient server never recover during overload?
# 6. Why is a rejection cheaper in a crowd?
# 7. Why can a blocked server not reject?
# 8. Why add jitter to Retry-After?
# 9. Why run a failed batch one by one, once?
# 10. Why quarantine after three deaths and not one?
#
# <details><summary>Answers</summary>
#
# 1. At 50 per second it is five seconds of waiting, for clients that leave after two.
# 2. What counts is bound ÷ speed, and speed changes with the texts.
# 3. It comes at once: the client can go elsewhere.
# 4. A burst drains by itself; only a queue that stays is overload.
# 5. Each answer comes just after its client has left, and clients that come take the free places.
# 6. One wake-up of the loop serves several.
# 7. Its queue is in the kernel, where no rule of yours looks.
# 8. A crowd that was rejected in one moment would come back in one moment.
# 9. To find the culprit; the others get their answers and pay with time.
# 10. One death can be an accident; three of the same input in a row are not.
# </details>
#
# ## How far off were you? And what must hold

# %%
score()
assert in_time_of[256] == in_time_of[10**6] < 0.5 * in_time_of[99], "a bound is a time"
assert min(goodput(by_rule[name]) for name in expected_yes_s) > 0.9 * MU, "a rule of time keeps the goodput"
assert all(abs(yes_s[name] / wait_s - 1) < 0.1 for name, wait_s in expected_yes_s.items()), (
    "and sets the wait"
)
assert goodput(by_rule["bound of 256"]) < 0.5 * MU and no_504_s > 1.8
assert share["queue target"] == 1 and bound_25 < 0.5, "a burst is no overload"
assert [status for status, *_ in seen] == [500] * DEATHS + [422] * (len(seen) - DEATHS) and deaths == DEATHS
assert {innocent for *_, innocent in seen} == {200}, "innocent texts are answered"
holds(real_goodput["careful"] > 1.5 * real_goodput["patient"], "so it is on the real server")
holds(no_ms < 0.2 * yes_ms and no_us < 5000, "a 503 comes at once and is cheap")
holds(awake.share(503) > 0.2 > blocks.share(503), "a blocked loop rejects nobody")
holds(waits_s["blocked"] > 10 * waits_s["careful"], "and its /health waits")
holds(share_of[1] > share_of[0], "a client that waits as told gets an answer more often")

# %% [markdown]
# ## Take away
#
# - A queue's bound is a time. If *bound ÷ speed* is above the clients' patience, it is as bad as no bound.
# - Reject early (503, at the door) when you can foresee it, and late (504) only when you could not. A burst may wait, a
#   queue that stays may not.
# - Only a free event loop can reject. Calls of milliseconds block it as well as calls of seconds.
#
# Next: [Lesson 6](6_gunicorn.ipynb). Which of Gunicorn's workers, and how many?
