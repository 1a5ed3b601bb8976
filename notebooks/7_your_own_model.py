# %% [markdown]
# # 7. Your own model
#
# You have trained a model. It is a PyTorch module: numbers in, numbers out. It knows nothing of texts, and nothing of servers.
#
# **Question: what does your own model need to become a service, and where will its time go?**
#
# Afterwards you can decide, for a model of yours: what its class must do, what a batch will gain, how large its reply may be,
# and whether it wants a process of its own.
#
# It takes about 2.5 minutes (the quick form under one), two cores and 4 GB of memory. [What all lessons need](README.md).

# %%
# "No module named 'lesson'"? Open this notebook where it lies, in the project's notebooks/, or by `make learn`.
from lesson import BLUE, GREY, ORANGE, bars, claim, compare, dots, guessed, holds, line
from lesson import picture, quick, said, score, serve, serve_all, stop, table, tell

import inspect
import tempfile
from pathlib import Path

import torch

import checks
from support import l07_language, l07_measure, l07_parts

torch.set_num_threads(1)

# %% [markdown]
# ## From a module to a service
#
# Here is a module of our own, or rather the method of it that computes. It guesses in which language a text is written.
# The rest of it, its sentences and its training are in `notebooks/support/l07_language.py`. It learns thirty sentences.

# %%
print(inspect.getsource(l07_language.Net.forward))
torch.manual_seed(0)
net = l07_language.train(l07_language.Net())
folder = tempfile.TemporaryDirectory()
weights = str(Path(folder.name) / "language.pt")
torch.save(net.state_dict(), weights)

# %% [markdown]
# A server wants more than a module. It wants a class with one method: `__call__` takes a **list** of inputs and returns a list
# of answers, one for each. That is all that it must have. Here is the one of our class `Language`, in the same file:

# %%
print(inspect.getsource(l07_language.Language.__call__))

# %% [markdown]
# Two more things are worth their lines:
#
# * `example` is an input that works. The server tries it at the start. A model that can't answer its own example never gets
#   ready, and so it never gets a request.
# * `check` looks at each input *before* the queue. The sentence of its `ValueError` is what the client reads, with status 422.
#   What it returns is what `__call__` gets. (If it returns nothing, `__call__` gets the input as it came.)
#   Ours takes a parameter, too: `rounds`, for an experiment below.

# %%
print(inspect.getsource(l07_language.Language.check))

# %% [markdown]
# Only the model is yours. Queue, batches, deadlines, rejections and metrics are there already. `MODEL=module:Class` names
# the class. `LANGUAGE_WEIGHTS` is our own setting: the class reads it.

# %%
own = {"MODEL": "notebooks.support.l07_language:Language", "LANGUAGE_WEIGHTS": weights, "BATCH_SIZE": 32}
language = serve(**own)
asked = ["Je voudrais une tasse de café.", "Good evening, how are you?", "Ich möchte bitte Kaffee.", 5]
replies = [l07_measure.post(language, inputs) for inputs in asked]
table("sent | status | reply", *((sent, reply.status, reply.body) for sent, reply in zip(asked, replies)))

# %% [markdown]
# The 5 never reached the model, nor the queue. It got the sentence of `check`.
#
# One thing is easy to forget. The texts of a batch are filled up with zeros, to be equally long. An answer must not depend on that:
# a text must get the same answer beside a long one as alone. In the module `real` takes care of it. Try it, with it and
# without. (*Raw scores* are what the module returns. The class makes shares of them, which add up to 1.)


# %%
@torch.inference_mode()
def furthest_apart(forget):
    """How far a short text's raw scores alone are from those beside a long one, at most."""
    short, long = l07_language.numbers(asked[0]), l07_language.numbers(asked[1] * 8)
    both = torch.nn.utils.rnn.pad_sequence([short, long], batch_first=True)
    if forget:  # the zeros become letters: blanks
        both = both.clamp(min=1)
    return float((net(both)[0] - net(short[None])[0]).abs().max())


careful, careless = furthest_apart(forget=False), furthest_apart(forget=True)
alone = ", ".join(f"{score:.1f}" for score in net(l07_language.numbers(asked[0])[None])[0].tolist())
moved = f"by {careful:.5f} at most; where the zeros count as letters, by {careless:.1f}"
tell(f"Alone the text has the raw scores {alone}. Beside a long text they move {moved}.")

# %% [markdown]
# ## Another task by one setting
#
# Models of Transformers need no class. `TASK` names what the model does, as Transformers calls it. Such a model has two parts.
# The *encoder* reads the text, in many layers. The *head* comes last, and makes the task's answer of what was read.
#
# To show that without a download we take the encoder of the bundled model, put other heads on it, and save them in a temporary
# folder. The heads' weights are random. So their answers mean nothing, but their form, their size and their time are real.

# %%
SERVED = {"a vector a text": "feature-extraction", "a vector a token": "feature-extraction"}
SERVED |= quick({}, {task: task for task in ("text-classification", "token-classification")})
folders = {task: l07_parts.make(folder.name, task) for task in l07_parts.KINDS}
settings = ({"MODEL": folders[name], "TASK": task, "BATCH_SIZE": 32} for name, task in SERVED.items())
servers = dict(zip(SERVED, serve_all(*settings)))
embedded = {name: l07_measure.post(server, "We met in Paris.") for name, server in servers.items()}
rows = ((name, SERVED[name], one.body[:60].replace("|", ""), len(one.body)) for name, one in embedded.items())
table("what | TASK | reply begins | bytes", *rows)

# %% [markdown]
# The vectors have the same `TASK`. A folder with a `modules.json`, as sentence-transformers writes it, makes one vector of a
# whole text. Any other folder gives a vector for each of its *tokens*, the pieces of words that the model reads.
#
# ## Where does the time go?
#
# A call has six steps. **Tokenise**: texts become whole numbers. **Pad**: all become as long as the longest.
# **Forward**: the encoder's layers. **Head**: what turns their result into scores. **Answer**: the scores become labels and
# words. **Serialise**: all that becomes JSON.
#
# Take 32 short sentences. The same encoder reads them for every task. Filling a mask has the largest head: it gives a score for
# each of 30,522 words, at each token. What share of the call do you think that head takes?

# %%
guess_head = ...  # % of the call's time

# %% [markdown]
# **Prediction.** Count the multiplications for one token, $h = 384$ numbers wide. A layer has four products of $h \times h$ and
# two of $h \times 4h$: together $12\,h^2$. There are 6 layers. The head of the mask has one of $h \times h$ and one of
# $h \times 30522$. If each multiplication takes the same time, the head's share is
#
# $$\frac{h^2 + 30522\,h}{h^2 + 30522\,h + 6 \cdot 12\,h^2}$$
#
# The other heads are a few numbers wide: their share is next to nothing.

# %%
from loadtests.load.texts import corpus

h, words, layers = 384, 30522, 6
head = h * h + words * h
predicted_head = head / (head + layers * 12 * h * h)
sentences = [one.text for one in corpus("short")[:32]]
timed = {task: l07_parts.time_parts(folders[task], task, sentences, quick(1, 7)) for task in folders}
ms = {task: found for task, (found, _, _) in timed.items()}
share = {task: {part: one / sum(found.values()) for part, one in found.items()} for task, found in ms.items()}
columns = " | ".join(["32 texts, ms", *l07_parts.PARTS])
table(columns, *((task, *(f"{found[part]:.2f}" for part in l07_parts.PARTS)) for task, found in ms.items()))

# %%
l07_parts.draw(share, 100 * predicted_head, guess_head)
measured_head = share["fill-mask"]["head"]
compare(
    "the head's share of fill-mask, %",
    guess=guess_head,
    formula=100 * predicted_head,
    measured=100 * measured_head,
)
tell(
    "The marks in the picture: where the head begins. Padding itself"
    f" takes hardly any time, but {timed['fill-mask'][2]:.0%} of what the encoder computed was padding, and that time hides in “forward”."
)

# %% [markdown]
# So the encoder decides, unless a head is as wide as a vocabulary. There this server computes the head at the mask only, and
# not at every token. It also lays texts end to end, so that it pads nothing (lesson 4).
#
# *Where the formula fails:* it knows multiplications only. The mask's answer needs an exponential for each of 30,522 words, and
# the vectors of all tokens become the longest JSON: both are outside of it, and both show in the picture.
#
# ## How large is a reply?
#
# One number in JSON is some twelve characters: `-0.03170817,`. A vector for a text is 384 numbers. Now somebody serves a vector
# for each *token*. How large is the reply to one text of 256 tokens?

# %%
guess_kb = ...  # KB for a text of 256 tokens

# %% [markdown]
# **Prediction.** Tokens × 384 × 12 characters. And the cost? Every number must be written as decimal digits, so the time grows as
# the reply does. Time one vector of 384 random numbers here; a reply of $t$ tokens takes $t$ times that.

# %%
import numpy as np

from workers.web.replies import rendered

vector = np.random.default_rng(0).normal(size=384).astype("float32")
vector_ms = l07_measure.seconds(lambda: rendered(vector), 500) * 1000
lengths, by_token = quick((32, 256), (8, 32, 64, 128, 256, 500)), servers["a vector a token"]
replies_of = {tokens: l07_measure.reply_of(by_token, tokens) for tokens in lengths}

# %%
title, axis = "A vector a token makes megabytes of a page", "size of the reply, KB"
with picture(title, "tokens of the text", axis, ylim=(0, 6 * lengths[-1])) as ax:
    line(ax, [0, lengths[-1]], [0, lengths[-1] * 384 * 12 / 1000], "predicted: 12 bytes a number")
    dots(ax, lengths, [size / 1000 for size, *_ in replies_of.values()])
    guessed(ax, [256], [guess_kb])

# %%
columns = "tokens | reply, KB | model, ms | all but queue and model, ms | the client reads the JSON, ms"
rows = ((tokens, size / 1000, *times_ms) for tokens, (size, *times_ms) in replies_of.items())
table(columns, *((tokens, f"{kb:.0f}", *(f"{ms:.1f}" for ms in times_ms)) for tokens, kb, *times_ms in rows))
text, server = l07_measure.of_length(256), servers["a vector a text"]
one_vector = l07_measure.post(server, text)
base64_form = l07_measure.post(server, text, path="v1/embeddings", encoding_format="base64")
formula, measured = 256 * 384 * 12 / 1000, replies_of[256][0] / 1000
compare("KB for 256 tokens", guess=guess_kb, formula=formula, measured=measured)
tell(
    f"Writing its JSON should take {256 * vector_ms:.1f} ms. One vector for the whole text has {len(one_vector.body) / 1000:.1f} KB; in"
    f" base64, as OpenAI's client asks for it, {len(base64_form.body) / 1000:.1f} KB with all that stands around it."
)

# %% [markdown]
# The size follows the formula. The time is more than writing: the bytes must be copied to the client, and the client must read
# them. Python's own JSON takes longer to read the reply than the server takes to write it. The server writes on its event loop.
# While it does, nobody else is served.
#
# **The rule.** If the client wants one vector a text, make it in the server: that is one file, `modules.json`. Send base64 where
# the client knows it. Send each token's vector only to those who need it.
#
# ## What does a batch gain?
#
# A call with $n$ texts takes $a + b\,n$ (lesson 4). What does *your* task gain from 32 texts in a call? The language model is
# small: a few letters, three layers. The others share one encoder. How many times as many texts a second does the language model
# answer in batches of 32 as one by one?

# %%
guess_gain = ...  # times

# %% [markdown]
# **Prediction.** Measure calls of 1 and of 8 texts, nothing else. They give $b = (t_8 - t_1) / 7$ and $a = t_1 - b$. Then a batch
# of 32 should gain
#
# $$\frac{32\,(a + b)}{a + 32\,b}$$
#
# Then measure calls of 32. The server itself says how long the model took: that is `model;dur` in the header `Server-Timing`.

# %%
plain = [text.replace("[MASK]", "it") for text in sentences]
asked_of = {"language": language, **servers}
laws = {name: l07_measure.batch_law(server, plain) for name, server in asked_of.items()}
columns = "model | a, ms | b, ms | gain of 32, predicted | measured"
rows = ((name, *law.values()) for name, law in laws.items())
table(columns, *((name, f"{a:.2f}", f"{b:.2f}", f"{p:.1f}", f"{m:.1f}") for name, a, b, p, m in rows))

# %%
rows = list(laws)[::-1]
with picture("What a batch of 32 gains differs by model", "times the texts/s of single calls", "") as ax:
    ax.axvline(1, color=GREY, linestyle=":")
    bars(ax, [laws[name]["predicted"] for name in rows], range(len(rows)), None)
    dots(ax, [laws[name]["measured"] for name in rows], range(len(rows)), None)
    right = max(laws[rows[0]]["predicted"], laws[rows[0]]["measured"])  # of the lowest row's marks
    for name, color in (("measured", BLUE), ("predicted", "black")):
        ax.plot([right], [0], label=name, color=color, alpha=0)
    guessed(ax, [guess_gain], [len(rows) - 0.4])  # above its row, where its name hides nothing
    ax.text(1.1, -0.55, "no gain", color=GREY, fontsize=12)
    ax.set_yticks(range(len(rows)), rows)
    ax.set(ylim=(-0.8, len(rows)), xlim=(0, None))

# %%
law, what = laws["language"], "the language model's gain of 32"
compare(what, guess=guess_gain, formula=law["predicted"], measured=law["measured"])
least, most = (f(law["measured"] for law in laws.values()) for f in (min, max))
furthest = max(laws, key=lambda name: abs(laws[name]["measured"] / laws[name]["predicted"] - 1))
tell(
    f"The gains go from {least:.1f} to {most:.1f} times. The formula is furthest off for *{furthest}*:"
    f" {laws[furthest]['predicted']:.1f} predicted, {laws[furthest]['measured']:.1f} measured."
)

# %% [markdown]
# The gain is decided by $a / b$ alone, and not by how small a model is. A small model has a small $b$. But it has few operations to
# launch, too, and so a small $a$.
#
# *Where the formula fails:* it takes the ninth text to cost what the second did. Does it? Time two pieces by themselves. The
# first is the language model, and what it costs for each letter (padding doesn't count as letters). The second is one matrix
# product out of the encoder's layers, and what it costs for each token.

# %%
product = torch.nn.Linear(h, 4 * h)
prices = [(n, *l07_measure.prices_in(net, product, plain, n)) for n in (1, 8, 32)]
said(
    prices[2][2] < 0.9 * prices[1][2],
    "A token of the encoder is still cheaper beyond eight texts, so the encoder gains more than the line says.",
)
columns = "texts in the call | language model, µs a letter | one product of a layer, µs a token"
table(columns, *((n, f"{letter_s * 1e6:.1f}", f"{token_s * 1e6:.2f}") for n, letter_s, token_s in prices))

# %% [markdown]
# A piece has no fixed price. A product of few rows leaves most of the core idle, so a token is cheaper in a batch. And the language
# model pads: in a larger batch the longest text is longer, and all pay for it. Its price for a letter has both in it. So measure a
# batch of the size that you will serve.
#
# ## When is a process worth it?
#
# "Use processes when Python pre- and post-processing is heavy." Our class cleans each text in Python, a letter at a time. Then
# torch computes. Python's lock, the GIL, lets one thread at a time run Python; torch lets go of it while it computes (lesson 2).
# So what happens to two copies of the model, in two threads of one process, or in two processes?
#
# The parameter `rounds` lets us turn the knob: the text is cleaned so many times. Take so many that Python is six tenths of a
# call's time, and torch four. There are two cores. How many times the answers of one copy do two copies give, in two threads?

# %%
guess_two_threads = ...  # times the answers of one copy

# %% [markdown]
# **Prediction.** A call takes $p$ seconds of Python and $m$ of torch; the share of Python is $s = p / (p + m)$. Instances that don't
# disturb each other answer $c$ times what one does. That is $c$ processes on $c$ cores. In threads the Python parts must take
# turns, so there can't be more than $1/p$ answers a second:
#
# $$\text{processes: } c \qquad \text{threads: } \min(c,\; 1 / s)$$
#
# And `/health`? The event loop is Python, too. A thread that computes in Python keeps the lock for up to 5 ms when another one asks
# for it. So each time that the loop needs the lock, it may wait for 5 ms. In a process the model has a lock of its own.
#
# Four users ask, each again as soon as it has its answer (a *closed loop*, see the [glossary](glossary.md)).

# %%
text = "The train leaves in the morning, and we will be there. " * 16
with torch.inference_mode():
    torch_s = l07_measure.seconds(lambda: net(l07_language.numbers(text)[None]))
round_s = l07_measure.seconds(lambda: l07_language.numbers(text, 40)) / 40


def rounds_for(share):
    """How many rounds make Python this share of a call."""
    return max(1, round(share / (1 - share) * torch_s / round_s))


tell(f"Torch takes {torch_s * 1000:.1f} ms for a text, a round of Python {round_s * 1000:.3f} ms.")

# %%
places = {
    "one thread": {},
    "one process": {"OFFLOAD": "process"},
    "two threads": {"INSTANCES": 2},
    "two processes": {"OFFLOAD": "process", "INSTANCES": 2},
    "two threads, turns of 0.2 ms": {"INSTANCES": 2, "SWITCH_S": 0.0002},
}
stop(*servers.values(), language)
copies = dict(zip(places, serve_all(*(own | {"BATCH_SIZE": 1} | settings for settings in places.values()))))
memory_mb = {place: server.memory_mb() for place, server in copies.items()}


# %%
def at(place, share):
    """Answers/s, ms for /health, and ms of a call of the model, where Python is this share of a call."""
    return l07_measure.of_calls(copies[place], text, rounds_for(share))


shares = quick((0.6,), (0.1, 0.35, 0.6, 0.8))
# Each place in turn, so that a slow moment of the machine meets all of them.
answered = {(place, share): at(place, share) for share in shares for place in list(places)[:4]}
gain = {
    (kind, share): answered[f"two {plural}", share][0] / answered[f"one {kind}", share][0]
    for share in shares
    for kind, plural in (("thread", "threads"), ("process", "processes"))
}

# %%
fine, top = [i / 100 for i in range(5, 86)], max(2.5, 1.1 * max(gain.values()))
title, axis = "The more Python, the less a second thread adds", "Python's share of a call, %"
formulas = (
    (lambda s: 2, ORANGE, "-"),
    (lambda s: min(2, 1 / s), BLUE, "-"),
    (lambda s: 2 / (1 + s), GREY, "--"),
)
with picture(title, axis, "times the answers of one copy", ylim=(0, top)) as ax:
    for formula, color, style in formulas:
        ax.plot([100 * s for s in fine], [formula(s) for s in fine], style, color=color, linewidth=1.5)
    for kind, plural, color in (("process", "two processes", ORANGE), ("thread", "two threads", BLUE)):
        dots(ax, [100 * s for s in shares], [gain[kind, s] for s in shares], plural, color)
    guessed(ax, [60], [guess_two_threads])
    ax.text(6, 0.15, "lines: formulas (dashed: see below) · dots: measured", color=GREY, fontsize=12)

# %%
columns = "Python's share | copies | answers/s | /health, median ms | a call of the model, ms | memory, MB"
rows = ((f"{share:.0%}", place, *one, memory_mb[place]) for (place, share), one in answered.items())
table(
    columns,
    *((s, place, f"{per_s:.0f}", f"{a:.1f}", f"{b:.1f}", f"{mb:.0f}") for s, place, per_s, a, b, mb in rows),
)
tell(
    f"Python six tenths: two threads give {gain['thread', 0.6]:.2f} times the answers of one. The formula says"
    f" {1 / 0.6:.2f}. Two processes give {gain['process', 0.6]:.2f} times those of one; the formula says 2. In each of them a call"
    f" takes {answered['two processes', 0.6][2]:.1f} ms, in a single one {answered['one process', 0.6][2]:.1f}."
)

# %% [markdown]
# Two processes come near their line, and the nearer the longer a call is. The event loop and our clients need some of the two
# cores, too. That makes each call a little longer, a short one about as much as a long one: compare the second column from the right.
#
# *Where the formula fails:* two threads lie well below their line. The formula lets them take turns perfectly: while one computes
# in torch, the other has the lock. But nobody arranges that. Two threads with equal work fall into step. Both want the lock at once
# and share it, so their Python parts take twice as long. Then both are in torch, and nobody has the lock. A call takes
# $c\,p + m$, and $c$ threads give
#
# $$\frac{c\,(p + m)}{c\,p + m} = \frac{c}{1 + (c - 1)\,s}$$
#
# times the answers of one. (That is Amdahl's law. The lock is what can't be done side by side.) Two numbers can check it. The server
# counts how long the calls of its model take: in step it must be $2p + m$. And it must not matter how *often* the lock changes
# hands: turns of 0.2 ms in place of 5 must change nothing. But `/health` must wait for much less. `sys.setswitchinterval` is the
# switch for that.

# %%
hasty, python_s = at("two threads, turns of 0.2 ms", 0.6), rounds_for(0.6) * round_s
alone_ms, in_step_ms = 1000 * (python_s + torch_s), 1000 * (2 * python_s + torch_s)
step, measured = {share: 2 / (1 + share) for share in shares}, gain["thread", 0.6]
compare("two threads, Python six tenths", guess=guess_two_threads, formula=step[0.6], measured=measured)
columns = "Python's share | two threads, in perfect turns | in step | measured"
rows = ((f"{s:.0%}", min(2, 1 / s), step[s], gain["thread", s]) for s in shares)
table(columns, *((s, *(f"{times:.2f}" for times in row)) for s, *row in rows))

# %%
one_thread, two_threads = answered["one thread", 0.6], answered["two threads", 0.6]
tell(
    f"Python six tenths, a call of the model: alone {alone_ms:.1f} ms predicted, {one_thread[2]:.1f} measured; one"
    f" of two threads {in_step_ms:.1f} ms predicted, {two_threads[2]:.1f} measured. With turns of 0.2 ms two threads"
    f" answer {hasty[0]:.0f} texts/s in place of {two_threads[0]:.0f}, and `/health` waits for {hasty[1]:.1f} ms in"
    f" place of {two_threads[1]:.1f}."
)

# %%
threads, processes = answered["two threads", 0.6], answered["two processes", 0.6]
single, apart = answered["one thread", 0.6], answered["one process", 0.6]
claim(
    "Use processes when Python pre- and post-processing is heavy",
    who="our own class on two cores, Python six tenths of a call, four users who ask again and again",
    number=f"two processes answer {processes[0]:.0f} texts/s and two threads {threads[0]:.0f}, one process {apart[0]:.0f} and one"
    f" thread {single[0]:.0f}; /health waits for {processes[1]:.1f} ms beside two processes and {threads[1]:.1f} ms beside two threads;"
    f" memory {memory_mb['two processes']:.0f} and {memory_mb['two threads']:.0f} MB",
    verdict="holds for several copies: c threads give c / (1 + (c - 1) x share of Python) times one; fails for one copy",
)
stop()

# %% [markdown]
# **The rule.** One copy: a thread. A process gives hardly more answers; it keeps `/health` quick. Several copies: put the share of
# Python into $c / (1 + (c-1)\,s)$. A tenth of Python costs two copies little, a half of it costs a third of their answers. Then
# take processes, if you have the memory. Better still: make the Python part short. A tokenizer in Rust lets go of the lock, as
# torch does.
#
# ## Exercises
#
# Fill in and run. The checker tells you what it thinks; it never stops the notebook. One solution of each is in
# `notebooks/solutions/`.
#
# **★** A model gives a vector of 768 numbers for each token. A number takes 12 characters. How large is the reply to a text of 200
# tokens, in MB?

# %%
reply_mb = ...

checks.exercise_7_1(reply_mb)

# %% [markdown]
# **★★** Write the class for a model that counts the words of a text. `__call__(self, inputs)` answers a whole batch.
# `check(self, inputs, parameters)` rejects what is not a text, and a text without a word, with a ValueError. Its sentence says what
# to send.


# %%
class Words: ...


checks.exercise_7_2(Words)

# %% [markdown]
# **★★★** Python takes the `share` of a call's time. How many times the answers of one copy do `copies` of them give on `cores`
# cores? `place` is "thread" (they fall into step) or "process". Instances that have no core of their own don't help.


# %%
def times_one_copy(place, copies, cores, share): ...


checks.exercise_7_3(times_one_copy)

# %% [markdown]
# ## In the lab
#
# How much Python may a call have, so that two threads still give 1.3 times the answers of one? Give the share, between 0 and 1, as large
# as you dare. It starts the real server with one instance and with two, and judges what it measures.

# %%
import labs

share_of_python = ...

labs.lab_7(share_of_python)

# %% [markdown]
# ## Ten questions
#
# Answer them aloud, then open the answers.
#
# 1. Why must padding be masked?
# 2. Why check inputs before the queue?
# 3. Why does the head matter so much in fill-mask?
# 4. Why can a reply be larger than its question by far?
# 5. Why does a small model not always gain from batches?
# 6. Why do two threads fall into step?
# 7. Why is Amdahl's law the right one?
# 8. How could turns of 0.2 ms have refuted it?
# 9. Why does /health get quicker with short turns?
# 10. When a process, then?
#
# <details><summary>Answers</summary>
#
# 1. Else a text's answer depends on its neighbours in the batch.
# 2. A bad text then costs one 422 and no batch.
# 3. It gives a score to each word of the vocabulary, at each token.
# 4. A vector per token has hundreds of numbers, each a dozen characters in JSON.
# 5. Its fixed part is small, too: a/b decides.
# 6. Both want the lock at once, share it, and then both are in torch.
# 7. The lock is the part that can't be done side by side.
# 8. If the lock's hand-over were the cost, more of them would have changed the speed.
# 9. The loop waits for the lock for one turn at most.
# 10. For several copies with much Python, if you have the memory.
# </details>
#
# ## How far off were you? And what must hold

# %%
score()
assert careful < 1e-3 < careless, "padding must not change an answer"
assert [reply.status for reply in replies] == [200, 200, 200, 422], "check rejects before the queue"
assert len(embedded["a vector a text"].json) == 384 and len(base64_form.body) < 0.8 * len(one_vector.body)
sizes = [size / (tokens * 384 * 12) for tokens, (size, *_) in replies_of.items()]
assert 0.8 < min(sizes) <= max(sizes) < 1.2, "the reply's size follows the formula"
holds(abs(measured_head - predicted_head) < 0.2, "fill-mask's head is about as large as its encoder")
holds(max(share[task]["head"] for task in list(share)[1:]) < 0.05, "other heads are next to nothing")
holds(all(law["measured"] > 1 for law in laws.values()), "a batch gains for every task")
holds(prices[2][2] < prices[0][2], "in a large batch a token's product is cheaper")
holds(processes[0] > 1.1 * threads[0], "two processes beat two threads where Python is heavy")
holds(abs(apart[0] / single[0] - 1) < 0.25, "one process answers what one thread does")
holds(gain["thread", 0.6] < 1 / 0.6, "two threads don't reach perfect turns")
holds(abs(gain["thread", 0.6] / step[0.6] - 1) < 0.2, "two threads fall into step")
holds(hasty[1] < threads[1] > processes[1], "/health waits for the lock, less where turns are short")

# %% [markdown]
# ## Take away
#
# * Your model needs a class with `__call__(inputs)`. Give it a `check` and an `example`, too: what is wrong gets a sentence, and
#   what can't answer never gets ready.
# * Time goes to the encoder, unless a head is as wide as a vocabulary. A reply costs by its numbers: tokens × width × 12 bytes.
# * Python's share $s$ decides between threads and processes: $c$ threads give $c / (1 + (c-1)\,s)$ times one, $c$ processes on
#   $c$ free cores nearly $c$ times, the nearer the longer a call is.
#
# Next: [Lesson 8](8_starting_processes.ipynb), on what a process costs, and how one is started.
