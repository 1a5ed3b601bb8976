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
from lesson import BLUE, GREEN, GREY, ORANGE, PURPLE, SERVER_CORES, claim, compare, dots, guessed, holds
from lesson import line, picture, quick, said, score, table, tell, way, whose

import math

import checks
from support import l10_runtimes

# %% [markdown]
# The runtime is the last box on the way of a request. All else stays as it was. So this lesson needs no server: it asks the
# model itself.

# %%
way(changed={"model"})

# %% [markdown]
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
table(
    [
        {
            "numbers": dtype,
            "operations a second, billions": f"{limits[dtype] / 1e9:.0f}",
            "short texts/s at most, head at each token": f"{limits[dtype] / operations(mean, mean):.0f}",
            "head at the mask only": f"{limits[dtype] / operations(mean, 1):.0f}",
        }
        for dtype in ("float32", "bfloat16")
    ]
)
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


curve = [n / 10 for n in range(10, 321)]
with picture(
    "A lean runtime helps small calls", "texts a call", "times PyTorch's texts/s", ylim=(0, None)
) as ax:
    ax.set_xscale("log")
    line(ax, curve, [(a_s + b_s * n) / (b_s * n) for n in curve])
    for name, color in (
        ("OpenVINO", ORANGE),
        ("torch.compile", GREEN),
        ("ONNX Runtime", BLUE),
    ):  # the last on top
        if name in running:
            dots(ax, sizes, times(name), name, color)
    guessed(ax, [1], [guess_times])
    ax.axhline(1, color=GREY, linewidth=1)
    ax.set_xticks(sizes, sizes)
    ax.minorticks_off()

# %%
onnx = times("ONNX Runtime")
tell(
    f"a = {a_s * 1000:.1f} ms, b = {b_s * 1000:.1f} ms. Predicted for 1, 8 and 32 texts a call:"
    f" {', '.join(f'{p:.1f}' for p in predicted)} times; ONNX Runtime measured: {', '.join(f'{m:.1f}' for m in onnx)}."
)
tell(
    f"ONNX Runtime's own call for one text takes {1000 / per_s['ONNX Runtime', 'short', 1]:.1f} ms. Reading the weights"
    f" takes about {read_s * 1000:.1f} ms and computing at least"
    f" {operations(mean, mean) / limits['float32'] * 1000:.1f} ms. Both can happen at the same time. So the better prediction for one"
    f" text is {(a_s + b_s) / (b_s + read_s):.1f} times."
)
compare(
    "ONNX Runtime for one text, times PyTorch",
    guess=guess_times,
    formula=(a_s + b_s) / (b_s + read_s),
    measured=onnx[0],
)

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
MARKS = {"limit": ("|", "black", 15), "predicted": ("|", "black", 15), "your guess": ("*", PURPLE, 13)}


def rows(ax, names, series):
    """A row for each name; which mark is what stands below."""
    colors = iter((ORANGE, BLUE) if len(series.keys() - MARKS.keys()) > 1 else (BLUE,))
    drawn = []
    for what, values in series.items():
        mark, color, size = MARKS.get(what) or ("o", next(colors), 7)
        style = {"color": color, "markersize": size, "markeredgewidth": 3 if mark == "|" else 1}
        drawn += ax.plot(values, range(len(names)), mark, label="_", **style)
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(-0.6, len(names) - 0.4)
    ax.figure.set_size_inches(7.2, 0.33 * len(names) + 1.9)
    ax.figure.legend(drawn, list(map(whose, series)), loc="outside lower center", ncols=4, handletextpad=0.2)


# %%
LEAN = {"ONNX Runtime, mask", "fast path", "fast path, bfloat16"}


def limit(name, n=mean):
    """Texts/s that the core can do at most, for what this runtime computes; int8 has no limit measured here."""
    dtype = "bfloat16" if "bfloat16" in name else "float32"
    return math.nan if "int8" in name else limits[dtype] / operations(n, 1 if name in LEAN else n)


order = sorted(running, key=lambda name: per_s[name, "short", 32])
with picture("No runtime reaches the core's limit", "short texts a second", "", xscale="log") as ax:
    rows(
        ax,
        order,
        {
            "one a call": [per_s[name, "short", 1] for name in order],
            "32 a call": [per_s[name, "short", 32] for name in order],
            "limit": [limit(name) for name in order],
            "your guess": [guess_per_s if name == "PyTorch" else math.nan for name in order],
        },
    )

# %%
table(
    [
        {
            "runtime": name,
            "texts/s, 32 a call": f"{per_s[name, 'short', 32]:.0f}",
            "limit, texts/s": f"{limit(name):.0f}" if limit(name) > 0 else "-",
            "share of the limit": f"{per_s[name, 'short', 32] / limit(name):.0%}" if limit(name) > 0 else "-",
        }
        for name in reversed(order)
    ]
)

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
def work(texts, size, lean):
    """Operations for all texts, `size` a call: each call padded to its longest, or lean."""
    n = l10_runtimes.lengths(texts)
    if lean:
        return sum(operations(one, 1) for one in n)
    calls = [n[k : k + size] for k in range(0, len(n), size)]
    return sum(len(call) * operations(max(call), max(call)) for call in calls)


size = quick(8, 32)
lines = {kind: l10_runtimes.texts(32, kind) for kind in ("short", "mixed")}
predicted_less = {k: work(asked, size, False) / work(asked, size, True) for k, asked in lines.items()}
measured_less = {k: per_s["fast path", k, size] / per_s["ONNX Runtime", k, size] for k in lines}
table(
    [
        {
            "texts": k,
            "predicted, times": f"{predicted_less[k]:.1f}",
            "measured, times": f"{measured_less[k]:.1f}",
        }
        for k in lines
    ]
)
speeds("mixed")

# %%
with picture(
    "Computing less beats computing faster", "times ONNX Runtime's texts/s", "", xlim=(0, None)
) as ax:
    guesses = [guess_less if kind == "mixed" else math.nan for kind in lines]
    series = {
        "predicted": predicted_less.values(),
        "fast path": measured_less.values(),
        "your guess": guesses,
    }
    rows(ax, list(lines), {what: list(values) for what, values in series.items()})
    ax.axvline(1, color=GREY, linewidth=1)

# %%
speed_of = {
    (name, k): work(lines[k], size, name in LEAN) * per_s[name, k, size] / 32 / 1e9
    for name in ("ONNX Runtime", "fast path")
    for k in lines
}
tell(
    "Billions of operations a second, short and mixed: "
    + "; ".join(
        f"{name} {speed_of[name, 'short']:.0f} and {speed_of[name, 'mixed']:.0f}"
        for name in ("ONNX Runtime", "fast path")
    )
    + f", of {limits['float32'] / 1e9:.0f} at most."
)
said(
    speed_of["ONNX Runtime", "mixed"] < speed_of["ONNX Runtime", "short"],
    "In the padded batch ONNX Runtime's operations take longer: that makes the ratio larger than predicted.",
)
said(
    speed_of["fast path", "mixed"] > speed_of["fast path", "short"],
    "With mixed lengths the fast path's operations go quicker: that makes the ratio larger than predicted, too.",
)
compare(
    "the fast path, mixed texts, times ONNX Runtime",
    guess=guess_less,
    formula=predicted_less["mixed"],
    measured=measured_less["mixed"],
)

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

# %%
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
held, peaks = {name: process.first for name, process in running.items()}, {}
installed = {}
for name, process in running.items():
    peaks[name], installed[name] = process.ask("peak"), process.ask("installed")
    process.stop()


def scores_mb(name):
    return 0 if name in LEAN else size * longest * V * (2 if name == "PyTorch, bfloat16" else 4) / 1e6


table(
    [
        {
            "runtime": name,
            "start to first answer, s": f"{process.start_s:.1f}",
            "memory then, MB": f"{held[name]:.0f}",
            "at most, predicted, MB": f"{held[name] + scores_mb(name):.0f}",
            "at most, measured, MB": f"{peaks[name]:.0f}",
            "installed, MB": f"{installed[name]:.0f}",
        }
        for name, process in running.items()
    ]
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
    rows(
        ax,
        order,
        {
            "first answer": [held[name] for name in order],
            "at most": [peaks[name] for name in order],
            "predicted": [held[name] + scores_mb(name) for name in order],
            "your guess": [guess_mb if name == "ONNX Runtime" else math.nan for name in order],
        },
    )

# %%
copies = {name: (peaks[name] - held[name]) / scores_mb(name) for name in order if scores_mb(name)}
tell(
    "How many times the scores came on top: "
    + ", ".join(f"{name} {times_over:.1f}" for name, times_over in copies.items())
    + "."
)
if "ONNX Runtime, mask" in peaks and "ONNX Runtime" in peaks:
    saved_mb = peaks["ONNX Runtime"] - peaks["ONNX Runtime, mask"]
    tell(
        f"With its head at the mask, ONNX Runtime needs {saved_mb:,.0f} MB less. So the head's scores do cost that much:"
        f" {saved_mb / scores_mb('ONNX Runtime'):.1f} copies of them, where the formula counts one."
    )
if "ONNX Runtime" in peaks:
    compare(
        "ONNX Runtime's memory at most, MB",
        guess=guess_mb,
        formula=held["ONNX Runtime"] + scores_mb("ONNX Runtime"),
        measured=peaks["ONNX Runtime"],
    )

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
if "ONNX Runtime" in running:
    gains = [*onnx, per_s["ONNX Runtime", "mixed", size] / per_s["PyTorch", "mixed", size]]
    faster = (
        f"{onnx[0]:.1f}, {onnx[1]:.1f} and {onnx[2]:.1f} times for 1, 8 and 32 short texts a call, {gains[-1]:.1f} times for"
        f" {size} of mixed lengths; the fast path, which is PyTorch too, is {measured_less['mixed']:.1f} times as fast as"
        " ONNX Runtime there, which pads and runs its head at each token"
    )
    depends = "depends on the batch: it saves the fixed part of a call" if gains[0] > 1.3 else "fails"
    sizes_mb, held_mb = ([mb[name] for name in ("ONNX Runtime", "PyTorch")] for mb in (installed, held))
    smaller = (
        f"{sizes_mb[0]:.0f} MB against {sizes_mb[1]:.0f}; in memory after the first answer {held_mb[0]:.0f} MB against"
        f" {held_mb[1]:.0f}"
    )
    ratio = f"fails for the figures; {sizes_mb[1] / sizes_mb[0]:.0f} times smaller all the same"
    verdicts = "holds" if min(gains) >= 2 else depends, "holds" if sizes_mb[0] <= 50 else ratio
else:
    faster = smaller = "it takes `pip install onnxruntime onnx onnxscript`"
    verdicts = ("untested: ONNX Runtime is not installed",) * 2
claim(
    "ONNX Runtime is 2–3 × faster",
    who="ONNX Runtime against PyTorch, both float32, the same model and texts, one core, without HTTP",
    number=faster,
    verdict=verdicts[0],
)
claim(
    "10–50 MB instead of 500",
    who="what pip installs for ONNX Runtime and a tokenizer, against PyTorch (as it is installed here) and Transformers",
    number=smaller,
    verdict=verdicts[1],
)

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
