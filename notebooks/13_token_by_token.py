# %% [markdown]
# # 13. Token by token
#
# A model that writes makes one token at a time, and reads everything before it to do so. All that you know about calls and batches
# still holds. But now a call is a *step*, and a request lives through hundreds of them.
#
# **Question: what does a token cost, and how do many readers share a model that writes?**
#
# Afterwards you can predict the milliseconds per token and the number of readers for a model from its size and your memory, and you know
# what continuous batching gains.
#
# It takes about 2 minutes (the quick form 30 s), two cores and 4 GB of memory. It takes SmolLM2 (135 million weights) where `make chat` has
# made it. Else, and in the quick form, a tiny model with random weights: the figures are smaller, the relations mostly the same.
# [What all lessons need](README.md).

# %%
# "No module named 'lesson'"? Open this notebook where it lies, in the project's notebooks/, or by `make learn`.
from lesson import BLUE, claim, compare, dots, guessed, holds, line, picture, quick, said, score, table
from lesson import tell

import numpy as np
from matplotlib.ticker import LogLocator

import checks
from support import l13_tokens as tokens
from support.l13_tokens import Lanes, continuous, draw, reading, static, step_ms, writing
from support.speeds import speeds

# %% [markdown]
# ## One token, and the next
#
# A *token* is a piece of a word. The model gets the tokens so far and gives a score to each token that could be next. We take the likeliest,
# put it behind the others, and ask again. That is all that "generating" is.

# %%
model = tokens.loaded()
tokenizer = tokens.tokenizer()
print(model.description)


def told(ids):
    """As text, where the tokens mean something."""
    return tokenizer.decode(ids) if tokenizer else str(ids)


ids = tokenizer("The capital of France is")["input_ids"] if tokenizer else tokens.prompt(5)
for n in (1, 2, 3, 12):
    print(f"{n:2} tokens:", told(tokens.write(model, ids, n)))

# %% [markdown]
# ## Why a cache?
#
# To make the 257th token the model needs what the 256 before it mean. It can read them all again. Or it keeps what it computed for each, its
# *keys and values*, in a cache, and computes one token only.
#
# **Guess.** How many times as long does the 257th token take without a cache?

# %%
guess_no_cache = ...  # times

# %% [markdown]
# **Prediction.** Without a cache a step computes $n$ tokens, with it one. If a step took time for tokens alone, that would be 256
# times. But any step also has to read all weights once: $a$. So a step takes $a + b\,n$, as a call did in lesson 4. We take $a$ and $b$ from
# steps of 16 and of 128 tokens, and predict the one of 256.

# %%
n_tokens = [1, 16, 64, 128, 256]
without = {n: step_ms(model, reading(n), quick(3, 7)) for n in n_tokens}
cached = {n: step_ms(model, writing(1, n), quick(3, 7)) for n in n_tokens}
b_ms = (without[128] - without[16]) / 112
a_ms = without[16] - 16 * b_ms
times = without[256] / cached[256]
compare(
    "the 257th token without a cache, times",
    guess=guess_no_cache,
    formula=(a_ms + 256 * b_ms) / (a_ms + b_ms),
    measured=times,
)

# %%
with picture(
    "A cache makes every token as cheap as the first", "tokens so far", "ms for the next one", ylim=(0, None)
) as ax:
    line(ax, n_tokens, [a_ms + b_ms * n for n in n_tokens], "a + b n")
    dots(ax, n_tokens, list(without.values()), "without a cache", "#D55E00")
    dots(ax, n_tokens, list(cached.values()), "with a cache", BLUE)
    guessed(ax, 256, guess_no_cache * cached[256])
said(
    cached[256] < 2 * cached[1],
    f"With a cache the 257th token takes {cached[256] / cached[1]:.1f} times as long as the second.",
)

# %%
claim(
    "A KV cache turns n² into n",
    who=f"{model.description.split(':')[0]}, one core, a step with and without a cache",
    number=f"the 257th token takes {without[256]:.0f} ms without and {cached[256]:.0f} with: {times:.1f} times, not 256",
    verdict="holds for the tokens that are computed; the time has a fixed part, so short answers gain less",
)

# %% [markdown]
# *Where the formula fails:* the line is through two points. A product of a few rows uses the core worse than one of many, and attention over
# a long prompt costs more than in proportion.
#
# ## What does a token cost?
#
# **Guess.** How many milliseconds does this model take for one token, for a single reader?

# %%
guess_token_ms = ...

# %% [markdown]
# **Prediction.** For a single token each weight is used once: one multiplication and one addition. A core does that much faster than
# memory brings the weights. So the time is *weights over bandwidth*: bytes ÷ bytes per second. Nothing else counts. We measure how
# fast this core reads, in the same way as lessons 4 and 9.

# %%
config = tokens.read().config
head = config.vocab_size * config.hidden_size
layer = 2 * config.hidden_size**2 + 3 * config.hidden_size * config.intermediate_size
layer += (
    2 * config.hidden_size * config.num_key_value_heads * (config.hidden_size // config.num_attention_heads)
)
weights_mb = 4 * (config.num_hidden_layers * layer + head) / 1e6
limits = speeds(quick(0.2, 1.0), mb=round(weights_mb))
read_ms = weights_mb * 1e6 / limits["bytes"] * 1000
one_ms = step_ms(model, writing(1, 32), quick(5, 15))
compare("ms per token", guess=guess_token_ms, formula=read_ms, measured=one_ms)
tell(f"{weights_mb:.0f} MB of weights are read for each token, at {limits['bytes'] / 1e9:.1f} GB/s.")

# %%
multiply_ms = weights_mb * 1e6 / 4 * 2 / limits["float32"] * 1000
said(
    multiply_ms < read_ms / 2 and read_ms > one_ms / 2,
    f"Multiplying alone would take {multiply_ms:.1f} ms. So the core waits for memory: decoding is *memory bound*.",
)
claim(
    "Decode is memory bound",
    who=f"one reader, {weights_mb:.0f} MB of float32 weights, one core",
    number=f"{one_ms:.0f} ms per token; reading the weights takes {read_ms:.0f} ms, multiplying them {multiply_ms:.1f} ms",
    verdict="holds for one reader; a batch changes it, see below"
    if 0.5 < read_ms / one_ms < 1.5
    else "depends on the size: here the launch of the operations takes the rest",
)

# %% [markdown]
# *Where the formula fails:* it counts the weights alone. Each of hundreds of operations has to be launched, too, and where a model is
# small enough for the processor's caches nothing comes from memory at all. The larger the model, the better the formula. For 8 billion
# weights in bfloat16 on a GPU that reads 3,000 GB/s it says $\frac{16}{3000}\,\text{s} = 5.3\,\text{ms}$ per token.
#
# ## How many fit?
#
# The cache takes memory: for each token its keys and its values, in each layer.
#
# **Guess.** How many sequences of 512 tokens fit into 1 GB, beside the weights?

# %%
guess_fit = ...

# %% [markdown]
# **Prediction.** A token takes 2 (keys and values) × layers × key heads × numbers per head × 4 bytes.

# %%
dim = config.hidden_size // config.num_attention_heads
token_bytes = 2 * config.num_hidden_layers * config.num_key_value_heads * dim * 4
layers = model.forward.layers
held = sum(each.cache.nbytes for each in layers) / len(layers[0].cache)  # of a slot
fit, formula_fit = int(1e9 // held), int(1e9 // (512 * token_bytes))
tell(f"A token takes {token_bytes / 1000:.0f} KB, a sequence of 512 of them {held / 1e6:.1f} MB.")
compare("sequences of 512 tokens in 1 GB", guess=guess_fit, formula=formula_fit, measured=fit)
claim(
    "Memory for the KV cache bounds the batch",
    who=f"this model, float32, {config.num_hidden_layers} layers with {config.num_key_value_heads} key heads of {dim}",
    number=f"{token_bytes / 1000:.0f} KB per token: {fit} sequences of 512 tokens in 1 GB",
    verdict="holds; halve it with 16-bit numbers, or with fewer key heads than query heads, as this model has",
)

# %% [markdown]
# (This server gives each sequence a *slot* with room for all of its tokens. Others cut the memory into pages, and give a sequence one page
# after the other: more fit where answers are shorter than they may be.)
#
# ## The batch that waits for its longest
#
# Eight readers share the model, and a step makes a token for each. Answers differ in length. The old way is the *static batch*: take eight,
# run until the last is done, take the next eight.
#
# **Guess.** Lengths are random (exponential, mean 20). For what share of the time is a slot at work?

# %%
guess_busy = ...

# %% [markdown]
# **Prediction.** A batch takes as long as its longest. Of $k$ exponential lengths the shortest is $\frac1k$ of the mean, the next takes
# $\frac1{k-1}$ more, and so on: the longest is $1 + \frac12 + … + \frac1k$ means. For $k = 8$ that is 2.7. So slots work for
# $\frac{1}{2.7} = 37\,\%$ of the time.

# %%
SLOTS = 8
lengths = tokens.answer_lengths(quick(80, 400), mean=20)
old, new = static(lengths, SLOTS), continuous(lengths, SLOTS)
harmonic = sum(1 / i for i in range(1, SLOTS + 1))
compare("share of the slots at work, static", guess=guess_busy, formula=1 / harmonic, measured=old.busy)

# %% [markdown]
# *Continuous batching* gives a slot away as soon as its sequence has ended: in the very next step. It is this project's first idea, one
# level down. What has queued while the step ran is taken, and nobody waits for anybody. Here is the project's own scheduler
# (`workers/generation/scheduler.py`), without a model. First one step at a time:

# %%
from workers.generation.scheduler import Scheduler, Sequence
from workers.generation.step_cost import StepCost
from workers.generation.steps import Options, Token

scheduler = Scheduler(2, StepCost())
for name, length in (("A", 1), ("B", 4), ("C", 2)):
    scheduler.add(Sequence([1], Options(max_tokens=length), owner=name))
while step := scheduler.plan():
    owners = (sequence.owner for sequence in step.sequences)
    print("in this step:", *owners, "  waiting:", len(scheduler.waiting))
    for sequence, _, reason in list(scheduler.advance(step, [Token(5, 0.0)] * len(step.rows))):
        if reason:
            scheduler.end(sequence, reason)

# %% [markdown]
# A ends, and C has its slot in the next step. Now forty sequences in eight slots: rows are slots, colours are sequences, white is idle.

# %%
draw(static=static(lengths[:40], SLOTS), continuous=continuous(lengths[:40], SLOTS))

# %%
gain = len(old.steps) / len(new.steps)
tell(
    f"With {len(lengths)} sequences: {len(old.steps)} steps static, {len(new.steps)} continuous. That is {gain:.1f} times the tokens per step,"
    f" and {new.busy:.0%} of the slots at work."
)
claim(
    "A static batch is good enough",
    who=f"{len(lengths)} answers of random lengths in {SLOTS} slots, this project's scheduler, counted in steps",
    number=f"slots at work {old.busy:.0%} static, {new.busy:.0%} continuous: {gain:.1f} times the tokens per step",
    verdict="fails where answers differ in length",
)

# %% [markdown]
# *Where the formula fails:* it is for endless exponential lengths. Rounding up to whole tokens makes lengths a little more alike.
#
# ## The batch curve
#
# A step for eight reads the weights as often as a step for one: once. So is a batch free?
#
# **Guess.** How many times the tokens per second do 32 sequences give?

# %%
guess_gain = ...

# %% [markdown]
# **Prediction.** The *roofline*: a step takes the longer of two times. Reading: bytes ÷ bandwidth, whatever the batch. Multiplying: 2
# operations per weight and sequence ÷ operations per second. They meet at
#
# $$n^* = \frac{\text{bytes per weight}}{2}\cdot\frac{\text{operations per second}}{\text{bytes per second}}.$$
#
# Below it a further sequence is free, above it costs in full.

# %%
sizes = [1, 2, 4, 8, 16, 32, 64]
batch_ms = {n: step_ms(model, writing(n, 32), quick(3, 9)) for n in sizes}
roof_ms = {n: max(read_ms, n * multiply_ms) for n in sizes}
bend = read_ms / multiply_ms
tell(
    f"This core reads {limits['bytes'] / 1e9:.1f} GB/s and does {limits['float32'] / 1e9:.0f} billion operations/s: the bend is at {bend:.0f}."
)
measured_gain = 32 * batch_ms[1] / batch_ms[32]
compare(
    "times the tokens/s with 32",
    guess=guess_gain,
    formula=32 * roof_ms[1] / roof_ms[32],
    measured=measured_gain,
)

# %%
with picture("A batch is nearly free, until it is not", "sequences in the batch", "tokens per second") as ax:
    line(ax, sizes, [1000 * n / roof_ms[n] for n in sizes], "roofline")
    dots(ax, sizes, [1000 * n / batch_ms[n] for n in sizes])
    guessed(ax, 32, guess_gain * 1000 / batch_ms[1])
    ax.set(xscale="log", yscale="log")
    ax.set_xticks(sizes, sizes)
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter("{x:g}")
    ax.minorticks_off()
table(
    [
        {"sequences": n, "ms per step (each reader's gap)": f"{ms:.0f}", "tokens/s": f"{1000 * n / ms:.0f}"}
        for n, ms in batch_ms.items()
    ]
)

# %%
claim(
    "Batching tokens is free until the processor is full",
    who=f"steps of 1 to 64 sequences, 32 tokens each in the cache, {weights_mb:.0f} MB of weights, one core",
    number=f"32 sequences give {measured_gain:.1f} times the tokens/s of one; by the roofline {32 * roof_ms[1] / roof_ms[32]:.1f}; it bends at"
    f" {bend:.0f}",
    verdict="depends: nearly so far below the bend; near it both limits count",
)
claim(
    "A bigger batch makes every token later",
    who="the same steps: a step is the gap between two tokens of each reader",
    number=f"{batch_ms[1]:.0f} ms for one, {batch_ms[8]:.0f} for eight, {batch_ms[64]:.0f} for 64",
    verdict="holds; slowly below the bend, in proportion above it",
)

# %% [markdown]
# *Where the formula fails:* it lets reading and multiplying overlap in full, and reach both speeds in full. Attention and the cache are not
# in it: each sequence brings its own keys and values, and they are read by nobody else. So a long context bends the curve earlier.
#
# ## "Continuous batching gives 23 ×"
#
# The claim's own benchmark counts three things at once: a batch in place of single requests or small static batches, slots that are free at once,
# and memory in pages, so that more fit. You have two of them now. **Multiply before you run the cell.**

# %%
guess_all = ...

# %%
static_per_s = old.busy * 1000 * SLOTS / batch_ms[8]
continuous_per_s = new.busy * 1000 * SLOTS / batch_ms[8]
wide = continuous(lengths, 64)
wide_per_s = wide.busy * 1000 * 64 / batch_ms[64]
compare(
    "64 slots, continuous, times 8 slots, static",
    guess=guess_all,
    formula=gain * 8 * batch_ms[8] / batch_ms[64],
    measured=wide_per_s / static_per_s,
)

# %%
claim(
    "Continuous batching gives 23 ×",
    who="this scheduler's steps at this model's measured step times, lengths exponential",
    number=f"{continuous_per_s / static_per_s:.1f} times a static batch of the same 8 slots; with 64 slots {wide_per_s / static_per_s:.1f} times;"
    f" {wide_per_s * one_ms / 1000:.0f} times one by one",
    verdict="depends on what it is compared with: the idea itself gives the longest length over the mean",
)

# %% [markdown]
# *Where it fails:* at the end of a run slots stay empty, as no more sequences come. With 64 slots that is a large part of so short a run.
#
# ## Exercises
#
# Fill in and run. The checker tells you what it thinks; it never stops the notebook. Solutions are in `notebooks/solutions/`.
#
# **★** A model has 8 billion weights in bfloat16. Its memory brings 400 GB per second. How many ms does a token take at least, for one reader?

# %%
ms_a_token = ...

checks.exercise_13_1(ms_a_token)

# %% [markdown]
# **★★** How many whole sequences of `tokens` tokens fit into the cache? (One line.)


# %%
def sequences_that_fit(cache_bytes, layers, heads, dim, itemsize, tokens): ...


checks.exercise_13_2(sequences_that_fit)

# %% [markdown]
# **★★★** How many steps do these lengths take in `slots` slots: in static batches, in the order of the list, and continuous? (Two lines, and
# four with a heap.)


# %%
def steps_static(lengths, slots): ...


def steps_continuous(lengths, slots): ...


checks.exercise_13_3((steps_static, steps_continuous))

# %% [markdown]
# ## In the lab
#
# Each reader's context has grown to 300 tokens. How many sequences may share a step, so that nobody's gap is longer than twice that of one
# reader alone? As many as possible, one whole number. The model is the lesson's own, and what counts is what it takes on this machine.

# %%
import labs

sequences = ...

labs.lab_13(sequences)

# %% [markdown]
# ## Ten questions
#
# Answer them aloud, then open the answers.
#
# 1. Why does a token need all that came before?
# 2. Why is the gain of a cache less than n?
# 3. Why is one reader's token bytes over bandwidth?
# 4. Why does a batch not read more weights?
# 5. Where does the batch curve bend, and why?
# 6. Why does a long context bend it earlier?
# 7. Why do key heads matter for memory?
# 8. Why is a static batch idle for most of its time?
# 9. Why is continuous batching greedy batching one level down?
# 10. Why is 23 × not false, and not the idea's own?
#
# <details><summary>Answers</summary>
#
# 1. Its score depends on them: attention reads their keys and values.
# 2. A step has a fixed part: the weights are read anyway.
# 3. Each weight is used once, and multiplying is faster than reading.
# 4. All rows use the same weight while it is there.
# 5. Where multiplying for all takes as long as reading for all.
# 6. Each sequence's keys and values are read by that sequence alone.
# 7. The cache holds keys and values per key head, not per query head.
# 8. It lasts as long as its longest: the harmonic number times the mean.
# 9. What queued while the step ran is taken in the next step.
# 10. It compares with a weak baseline and adds memory in pages.
# </details>

# %% [markdown]
# ## How far off were you?

# %%
score()

# %% [markdown]
# ## What must hold

# %%
assert tokens.write(model, ids, 8) == tokens.write(model, ids, 8), "the likeliest token is the same each time"
assert held == 512 * token_bytes, "the cache is as large as counted"
assert 0.25 < old.busy < 0.5 < new.busy, "a static batch waits for its longest"
assert isinstance(new, Lanes) and gain > 1.5
holds(times > 2, "a cache pays")
holds(measured_gain > 2, "so does a batch")
holds(np.argmax([n / batch_ms[n] for n in sizes]) >= 4, "up to dozens of sequences")

# %% [markdown]
# ## Take away
#
# - A token costs the reading of all weights: bytes over bandwidth. A batch shares that reading, until the arithmetic fills the processor.
# - The cache makes a token cost 1 and not n, and its memory decides how many readers fit.
# - Never let a short answer wait for a long one: give its slot away in the next step.
#
# Next: [Lesson 14](14_the_first_token.ipynb). Some read a prompt while others read an answer. Who waits?
