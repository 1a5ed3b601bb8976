# %% [markdown]
# # 11. Protocols and packages
#
# Your model has a queue, a loop and a server. Now others ask: why not gRPC, why not another server, why is the image so large?
#
# **Question: how do you choose without believing anybody?**
#
# Afterwards you can say for your own model what another protocol would bring, which server fits your needs, and what your
# image consists of.
#
# It takes about 2 minutes (the quick form under one), two cores and 4 GB of memory. [What all lessons need](README.md).

# %%
# "No module named 'lesson'"? Open this notebook where it lies, in the project's notebooks/, or by `make learn`.
from lesson import BLUE, CLIENT_CORES, GREY, SERVER_CORES, TEXT, ask, bars, claim, compare
from lesson import dots, guessed, holds, line, picture, quick, score, serve, serve_all, serve_recipe
from lesson import stop, table, tell, way


import numpy as np

import checks

# %% [markdown]
# ## Two doors to the same model
#
# HTTP carries text; anybody can read it. gRPC packs messages into bytes and sends them over HTTP/2. Its fans say that it
# is several times faster. This server has both doors. Behind them stand the same queue, the same loop, the same model.

# %%
way(
    ("client", "HTTP", "queue", "loop", "model"),
    ("client", "gRPC", "queue", "loop", "model"),
    changed={"HTTP", "gRPC"},
)

# %% [markdown]
# One client asks, waits for the answer, and asks again. **Guess:** how many times as many answers a second does it get over
# gRPC, from our real model?

# %%
guess = ...  # times

# %% [markdown]
# **Prediction.** A call takes $m$ in the model, and $h$ or $g$ in everything else: client, network, server. So gRPC is
# $\frac{m+h}{m+g}$ times as fast. A model that returns at once shows $h$ and $g$. Even a protocol that costs nothing
# would be only $\frac{m+h}{m}$ times as fast.
#
# We start three servers: one with our model, one with a model that returns at once, and one for later. Both doors are
# asked by clients of one family, Triton's.

# %%

from loadtests.modes import free_port
from support import l11_grpc_and_http

INSTANT, OURS = "loadtests.bench.apps:Instant", "minilm-mlm"
ours = serve(GRPC_PORT=free_port(), BATCH_SIZE=32)
instant, failing = serve_all(
    {"MODEL": INSTANT, "GRPC_PORT": free_port(), "BATCH_SIZE": 32},
    {"MODEL": "notebooks.support.l11_fails:Fails", "OFFLOAD": "process"},
    cores=SERVER_CORES,
)
servers = {INSTANT: instant, OURS: ours}


# %%
def visits(model, *kinds, rounds, **options):
    """The medians of some rounds in which all kinds take turns, so that a slow moment meets all of them."""
    options |= {"model": model, "cpu": max(CLIENT_CORES), "duration_s": quick(0.3, 1.0)}
    return l11_grpc_and_http.in_turn(servers[model], kinds, rounds, **options)


alone = {model: visits(model, "HTTP", "gRPC", rounds=quick(1, 5)) for model in servers}

# %%
h, g = alone[INSTANT]["HTTP"]["ms"], alone[INSTANT]["gRPC"]["ms"]
m = alone[OURS]["HTTP"]["ms"] - h
predicted = (m + h) / (m + g)
gain = {model: found["gRPC"]["per_s"] / found["HTTP"]["per_s"] for model, found in alone.items()}
tell(
    f"Everything but the model takes {h:.2f} ms over HTTP and {g:.2f} ms over gRPC. Our model takes {m:.1f} ms. So gRPC should be"
    f" {predicted:.2f} times as fast, and no protocol more than {(m + h) / m:.2f} times. Measured: **{gain[OURS]:.2f} times**."
)

# %%
compare("gRPC with our model, times HTTP", guess=guess, formula=predicted, measured=gain[OURS])
x = np.linspace(0, 1.25 * m, 200)
top = 1.1 * max(guess, *gain.values(), 1.5)
with picture(
    "A protocol saves only its own share", "the model's time, ms", "gRPC, times HTTP", ylim=(0, top)
) as ax:
    free = (x + h) / np.maximum(x, 1e-9)
    line(ax, x[free < top], free[free < top], "a protocol that costs nothing", GREY, linestyle="--")
    line(ax, x, (x + h) / (x + g))
    dots(ax, [0, m], [gain[INSTANT], gain[OURS]], None)
    ax.plot([0.8 * m], [0.75 * gain[OURS]], label="measured", color=BLUE, alpha=0)
    guessed(ax, m, guess)

# %%
claim(
    "gRPC is 3–5 × faster than REST",
    who="the same call by one client, Triton's in Python, answers/s over gRPC in times of HTTP's",
    number=f"{gain[INSTANT]:.2f} × with a model that returns at once, {gain[OURS]:.2f} × with one of {m:.0f} ms; a protocol that"
    f" costs nothing would have {(m + h) / m:.2f} ×",
    verdict="fails here: the model's time is the same behind both; other languages' libraries are untested here",
)

# %% [markdown]
# ## Many calls, or one stream
#
# Now 32 texts are always under way. There are four ways to send them: 32 connections and a text in each call, over either
# protocol; one gRPC stream, on which texts and answers pass each other; or lists of 32 texts, which HTTP answers with a
# line for each text. The model is the one that returns at once, so that only the doors are measured.
#
# **Guess:** how many times as many texts does the stream carry as the separate gRPC calls?

# %%
guess_stream = ...  # times

# %% [markdown]
# **Prediction.** Each side has one core. Whichever side needs more time for a text limits both: texts a second are
# 1 / max(server's time, client's time). With lists they take turns, since only one list is under way: 1 / (server's time +
# client's time). The operating system counts the processor time of both.

# %%
many = {
    "HTTP, a call each": ("HTTP", "one a call"),
    "gRPC, a call each": ("gRPC", "one a call"),
    "gRPC, one stream": ("gRPC", "one stream"),
    "HTTP, lists": ("HTTP", "lists"),
}
crowd = {
    name: visits(INSTANT, kind, rounds=quick(1, 3), way=how, in_flight=32)[kind]
    for name, (kind, how) in many.items()
}

# %%
for name, found in crowd.items():
    sides_ms = found["server_ms"], found["client_ms"]
    found["predicted"] = 1000 / (sum(sides_ms) if name == "HTTP, lists" else max(sides_ms))
table(
    {
        "32 texts under way": name,
        "texts/s": f"{found['per_s']:,.0f}",
        "predicted, texts/s": f"{found['predicted']:,.0f}",
        "server's time, ms a text": f"{found['server_ms']:.3f}",
        "client's time, ms a text": f"{found['client_ms']:.3f}",
    }
    for name, found in crowd.items()
)

# %%
with picture("It is the call that costs", "texts a second", "", xscale="log") as ax:
    rows = range(len(crowd))
    bars(ax, [found["predicted"] for found in crowd.values()], rows, None)
    dots(ax, [found["per_s"] for found in crowd.values()], rows, None)
    right = max(crowd["HTTP, lists"]["predicted"], crowd["HTTP, lists"]["per_s"])
    for name, color in (("measured", BLUE), ("predicted", "black")):
        ax.plot([right], [3], label=name, color=color, alpha=0)
    guessed(ax, guess_stream * crowd["gRPC, a call each"]["per_s"], 2)
    ax.set_yticks(rows, crowd)
    ax.set_ylim(-0.7, len(crowd) - 0.4)

# %%
http, grpc, stream, lists = (found["per_s"] for found in crowd.values())
tell(
    f"One stream carries {stream / grpc:.1f} times as many texts as separate gRPC calls, lists over plain HTTP {lists / http:.1f} times"
    f" as many as separate HTTP calls. With separate calls gRPC has {grpc / http:.2f} times what HTTP has: the server needs"
    f" {crowd['gRPC, a call each']['server_ms']:.2f} ms for a gRPC call and {crowd['HTTP, a call each']['server_ms']:.2f} ms for one over"
    " HTTP."
)
claim(
    "gRPC does 10k requests/s where REST does 3k",
    who="32 connections, one text a call, a model that returns at once, one core for the server, one for the client, both in Python",
    number=f"{grpc:,.0f}/s over gRPC, {http:,.0f}/s over HTTP; with 32 texts on one gRPC stream {stream:,.0f}/s, in HTTP lists"
    f" {lists:,.0f}/s",
    verdict=f"fails here: gRPC has {grpc / http:.2f} times what HTTP has; most counts how many texts share a call",
)

# %% [markdown]
# *Where the formula fails:* it takes a core for wholly ours, and the two sides as working side by side without ever waiting for each other. Both ends are
# Python here, so this compares two libraries as much as two protocols. It is what you would get with this server. A client
# in C++ would change the client's column only.
#
# ## Smaller payloads
#
# The same two calls, as bytes on the wire. And one answer of another kind: an embedding, 384 numbers.
#
# **Guess:** by how many per cent is the embedding smaller as bytes than as JSON?

# %%
guess_smaller = ...  # %

# %% [markdown]
# **Prediction.** A number takes 4 bytes as a float32. As JSON it takes its digits: "-0.012345678" and a comma, about 12
# characters. So bytes save $1 - 4/12$, about two thirds. A short text is a text in both, and so is its answer: nothing.

# %%
import orjson

wire = {kind: l11_grpc_and_http.bytes_of(instant, kind, max(CLIENT_CORES)) for kind in ("HTTP", "gRPC")}
inside = len(TEXT) + len(ask(instant).body)  # the text and its answer themselves
vector = np.random.default_rng(0).normal(0, 0.05, 384).astype(np.float32)
as_json, as_bytes = len(orjson.dumps(vector, option=orjson.OPT_SERIALIZE_NUMPY)), vector.nbytes
smaller, smaller_vector = 1 - wire["gRPC"] / wire["HTTP"], 1 - as_bytes / as_json

# %%
COLUMNS = "what", "HTTP, bytes", "gRPC, bytes", "smaller by", "predicted", "your guess"
rows = (
    ("a call with a short text, and its answer", wire["HTTP"], wire["gRPC"], smaller, "0%", "-"),
    ("384 numbers, as JSON and as bytes", as_json, as_bytes, smaller_vector, "67%", f"{guess_smaller}%"),
)
table(
    dict(zip(COLUMNS, (what, f"{http:.0f}", f"{grpc:.0f}", f"{less:.0%}", *rest)))
    for what, http, grpc, less, *rest in rows
)
tell(
    f"The text and its answer are {inside} bytes of it in both. Around them HTTP needs {wire['HTTP'] - inside:.0f} bytes and gRPC"
    f" {wire['gRPC'] - inside:.0f}."
)

# %%
claim(
    "gRPC's payloads are 30–50 % smaller",
    who="bytes on the wire of a short text and its answer, headers included; an embedding of 384 numbers, as JSON and as bytes",
    number=f"{smaller:.0%} smaller for the text, whose answer has as many bytes in both; {smaller_vector:.0%} for the embedding",
    verdict="holds for short texts, where most of a call is its frame; numbers shrink more, but HTTP can carry them as bytes too",
)

# %% [markdown]
# *Where the formula fails:* it forgot the frame. Around a short text and its answer HTTP sends all its headers each time, and
# gRPC fewer. With long texts the frame counts less and less. Whether fewer bytes are less time, the first
# picture has shown.
#
# **So:** take gRPC if your callers have it already, or if they need a stream. Don't take it for speed: here even the stream carries
# fewer texts than separate HTTP calls. Send several texts in a call.
#
# ## What an error may reveal
#
# A program that fails knows much about itself. How much of that should a client see? Many tutorials end with debugging
# switched on. This is such a server. We send it a text that is too long for the model.

# %%
import re

from lesson import HERE

print(*(HERE / "support" / "l11_debug.py").read_text().splitlines()[-5:], sep="\n")

# %% [markdown]
# **Guess:** how many files of the server's disk does its reply name?

# %%
guess_files = ...

# %% [markdown]
# **Prediction.** A traceback has an entry for each function under way, with its file. The web framework has about ten of
# them on the way to the handler, the pipeline and the model about ten more. Many share a file: say ten files.

# %%
debug = serve_recipe("l11_debug")
too_long = TEXT + " Or so they say." * 200
revealed, refused = ask(debug, too_long), ask(failing, "raise an error")
sentence = ask(ours, too_long)
stop(debug)
files = set(re.findall(r'File "([^"]+)"', revealed.body))


def without_paths(text):
    """The last lines of a reply, folders left out: they are this machine's own."""
    return "\n".join(re.sub(r'"/[^"]*/', '"/…/', text).splitlines()[-8:])


print(revealed.status, "…", without_paths(revealed.body), sep="\n")

# %% [markdown]
# An attacker reads from it which libraries run, in which Python, and where they lie. And the client can do nothing with
# it. Now the same text at this project's server, and then a model with a bug: it misses a file.

# %%
print(sentence.status, sentence.body)
print(refused.status, refused.body)
log = failing.log()
request_id = refused.headers["x-request-id"]
secret = "licence.key"


# %%
def described(who, reply):
    return {
        "reply": who,
        "status": reply.status,
        "bytes": len(reply.body),
        "files named": len(set(re.findall(r'File "([^"]+)"', reply.body))),
        "says which Python": "yes" if re.search(r"python3\.\d+", reply.body) else "no",
        "says what to do": "yes" if reply.status == 422 or "report" in reply.body else "no",
    }


ours_long, ours_bug = "this server: text too long", "this server: the model has a bug"
replies = {"debugging on: text too long": revealed, ours_long: sentence, ours_bug: refused}
table(described(who, reply) for who, reply in replies.items())

# %%
tell(
    f"The traceback named {len(files)} files; predicted were 10, your guess was {guess_files}. The bug's own traceback, with the"
    f" missing file's name, is in the server's log{' beside the id that the reply has' if request_id in log else ''}: the client can quote the id, and you can look it up."
)
claim(
    "Errors shown to the user help",
    who="the reply to a text that is too long, from a server with debugging on and from this one",
    number=f"a traceback of {len(revealed.body):,} bytes that names {len(files)} files and says nothing to do; a sentence of"
    f" {len(sentence.body)} bytes that does",
    verdict="depends on the error: a sentence about the input helps, a traceback helps the attacker; it belongs in the log",
)
stop()

# %% [markdown]
# ## Choosing by what was measured
#
# The web is full of selectors: answer ten questions, and a table of points names your server. Somebody *gave* those points, and
# somebody picked the columns. These figures come from measurements: many servers with the same model and the same texts, each as its own documentation teaches
# it (`make peers`; it takes hours, so we read the stored rows). *p99*: 99 of 100 answers are faster than that; see the
# [glossary](glossary.md).

# %%
from support import l11_selector

peers = l11_selector.measured()
table(
    peers.sort_values("short texts/s", ascending=False)
    .map(lambda value: f"{value:,.0f}" if value >= 20 else f"{value:.1f}")
    .reset_index(names="server")
)
tell(
    f"A stored run: {l11_selector.day()}. “mixed”: one text in ten is long. We ran it, and one of the servers is ours: keep that in mind."
)

# %% [markdown]
# So start from limits, not from points. A limit is something that you *know*: what the machine has, what your users wait
# for. A server that breaks it is out, however fast it is. Put yours in, and run the cell.

# %%
limits = {"least": {"mixed texts/s": 20}, "most": {"memory, MB": 800, "start, s": 10}}
mine = l11_selector.choose(peers, weights={"mixed texts/s": 1, "memory, MB": 1}, **limits)
table({"server": name, "score": f"{points:.2f}"} for name, points in mine.items())

# %% [markdown]
# Then run the first two of these with *your* model. These numbers are for one small model on one kind of machine.

# %% [markdown]
# ## What is in an image
#
# A container image holds Python, the packages, the model and the code. You read that a *multi-stage build* shrinks it: build
# in one image, copy what you need into another, and leave compilers and caches behind. `deploy/Dockerfile` does that.
#
# **Guess:** by how many per cent is our image smaller than one built in a single stage?

# %%
guess_saved = ...  # %

# %% [markdown]
# **Prediction.** It saves exactly what the first image has and the second hasn't. Add up: the installed packages of
# `requirements.txt` (torch in its CPU build, where that is installed), the model, the code, and Debian with Python. Then what a single stage would leave in: pip, its cache of
# what it downloaded, and the compilers (`build-essential`). This lesson builds no image: it adds up files of this machine.

# %%
from support import l11_sizes

packages = l11_sizes.packages()
compilers_mb = l11_sizes.compilers_mb()
DEBIAN_MB, BUILT_MB = 230, 1450  # of an image that we built with buildah, see docs/deployments.md
layers = l11_sizes.layers(packages) | {"Debian, Python": DEBIAN_MB}
left_out = l11_sizes.left_out(packages) | {"compilers": compilers_mb or 0.0}
image_mb, single_mb = sum(layers.values()), sum(layers.values()) + sum(left_out.values())
saved = 1 - image_mb / single_mb

# %%
with picture("Most of the image is torch", "MB", "") as ax:
    both = {**layers, **{f"({name})": mb for name, mb in left_out.items()}}
    rows = range(len(both), 0, -1)
    ax.barh(rows, both.values(), color=[BLUE] * len(layers) + ["#BBBBBB"] * len(left_out))
    for row, mb in zip(rows, both.values()):
        ax.text(mb + 15, row, f"{mb:.0f}" if mb >= 1 else "< 1", va="center", fontsize=11)
    bars(ax, [image_mb], [0], "")
    dots(ax, [BUILT_MB], [-1], "")
    guessed(ax, [single_mb * (1 - guess_saved / 100)], [-2], "")
    ax.set_yticks([*rows, 0, -1, -2], [*both, "image: added up", "image: built", "image: your guess"])
    ax.set_ylim(-2.8, len(both) + 0.7)
    ax.set_xlim(0, 1.1 * single_mb)

# %%
wanted_mb = image_mb / (1 - 0.84)
tell(
    f"In brackets: what a second stage leaves behind. Added up, the image is {image_mb:,.0f} MB; the one that we built with buildah had"
    f" {BUILT_MB:,} MB. A single stage would be {single_mb:,.0f} MB. So the second stage makes it {saved:.0%} smaller; your guess was"
    f" {guess_saved}%. Without torch it would be {packages['torch'] / image_mb:.0%} smaller."
)
compare("MB of the image", guess=single_mb * (1 - guess_saved / 100), formula=image_mb, measured=BUILT_MB)
claim(
    "A multi-stage build makes the image 84 % smaller",
    who="installed packages, model, code, pip, compilers of this machine, added up; pip's cache estimated from a sample; Debian's size from an own build",
    number=f"{image_mb:,.0f} instead of {single_mb:,.0f} MB, {saved:.0%} smaller; for 84 % the single stage would have to be"
    f" {wanted_mb:,.0f} MB",
    verdict="fails here: what is big is needed at run time; to shrink it, leave torch out (lesson 10)",
)

# %% [markdown]
# ## Exercises
#
# Fill in and run. The checkers never stop the notebook. Stuck? Look into `notebooks/solutions/`.
#
# **★** Your model takes 40 ms a text. Everything else takes 0.8 ms over HTTP and 0.3 ms over gRPC. How many times as many
# answers does one client get over gRPC?

# %%
times_as_many = ...

checks.exercise_11_1(times_as_many)


# %% [markdown]
# **★★** A call costs `call_ms`, whatever is in it, and `text_ms` for each text. A client sends a list of `n`, waits, and sends the next. How
# many texts a second is that?


# %%
def texts_per_s(n, call_ms, text_ms): ...


checks.exercise_11_2(texts_per_s)

# %% [markdown]
# **★★★** Write the selector. `servers` maps names to figures, `least` and `most` are limits, as in `{"mixed texts/s": 20}`. Return the names of
# those that keep all limits, the one with the largest figure `by` first. A server without a figure that has a limit is out.


# %%
def choose(servers, least, most, by): ...


checks.exercise_11_3(choose)

# %% [markdown]
# ## In the lab
#
# It is the call that costs. So choose how many texts a list needs, at least, for HTTP to carry five times as many texts a second as with a text a
# call. One number. It starts the real server with a model that returns at once, and one client that sends one list after the other.

# %%
import labs

texts_per_list = ...

labs.lab_11(texts_per_list)

# %% [markdown]
# ## Ten questions
#
# Answer them aloud, then open the answers.
#
# 1. Why does a protocol hardly matter for a model of 13 ms?
# 2. Why do lists beat streams here?
# 3. Why are gRPC's short messages smaller?
# 4. Why not show tracebacks?
# 5. Why an id in the reply?
# 6. Why start from limits and not from points?
# 7. Why doesn't a second stage shrink this image much?
# 8. Why was the model that returns at once measured, too?
# 9. Why does gRPC gain less, the longer the model takes?
# 10. Why does a client get a sentence for its own mistake, and an id for the server's?
#
# <details><summary>Answers</summary>
#
# 1. It can save no more than its own share of the time.
# 2. It is the call that costs; a list makes one call of many.
# 3. HTTP sends all headers each time.
# 4. They help an attacker, and a client can do nothing with them.
# 5. The client can quote it, and you find the traceback in the log.
# 6. A limit is something you know; points are somebody's opinion.
# 7. What is big is needed at run time.
# 8. It shows what everything but the model takes, over either protocol.
# 9. The model's time is the same behind both.
# 10. It can mend the one; the other is for who reads the log.
# </details>

# %% [markdown]
# ## How far off were you?

# %%
score()

# %% [markdown]
# ## What must hold

# %%
assert (revealed.status, sentence.status, refused.status) == (500, 422, 500)
named = re.search(r'File "', sentence.body + refused.body)
assert files and not named, "no reply of this server names a file"
logged = secret in log and request_id in log
assert secret not in refused.body and logged, "the log has it, under the reply's id"
assert as_bytes < as_json and wire["gRPC"] < wire["HTTP"]
assert packages["torch"] > 0.4 * image_mb and saved < 0.84
holds(0.7 < gain[OURS] < 1.4, "for a model of milliseconds the protocol hardly matters")
holds(lists > 2 * http and stream > 1.1 * grpc, "many texts a call save calls")

# %% [markdown]
# ## Take away
#
# 1. Ask what share of the time a part has before you replace it: a protocol, a layer, an import. It can save no more than that.
# 2. Choose by limits that you know and by numbers that you can measure again. Points and weights are opinions.
# 3. A traceback belongs in the log, and its id in the reply.
#
# Next: [Lesson 12](12_replicas.ipynb). One machine can stop. What do two replicas cost, and what do they save?
