# %% [markdown]
# # 14. The first token and the next
#
# Readers of a model that writes wait twice: for the first token, and then for each next one. A prompt is read in one go, an answer is written
# token by token, and both want the same processor.
#
# **Question: who waits for whom?**
#
# Afterwards you can set a limit for both waits, keep a long prompt from stalling everybody, admit by tokens and not by requests, and say when a
# draft model pays.
#
# It takes about 2 minutes (the quick form 30 s), two cores and 3 GB of memory; the model is lesson 13's. [What all lessons need](README.md).

# %%
# "No module named 'lesson'"? Open this notebook where it lies, in the project's notebooks/, or by `make learn`.
from lesson import BLUE, claim, compare, dots, guessed, holds, line, picture, quick, said, score, table
from lesson import tell

import inspect

import numpy as np

import checks
from support import l13_tokens as tokens
from support import l14_first as first
from support.l14_first import RULES, WHOLE, Reader, crowd, draw_gaps, newcomer, simulate
from workers.generation.scheduler import Scheduler
from workers.generation.steps import Options

# %% [markdown]
# ## Two waits
#
# The *time to first token* (TTFT) is the wait in the queue and the reading of the prompt, the *prefill*. The *inter-token latency* (ITL) is the
# gap between two tokens while the answer is written, the *decode*: one step of the model. A mean over an answer hides a gap of a second in
# it, so we look at the longest gap.
#
# "Suppose" here means: a step takes 40 ms, 1.2 ms more for each token of a prompt, 2 ms for each sequence that writes, and 0.003 ms for each
# token in the cache. That is the law of `workers/generation/step_cost.py`; the server learns its own.

# %%
LAW = (0.04, 0.0012, 0.002, 3e-6)  # a, b, c, d in seconds

# %% [markdown]
# ## A long prompt stalls everybody
#
# Eight people read their answers. Somebody sends a prompt of 400 tokens.
#
# **Guess.** How many times as long as usual is the gap that the eight see?

# %%
guess_stall = ...  # times

# %% [markdown]
# **Prediction.** A usual step takes $a + 8c = 56$ ms. A step with the whole prompt takes $a + 8c + 400\,b = 536$ ms: nearly ten times. The eight
# see a stutter of half a second. It comes back with each long prompt.
#
# It gets worse where prompts go *first*, before all decoding, as long as there are any: several prompts in a row make one long gap.

# %%
eight = [Reader(0.0, 10, 40) for _ in range(8)]


def scene(rule):
    """Eight readers, and two long prompts that come after a second."""
    readers = [Reader(0.0, 10, 40) for _ in range(8)]
    return simulate(LAW, readers + [Reader(1.0, 400, 10) for _ in range(2)], **rule)


# %%
scenes = {name: scene(rule) for name, rule in RULES.items()}
one_long = simulate(LAW, [*eight, Reader(1.0, 400, 10)], step_tokens=WHOLE)
gaps = {name: max(max(reader.gaps_s) for reader in run.readers[:8]) for name, run in scenes.items()}
usual = float(np.median(one_long.readers[0].gaps_s))
longest = max(one_long.readers[0].gaps_s)
compare("the gap, times a usual one", guess=guess_stall, formula=536 / 56, measured=longest / usual)

# %%
draw_gaps(**{name.replace(" ", "_"): run for name, run in scenes.items()})
table(
    [
        {
            "rule": name,
            "longest gap of the eight, s": f"{gaps[name]:.2f}",
            "first token of the newcomers, s": ", ".join(
                f"{reader.ttft_s:.2f}" for reader in run.readers[8:]
            ),
        }
        for name, run in scenes.items()
    ]
)

# %% [markdown]
# Rows are readers, ticks are tokens, orange are the newcomers. With *prefill first* and with *whole prompts* the ticks of the eight have a
# hole. With the *budget* they only move apart a little, for longer, and the newcomers wait longer for their first token.
#
# ## The one `if` that cures it
#
# Nobody says that a prompt must be read in one step. Its keys and values can be computed in *chunks*, as many tokens per step as the
# others can bear. The scheduler has a budget of prompt tokens for each step:

# %%
print(inspect.getsource(Scheduler.prompt_budget))

# %% [markdown]
# Without anybody who writes: large chunks. Beside some who do: as many tokens as keep the step within 2.5 times a usual one, by the measured law.
#
# **Guess.** With chunks of 64 tokens, how long is the longest gap with the law from above, in ms?

# %%
guess_gap_ms = ...

# %% [markdown]
# **Prediction.** For chunks of $k$ tokens, a prompt of $P$ and $n$ who write:
#
# $$\text{gap} = a + c\,n + b\,k \qquad \text{TTFT} = \frac{P}{k}\,(a + c\,n) + b\,P$$
#
# Small chunks: short gaps, and the newcomer pays the fixed part of many steps. That is the trade, and no chunk is right for both.

# %%
chunks = [16, 32, 64, 128, 256, 400]


def with_chunks(k):
    """The longest gap of eight and the newcomer's first token, simulated."""
    run = simulate(LAW, [Reader(0.0, 10, 80) for _ in range(8)] + [Reader(1.0, 400, 10)], step_tokens=k + 8)
    return max(max(reader.gaps_s) for reader in run.readers[:8]), run.readers[8].ttft_s


by_chunk = {k: with_chunks(k) for k in chunks}
a, b, c, _ = LAW
formula, found_ms = 1000 * (a + 8 * c + 64 * b), 1000 * by_chunk[64][0]
compare("the gap with chunks of 64, ms", guess=guess_gap_ms, formula=formula, measured=found_ms)

# %%
with picture(
    "Short gaps or an early first token", "tokens per chunk", "s", ylim=(0, None), xscale="log"
) as ax:
    line(ax, chunks, [a + 8 * c + b * k for k in chunks], None)
    line(ax, chunks, [400 / k * (a + 8 * c) + 400 * b for k in chunks], None)
    dots(ax, chunks, [gap for gap, _ in by_chunk.values()], "longest gap", BLUE)
    dots(ax, chunks, [ttft for _, ttft in by_chunk.values()], "first token", "#D55E00")
    guessed(ax, 64, guess_gap_ms / 1000, None)
    ax.set_xticks(chunks, chunks)
    ax.minorticks_off()

# %% [markdown]
# ## The same, measured
#
# Now lesson 13's model. First its own law, from eight kinds of steps. Then eight sequences write, and a prompt of 400 tokens joins.

# %%
model = tokens.loaded(16)
cost = tokens.law_of(model)
a_ms, b_ms, c_ms, d_ms = (1000 * term for term in cost.law)
tell(
    f"A step takes {a_ms:.1f} ms, {b_ms:.2f} per prompt token, {c_ms:.2f} per sequence, {1000 * d_ms:.2f} per thousand tokens in the cache."
)

# %%
found = {k: newcomer(model, step_tokens=k + 8) for k in quick([32, 400], chunks)}
rows = []
for k, (plain_ms, gap_ms, ttft_ms) in found.items():
    rows.append(
        {
            "tokens per chunk": k,
            "usual step, ms": f"{plain_ms:.0f}",
            "longest gap, formula": f"{plain_ms + b_ms * k:.0f}",
            "gap, measured": f"{gap_ms:.0f}",
            "first token, formula": f"{400 / k * plain_ms + 400 * b_ms:.0f}",
            "measured": f"{ttft_ms:.0f}",
        }
    )
table(rows)

# %%
smallest, largest = min(found), max(found)
claim(
    "Chunked prefill costs throughput",
    who="this model, eight readers and a prompt of 400 tokens",
    number=f"first token after {found[smallest][2]:.0f} ms in chunks of {smallest}, {found[largest][2]:.0f} ms in one; longest gap"
    f" {found[smallest][1]:.0f} and {found[largest][1]:.0f} ms",
    verdict="holds for the newcomer: each chunk pays a step's fixed part again; the readers gain more",
)

# %% [markdown]
# *Where the formula fails:* it takes each chunk to cost the same. A later chunk attends to all before it. And a product of few rows uses the core
# worse than one of many.
#
# ## Goodput under two limits
#
# A reader is served well if the first token comes within 1 s and no gap is longer than 0.2 s. *Goodput* counts those, per second. Strangers come,
# one prompt in ten has 400 tokens.
#
# **Guess.** At 1.2 readers per second, what share is served well when prompts go first?

# %%
guess_good = ...

# %% [markdown]
# **Prediction.** While an answer of 60 tokens is written others come. A step for some writers takes about 50 ms, so an answer takes 3 s or more,
# and in that time 3.6 readers come. A prompt makes a gap of more than 0.2 s if it has more than about $\frac{0.2 - 0.05}{0.0012} = 125$ tokens. With a
# mean of 80, exponential, $e^{-125/80} = 21\,\%$ have, and the tenth that is long: three in ten. So an answer escapes with probability
# $0.7^{3.6} = 28\,\%$.

# %%
rates = quick([0.6, 1.2], [0.3, 0.6, 0.9, 1.2, 1.5, 1.8])
seconds = quick(60, 300)
runs = {
    (name, rate): simulate(LAW, crowd(rate, seconds), **rule)
    for name, rule in RULES.items()
    for rate in rates
}
good = {key: run.goodput(1.0, 0.2) for key, run in runs.items()}
at = 1.2
compare(
    "share served well, prefill first",
    guess=guess_good,
    formula=0.28,
    measured=good["prefill first", at] / at,
)

# %%
with picture("The same work, and more good answers", "readers per second", "served well, per second") as ax:
    line(ax, [0, rates[-1]], [0, rates[-1]], "all", "#999999", linestyle=":")
    for name, color in zip(RULES, ("#D55E00", "#E69F00", BLUE)):
        ax.plot(rates, [good[name, rate] for rate in rates], "o-", color=color, label=name)
    guessed(ax, at, guess_good * at, None)
per_s = {
    name: sum(len(reader.token_s) for reader in runs[name, at].readers) / runs[name, at].seconds
    for name in RULES
}
tell(
    "Tokens per second at 1.2 readers per second: "
    + ", ".join(f"{name} {n:.0f}" for name, n in per_s.items())
    + "."
)

# %%
claim(
    "Prefill first is fine",
    who="this project's scheduler, simulated; limits 1 s for the first token and 0.2 s for each gap; 1.2 readers per second",
    number=f"served well per second: {good['prefill first', at]:.2f} with prompts first, {good['whole prompts', at]:.2f} with whole prompts beside"
    f" the others, {good['budget by time', at]:.2f} with a budget",
    verdict="fails for people who read; for batch jobs it is fine",
)
claim(
    "Tokens per second say how good a server is",
    who="the same runs",
    number=f"tokens/s {per_s['prefill first']:.0f} and {per_s['budget by time']:.0f}, served well per second {good['prefill first', at]:.2f} and"
    f" {good['budget by time', at]:.2f}",
    verdict="fails: the same tokens, at different moments",
)

# %% [markdown]
# ## Admission by tokens
#
# Ten requests wait. Is that much? Ten questions of 20 tokens are read in one step, ten documents of 400 in 5 s. A bound on the number of
# requests can't tell them apart. This server plays its scheduler's future in a few large steps (`workers/generation/estimate.py`), and rejects on
# arrival what could not have its first token in time.
#
# **Guess.** By how much is that forecast off on average, in ms, at 1.2 readers per second? (The mean TTFT is some hundred ms.)

# %%
guess_off_ms = ...

# %%
run = runs["budget by time", at]
off_ms = 1000 * float(np.mean([abs(reader.predicted_s - reader.ttft_s) for reader in run.readers]))
ttft = [reader.ttft_s for reader in run.readers]
predicted = [reader.predicted_s for reader in run.readers]
with picture("The first token is predicted on arrival", "predicted, s", "simulated, s") as ax:
    line(ax, [0, max(ttft)], [0, max(ttft)], "equal")
    dots(ax, predicted, ttft, "a reader", BLUE, markersize=4)
compare("the forecast's error, ms", guess=guess_off_ms, formula=1000 * (a + 8 * c) / 2, measured=off_ms)

# %% [markdown]
# The formula here: a reader comes in the middle of a step, so half a usual step is not known better. *Where it fails:* lengths of answers are
# not known, and where all slots are taken the wait is for the end of somebody's answer.
#
# ## What a reader costs who has left
#
# Three readers in ten close the page after 10 tokens. Their answers would have 60 on average.
#
# **Guess.** What share of all tokens is written for nobody, if the server does not notice?

# %%
guess_unread = ...

# %% [markdown]
# **Prediction.** For exponential lengths with mean $m$, the part beyond 10 tokens is $e^{-10/m}$ of all. Three in ten leave: $0.3\,e^{-10/60} = 25\,\%$.


# %%
def leaving(notices):
    """Every reader whose number ends in 0, 1 or 2 leaves after ten tokens."""
    readers = crowd(0.9, quick(60, 300), seed=1)
    for number, reader in enumerate(readers):
        reader.stays = 10 if number % 10 < 3 else reader.stays
    return simulate(LAW, readers, notices=notices)


careless, careful = leaving(notices=False), leaving(notices=True)
written = careless.unread + sum(len(reader.token_s) for reader in careless.readers)
share, formula = careless.unread / written, 0.3 * np.exp(-10 / 60)
compare("share written for nobody", guess=guess_unread, formula=formula, measured=share)
tell(
    f"A server that notices writes {careful.unread} tokens for nobody: it ends the sequence, and its slot is free in the next step."
)

# %% [markdown]
# ## Alone and in a batch: the same text?
#
# The same prompt, alone and beside seven others. And with *sampling*, where the next token is drawn by lot: does a seed still fix the text, when
# others share the batch?
#
# **Guess.** Of these two, how many are the same in the batch as alone?

# %%
guess_same = ...  # 0, 1 or 2

# %% [markdown]
# **Prediction.** In a batch a product adds in another order, so a score can differ in the seventh digit. The likeliest token changes only where two
# are as likely to that digit: hardly ever in float32. And the seed: if the random numbers came from one stream for the whole batch, a
# neighbour would change them. Here each sequence draws by *its own* seed and its own position. So both are the same.

# %%
ids = tokens.prompt(12)
others = [tokens.prompt(8 + i, i) for i in range(1, 8)]
drawn = Options(temperature=1.0, seed=5)
n = quick(12, 32)
alone = [tokens.write(model, ids, n), tokens.write(model, ids, n, options=drawn)]
beside = [
    tokens.together(model, [ids, *others], n, options=[options] + [Options()] * 7)[0]
    for options in (Options(), drawn)
]
same = [x == y for x, y in zip(alone, beside)]

# %%
table(
    {"tokens are chosen": how, "the same in a batch": "yes" if one else "no"}
    for how, one in zip(("the likeliest", "by lot, seed 5"), same)
)
compare("the same, of 2", guess=guess_same, formula=2, measured=sum(same))
claim(
    "The same prompt gives the same text",
    who=f"this model in float32, {n} tokens, alone and beside seven others",
    number=f"the likeliest token: {'the same' if same[0] else 'another text'}; by lot with a seed: {'the same' if same[1] else 'another text'}",
    verdict="depends: here it does in float32; with 16-bit numbers two tokens are as likely more often, and a batch decides (untested here)",
)

# %% [markdown]
# ## Guess the next tokens, check them at once
#
# *Speculative decoding*: something cheap drafts $k$ tokens. The model computes all of them in one step, as it would a prompt. It keeps those that it
# would have written itself, and one more. So a step gives up to $k + 1$ tokens, and the text is exactly the same.
#
# The cheapest draft is a look-up: when have the last two tokens come before, and what followed? (*n-gram* or *prompt look-up*; Transformers has
# it.) One text here repeats itself, as when a document is quoted or code is edited. One is new.
#
# **Guess.** With $k = 4$, how many times as fast is the one that repeats itself?

# %%
guess_speedup = ...

# %% [markdown]
# **Prediction.** If each drafted token is right with probability $p$, a step gives
#
# $$1 + p + p^2 + … + p^k = \frac{1 - p^{k+1}}{1 - p}$$
#
# tokens. And it takes longer, because it computes $k + 1$ tokens and not one: $t_{k+1} / t_1$. The ratio of the two is the gain. $p$ can be
# found from a text that is written already.

# %%
K = 4
stock, tokenizer = first.stock(), tokens.tokenizer()
fresh = tokenizer("Once upon a time there was")["input_ids"] if tokenizer else tokens.prompt(7)
longer = tokens.step_ms(model, tokens.reading(K + 1), 9) / tokens.step_ms(model, tokens.reading(1), 9)
drafts = {
    kind: first.with_drafts(stock, text, K, quick(24, 48))
    for kind, text in (("repeats itself", tokens.prompt(60) * 3), ("is new", fresh))
}

# %%
table({"the text": kind} | draft.row(longer) for kind, draft in drafts.items())
repeated, new = drafts.values()
compare(
    "times as fast", guess=guess_speedup, formula=repeated.predicted_per_step / longer, measured=repeated.gain
)
said(
    repeated.is_same and new.is_same,
    f"The text is the same, token by token. A step of {K + 1} tokens takes {longer:.2f} times as long as one of 1.",
)

# %%
chances = np.linspace(0, 1, 50)
with picture("A draft pays where it is right", "p, a drafted token is right", "times as fast") as ax:
    for k, color in ((2, "#56B4E9"), (4, BLUE), (8, "#009E73")):
        gains = sum(chances**i for i in range(k + 1)) / (1 + k * (longer - 1) / K)
        line(ax, chances, gains, f"k = {k}", color)
    ax.axhline(1, color="#999999", linestyle=":")
    dots(ax, [repeated.p, new.p], [repeated.gain, new.gain], None, "black")
    guessed(ax, repeated.p, guess_speedup, None)
claim(
    "Speculative decoding is 2–3 × faster",
    who="look-up drafts of four tokens, one reader, Transformers' generate; a text that repeats itself and a new one",
    number=f"{repeated.gain:.1f} times as fast where the text repeats itself (p = {repeated.p:.2f}), {new.gain:.1f} times where it is new"
    f" (p = {new.p:.2f})",
    verdict="depends on p, and on whether the processor has time to spare: in a full batch the drafts cost in full",
)

# %% [markdown]
# *Where the formula fails:* it takes drafts to be right independently. They come in runs: a copied passage is right for long, new text never is.
# And looking up takes time, too. In a batch of many readers the step has no time to spare (lesson 13's bend): there a draft that is wrong takes a
# token from somebody else.
#
# ## Exercises
#
# Fill in and run. The checker tells you what it thinks; it never stops the notebook. Solutions are in `notebooks/solutions/`.
#
# **★** A usual step takes 20 ms, and each prompt token in it 0.5 ms more. With chunks of 64 tokens, how long is the longest gap, in ms?

# %%
longest_gap_ms = ...

checks.exercise_14_1(longest_gap_ms)

# %% [markdown]
# **★★** Write "served well": the first token within its limit, and each gap within its own. (One line.)


# %%
def meets(ttft_s, gaps_s, ttft_limit_s, gap_limit_s): ...


checks.exercise_14_2(meets)

# %% [markdown]
# **★★★** How many times as fast is a reader with drafts of `k` tokens, each right with probability `p`, if a further token makes a step longer by `b`
# of itself? (One line.)


# %%
def speedup_of(p, k, b): ...


checks.exercise_14_3(speedup_of)

# %% [markdown]
# ## In the lab
#
# Choose the tokens of a chunk, so that a prompt of 400 tokens never makes the gap longer than three usual steps, on this
# machine. One number.

# %%
import labs

chunk = ...

labs.lab_14(chunk)

# %% [markdown]
# ## Ten questions
#
# Answer them aloud, then open the answers.
#
# 1. Why two latencies and not one?
# 2. Why the longest gap and not the mean?
# 3. Why does a long prompt stall everybody?
# 4. Why do chunks cure it?
# 5. What do chunks cost, and whom?
# 6. Why set the chunk by time?
# 7. Why can the same tokens per second be a good and a bad server?
# 8. Why admit by tokens?
# 9. Why end an answer when its reader leaves?
# 10. Why do drafts not pay in a full batch?
#
# <details><summary>Answers</summary>
#
# 1. A reader waits for the first token once, and for each next one as long as the answer goes.
# 2. A second's hole disappears in a mean of hundreds.
# 3. It is computed in the step that the others wait for.
# 4. They bound the step; the prompt takes more of them.
# 5. The newcomer: each chunk pays a step's fixed part.
# 6. Tokens per step mean different gaps on different machines and loads.
# 7. Readers feel when tokens come, not how many.
# 8. Ten questions and ten documents are both ten requests.
# 9. The rest is written for nobody, in a slot that others wait for.
# 10. There each further token costs in full, right or wrong.
# </details>

# %% [markdown]
# ## How far off were you?

# %%
score()

# %% [markdown]
# ## What must hold

# %%
assert gaps["budget by time"] < 0.5 * min(gaps["prefill first"], gaps["whole prompts"]), (
    "a budget keeps gaps short"
)
assert by_chunk[16][0] < by_chunk[400][0] and by_chunk[16][1] > by_chunk[400][1], (
    "short gaps or an early first token"
)
assert good["budget by time", at] > 1.5 * good["prefill first", at], "and more are served well"
assert careful.unread == 0 < careless.unread, "an answer ends when its reader leaves"
assert off_ms < 200, "the first token can be predicted"
assert repeated.per_step > 1 and repeated.is_same, "drafts save steps, and change nothing"
holds(found[smallest][1] < found[largest][1], "so it is with a real model")

# %% [markdown]
# ## Take away
#
# - Two waits, two limits, and goodput counts who has both. Tokens per second hide the difference.
# - Read prompts in chunks, as large as the readers' gaps allow. The size follows from a measured law, not from a setting.
# - Admit by predicted first token, end an answer when its reader leaves, and let each sequence draw by its own seed.
#
# Next: [Lesson 15, a fleet](15_a_fleet.ipynb).
