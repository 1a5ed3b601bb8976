# %% [markdown]
# # 10. Faster runtimes
#
# PyTorch is made for research. So everybody tells you to serve with something else: bfloat16, a compiler, ONNX Runtime,
# OpenVINO, int8.
#
# **Question: would another runtime make your model faster, and what would it cost you?**
#
# Afterwards you can decide whether your model has anything left to gain, what to change first, and how to tell whether it
# still gives the same answers.
#
# It takes about 2 minutes (the quick form half a minute), two cores and 16 GB of memory (the quick form 4). [What all
# lessons need](README.md).

# %%
# "No module named 'lesson'"? Open this notebook where it lies, in the project's notebooks/, or by `make learn`.
from lesson import BLUE, GREEN, GREY, ORANGE, SERVER_CORES, claim, compare, dots, guessed, holds
from lesson import line, picture, quick, said, score, table, tell

import math

import checks
from support import l10_runtimes
from support.l10_runtimes import LEAN, rows

# %% [markdown]
# The runtime is the last box on the way of a request. All else stays as it was. So this lesson needs no server: it asks the
# model itself.
#
# ## How fast could it be at all?
#
# A model is mostly products of matrices. A core can do only so many multiplications and additions a second, whatever
# program asks for them. That is the limit for every runtime.
#
# **Your guess:** how many short texts a second (about ten tokens each) can one core answer at most, in float32?

# %%
guess_per_s = ...  # texts a second

# %% [markdown]
# **Prediction.** Count. A layer multiplies each token's $h$ numbers by four tables of $h \times h$ (query, key, value, out)
# and by two of $h \times i$ (up and down). In the attention each token meets the $n$ tokens of its text, twice. The head turns
# a token's $h$ numbers into a score for each of $V$ words. A multiplication and an addition are two operations:
#
# $$2 \left( n L\,(4h^2 + 2hi + 2nh) + m\,(h^2 + hV) \right)$$
#
# for $n$ tokens in $L$ layers, when the head runs at $m$ of the tokens. Here are this model's numbers.

# %%
L, h, i, V = 6, 384, 1536, 30522


def operations(n, m):
    """Of one text with n tokens, when the head runs at m of them."""
    return 2 * (n * L * (4 * h * h + 2 * h * i + 2 * n * h) + m * (h * h + h * V))


core = min(SERVER_CORES)
limits = l10_runtimes.errand("limits", quick(0.4, 4.0), core=core)
tell(
    f"Ten tokens, the head at each: {operations(10, 10):,} operations by the formula, {limits['counted']:,} counted by"
    " torch."
)

# %% [markdown]
# What can this core do? Ask for one product that stays in its caches, again and again. And a second limit: each call must
# read the weights, however small its batch is. So we also measure how many bytes a second come in.

# %%
short = l10_runtimes.texts(32)
tokens = l10_runtimes.lengths(short)
mean = sum(tokens) / len(tokens)
weights_mb = 4 * (L * (4 * h * h + 2 * h * i) + h * h + h * V) / 1e6  # the embeddings are only looked up


def limits_of(dtype):
    """Operations a second, and texts a second with the head at each token and at the mask only."""
    speed = limits[dtype]
    return speed / 1e9, speed / operations(mean, mean), speed / operations(mean, 1)


columns = "numbers | operations a second, billions | short texts/s at most, head at each token | head at the mask only"
table(columns, *((dtype, *map("{:.0f}".format, limits_of(dtype))) for dtype in ("float32", "bfloat16")))

# %%
read_s = weights_mb * 1e6 / limits["bytes"]
tell(
    f"The short texts have {mean:.1f} tokens on average. The core reads {limits['bytes'] / 1e9:.0f} GB a second, and a call"
    f" reads {weights_mb:.0f} MB of weights in float32. So with one text a call it can do about {1 / read_s:.0f} texts/s at most,"
    " whatever it computes."
)

# %% [markdown]
# That last limit is for float32. Numbers of fewer bits are fewer bytes to read, so int8 may pass it.
#
# bfloat16 keeps half of a number's bits. Some processors have units that multiply it many times faster (Intel calls them
# AMX). Others have none; then the two rows hardly differ, or the second is the lower one.
#
# ## How fast are they?
#
# Same model, same texts, one core, no HTTP. Each runtime is a fresh process, and loads only what it needs. All of them give
# the same kind of answer: five words with scores and sentences. They are asked in turn, and the best turn counts: whatever
# else the machine does can only make a call slower.
#
# * **stock pipeline**: what Transformers gives you. **PyTorch**: the same model without the pipeline around it.
# * **torch.compile**: PyTorch writes C++ for your model and compiles it. It needs a C++ compiler.
# * **ONNX Runtime**, **OpenVINO**: the model as a graph in a file, run by a program without PyTorch. *int8* rounds
#   the weights to whole numbers of 8 bits. OpenVINO is too large to come with the lessons; it has a row after
#   `pip install --no-deps --target .peers/openvino openvino==2026.4.1 openvino-telemetry` in the project's folder.
#   *mask*: a graph whose head runs at the mask only; more of it below.
# * **fast path**: what this server runs. It is PyTorch too.
#
# **Your guess:** one short text a call. How many times as fast as PyTorch is ONNX Runtime?

# %%
guess_times = ...  # times PyTorch's texts a second

# %% [markdown]
# **Prediction.** A call of PyTorch costs $a + b\,n$ for $n$ texts (lesson 4). A lean runtime can save the fixed part $a$, in
# which Python walks through the model. It can't save the part of the texts, $b$, if that is the processor's own work. So
# it gains at most
#
# $$\frac{a + b\,n}{b\,n}$$
#
# which is much for one text and almost nothing for a large batch.

# %%
names = quick(
    ["PyTorch", "ONNX Runtime", "ONNX Runtime, int8", "fast path"],
    list(l10_runtimes.RUNTIMES),
)
sizes = [1, 8, 32]
cells = [("short", size, quick(1, 5)) for size in sizes]
cells += [("mixed", size, quick(1, 2)) for size in quick([8], sizes)]
with l10_runtimes.exported(quick(False, True)) as (folder, export_s):
    running, missing = l10_runtimes.start(
        names, folder, core=core, patience_s=150
    )  # a compiler takes its time
per_s = l10_runtimes.rates(running, cells)
tell(f"Not measured: {'; '.join(f'{name} ({why})' for name, why in missing.items()) or 'none'}.")


# %%
def column(lengths, size):
    return {f"{lengths} × {size}": {name: per_s[name, lengths, size] for name in running}}


def speeds(*kinds):
    columns = {
        k: v for lengths, size, _ in cells if lengths in kinds for k, v in column(lengths, size).items()
    }
    table([{"texts/s": name} | {k: f"{v[name]:.0f}" for k, v in columns.items()} for name in running])


speeds("short")

# %%
b_s = (32 / per_s["PyTorch", "short", 32] - 1 / per_s["PyTorch", "short", 1]) / 31
a_s = 1 / per_s["PyTorch", "short", 1] - b_s
predicted = [(a_s + b_s * n) / (b_s * n) for n in sizes]


def times(name, base="PyTorch"):
    return [per_s[name, "short", n] / per_s[base, "short", n] for n in sizes]


# %%
curve = [n / 10 for n in range(10, 321)]
RUNTIMES = {"OpenVINO": ORANGE, "torch.compile": GREEN, "ONNX Runtime": BLUE}  # the last on top
with picture(
    "A lean runtime helps small calls", "texts a call", "times PyTorch's texts/s", ylim=(0, None)
) as ax:
    ax.set_xscale("log")
    line(ax, curve, [(a_s + b_s * n) / (b_s * n) for n in curve])
    for name, color in RUNTIMES.items():
        if name in running:
            dots(ax, sizes, times(name), name, color)
    guessed(ax, [1], [guess_times])
    ax.axhline(1, color=GREY, linewidth=1)
    ax.set_xticks(sizes, sizes)
    ax.minorticks_off()

# %%
onnx = times("ONNX Runtime")
told, measured = (", ".join(f"{one:.1f}" for one in some) for some in (predicted, onnx))
tell(
    f"a = {a_s * 1000:.1f} ms, b = {b_s * 1000:.1f} ms. Predicted for 1, 8 and 32 texts a call: {told} times; ONNX Runtime"
    f" measured: {measured}."
)
call_ms = 1000 / per_s["ONNX Runtime", "short", 1]
least_ms = 1000 * operations(mean, mean) / limits["float32"]
better = (a_s + b_s) / (b_s + read_s)
tell(
    f"ONNX Runtime's own call for one text takes {call_ms:.1f} ms. Reading the weights takes about {read_s * 1000:.1f} ms and"
    f" computing at least {least_ms:.1f} ms. Both can happen at the same time. So the better prediction for one text is {better:.1f} times."
)
compare("ONNX Runtime for one text, times PyTorch", guess=guess_times, formula=better, measured=onnx[0])

# %% [markdown]
# *Where the formula fails:* for one text the fixed part $a$ is not only Python. The weights must be read even for a single
# token, and no runtime can save that: the sentence above says how long it takes. With that time beside $b$, the prediction
# for one text is $(a+b)/(b+\text{reading})$: the last sentence gives it. And $b$ is PyTorch's own: a runtime whose products are
# quicker lies above the line, one whose products are slower lies below.
#
# ## How far from the limit?
#
# A batch of 32 short texts hides the fixed part. What is left is the share of the core's limit that each runtime
# reaches: the [utilisation](glossary.md) of its arithmetic.
# The limit counts what that runtime computes: the fast path runs the head at the mask, most others at every token.


# %%
def limit(name, n=mean):
    """Texts/s that the core can do at most, for what this runtime computes; int8 has no limit measured here."""
    dtype = "bfloat16" if "bfloat16" in name else "float32"
    return math.nan if "int8" in name else limits[dtype] / operations(n, 1 if name in LEAN else n)


order = sorted(running, key=lambda name: per_s[name, "short", 32])
by_size = {f"{n} a call": [per_s[name, "short", n] for name in order] for n in (1, 32)}
series = by_size | {"limit": list(map(limit, order))}
series["your guess"] = [guess_per_s if name == "PyTorch" else math.nan for name in order]
with picture("No runtime reaches the core's limit", "short texts a second", "", xscale="log") as ax:
    rows(ax, order, series)


# %%
def of_limit(name):
    """As the table shows it."""
    speed, most = per_s[name, "short", 32], limit(name)
    known = (f"{most:.0f}", f"{speed / most:.0%}") if most > 0 else ("-", "-")
    return name, f"{speed:.0f}", *known


table("runtime | texts/s, 32 a call | limit, texts/s | share of the limit", *map(of_limit, reversed(order)))

# %% [markdown]
# *Where this limit fails:* it counts products only. Between them a model adds, normalises and takes exponentials, and these
# read and write memory. The faster the products are, the more the rest weighs. That is why the share is lowest
# in bfloat16 on a core that multiplies it so fast.
#
# ## What you need not compute
#
# You have seen two ways to be fast: save the fixed part, or use smaller numbers. There is a third: compute less. A text has
# its mask at one token, so the head is needed at one token. And nobody needs the padding, which makes all texts of a batch as
# long as the longest.
#
# **Your guess:** one text in ten has 200 tokens, and 32 texts go in a call. How many times as fast as ONNX Runtime is the
# fast path? Both in float32.

# %%
guess_less = ...  # times ONNX Runtime's texts a second

# %% [markdown]
# **Prediction.** If both do as many operations a second, the ratio is that of the operations: all texts as long as the
# longest and the head at each token, against the texts' own tokens and the head at the mask.


# %%
size = quick(8, 32)
lines = {kind: l10_runtimes.texts(32, kind) for kind in ("short", "mixed")}


def work(asked, lean):
    """Operations for all texts, `size` a call: each call padded to its longest, or lean."""
    return l10_runtimes.work(operations, l10_runtimes.lengths(asked), size, lean)


predicted_less = {k: work(asked, False) / work(asked, True) for k, asked in lines.items()}
measured_less = {k: per_s["fast path", k, size] / per_s["ONNX Runtime", k, size] for k in lines}
both = zip(lines, map("{:.1f}".format, predicted_less.values()), map("{:.1f}".format, measured_less.values()))
table("texts | predicted, times | measured, times", *both)
speeds("mixed")

# %%
with picture(
    "Computing less beats computing faster", "times ONNX Runtime's texts/s", "", xlim=(0, None)
) as ax:
    series = {"predicted": [*predicted_less.values()], "fast path": [*measured_less.values()]}
    series["your guess"] = [guess_less if kind == "mixed" else math.nan for kind in lines]
    rows(ax, list(lines), series)
    ax.axvline(1, color=GREY, linewidth=1)

# %%
both = ("ONNX Runtime", "fast path")
speed_of = {
    (one, k): work(lines[k], one in LEAN) * per_s[one, k, size] / 32 / 1e9 for one in both for k in lines
}
speed = "; ".join(f"{one} {speed_of[one, 'short']:.0f} and {speed_of[one, 'mixed']:.0f}" for one in both)
tell(f"Billions of operations a second, short and mixed: {speed}, of {limits['float32'] / 1e9:.0f} at most.")
padded, lean = ({k: speed_of[one, k] for k in lines} for one in both)
said(padded["mixed"] < padded["short"], "Padded, ONNX's operations take longer: so the ratio is larger.")
said(
    lean["mixed"] > lean["short"], "The fast path's go quicker with mixed lengths: the ratio is larger, too."
)
told, found = (one["mixed"] for one in (predicted_less, measured_less))
compare("the fast path, mixed texts, times ONNX", guess=guess_less, formula=told, measured=found)

# %% [markdown]
# *Where the formula fails:* it assumes that both do as many operations per second.
#
# None of this needs PyTorch. You can export a graph whose head runs at the mask only.

# %%
if "ONNX Runtime, mask" in running:
    masked = times("ONNX Runtime, mask", base="ONNX Runtime")
    tell(
        "ONNX Runtime with its head at the mask, against itself with the head at each token:"
        f" {', '.join(f'{one:.1f}' for one in masked)} times the texts/s for 1, 8 and 32 short texts a call."
    )
else:
    tell("That graph is not exported in the quick form.")

# %% [markdown]
# ## Is it still the same model?
#
# A faster answer helps only if it is the same answer. Ask each runtime 60 texts and compare with PyTorch in float32: is the
# first word the same, are the five words the same, and how far apart are the scores of a word (from 0 to 1)?
#
# **Your guess:** how far, at most, does bfloat16 move a score?

# %%
guess_gap = ...  # from 0 to 1

# %% [markdown]
# **Prediction.** It keeps 8 binary digits of a number. A word's *logit* is its number before it becomes a score. Say that the
# likely words' logits lie between 8 and 16. There 8 digits leave steps of 1/16. So each logit is off by up to 1/32, and
# the distance of two logits by up to 1/16. A score moves at most a quarter as far as that distance: by 1/64.

# %%
asked = [l10_runtimes.texts(60)[k : k + 4] for k in range(0, 60, 4)]
expected = running["PyTorch"].ask("answers", asked)
answers = {name: process.ask("answers", asked) for name, process in running.items()}
alike = {name: l10_runtimes.agreement(found, expected) for name, found in answers.items()}
table(
    [
        {
            "runtime": name,
            "same first word, of 60": f"{found['top 1']}",
            "same five words, of 60": f"{found['top 5']}",
            "largest score difference": f"{found['score']:.1g}",
        }
        for name, found in alike.items()
    ]
)

# %%
others = sorted((name for name in alike if alike[name]["score"] > 0), key=lambda name: alike[name]["score"])
with picture("bfloat16 and int8 move the scores", "largest difference of a score", "", xscale="log") as ax:
    expected_gap = [1 / 64 if "bfloat16" in name else math.nan for name in others]
    guesses = [guess_gap if "bfloat16" in name else math.nan for name in others]
    measured = [alike[name]["score"] for name in others]
    rows(ax, others, {"predicted": expected_gap, "measured": measured, "your guess": guesses})
if worst := max([found["score"] for name, found in alike.items() if "bfloat16" in name], default=0):
    more = "More: the formula rounds once, at the end. The model rounds after every step."
    tell(
        f"bfloat16: {1 / 64:.3f} predicted, {worst:.3f} measured at worst."
        f" {more if worst > 1 / 64 else 'Within the prediction.'}"
    )
else:
    tell("The quick form has no bfloat16.")

# %% [markdown]
# In float32 every runtime agrees to the fourth digit or better: they only add in another order. bfloat16 and int8 may change
# words. Which words? Look at the lead: by how much did the first word's score beat the second's, in PyTorch's answer?

# %%
changed, kept = [], []
for found in answers.values():
    for ours, best in zip(found, expected):
        same = ours[0]["token"] == best[0]["token"]
        (kept if same else changed).append(best[0]["score"] - best[1]["score"])
tell(
    f"First words that stayed: a lead of {sum(kept) / len(kept):.2f} on average. First words that changed: {len(changed)} in"
    f" all, a lead of {sum(changed) / max(1, len(changed)):.2f} on average."
)

# %% [markdown]
# Whether a changed word matters is for you to say, with your own texts and your own measure of quality. Sixty texts show a
# broken model; they don't show a slightly worse one.
#
# ## What does it cost to install, start and hold?
#
# **Your guess:** a process has ONNX Runtime, and takes 32 texts in one call. One in ten has 200 tokens. How much memory does
# the process take at most?

# %%
guess_mb = ...  # MB

# %% [markdown]
# **Prediction.** A process takes what it has after its first short answer. A large batch comes on top. The
# largest thing in it is the scores: 4 bytes for each word, for each token, padding included. For PyTorch in bfloat16 it is 2 bytes. A
# runtime that runs the head at the mask has no such thing.

# %%
longest = max(l10_runtimes.lengths(lines["mixed"]))
held, peaks, installed = l10_runtimes.memory(running)


def scores_mb(name):
    return 0 if name in LEAN else size * longest * V * (2 if name == "PyTorch, bfloat16" else 4) / 1e6


predicted_mb = {name: held[name] + scores_mb(name) for name in running}
mb = [(f"{one[name]:.0f}" for one in (held, predicted_mb, peaks, installed)) for name in running]
table(
    "runtime | start to first answer, s | memory then, MB | at most, predicted, MB | at most, measured, MB | installed, MB",
    *((name, f"{process.start_s:.1f}", *each) for (name, process), each in zip(running.items(), mb)),
)

# %%
if "ONNX Runtime" in running:
    tell(
        f"Exporting the graph took {export_s['float32.onnx']:.0f} s, rounding it to int8 {export_s['int8.onnx']:.0f} s more."
        " You do that once, with PyTorch installed; the server doesn't need PyTorch."
    )
    tell(
        f"On disk: of the {installed['ONNX Runtime']:.0f} MB that pip installs for ONNX Runtime and a tokenizer, ONNX Runtime"
        f" itself is {l10_runtimes.installed_mb(['onnxruntime'], alone=True):.0f}."
    )

# %%
order = sorted(peaks, key=peaks.__getitem__)
with picture("A padded batch takes the memory", "memory of the process, MB", "", xlim=(0, None)) as ax:
    series = {
        "first answer": held,
        "at most": peaks,
        "predicted": predicted_mb,
        "your guess": {"ONNX Runtime": guess_mb},
    }
    rows(ax, order, {what: [mb.get(name, math.nan) for name in order] for what, mb in series.items()})

# %%
copies = {name: (peaks[name] - held[name]) / scores_mb(name) for name in order if scores_mb(name)}
each = ", ".join(f"{name} {times_over:.1f}" for name, times_over in copies.items())
tell(f"How many times the scores came on top: {each}.")
if "ONNX Runtime, mask" in peaks and "ONNX Runtime" in peaks:
    saved_mb = peaks["ONNX Runtime"] - peaks["ONNX Runtime, mask"]
    tell(
        f"With its head at the mask, ONNX Runtime needs {saved_mb:,.0f} MB less. So the head's scores do cost that much:"
        f" {saved_mb / scores_mb('ONNX Runtime'):.1f} copies of them, where the formula counts one."
    )
if "ONNX Runtime" in peaks:
    told_mb, found_mb = predicted_mb["ONNX Runtime"], peaks["ONNX Runtime"]
    compare("ONNX Runtime's memory at most, MB", guess=guess_mb, formula=told_mb, measured=found_mb)

# %% [markdown]
# Memory here is all of the process's pages (RSS), as if it were alone on the machine. *Where the formula fails:* it counts the
# scores once, and nothing else of the batch. The sentences above say how many times the scores would fill what came on top, and (in
# the full form) what of that is really theirs.
#
# ## When does compiling pay?
#
# `torch.compile` costs at each start, and saves a little in each call. It pays after as many texts as the start takes longer,
# divided by what one text saves. Its compiler keeps on disk what it has made, so a later start on the same machine is quicker.
# Here it begins with empty folders: this is a first start, as in a fresh container.

# %%
if "torch.compile" in running:
    slower_s = running["torch.compile"].start_s - running["PyTorch"].start_s
    saved_s = 1 / per_s["PyTorch", "short", 1] - 1 / per_s["torch.compile", "short", 1]
    paid = f"pays after {slower_s / saved_s:,.0f} texts" if saved_s > 0 else "never pays"
    tell(
        f"Compiled, it starts {slower_s:.0f} s later and saves {saved_s * 1000:.1f} ms a text, one text a call: it {paid}."
    )
else:
    tell(f"torch.compile: {missing.get('torch.compile', 'not in the quick form')}.")

# %% [markdown]
# ## The claims

# %%
gain = {"short": onnx, "fast path": measured_less["mixed"], "size": size}
if "ONNX Runtime" in running:
    gain["mixed"] = per_s["ONNX Runtime", "mixed", size] / per_s["PyTorch", "mixed", size]
said_often = "ONNX Runtime is 2–3 × faster", "10–50 MB instead of 500"
for text, entry in zip(said_often, l10_runtimes.verdicts(gain, installed, held)):
    claim(text, **entry)

# %% [markdown]
# ## Exercises
#
# The solutions are in `notebooks/solutions/`, if you are stuck.
#
# **★** A model has 100 million weights in its products. A text has 20 tokens, and each weight meets each token once. A core
# does 200 billion operations a second. How many texts a second can any runtime answer on it at most?

# %%
most_per_s = ...

checks.exercise_10_1(most_per_s)


# %% [markdown]
# **★★** Texts of these lengths, in tokens, are padded to the longest. What share of all tokens computed is padding?


# %%
def padding_share(lengths): ...


checks.exercise_10_2(padding_share)


# %% [markdown]
# **★★★** A runtime starts `later_s` seconds later than the old one. A call of $n$ texts takes $a + bn$ with the old one, and
# $a' + b'n$ with the new one. After how many **texts** has it paid for its later start? (`math.inf` if never.)


# %%
def texts_until_paid(later_s, old, new, n):
    """`old` and `new` are the pairs (a, b), in seconds; n texts go in each call."""
    ...


checks.exercise_10_3(texts_until_paid)

# %% [markdown]
# ## In the lab
#
# The stock model, one text at a time, is `FAST=0`. Give the settings with which the real server answers at least 5 times as many short texts
# per second, and no score moves by more than 0.001. A dict, as `{"BATCH_SIZE": 1}`; the settings are in `docs/settings.md`. No further package.

# %%
import labs

my_settings = ...

labs.lab_10(my_settings)

# %% [markdown]
# ## Ten questions
#
# Answer them aloud, then open the answers.
#
# 1. Why count operations first?
# 2. Why does a lean runtime help single texts most?
# 3. Why does reading the weights bound one text?
# 4. Why does computing less beat computing faster?
# 5. Why are products not everything?
# 6. Why can bfloat16 change a word?
# 7. Why is agreement on 60 texts not quality?
# 8. Why does a padded batch take gigabytes?
# 9. Why does compiling pay only after many texts?
# 10. Why install size matters?
#
# <details><summary>Answers</summary>
#
# 1. No runtime computes more per second than the core can.
# 2. It saves the fixed part of a call, which a batch shares anyway.
# 3. Each weight is needed even for one token.
# 4. Padding and a head at each token can be most of the work.
# 5. Between them values are added, normalised and moved through memory.
# 6. It keeps 8 bits, and where two words are close a step decides.
# 7. It shows a broken model, not a slightly worse one.
# 8. Scores for each word at each token, padding included.
# 9. It costs at each start, and saves a little per call.
# 10. A cold start loads it, and each replica holds it.
# </details>

# %% [markdown]
# ## How far off were you?

# %%
score()

# %% [markdown]
# ## What must hold

# %%
assert operations(10, 10) == limits["counted"], "the formula counts what torch counts"
for name in {"ONNX Runtime", "fast path"} & set(alike):
    assert alike[name]["top 1"] == 60 and alike[name]["score"] < 1e-3, "float32 is float32"
if "ONNX Runtime" in running:
    assert installed["ONNX Runtime"] < installed["PyTorch"] and held["ONNX Runtime"] < held["PyTorch"]
    holds(running["ONNX Runtime"].start_s < running["PyTorch"].start_s, "it starts sooner: it imports less")
    holds(onnx[0] > onnx[2], "a lean runtime helps small calls most")
    holds(measured_less["mixed"] > measured_less["short"], "padding costs most where lengths differ")
    holds(measured_less["mixed"] > onnx[2], "computing less beats computing faster")
holds(all(not per_s[n, "short", 32] > 1.1 * limit(n) for n in running), "nobody is faster than the core")

# %% [markdown]
# ## Take away
#
# * Count first: operations of a text against what your core can do. That is all that any runtime can ever give you.
# * In calls of many texts: stop computing what nobody needs (padding, the head at every token), then make the numbers smaller,
#   and only then change the runtime. For single texts the runtime counts as much.
# * A lean runtime starts sooner, installs smaller and helps small calls. Compare its answers before you trust it.
#
# Which of all this is for you? [Lesson 11](11_protocols_and_packages.ipynb)
