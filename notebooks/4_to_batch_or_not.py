# %% [markdown]
# # 4. To batch or not to batch
#
# Several texts in one call of the model: everybody recommends it. It costs code, memory and, done badly, time.
#
# **Question: what does a batch buy for *your* model, and when does it hurt?**

# %%
from lesson import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    RED,
    SERVER_CORES,
    capacity,
    claim,
    dots,
    line,
    load,
    picture,
    quick,
)
from lesson import serve_all, simulate, stop

import inspect

import checks
from loadtests import planner
from loadtests.planner import CostLaw
from workers.loop import ModelLoop
from workers.settings import Settings

# %% [markdown]
# ## The cost law
#
# A call has a part that does not depend on its size (Python, the launch of each operation, reading the weights) and a part
# for each text. So a call with $n$ texts takes $a + b\,n$. In one call instead of $n$ you save $n - 1$ times $a$, and never
# any $b$. **Your prediction:** the most that any batch can ever gain is
#
# $$\frac{a + b}{b}$$
#
# Measure both for this model: the stock pipeline, and the fast path that this server uses. (`planner` is in `loadtests`.)

# %%
options = {"kinds": ("short", "mixed"), "sizes": quick((1, 8, 32), planner.SIZES), "budget_s": quick(1.5, 10)}
timings = {
    name: planner.measure_on(SERVER_CORES, Settings(TORCH_THREADS=1, FAST=fast), **options)
    for name, fast in (("stock", False), ("fast", True))
}
laws = {name: planner.fit(df[df.kind == "short"]) for name, df in timings.items()}
for name, law in laws.items():
    print(
        f"{name}: a = {law.a_s * 1000:.1f} ms, b = {law.b_s * 1000:.1f} ms, most gained: {law.most_gained:.1f} times"
    )

# %%
colors = {"stock": BLUE, "fast": ORANGE}
with picture("The cost law", "texts in the call", "time of the call, ms") as ax:
    for name, df in timings.items():
        median = df[df.kind == "short"].groupby("texts").seconds.median() * 1000
        dots(ax, median.index, median, f"{name}, measured", colors[name])
        line(
            ax,
            median.index,
            [laws[name].seconds(n) * 1000 for n in median.index],
            f"{name}: a + b n",
            colors[name],
        )

# %% [markdown]
# Two straight lines, two models of cost. *Where the law fails:* where a batch outgrows the processor's caches it bends
# upwards; on a GPU it stays almost flat until the GPU is full.

# %% [markdown]
# ## "Dynamic batching gives 10×"
#
# Ask the real server as hard as you can: one by one, then with batches up to 32. The planner predicts both from the law.

# %%
law = laws["fast"]
singly, batched = serve_all({}, {"BATCH_SIZE": 32}, cores=SERVER_CORES)
found = {1: capacity(singly, quick(1.5, 8), users=64), 32: capacity(batched, quick(1.5, 8), users=64)}
for n, per_s in found.items():
    print(
        f"batches of {n:2}: {planner.predict_capacity(law, n):4.0f} texts/s predicted, {per_s:4.0f} measured"
    )

# %%
gain = found[32] / found[1]
stock_gain = 32 * laws["stock"].seconds(1) / laws["stock"].seconds(32)
claim(
    "Dynamic batching gives 10×",
    f"{gain:.1f} times over HTTP with the fast path; {stock_gain:.1f} times in a stock pipeline's own calls of 32 short"
    " texts",
    "fails here; depends on (a + b) / b of your model and device: measure it",
)
claim(
    "Batching lifts GPU utilisation from 20 % to 80 %",
    "untested here: no GPU at hand",
    "untested",
)

# %% [markdown]
# ## To wait or not to wait
#
# A batch needs texts. Two ways to get them:
#
# * **a window**: having one text, wait some milliseconds for others;
# * **work-conserving**: never idle while there is work. While the model runs, others arrive. They are the next batch.
#
# This is the code. `window_s` is 0 by default.

# %%
print(inspect.getsource(ModelLoop.take_batch))

# %% [markdown]
# **Your prediction.** At low load nobody else comes: a window of $w$ adds $w$ to everybody's time. At high load the queue
# fills the batch at once: it adds nothing. And in the middle? Here the planner runs *the real loop* on a virtual clock
# with your model's law.

# %%
windows = [0, 1, 5, 10, 50]
one_per_s = planner.predict_capacity(law)
loads = {"low": 0.2 * one_per_s, "middle": 0.7 * one_per_s, "high": 0.9 * planner.predict_capacity(law, 32)}
planned = {
    name: [
        simulate(
            law, batch_size=32, window_ms=window, rate_per_s=rate, duration_s=quick(10, 60)
        ).latency_ms.quantile(0.95)
        for window in windows
    ]
    for name, rate in loads.items()
}

# %% [markdown]
# And measured, at low and middle load, with the real server: no window, and one of 10 ms. (No batching at all, too.)

# %%
(waiting,) = serve_all({"BATCH_SIZE": 32, "BATCH_WINDOW_MS": 10}, cores=SERVER_CORES)
servers = {"no batching": singly, "no window": batched, "window 10 ms": waiting}
measured = {
    (name, at): load(server, "open", rate_per_s=loads[at], duration_s=quick(2, 20), limit_s=20).latency_ms
    for name, server in servers.items()
    for at in ("low", "middle")
}
p95_ms = {key: round(latency_ms.quantile(0.95), 1) for key, latency_ms in measured.items()}
for (name, at), p95 in p95_ms.items():
    print(f"{at:6} load, {name:12}: p95 {p95:5.1f} ms, median {measured[name, at].median():5.1f} ms")

# %%
with picture("What waiting for a batch costs", "window, ms", "time to the answer, p95, ms") as ax:
    for (name, p95), color in zip(planned.items(), (BLUE, ORANGE, GREEN)):
        line(ax, windows, p95, f"{name}: {loads[name]:.0f}/s", color)
    for at, color in (("low", BLUE), ("middle", ORANGE)):
        dots(ax, [0, 10], [p95_ms["no window", at], p95_ms["window 10 ms", at]], None, color)
    ax.plot([], [], "o", color=GREY, label="measured")
    ax.set_xscale("symlog", linthresh=1)
    ax.set_xticks(windows, windows)

# %% [markdown]
# A window hardly ever helped. At low load it is pure loss. The surprise is at high load, where you expected it to add
# nothing: at nine tenths of the capacity the queue is often a little shorter than a full batch when the model becomes
# free. The window then lets the model idle, and a server that busy has no time to give away.
#
# *Where this could fail:* if $a$ is huge and $b$ almost nothing, larger batches might repay a short wait. Ask the planner
# for such a model before you believe anybody, us included:

# %%
giant = CostLaw(a_s=0.05, b_s=0.0002)
for rate in (10, 50, 200):
    times = [
        simulate(
            giant, batch_size=64, window_ms=w, rate_per_s=rate, duration_s=quick(10, 60)
        ).latency_ms.mean()
        for w in (0, 10, 50)
    ]
    print(
        f"{rate:4}/s: mean {times[0]:4.0f} ms without a window, {times[1]:4.0f} with 10 ms, {times[2]:4.0f} with 50 ms"
    )

# %%
low_cost = planned["low"][windows.index(10)] - planned["low"][0]
claim(
    "Wait 10 ms for a batch",
    f"at low load a window of 10 ms adds {low_cost:.0f} ms to the p95 by the twin, and"
    f" {p95_ms['window 10 ms', 'low'] - p95_ms['no window', 'low']:.0f} ms measured; at high load it adds"
    f" {planned['high'][windows.index(10)] - planned['high'][0]:.0f} ms",
    "fails: a queue that filled while the model ran is the batch",
)
claim(
    "Asynchronous batching costs 10 ms at p95",
    f"batches without a window against no batching, p95: low load {p95_ms['no window', 'low']:.0f} against"
    f" {p95_ms['no batching', 'low']:.0f} ms, middle load {p95_ms['no window', 'middle']:.0f} against"
    f" {p95_ms['no batching', 'middle']:.0f} ms",
    "fails: the window costs, the batching does not",
)

# %% [markdown]
# ## The static batch
#
# The oldest way: collect exactly $n$ texts, then run. **Your prediction.** At $\lambda$ texts a second the first waits for
# $n - 1$ more: $(n-1)/\lambda$; the mean over all is half of that. At low load, with $n = 8$:

# %%
rate = loads["low"]
predicted_ms = (8 - 1) / (2 * rate) * 1000 + law.seconds(8) * 1000
static = simulate(law, batch_size=8, window_ms=9e5, deadline_s=1e4, rate_per_s=rate, duration_s=quick(20, 60))
greedy = simulate(law, batch_size=8, rate_per_s=rate, duration_s=quick(20, 60))
full = static[static.batch_size == 8]
print(f"static: {predicted_ms:.0f} ms predicted, {full.latency_ms.mean():.0f} by the twin")
print(f"work-conserving: {greedy.latency_ms.mean():.0f} ms")

# %%
claim(
    "A static batch hurts at low load",
    f"batches of exactly 8 at {rate:.0f} texts/s: mean {full.latency_ms.mean():.0f} ms, against"
    f" {greedy.latency_ms.mean():.0f} ms without waiting (both by the twin); and the last ones never get full",
    "holds",
)

# %% [markdown]
# ## Padding, or where batching loses
#
# The stock pipeline makes all texts of a batch as long as the longest. One long text among short ones, and everybody pays
# for its length. **Your prediction.** With ten texts in a hundred of 200 tokens and the rest of 12, the mean is 31 tokens,
# but the batch computes 200 for each: 6 times too much. That is more than a batch can gain here.

# %%
rows = [
    (name, kind, n, n / timings[name].query("kind == @kind and texts == @n").seconds.median())
    for name in ("stock", "fast")
    for kind in ("short", "mixed")
    for n in (1, 32)
]
per_s = {(name, kind, n): value for name, kind, n, value in rows}
for (name, kind, n), value in per_s.items():
    print(f"{name:5} {kind:5} batches of {n:2}: {value:5.0f} texts/s")

# %%
with picture("Who gains from a batch of 32?", "times the texts/s of calls of one", "", xlim=(0, None)) as ax:
    pairs = [(name, kind) for name in ("fast", "stock") for kind in ("mixed", "short")]
    gains = [per_s[pair[0], pair[1], 32] / per_s[pair[0], pair[1], 1] for pair in pairs]
    ax.axvline(1, color=RED, linestyle=":", label="no gain")
    limits = [laws[name].most_gained for name, _ in pairs]
    ax.plot(
        limits,
        range(4),
        "|",
        color="black",
        markersize=30,
        markeredgewidth=3,
        label="(a + b) / b, short texts",
    )
    dots(ax, gains, range(4))
    ax.set_ylim(-0.6, 3.6)
    ax.set_yticks(range(4), [f"{name}, {kind}" for name, kind in pairs])
    ax.legend(loc="upper center", bbox_to_anchor=(0.4, -0.18), ncols=3, columnspacing=1)

# %% [markdown]
# The stock pipeline loses by batching mixed lengths. The fast path sorts texts by length, and starts another forward pass
# rather than pad too much, so it does not.
#
# **The rule.** 1. Measure $a$ and $b$. 2. If $(a+b)/b$ is below 1.5, don't batch. 3. Else batch without a window.
# 4. If texts differ in length, check with your own mix, not with one sentence. `make plan` does all of it.

# %%
stop()

# %% [markdown]
# ## Exercises
#
# **★** A call takes 8 ms and 2 ms more for each text. How many times more texts a second can batching give at most?

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
# **★★★** A window of $w$ at $\lambda$ texts a second, and a model that takes no time. The first text waits $w$; those who come
# during its window wait less. What is the mean wait over all? (The checker asks the planner.)


# %%
def mean_wait_s(rate_per_s, window_s): ...


checks.exercise_4_3(mean_wait_s)

# %% [markdown]
# ## What must hold

# %%
assert 1 < gain < 1.3 * law.most_gained + 1, "no batch gains more than (a + b) / b"
assert found[32] > found[1]
assert planned["low"][0] < planned["low"][windows.index(10)] < planned["low"][-1], (
    "a window costs time at low load"
)
assert planned["middle"][0] < planned["middle"][-1]
assert measured["window 10 ms", "low"].median() > measured["no window", "low"].median()
assert (
    0.5 < full.latency_ms.mean() / predicted_ms < 2 and full.latency_ms.mean() > 3 * greedy.latency_ms.mean()
)
stock_short, stock_mixed = (per_s["stock", k, 32] / per_s["stock", k, 1] for k in ("short", "mixed"))
assert stock_mixed < stock_short, "padding takes back what the batch gave"
assert per_s["fast", "mixed", 32] > 1.2 * per_s["stock", "mixed", 32]
