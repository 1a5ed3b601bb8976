# %% [markdown]
# # 4. To batch or not to batch
#
# Several texts in one call of the model: everybody recommends it. It costs code and memory. Done badly, it costs time.
#
# **Question: what does a batch buy for *your* model, and when does it hurt?**
#
# Afterwards you can decide for your own model whether to batch, how many texts at most, and when to hold a batch for more.
#
# It takes about 3 minutes (the quick form 40 s), two cores and 4 GB of memory. [What all lessons need](README.md).

# %%
# "No module named 'lesson'"? Open this notebook where it lies, in the project's notebooks/, or by `make learn`.
from lesson import BLUE, GREEN, GREY, ORANGE, RED, SERVER_CORES, bars, claim, compare, dots, guessed, holds
from lesson import line, load, picture, quick, said, score, serve_all, stop, table, tell

import checks
from support import l04_measure
from support.l04_measure import named, saturate

# %% [markdown]
# Until now the loop took one text from the queue and called the model. With `BATCH_SIZE=32` it takes up to 32 that wait
# there, and makes one call for all of them.
#
# ## What does a call cost?
#
# **Guess.** The server answers texts one by one, as fast as it can. Then it may take up to 32 in a call. How many times as
# many texts a second does it answer?

# %%
guess_gain = ...  # times

# %% [markdown]
# **The cost law.** A call has a part that does not depend on its size: Python, the launch of each operation, reading the
# weights. And it has a part for each text. So a call with $n$ texts takes $a + b\,n$. One call instead of $n$ saves $n - 1$
# times $a$, and never any $b$. Measure both for this model: the stock pipeline, and the fast path that this server uses.
# (`planner` is in `loadtests`.)

# %%
from loadtests.plan import planner

MOST = quick(8, 32)  # texts in a call, where texts are long
timings, lengths = l04_measure.calls(MOST)
laws = {name: planner.fit(df) for name, df in timings.items()}
gain_32 = {name: 32 * law.seconds(1) / law.seconds(32) for name, law in laws.items()}
limits = {name: f"{gain_32[name]:.1f} × | {law.most_gained:.1f} ×" for name, law in laws.items()}
table(
    "model | a, ms | b, ms | gain with 32, by the law | with endless batches, (a + b) / b",
    *(
        (name, f"{law.a_s * 1000:.1f}", f"{law.b_s * 1000:.1f}", *limits[name].split(" | "))
        for name, law in laws.items()
    ),
)

# %%
import numpy as np

n, title = np.array([1, 32]), "Time grows by straight lines"
with picture(title, "texts in the call", "time of the call, ms", ylim=(0, None)) as ax:
    for (name, df), color in zip(timings.items(), (BLUE, ORANGE)):
        mean = df.groupby("texts").seconds.mean() * 1000
        line(ax, n, laws[name].seconds(n) * 1000, f"{name}: a + b n", color)
        dots(ax, mean.index, mean, None, color)

# %% [markdown]
# Lines are the law, dots are measured. *Where the law fails:* a batch that outgrows the processor's caches can lie
# above its line. A GPU's line is said to stay almost flat until the GPU is full (not measured here).
#
# ## "Dynamic batching gives 10×"
#
# Now the real server: one by one, then in batches up to 32. A server does more than call the model: HTTP, the queue, the answer.
# That is a law of its own, $a' + b'\,n$. We measure it with a model that returns at once, one by one and in batches. The prediction
# is the sum of the two laws.

# %%
batches = {"BATCH_SIZE": 32}
options = ({}, batches, batches | {"FIXED_DELAY_MS": 10}, l04_measure.FIXED)
singly, batched, waiting, static = serve_all(*options, cores=SERVER_CORES)
law, around = laws["fast"], l04_measure.server_law()
found = {1: saturate(singly), 32: saturate(batched)}
per_s = {n: found[n][0] for n in found}
summed = planner.CostLaw(law.a_s + around.a_s, law.b_s + around.b_s)
predicted = {n: n / summed.seconds(n) for n in found}
gain = per_s[32] / per_s[1]
a_ms, b_ms = around.a_s * 1000, around.b_s * 1000
tell(f"The server itself takes {a_ms:.2f} ms for a call and {b_ms:.2f} ms for each text in it.")

# %%
title = f"A batch of 32 gives {gain:.1f} times the texts/s"
with picture(title, "texts a second", "", xlim=(0, 10.5 * per_s[1])) as ax:
    ax.axvline(10 * per_s[1], color=RED, linestyle=":")
    ax.text(10 * per_s[1], 0.5, "ten times ", color=RED, ha="right", va="center")
    bars(ax, [predicted[1], predicted[32]], [0, 1], None)
    dots(ax, [per_s[1], per_s[32]], [0, 1], None)
    named(ax, predicted[32], per_s[32], 1)
    guessed(ax, guess_gain * per_s[1], 1.7)
    ax.set_ylim(-0.6, 2)
    ax.set_yticks([0, 1], ["one by one", "up to 32"])
rates = f"{predicted[1]:.0f} and {predicted[32]:.0f} texts/s predicted, {per_s[1]:.0f} and {per_s[32]:.0f} measured"
tell(f"One by one and in batches: {rates}.")
compare("times the texts/s in batches", guess=guess_gain, formula=predicted[32] / predicted[1], measured=gain)

# %%
bare = timings["fast"].groupby("texts").seconds.mean() * 1000
both = {  # one by one, up to 32
    "the law, a + b n": (law.seconds(1) * 1000, law.seconds(32) / 32 * 1000),
    "the bare model, measured": (bare[1], bare[32] / 32),
    "the model, inside the busy server": (found[1][1], found[32][1]),
    "all of the server": (1000 / per_s[1], 1000 / per_s[32]),
}
rows = ((name, f"{a:.2f}", f"{b:.2f}", f"{a / b:.1f} ×") for name, (a, b) in both.items())
table("ms a text | one by one | up to 32 | gain", *rows)
a, b = (max(0, both["all of the server"][i] - found[n][1]) for i, n in enumerate((1, 32)))
tell(f"Outside of the model a text cost {a:.2f} ms one by one, and {b:.2f} ms in batches.")
said(
    b < a / 2, "So the server adds its time to each call, not to each text.", "A batch saves little of that."
)

# %% [markdown]
# Read the columns downwards. The first two lines differ because a line through all sizes is a compromise. The third is the same
# call in a server, whose event loop reads other requests on the same core. The last adds what lies between two calls: the
# answers go from the thread to the event loop, and the next batch comes back.
#
# *Where the prediction fails:* it adds the two laws, as if the server and the model never worked at the same time. And each law is a
# straight line. The server has an $a$ of its own, which a batch pays once. So the bare model's $(a+b)/b$ is not a hard limit for it.

# %%
stock = timings["stock"].groupby("texts").seconds.mean()
stock_gain = 32 * stock[1] / stock[32]
claim(
    "Dynamic batching gives 10×",
    who="this server with short texts, one core; the stock pipeline's own calls",
    number=f"{gain:.1f} times over HTTP with the fast path; {stock_gain:.1f} times in the stock pipeline",
    verdict="depends on (a + b) / b of your model and device: measure it",
)
claim(
    "A batch of 32 lifts 100 to 1,000 requests/s",
    who="this server with the fast path and short texts, one core, saturated",
    number=f"{per_s[1]:.0f} requests/s one by one, {per_s[32]:.0f} in batches of up to 32",
    verdict="fails here" if gain < 8 else "holds here",
)

# %%
claim(
    "Batching lifts GPU utilisation from 20 % to 80 %",
    who="nobody: no GPU is at hand",
    number="it would take one, its own counter of utilisation, and the same texts one by one and in batches",
    verdict="untested: no GPU",
)

# %% [markdown]
# ## "Batching is essential for very large models"
#
# A very large model does not fit here. One of its layers does: a matrix of 8,192 × 8,192 weights, 268 MB. It computes on
# rows, and a row is one token. A model that writes text computes one token a call. A model that reads texts computes all of
# a text's tokens in one call.
#
# **Guess.** The layer gets 32 rows instead of 1. How many times as long does that take?

# %%
guess_times = ...  # times as long

# %% [markdown]
# **Prediction.** It must read all its weights, however few rows there are: bytes over memory speed. And it must do two
# operations for each weight and row: operations over computing speed. The slower of the two decides. We measure both speeds
# first.

# %%
from support.speeds import speeds

side, row_counts = 8192, quick([1, 12, 32, 384], [1, 2, 4, 8, 12, 16, 32, 64, 128, 384])
limits = speeds(quick(0.2, 1.0), mb=268)  # lesson 10 measures them in the same way
bytes_s, operations_s = limits["bytes"], limits["float32"]
layer_ms = l04_measure.layer_ms(side, row_counts)
roof_ms = {n: max(4 * side**2 / bytes_s, 2 * n * side**2 / operations_s) * 1000 for n in row_counts}
title = "32 rows cost less than 32 times one row"
with picture(title, "rows (tokens) in the call", "time of the call, ms") as ax:
    line(ax, row_counts, list(roof_ms.values()))
    dots(ax, row_counts, list(layer_ms.values()))
    guessed(ax, 32, guess_times * layer_ms[1])
    ax.set(xscale="log", yscale="log")
    ax.set_xticks([1, 12, 32, 384], [1, 12, 32, 384])

# %%
by_token, by_text = 32 * layer_ms[1] / layer_ms[32], 32 * layer_ms[12] / layer_ms[384]
tell(
    f"This core reads {bytes_s / 1e9:.0f} GB/s and computes {operations_s / 1e9:.0f} billion operations/s. So up to"
    f" {operations_s / bytes_s * 2:.0f} rows should take no longer than one. Measured: 32 rows take"
    f" {layer_ms[32] / layer_ms[1]:.1f} times as long. So a batch of 32 gives {by_token:.1f} times the tokens/s where each brings"
    f" one (predicted {32 * roof_ms[1] / roof_ms[32]:.1f}), and {by_text:.1f} times where each brings 12 (predicted"
    f" {32 * roof_ms[12] / roof_ms[384]:.1f})."
)

memory, computing = 400 * side**2 / bytes_s, 200 * side**2 / operations_s  # per cent of a second, for a row
rows = ((n, memory / layer_ms[n] * 1000, n * computing / layer_ms[n] * 1000) for n in (1, 12, 32, 384))
columns = "rows | of the memory's speed | of the computing speed"
table(columns, *((n, f"{a:.0f}%", f"{b:.0f}%") for n, a, b in rows))

# %%
times, formula = layer_ms[32] / layer_ms[1], roof_ms[32] / roof_ms[1]
compare("32 rows, times one row", guess=guess_times, formula=formula, measured=times)
holds_here, otherwise = "holds for such a layer", "depends on the tokens that each brings to a call"
claim(
    "Batching is essential for very large models",
    who="one layer of such a model, 268 MB of float32 weights, one core; not a whole model",
    number=f"a batch of 32 gives {by_token:.1f} times the tokens/s when each brings one token, as when a model writes;"
    f" {by_text:.1f} times when each brings 12",
    verdict=holds_here if min(by_token, by_text) > 3 else otherwise,
)

# %% [markdown]
# *Where the prediction fails:* it assumes that the layer reaches one of the two speeds in full. The table says how much of each
# it really reaches. Torch's product of plain weights is made for many rows. Between one row and many there is a range where it
# reaches neither. (A share of a little more than 100 % is the error of measuring the two speeds.) A server that packs its weights, as
# this project's does, narrows that range: [lesson 13](13_token_by_token.ipynb) draws the same curve for a whole model.
#
# ## To wait or not to wait
#
# A batch needs texts. There are three ways to get them:
#
# * **[greedy batching](glossary.md)**: when the model is free it takes what has queued. While it runs, others arrive; they are
#   the next batch.
# * **a fixed [batching delay](glossary.md)**: a partial batch is held some milliseconds for more texts. Many servers have a
#   setting for it. This one has none; for comparison there is `loadtests/plan/fixed_delay.py`.
# * **[anticipation](glossary.md)**, what this server does: it is greedy, unless it has learnt that the clients it has just answered
#   ask again at once. More about that below.
#
# Five requests, A to E, on a line of time. A call takes 20 ms and 2 ms for each text. **Before you run the cell:** which of the three
# rules answers E first?

# %%
from support import l04_timeline

from loadtests.plan.planner import CostLaw

l04_timeline.draw(l04_timeline.timeline(CostLaw(0.02, 0.002), [0, 14, 18, 21, 55]))

# %% [markdown]
# One by one, each waits for all before it. Greedy: A goes alone, and *the call is the window* in which B, C and D gather. With a delay
# A waits for nobody, and so does E. (Had B come sooner, the delay would have bought something: try `[0, 5, 9, 14, 31]`. These are
# from the simulator, with this server's loop.)
#
# First we let strangers come, at random times. Batches without a delay are then this server as it is: for strangers it is nearly
# always greedy.
#
# **Guess.** The load is in the middle: 70 % of what the server can do one by one. How many milliseconds does a fixed delay of
# 10 ms add to the median time?

# %%
guess_added_ms = ...  # ms

# %% [markdown]
# **Prediction.** At low load nobody else comes: a delay of $w$ adds $w$ to everybody's time. At high load the queue fills
# the batch: it adds little. And in the middle? Here the planner runs *the real loop* on a virtual clock with the sum of
# the two laws, several times for each point. That is what “simulated” means in these lessons. The high load is nine tenths of what
# batches of 32 can do by that law.
#
# Then we measure, at low and middle load: without batches, with batches, and with batches and a fixed delay of 10 ms. The three
# servers take turns, and each turn brings the same people at the same moments. So the machine's moods and the luck of the
# draw meet all three alike.

# %%
delays_ms = [0, 2, 5, 10, 20]
loads = {"low": 0.2 * per_s[1], "middle": 0.7 * per_s[1], "high": 0.9 * predicted[32]}
planned = {
    name: [l04_measure.simulated_ms(summed, delay_ms, rate) for delay_ms in delays_ms]
    for name, rate in loads.items()
}
table(
    " | ".join(["simulated median, ms", *(f"delay {w} ms" for w in delays_ms)]),
    *(
        (f"{name}, {loads[name]:.0f}/s", *(f"{ms:.1f} ± {apart:.1f}" for ms, apart in points))
        for name, points in planned.items()
    ),
)

# %%
servers = {"no batching": singly, "no delay": batched, "delay 10 ms": waiting}
measured = l04_measure.in_turns(servers, {at: loads[at] for at in ("low", "middle")})
p50, p95 = ({key: df.latency_ms.quantile(q) for key, df in measured.items()} for q in (0.5, 0.95))
added = {at: p50["delay 10 ms", at] - p50["no delay", at] for at in ("low", "middle")}
with picture("At low load all of a delay is added", "fixed delay, ms", "added to the median time, ms") as ax:
    line(ax, [0, 20], [0, 20], "all of it", GREY, linestyle=":")
    for (name, points), color in zip(planned.items(), (BLUE, ORANGE, GREEN)):
        line(ax, delays_ms, [ms - points[0][0] for ms, _ in points], name, color)
    dots(ax, [10, 10], list(added.values()), None, "black")
    guessed(ax, 10, guess_added_ms, None)

# %%
best_high = min(range(len(delays_ms)), key=lambda i: planned["high"][i][0])
simulated = {at: f"{planned[at][3][0] - planned[at][0][0]:.1f} ms" for at in added}
tell(
    "Lines are simulated, dots measured, the star is your guess. A delay of 10 ms adds "
    + "; ".join(f"{simulated[at]} at {at} load (measured {ms:.1f})" for at, ms in added.items())
    + f". At high load {delays_ms[best_high]} ms is the best of these delays: {planned['high'][best_high][0]:.1f} ms against"
    f" {planned['high'][0][0]:.1f} ms without (runs of the same setting are up to {2 * planned['high'][best_high][1]:.1f} ms apart)."
)

# %% [markdown]
# Strangers at low load lose all of a fixed delay. The busier the server, the less of it is added, because others come anyway.
# At high load it changes hardly anything: the queue fills the batches anyway.
#
# The picture compares differences, and for these a simulation is made. How long an answer takes it can't say: it leaves out the
# client and most of HTTP, and its law comes from calls without a pause between them, while in a server caches can be cold.
#
# ## "Asynchronous batching costs 10 ms at p95"
#
# Batches that nobody holds: can they cost anything? All texts of a call wait until the whole call is done, for the
# neighbour's $b$ too. But without batches the second of two waits for all of the first one's call. Compare the p95 for
# “no batching” and “no delay”: 95 of 100 answers take less.

# %%
costs = {at: p95["no delay", at] - p95["no batching", at] for at in ("low", "middle")}
shared = (measured["no delay", "low"].batch_size > 1).mean()
tell(
    f"At low load {shared:.0%} of the texts shared a call. Batching changed the p95 by {costs['low']:+.1f} ms, at middle load by {costs['middle']:+.1f} ms."
)
low, middle = (", ".join(f"{p95[name, at]:.0f}" for name in servers) for at in costs)
fails = "fails here: without a fixed delay batches change the p95 by less than 3 ms at low load, and shorten it at middle load"
claim(
    "Asynchronous batching costs 10 ms at p95",
    who="this server, the same arrivals without batches, with batches, and with a fixed delay of 10 ms",
    number=f"p95 at low load {low} ms; at middle load {middle} ms",
    verdict=fails
    if costs["low"] < 3 and costs["middle"] < 0
    else "depends on the load; the machine's noise is as large",
)

# %% [markdown]
# ## Clients that come back: 1, 7, 1, 7
#
# Eight users ask again 1 to 3 ms after each answer, as a script or a load test does. And a call costs
# about the same for 1 text as for 8: $a$ = 50 ms, $b$ = 0.2 ms. We run the real loop on the virtual clock. `l04_greedy.Greedy` is that
# loop with one method replaced, so that it never holds a batch.
#
# When the answers go out, all users of that batch come back within milliseconds. The first to arrive finds the model idle and
# starts a call alone. The others wait for all of it. So two calls answer 8 texts.
#
# **Guess.** Suppose that the loop held the first text until the others were there. How many times as many texts per second would
# it answer?
#
# **Formula.** Two calls take $2a + 8b$. One call for all takes $a + 8b$, and the hold $t$ on top, here about 3 ms:
#
# $$\text{gain} = \frac{2a + 8b}{a + 8b + t}$$
#
# Holding pays while $t < a$. If the formula is below one, the loop should stay greedy.

# %%
from support import l04_greedy
from support.l04_greedy import Greedy, ModelLoop, watch

flat = CostLaw(a_s=0.05, b_s=0.0002)
greedy = watch(Greedy, flat, users=8)
tell(f"Ten calls of the greedy loop, texts in each: **{', '.join(map(str, greedy.sizes[10:20]))}**.")
guess_back = ...  # times the texts per second

# %%
held, rows = {}, []
for a_ms, b_ms in ((50, 0.2), (10, 1), (2, 5)):
    one = CostLaw(a_ms / 1000, b_ms / 1000)
    before, held[a_ms] = watch(Greedy, one, users=8), watch(ModelLoop, one, users=8)
    formula = max(1, (2 * a_ms + 8 * b_ms) / (a_ms + 8 * b_ms + 3))
    per_s_each = (f"{before.per_s:.0f}", f"{held[a_ms].per_s:.0f}")
    rows.append(
        (f"{a_ms} + {b_ms} n", f"{formula:.2f} ×", *per_s_each, f"{held[a_ms].per_s / before.per_s:.2f} ×")
    )
table("a + b n, ms | gain by the formula | texts/s, greedy | texts/s, anticipation | gain", *rows)

# %%
l04_greedy.draw({"antici-\npation": held[50].calls, "greedy": greedy.calls})
back, formula = held[50].per_s / greedy.per_s, (2 * 50 + 8 * 0.2) / (50 + 8 * 0.2 + 3)
compare("times the texts/s with a hold", guess=guess_back, formula=formula, measured=back)
tell(
    f"Numbers are texts in the call. It is {back:.2f} times the texts/s, and the mean latency falls from"
    f" {greedy.mean_ms:.0f} to {held[50].mean_ms:.0f} ms."
)

# %% [markdown]
# Disk schedulers call this *anticipation*. The loop counts how many texts come within each time after a batch's answers. It holds
# a batch only for as long as that saves more than it costs (`workers/scheduling/anticipation.py`). There is nothing to set.
#
# *Where the formula fails:* it assumes that users come back at once. What if nobody does? The same model again: 8 users that
# think for up to 400 ms, then strangers at random times.

# %%
from functools import partial

from loadtests.plan.fixed_delay import FixedDelay

loops = {"greedy": Greedy, "delay 10 ms": partial(FixedDelay, delay_s=0.01), "anticipation": ModelLoop}
names = "8 users, back in 1 to 3 ms", "8 users, back in up to 400 ms", "strangers, 60/s"
crowds = dict(zip(names, ({"users": 8}, {"users": 8, "think_s": (0, 0.4)}, {"rate_per_s": 60})))
seen = {(who, name): watch(loop, flat, **kw) for who, kw in crowds.items() for name, loop in loops.items()}
short = {name: watch(loop, CostLaw(0.002, 0.005), users=8).mean_ms for name, loop in loops.items()}
columns = " | ".join(["texts/s, mean ms, share held", *loops])
table(columns, *((who, *(seen[who, name] for name in loops)) for who in crowds))

# %%
at_once, _, strangers = crowds
gain_10 = seen[at_once, "delay 10 ms"].per_s / greedy.per_s
claim(
    "Wait 10 ms for a batch",
    who="this server with short texts and strangers, measured; users that come back at once, simulated",
    number=f"strangers: {added['low']:+.0f} ms in the median at low load, {added['middle']:+.0f} ms in the middle. 8 users back"
    f" at once: {gain_10:.2f} times the texts/s where a call takes 50 + 0.2 n ms; {short['delay 10 ms']:.0f} ms in the mean for"
    f" {short['greedy']:.0f} where it takes 2 + 5 n",
    verdict="depends on the cost law and on who comes back: a server can learn both",
)

# %% [markdown]
# A fixed delay is right for one cost law and one kind of client. Strangers don't follow a batch's answers, so the loop hardly ever
# holds a batch for them: see the share held. For users that come back later, it now and then holds in vain; compare the mean.
#
# ## The static batch
#
# The oldest way: collect exactly $n$ texts, then run.
#
# **Guess.** At the low load from above, with batches of exactly 8: how long does an answer take on average?

# %%
guess_static_ms = ...  # ms

# %% [markdown]
# **Prediction.** At $\lambda$ texts a second the first waits for $n - 1$ more: $\frac{n-1}{\lambda}$. The last waits for
# nobody. The mean is half of the first one's wait, and the call comes on top.

# %%
rate = loads["low"]
predicted_ms = (8 - 1) / (2 * rate) * 1000 + law.seconds(8) * 1000
static_s = quick(3, min(25, max(8, 100 / rate)))  # long enough for a dozen batches
patience_s = quick(2, max(4, 4 * predicted_ms / 1000))
asked = load(static, "open", rate_per_s=rate, duration_s=static_s, limit_s=patience_s, timeout_s=patience_s)
full = asked[asked.outcome == "200"]
full_ms, undelayed_ms = full.latency_ms.mean(), measured["no delay", "low"].latency_ms.mean()
title = "Collecting exactly 8 keeps people waiting"
with picture(title, "mean time to the answer, ms", "", xlim=(0, None), ylim=(-0.6, 1.5)) as ax:
    bars(ax, [predicted_ms], [0], None)
    dots(ax, [full_ms, undelayed_ms], [0, 1], None)
    named(ax, predicted_ms, full_ms, 0)
    guessed(ax, guess_static_ms, 0.4)
    ax.set_yticks([0, 1], ["exactly 8", "up to 32,\nno delay"])

# %%
compare("the mean with exactly 8, ms", guess=guess_static_ms, formula=predicted_ms, measured=full_ms)
lost = f"{len(asked) - len(full)} of {len(asked)} texts"
tell(
    f"Without waiting it is {undelayed_ms:.0f} ms. And {lost} got no answer, because their batch did not become full before they left."
)
claim(
    "A static batch hurts at low load",
    who=f"this server, batches of exactly 8 at {rate:.0f} texts/s",
    number=f"mean {full_ms:.0f} ms against {undelayed_ms:.0f} ms without waiting; {lost} were never answered",
    verdict="holds",
)

# %% [markdown]
# *Where the prediction fails:* $\lambda$ is what we asked for. A run of some seconds brings a few more or fewer, and a batch
# that some have left waits for others.
#
# ## Short and long texts in one batch
#
# The stock pipeline makes all texts of a batch as long as the longest one. That is [padding](glossary.md). Here about one text in ten
# is long. The others have about a dozen tokens.
#
# **Guess.** How many times as many texts a second does the stock pipeline answer in full batches of these?

# %%
guess_mixed = ...  # times

# %% [markdown]
# **Prediction.** A batch with one long text costs as much as a batch of long texts. One by one, only the long ones are long.
# Let $m$ be the share of long texts. Then $p = (1-m)^n$ of the batches hold none. $s_1$ and $l_1$ are the times of a short and
# of a long text alone, $s_n$ and $l_n$ those of one text in a batch of its kind. Then the gain is
#
# $$\frac{(1-m)\,s_1 + m\,l_1}{p\,s_n + (1-p)\,l_n}$$
#
# The fast path lays the texts end to end and pads nothing. (Models that can't be computed so are sorted by length and padded a
# little.) So its denominator is $(1-m)\,s_n + m\,l_n$. All of these can be measured with texts that are *not* mixed.

# %%
ms = {name: l04_measure.ms_a_text(df) for name, df in lengths.items()}
m = l04_measure.share_of_long(lengths["stock"])
p = (1 - m) ** MOST


def gain_of_mixed(name):
    """The gain of full batches of mixed texts, from texts that are not mixed."""
    short, long = ms[name]["short"], ms[name]["long"]
    of_short = p if name == "stock" else 1 - m
    in_batch = of_short * short[MOST] + (1 - of_short) * long[MOST]
    return ((1 - m) * short[1] + m * long[1]) / in_batch


# %%
gains = l04_measure.gains(ms, MOST)
of_short = {name: MOST * law.seconds(1) / law.seconds(MOST) for name, law in laws.items()}
expected = [gain_of_mixed(name) if kind == "mixed" else of_short[name] for name, kind in gains]
title = "Padding takes back what a batch gave"
with picture(title, f"texts/s in batches of {MOST}, times those one by one", "", xlim=(0, None)) as ax:
    ax.axvline(1, color=RED, linestyle=":")
    bars(ax, expected, range(4), None)
    dots(ax, list(gains.values()), range(4), None)
    named(ax, expected[3], gains["stock", "short"], 3)
    guessed(ax, guess_mixed, 2)
    ax.set_ylim(-0.6, 4)
    ax.set_yticks(range(4), [f"{name}, {kind}" for name, kind in gains])

# %%
padded, formula = gains["stock", "mixed"], gain_of_mixed("stock")
said(
    padded < 1,
    f"In the stock pipeline batching mixed texts makes them slower than one by one: {padded:.2f} times.",
    f"In the stock pipeline batching mixed texts still gains a little: {padded:.2f} times.",
)
compare("the stock pipeline's gain, mixed texts", guess=guess_mixed, formula=formula, measured=padded)
tell(f"{m:.0%} of the texts are long, so {p:.0%} of the batches should hold none.")
stop()

# %% [markdown]
# The red line is “no gain”. The fast path gains less with mixed texts than with short ones, too, because a long text gains little in
# a batch. But it pads nothing.
#
# *Where the prediction fails:* a batch of long texts takes seconds, so there are few of them in this measurement, and one slow
# moment of the machine moves the dot.

# %% [markdown]
# ## Exercises
#
# Solutions are in `notebooks/solutions/`.
#
# **★** A call takes 8 ms and 2 ms more for each text. How many times as many texts a second can batching give at most?

# %%
most_gained = ...

checks.exercise_4_1(most_gained)

# %% [markdown]
# **★★** Larger batches are slower calls. Which is the smallest batch that reaches a `share` of the highest possible rate
# $1/b$? (A whole number.)


# %%
def smallest_batch(a_s, b_s, share): ...


checks.exercise_4_2(smallest_batch)

# %% [markdown]
# **★★★** A fixed delay of $w$ at $\lambda$ texts a second, and a model that takes no time. The first text waits $w$; those that
# come during its delay wait less. What is the mean wait over all? (The checker asks the simulation.)


# %%
def mean_wait_s(rate_per_s, delay_s): ...


checks.exercise_4_3(mean_wait_s)

# %% [markdown]
# ## In the lab
#
# Predict the gain of batches of up to 16 on this machine, within a fifth, from your own a and b. One number. It starts the
# real server and judges what it measures.

# %%
import labs

predicted_gain = ...

labs.lab_4(predicted_gain)

# %% [markdown]
# ## Ten questions
#
# Answer them aloud, then open the answers.
#
# 1. What does a batch save, and what never?
# 2. Why is (a + b)/b the limit?
# 3. Why can a server gain more than its bare model?
# 4. Why does one long text hurt a padded batch?
# 5. Why is a row of a layer nearly free below the bend?
# 6. Why does a fixed delay cost strangers all of it at low load?
# 7. Why does a greedy loop make 1, 7, 1, 7?
# 8. When does holding pay?
# 9. Why can't a simulation say how long an answer takes?
# 10. Why measure with your own mix of lengths?
#
# <details><summary>Answers</summary>
#
# 1. It saves a, once per text after the first; never b.
# 2. In an endless batch a is shared by all, and b is left.
# 3. Its own fixed part per call is shared, too.
# 4. All texts are made as long as the longest.
# 5. The weights are read once, whatever the rows.
# 6. Nobody else comes while the first one waits.
# 7. The first client back starts a call alone, and the others miss it.
# 8. When those who were just answered come back within less than a.
# 9. It leaves out the client and most of HTTP. It is made for differences.
# 10. One sentence has no padding to show.
# </details>
#
# ## How far off were you? And what must hold

# %%
score()

assert planned["low"][0][0] < planned["low"][-1][0], "a fixed delay costs time where nobody comes"
assert set(greedy.sizes[10:20]) == {1, 7}, "greedy batching splits the users in two"
assert back > 1.7, "a hold gives nearly twice as much where a call is flat"
assert seen[strangers, "anticipation"].held < 0.1, "for strangers hardly anything is held"
holds(gain > 1, "batches help this model")
holds(added["low"] > 3, "a fixed delay costs strangers time")
holds(0.5 < full_ms / predicted_ms < 2, "the static batch waits for its last")
holds(full_ms > 3 * undelayed_ms, "and that is long")
holds(0.5 < gains["stock", "mixed"] / gain_of_mixed("stock") < 2, "one long text makes all of them long")
holds(gains["stock", "mixed"] < gains["stock", "short"], "padding takes back what the batch gave")
holds(gains["fast", "mixed"] > gains["stock", "mixed"], "no padding saves it")

# %% [markdown]
# ## Take away
#
# 1. Measure $a$ and $b$. A batch saves $a$, never $b$: if $(a+b)/b$ is close to one, don't batch.
# 2. Else batch. Holding a batch pays where $a$ is large and clients come back at once: there greedy batching loses up to half of
#    the capacity. For strangers a fixed delay costs time. A loop that learns which clients come back needs no setting.
# 3. One long text makes a padded batch long. If texts differ in length, check with your own mix, not with one sentence. Sort by
#    length, or don't mix.
#
# `make plan` measures all of it for your model.
#
# Next: [Lesson 5, saying no](5_saying_no.ipynb).
