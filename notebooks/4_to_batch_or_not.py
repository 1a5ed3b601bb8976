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
    QUICK,
    RED,
    SERVER_CORES,
    bars,
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
options = {"kinds": ("short", "mixed"), "sizes": quick((1, 32), planner.SIZES), "budget_s": quick(1.5, 10)}
with planner.measuring_on(SERVER_CORES) as measure:
    timings = {
        name: measure(Settings(TORCH_THREADS=1, FAST=fast), **options)
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

# %% [markdown]
# *Where the prediction fails:* the law was measured some seconds before, and the machine has moods: a tenth or a fifth is
# common. A line through six sizes is also a compromise, and the planner takes a request's HTTP to cost the same in a batch,
# where replies that leave together share some of it.

# %%
gain = found[32] / found[1]
stock_s = timings["stock"].query("kind == 'short'").groupby("texts").seconds.median()
stock_gain = 32 * stock_s[1] / stock_s[32]
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
# with your model's law, several times for each point.

# %%
windows = [0, 1, 5, 10, 50]
one_per_s = planner.predict_capacity(law)
loads = {"low": 0.2 * one_per_s, "middle": 0.7 * one_per_s, "high": 0.9 * planner.predict_capacity(law, 32)}


def median_ms(window, rate):
    """The median time to the answer: its median over some runs, and how far these are apart."""
    options = {"batch_size": 32, "window_ms": window, "rate_per_s": rate, "duration_s": quick(5, 40)}
    found = sorted(simulate(law, seed=seed, **options).latency_ms.median() for seed in range(quick(3, 5)))
    return found[len(found) // 2], found[-1] - found[0]


planned = {name: [median_ms(window, rate) for window in windows] for name, rate in loads.items()}
for name, points in planned.items():
    print(
        f"{name:6}",
        "   ".join(f"{w} ms: {ms:.1f} ± {apart / 2:.1f}" for w, (ms, apart) in zip(windows, points)),
    )

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
p95_ms, p50_ms = ({key: ms.quantile(q) for key, ms in measured.items()} for q in (0.95, 0.5))
for name, at in measured:
    print(f"{at:6} load, {name:12}: median {p50_ms[name, at]:5.1f} ms, p95 {p95_ms[name, at]:5.1f} ms")

# %%
with picture(
    "What waiting for a batch costs", "window, ms", "median time to the answer, ms", ylim=(0, None)
) as ax:
    for (name, points), color in zip(planned.items(), (BLUE, ORANGE, GREEN)):
        line(ax, windows, [ms for ms, _ in points], f"{name}: {loads[name]:.0f}/s", color)
    for at, color in (("low", BLUE), ("middle", ORANGE)):
        dots(ax, [0, 10], [p50_ms["no window", at], p50_ms["window 10 ms", at]], None, color)
    ax.plot([], [], "o", color=GREY, label="measured")
    ax.set_xscale("symlog", linthresh=1)
    ax.set_xticks(windows, windows)

# %% [markdown]
# A window did not help anywhere. At low load it is pure loss: all of it is added. In the middle it is nearly the same. At
# high load the queue fills most batches without it: a short window changes less than two runs differ. A long one still
# costs: at nine tenths of the capacity the queue is often a little shorter than a full batch when the model becomes
# free; then the window lets the model idle, and a server that busy has no time to give away.
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
at_10 = windows.index(10)
cost_ms = {name: points[at_10][0] - points[0][0] for name, points in planned.items()}
claim(
    "Wait 10 ms for a batch",
    f"at low load a window of 10 ms adds {cost_ms['low']:.0f} ms to the median by the twin, and"
    f" {p50_ms['window 10 ms', 'low'] - p50_ms['no window', 'low']:.0f} ms measured; at high load {cost_ms['high']:+.0f} ms"
    f" by the twin, where runs of the same setting are {planned['high'][0][1]:.0f} ms apart",
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
# but the batch computes 200 for each: 6.5 times too much. So in place of $(a+b)/b$ it gains that, divided by 6.5.

# %%
per_s = {
    (name, kind, n): n / timings[name].query("kind == @kind and texts == @n").seconds.mean()
    for name in ("stock", "fast")
    for kind in ("short", "mixed")
    for n in (1, 32)
}  # of the mean, for a median would forget the one long text in ten
for (name, kind, n), value in per_s.items():
    print(f"{name:5} {kind:5} batches of {n:2}: {value:5.0f} texts/s")

# %%
with picture("Who gains from a batch of 32?", "times the texts/s of calls of one", "", xlim=(0, None)) as ax:
    pairs = [(name, kind) for name in ("fast", "stock") for kind in ("mixed", "short")]
    gains = [per_s[pair[0], pair[1], 32] / per_s[pair[0], pair[1], 1] for pair in pairs]
    ax.axvline(1, color=RED, linestyle=":", label="no gain")
    padding = {("stock", "mixed"): 6.5}
    bars(ax, [laws[pair[0]].most_gained / padding.get(pair, 1) for pair in pairs], range(4))
    dots(ax, gains, range(4))
    ax.set_ylim(-0.6, 3.6)
    ax.set_yticks(range(4), [f"{name}, {kind}" for name, kind in pairs])
    ax.legend(loc="upper center", bbox_to_anchor=(0.4, -0.18), ncols=3, columnspacing=1)

# %% [markdown]
# The stock pipeline loses by batching mixed lengths. The fast path sorts texts by length, and starts another forward pass
# rather than pad too much, so it does not.
#
# *Where the prediction fails:* $(a+b)/b$ is from a line through all sizes; where the last point lies below the line, the
# dot of 32 lies beyond the bar. And $b$ is a short text's: to a long one $a$ matters little, so mixed lengths gain less.
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
assert found[32] > found[1]
for at in ("low", "middle"):
    assert planned[at][0] < planned[at][at_10] < planned[at][-1], "a window costs time"
# The quick form asks for two seconds: on a busy machine that tells less.
assert QUICK or gain < 1.3 * law.most_gained + 1, "no batch gains more than (a + b) / b, give or take the fit"
assert QUICK or p50_ms["window 10 ms", "low"] > p50_ms["no window", "low"]
assert (
    0.5 < full.latency_ms.mean() / predicted_ms < 2 and full.latency_ms.mean() > 3 * greedy.latency_ms.mean()
)
stock_short, stock_mixed = (per_s["stock", k, 32] / per_s["stock", k, 1] for k in ("short", "mixed"))
assert stock_mixed < stock_short, "padding takes back what the batch gave"
assert per_s["fast", "mixed", 32] > 1.2 * per_s["stock", "mixed", 32]
