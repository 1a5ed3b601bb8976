# %% [markdown]
# # 12. Replicas
#
# One process is full, or you can't afford to lose it. Now a second one comes, and something before both that shares the requests.
#
# **Question: what does a second replica give, and how long does the next one take?**
#
# Afterwards you can say what your cold start consists of, how many replicas you want, what a lost one costs, and why an autoscaler
# can't save you in time.
#
# It takes about 2 minutes (the quick form under one), two cores and 4 GB of memory. It needs HAProxy (`apt-get install haproxy`); without
# it one replica alone is measured. [What all lessons need](README.md).

# %%
# "No module named 'lesson'"? Open this notebook where it lies, in the project's notebooks/, or by `make learn`.
from lesson import BLUE, GREY, ORANGE, RED, SERVER_CORES, bars, claim, compare, dots, guessed, holds, line
from lesson import load, picture, quick, score, serve, stop, tell, way, whose

import statistics
import time

import numpy as np

import checks

# %% [markdown]
# ## A cold start, part by part
#
# You start a replica now. When does it answer? Its process has much to do before.
#
# **Guess:** how many seconds from the command to the first answer, for our model?

# %%
guess_start_s = ...

# %% [markdown]
# **Prediction.** The sum of the parts: the interpreter, the imports, the weights, a first call. They are timed one after the
# other in a new process. Then the server itself is started and timed.

# %%
from support import l12_cold_start


def seconds_to_ready():
    began = time.monotonic()
    server = serve()
    took_s = time.monotonic() - began
    stop(server)
    return took_s


# %%
tries = [(l12_cold_start.parts(SERVER_CORES), seconds_to_ready()) for _ in range(quick(1, 2))]
parts = {name: statistics.median(one[name] for one, _ in tries) for name in tries[0][0]}
start_s = statistics.median(ready_s for _, ready_s in tries)
sum_s = sum(parts.values())
importing_s = sum(seconds for name, seconds in parts.items() if name.startswith("import"))

# %%
with picture("Most of a cold start is importing", "time since the command, s", "") as ax:
    rows, ends = range(len(parts), 0, -1), np.cumsum(list(parts.values()))
    starts = ends - list(parts.values())
    colors = [ORANGE if name.startswith("import") else BLUE for name in parts]
    ax.barh(rows, parts.values(), left=starts, color=colors)
    bars(ax, [sum_s], [0], "")
    dots(ax, [start_s], [-1], "")
    guessed(ax, [guess_start_s], [-2], "")
    ax.set_yticks([*rows, 0, -1, -2], [*parts, "predicted: the sum", "measured: ready", whose("your guess")])
    ax.set_ylim(-2.7, len(parts) + 0.6)

# %%
tell(
    f"The parts take {sum_s:.1f} s together, the server took {start_s:.1f} s; your guess was {guess_start_s:g} s. Imports are"
    f" {importing_s / sum_s:.0%} of it (orange), the weights {parts['load the weights'] / sum_s:.0%}."
)
compare("seconds to ready", guess=guess_start_s, formula=sum_s, measured=start_s)
claim(
    "A cold start takes 5–10 s",
    who="this server with the embedded model, on one core, its files already in memory, from the command to ready",
    number=f"{start_s:.1f} s, of which imports {importing_s:.1f} s and weights {parts['load the weights']:.1f} s",
    verdict="depends on the libraries more than on a small model; with gigabytes of weights, or files not yet read from disk, it is longer"
    " (a cold disk is untested)",
)

# %% [markdown]
# *Where the formula fails:* each part was timed with nothing beside it. The server loads in a thread, while its loop answers
# `/ready` already, so it may take longer than the sum. What follows from the picture: smaller weights hardly help a small model.
# Fewer imports do. (All files were in memory already: what a cold disk adds is not measured here.)

# %% [markdown]
# ## Two replicas behind a balancer
#
# One process is full, or you can't afford to lose it. So you start a second one, and a *balancer* before both. Ours is
# HAProxy (`deploy/cluster.py`). It sends each request to the replica that has the fewest under way.

# %%
way(
    ("clients", "HAProxy", "replica 1"),
    ("", "the same", "replica 2"),
    changed={"HAProxy", "the same", "replica 2"},
)

# %% [markdown]
# A laptop has no second machine. So the model is replaced by one that loads just as ours does, but takes 20 ms a call without
# computing. Two of them don't slow each other down: as on two machines.
#
# **Guess:** 140 texts a second arrive. How many a second do two replicas answer in time? In time is within one second.

# %%
guess_two_per_s = ...

# %% [markdown]
# **Prediction.** One replica answers a text every 20 ms, so 50 a second. Two answer twice as many, and the balancer adds little.
# `loadtests/plan/fleet.py` simulates it, with each replica's queue and what it rejects.

# %%
import shutil

from loadtests.load import generator
from loadtests.plan import fleet
from loadtests.bench.apps import SLEEP_S
from loadtests.plan.planner import OVERHEAD_S, CostLaw

HAPROXY = shutil.which("haproxy") is not None
SLEEPER = quick("loadtests.bench.apps:Sleeps", "notebooks.support.l12_sleeper:Sleeper")
law, limit_s = CostLaw(0.0, SLEEP_S), 1.0

# %%
settings = {"MODEL": SLEEPER, "DEADLINE_S": limit_s}
began = time.monotonic()
one = serve(cores=None, **settings)
load_s = time.monotonic() - began
two = serve("haproxy-2", cores=None, **settings) if HAPROXY else None
replicas = {1: one, 2: two} if HAPROXY else {1: one}
if not HAPROXY:
    tell("HAProxy isn't installed here (`apt-get install haproxy`): one replica alone is measured.")

# %%
rates, seconds = quick((40, 140), (20, 45, 70, 95, 140)), quick(1.0, 3)
options = {"limit_s": limit_s, "timeout_s": 3.0, "duration_s": seconds}
runs = {
    (n, rate): load(server, "open", rate_per_s=rate, **options)
    for n, server in replicas.items()
    for rate in rates
}
good = {key: generator.summary(df, limit_s)["goodput_per_s"] for key, df in runs.items()}


def foretold(n, rate):
    """What fleet.py says of n replicas, asked at the same moments."""
    replica = fleet.Fleet(law, n, overhead_s=OVERHEAD_S, deadline_s=limit_s)
    return fleet.simulate(replica, rate_per_s=rate, duration_s=30).summary()["goodput_per_s"]


# %%
grid = np.linspace(20, 140, 13)
with picture(
    "Two replicas answer twice as much", "texts a second that come", "answered in time, a second"
) as ax:
    for n, color in zip(replicas, (BLUE, ORANGE)):
        line(ax, grid, [foretold(n, rate) for rate in grid], None, color, linestyle="--")
        dots(ax, rates, [good[n, rate] for rate in rates], {1: "one replica", 2: "two replicas"}[n], color)
    guessed(ax, 140, guess_two_per_s)
    ax.set_ylim(0, None)
tell("Dashed: simulated by `fleet.py`. Dots: measured.")

# %%
outside_ms = {
    n: (runs[n, rates[0]].latency_ms - runs[n, rates[0]].model_ms - runs[n, rates[0]].queue_ms).median()
    for n in replicas
}
if HAPROXY:
    hop_ms = outside_ms[2] - outside_ms[1]
    tell(
        f"At 140 a second one replica answers {good[1, 140]:.0f} and two answer {good[2, 140]:.0f}; simulated: {foretold(1, 140):.0f} and"
        f" {foretold(2, 140):.0f}. The price: through HAProxy a request spends {outside_ms[2]:.1f} ms outside the queue and the model, and"
        f" {outside_ms[1]:.1f} ms without: {abs(hop_ms):.1f} ms {'more' if hop_ms > 0 else 'less, which is noise'}."
    )

# %% [markdown]
# ## A lost replica
#
# 80 texts a second come, which two replicas can do and one can't. Then we kill one of them with `kill -9`, as the kernel
# does when memory runs out. **Guess:** after how many seconds are there two again?

# %%
guess_gap_s = ...

# %% [markdown]
# **Prediction.** Requests that were with the dead one are sent again: HAProxy sends a request to the other replica when a connection
# breaks. The supervisor, which started the replicas (`deploy/cluster.py`), waits a second and starts a new one, which needs a cold start. Until then one replica does what it
# can. The simulation is told when each text came and when the kill was.

# %%
from support import l12_growing

lost, lost_s = None, quick(4, 16)
if HAPROXY:
    lost = l12_growing.disturb(
        two,
        lambda: load(two, "open", rate_per_s=80, **options | {"duration_s": lost_s}),
        lambda: l12_growing.kill_a_replica(two),
        after_answers=quick(60, 240),
    )

# %%
around = {"overhead_s": OVERHEAD_S, "deadline_s": limit_s}
if HAPROXY:
    dying = fleet.Fleet(law, 2, **around, cold_start_s=load_s + 1, kills=((lost.at_s, 1),))
    told = fleet.simulate(dying, arrivals_s=lost.rows.due_s.tolist(), duration_s=lost_s)
    told_no = np.histogram(told.failed_s, np.arange(lost_s + 1))[0]


# %%
def draw_refusals(title, event, seconds, predicted, name, guess_s):
    """Refusals a second; dotted: what happened, and when there was a replica more."""
    no = l12_growing.by_second(event.rows, "503")
    top = 1.25 * max(*predicted, no.max(), 1)
    with picture(title, "time, s", "refused, a second", ylim=(-0.05 * top, top)) as ax:
        line(ax, np.arange(seconds) + 0.5, predicted, name, drawstyle="steps-mid")
        dots(ax, no.index + 0.5, no, "measured", RED)
        for at_s in (event.at_s, event.at_s + event.took_s):
            ax.axvline(at_s, color=GREY, linestyle=":")
        guessed(ax, event.at_s + guess_s, 0.93 * top)


# %%
if HAPROXY:
    draw_refusals("A lost replica costs one cold start", lost, lost_s, told_no, "simulated", guess_gap_s)
    outcomes = lost.rows.outcome.value_counts().to_dict()
    unanswered = sum(n for outcome, n in outcomes.items() if outcome not in ("200", "503"))
    compare("seconds until there are two again", guess=guess_gap_s, formula=load_s + 1, measured=lost.took_s)
    tell(
        f"Two again after **{lost.took_s:.1f} s**, predicted {load_s + 1:.1f} s, your guess {guess_gap_s:g} s (the dotted lines: from the"
        f" kill until ready). Rejected: {outcomes.get('503', 0)} of {len(lost.rows)}, simulated {told.failed}. Ended without any answer:"
        f" {unanswered}."
    )

# %% [markdown]
# Nobody is lost, but some are rejected, because one replica can't do the work of two. Two that are left could have done it:
# keep **one to spare**. The refusals begin a little after the kill, because a short queue is allowed to fill first.
#
# ## How fast it grows
#
# Now the load grows instead: 130 texts a second, too much for two. After a while you add a replica by hand (`kill -TTIN`).
# **Guess:** how many seconds from your command until it helps?

# %%
guess_grow_s = ...

# %% [markdown]
# **Prediction.** One cold start and nothing else. Until then two replicas reject what they can't do in time. The simulation is told when
# each text came and how long a cold start takes.

# %%
grown, grow_s = None, quick(3, 13)
if HAPROXY:
    grown = l12_growing.disturb(
        two,
        lambda: load(two, "open", rate_per_s=130, **options | {"duration_s": grow_s}),
        lambda: l12_growing.add_a_replica(two),
        after_answers=quick(60, 200),
    )
stop()

# %%
if HAPROXY:
    # Three, of which one is away until the new one is ready: the simulator starts it where one has died.
    growing = fleet.Fleet(law, 3, **around, cold_start_s=grown.at_s + load_s, kills=((0.0, 1),))
    told = fleet.simulate(growing, arrivals_s=grown.rows.due_s.tolist(), duration_s=grow_s)
    predicted = np.histogram(told.failed_s, np.arange(grow_s + 1))[0]
    draw_refusals(
        "A new replica helps after one cold start", grown, grow_s, predicted, "simulated", guess_grow_s
    )
    compare("seconds until the third is ready", guess=guess_grow_s, formula=load_s, measured=grown.took_s)
    tell(
        f"The third replica was ready after **{grown.took_s:.1f} s**; predicted, a cold start: {load_s:.1f} s; your guess: {guess_grow_s:g} s."
    )

# %% [markdown]
# *Where the simulation fails:* all replicas share one machine here, so the new one loads beside the old ones. How much that takes from
# them we haven't measured.
#
# An autoscaler does the same by itself. This is a stored run of Ray Serve, which isn't installed here
# (`loadtests/ray/curve.py`). At second 12 the load grows from 20 to 200 texts a second. A replica does 50 a second. Ray's
# settings (`deploy/ray/serve.yaml`) say for how long it looks and waits before it starts one. Then comes a cold start, of this little
# model about a second. That is the prediction.

# %%
ray = l12_growing.ray()
step_s = int((ray.offered > 2 * ray.offered.iloc[0]).idxmax())
more_s = int((ray.replicas > 1).idxmax()) - step_s
refusing = ray["503"][ray.index > step_s]
calm_s = int(refusing[refusing > 0].index.max()) + 1 - step_s
told_s = l12_growing.ray_waits_s() + 1
tell(
    f"The second replica came {more_s} s after that, and nobody was refused after {calm_s} s; predicted: {told_s} s."
    f" Rejected meanwhile: {int(refusing.sum()):,}."
)

# %% [markdown]
# *Where the formula fails:* Ray takes longer than its settings and a cold start; the stored rows don't say why. An autoscaler can't be
# faster than a cold start, and may be much slower. Which signal it should watch, and how much headroom a cold start needs, is in
# [lesson 15](15_a_fleet.ipynb). Until a new replica is there, reject at once, or keep one to spare.

# %% [markdown]
# ## Exercises
#
# Fill in and run. The checkers never stop the notebook. Stuck? Look into `notebooks/solutions/`.
#
# **★** Of two replicas one is lost once in 30 days, and the next one answers after 12 s. The one that is left can do 60 % of the load. What
# share of a month's requests is rejected?

# %%
share = ...

checks.exercise_12_1(share)

# %% [markdown]
# **★★** `rate_per_s` texts arrive, and a replica answers `one_per_s`. How many replicas do you want, so that one of them may
# die, and those that are left still answer everything?


# %%
def replicas_wanted(rate_per_s, one_per_s): ...


checks.exercise_12_2(replicas_wanted)


# %% [markdown]
# **★★★** Write a circuit breaker (lesson 5 has this server's). `allows()` says whether to try now. `note(ok)` tells it how a try ended. After `failures` in
# a row it opens for `pause_s` seconds. Then it lets one try through: a success closes it, a failure opens it again at once.
# `now()` gives the time in seconds.


# %%
class Breaker:
    def __init__(self, failures, pause_s, now): ...

    def allows(self): ...

    def note(self, ok): ...


checks.exercise_12_3(Breaker)

# %% [markdown]
# ## In the lab
#
# Choose a rate, at least 20 per second, at which nobody goes without an answer while one of two replicas is killed. (Needs
# HAProxy.) One number. It starts the real server and judges what it measures.

# %%
import labs

safe_rate_per_s = ...

labs.lab_12(safe_rate_per_s)

# %% [markdown]
# ## Ten questions
#
# Answer them aloud, then open the answers.
#
# 1. Why keep one replica to spare?
# 2. Why can an autoscaler not be faster than a cold start?
# 3. Why do two replicas answer twice as much here, although they share a laptop?
# 4. Why is a killed replica's request not lost?
# 5. Why do the refusals begin a little after the kill?
# 6. Why does the supervisor wait a second before it starts a new one?
# 7. Why does a balancer ask for the fewest under way, and not take turns?
# 8. What does the way through HAProxy cost a request?
# 9. Why reject at once while a new replica starts?
# 10. Why is most of a cold start importing?
#
# <details><summary>Answers</summary>
#
# 1. A lost one costs a cold start, and until then the others must do its work.
# 2. What it orders has to start first.
# 3. Their model sleeps: they don't slow each other down.
# 4. HAProxy sends it to the other one when the connection breaks.
# 5. A short queue is allowed to fill first.
# 6. One that dies at its start would otherwise be started again and again without a pause.
# 7. Texts are uneven: a turn may fall on the one that is busy.
# 8. About a millisecond or less: measure it beside one replica alone.
# 9. Who waits behind more than the deadline allows gets nothing, and makes others wait.
# 10. Libraries are read and run before a single weight is loaded.
# </details>

# %% [markdown]
# ## How far off were you?

# %%
score()

# %% [markdown]
# ## What must hold

# %%
holds(importing_s > 0.5 * sum_s, "most of a cold start is importing")
if HAPROXY:
    assert unanswered == 0, "a killed replica's texts are asked again elsewhere"
    holds(good[2, 140] > 1.6 * good[1, 140], "two replicas answer almost twice as much")
    holds(0.5 * (load_s + 1) < lost.took_s < 3 * (load_s + 1), "a lost replica costs about a cold start")

# %% [markdown]
# ## Take away
#
# 1. Two replicas answer twice as much, and the balancer costs next to nothing.
# 2. A lost replica and a new one cost one cold start. Keep one to spare; reject at once until then.
# 3. An autoscaler costs more: Ray's second replica came after **11 s**, and a cold start of its model takes about a second.
#
# Next: [Lesson 13](13_token_by_token.ipynb), for models that write. All the claims and their verdicts are in the [ledger](claims.md); the words are in
# the [glossary](glossary.md). To put your own model behind all this, go back to the [README](../README.md#deployments).
