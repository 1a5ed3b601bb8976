"""The lessons' lab exercises: they start the real server as the learner says, measure, and judge what was measured.

    labs.lab_3(12.5)        runs at 12.5 texts per second and says whether the mean time is within the limit

An answer that is still `...` measures nothing. A judge is a function of what was measured, so that it can be tested alone.
"""

import functools
import time
from collections.abc import Callable
from typing import Any

import lesson
import numpy as np
from checks import NotYet, Verdict
from lesson import CLIENT_CORES, SERVER_CORES, capacity, load, serve, stop

from loadtests.load import generator
from loadtests.modes import Mode, free_port

SLEEPS = {"MODEL": "loadtests.bench.apps:Sleeps"}


def lab(measure: Callable[[Any], Verdict]) -> Callable[[Any], Verdict]:
    """Make a lab of one that measures: it waits for an answer, stops its servers, and never raises."""

    @functools.wraps(measure)
    def soft(answer: Any) -> Verdict:
        if answer is ... or answer is None:
            return Verdict(False, "your turn: fill in the blank. It then measures for some seconds.")
        try:
            return measure(answer)
        except NotYet as hint:
            return Verdict(False, str(hint))
        except Exception as error:
            return Verdict(False, f"the experiment failed with {type(error).__name__}: {error}")
        finally:
            stop()

    return soft


def steady(turns: list[float]) -> float:
    """The median of a measurement's turns. Raises NotYet where they differ by a quarter: nothing can be judged then."""
    if min(turns) < 0.75 * max(turns):
        raise NotYet(
            f"something else computes on this machine: the same experiment gave {min(turns):.0f} to {max(turns):.0f} per second. Try again"
        )
    return float(np.median(turns))


# --- lesson 1 ---------------------------------------------------------------------------------------------------------


def judge_1(statuses: list[int]) -> Verdict:
    """A bound was chosen so that 100 people at once all get an answer."""
    rejected = statuses.count(503)
    if rejected:
        return Verdict(
            False,
            f"{rejected} of {len(statuses)} were rejected: all of them come before the first call has ended",
        )
    return Verdict(
        True,
        f"{statuses.count(200)} of {len(statuses)} were answered. Now look at how long the last one waited.",
    )


@lab
def lab_1(max_queue: int) -> Verdict:
    server = serve(MAX_QUEUE=max_queue, QUEUE_TARGET_S=0, DEADLINE_S=60)
    return judge_1([reply.status for reply in lesson.ask_together(server, [lesson.TEXT] * 100)])


# --- lesson 2 ---------------------------------------------------------------------------------------------------------


def judge_2(statuses: list[int]) -> Verdict:
    """A text that waits for a new process longer than its deadline allows is told so at once."""
    if 503 not in statuses:
        return Verdict(
            False,
            f"the four got {sorted(statuses)}: with this deadline they wait for the new process. Loading takes longer than what?",
        )
    return Verdict(
        True, f"the four got {sorted(statuses)}: those that can't be answered in time hear of it at once."
    )


@lab
def lab_2(deadline_s: float) -> Verdict:
    from support.l02_crash import kill_in_a_call

    from loadtests.load import texts

    server = serve(OFFLOAD="process", DEADLINE_S=deadline_s)
    crash = kill_in_a_call(server, texts.corpus("long")[0].text, texts=4)
    return judge_2([reply.status for reply in crash.replies])


# --- lesson 3 ---------------------------------------------------------------------------------------------------------


def judge_3(mean_ms: float, limit_ms: float, rate_per_s: float, capacity_per_s: float) -> Verdict:
    """As many as possible, with a mean time within four calls."""
    busy = rate_per_s / capacity_per_s
    if mean_ms > limit_ms:
        return Verdict(
            False,
            f"{mean_ms:.0f} ms on average, {limit_ms:.0f} were allowed: {busy:.0%} of the capacity is too much",
        )
    if busy < 0.6:
        return Verdict(
            False,
            f"{mean_ms:.0f} ms on average, within {limit_ms:.0f}; but {busy:.0%} of the capacity is timid. Turn M/D/1 around",
        )
    return Verdict(
        True, f"{mean_ms:.0f} ms on average, within {limit_ms:.0f}, at {busy:.0%} of the capacity."
    )


@lab
def lab_3(rate_for: Callable[[float, float], float]) -> Verdict:
    server = serve(**SLEEPS, MAX_QUEUE=10_000, DEADLINE_S=60, QUEUE_TARGET_S=0)
    capacity_per_s = capacity(server, 2, users=4)
    limit_s = 4 / capacity_per_s
    rate_per_s = rate_for(1 / capacity_per_s, limit_s)
    df = load(server, "open", rate_per_s=rate_per_s, duration_s=10, limit_s=60)
    return judge_3(float((df.queue_ms + df.model_ms).mean()), 1000 * limit_s, rate_per_s, capacity_per_s)


# --- lesson 4 ---------------------------------------------------------------------------------------------------------


def judge_4(gain: float, predicted: float) -> Verdict:
    """A gain was predicted within a fifth."""
    if not 0.8 < predicted / gain < 1.25:
        return Verdict(
            False,
            f"measured {gain:.2f} times, you said {predicted:.2f}. What do a and b say: (a + b) n / (a + b n)?",
        )
    return Verdict(True, f"measured {gain:.2f} times, you said {predicted:.2f}.")


@lab
def lab_4(predicted: float) -> Verdict:
    per_s = {}
    for most in (1, 16):
        server = serve(BATCH_SIZE=most, cores=SERVER_CORES)
        per_s[most] = capacity(server, 3, users=32)
        stop(server)
    return judge_4(per_s[16] / per_s[1], predicted)


# --- lesson 5 ---------------------------------------------------------------------------------------------------------


def judge_5(goodput_per_s: float, burst_answered: int) -> Verdict:
    """Settings for overload and for bursts at once."""
    if goodput_per_s < 40:
        return Verdict(
            False,
            f"at twice the capacity {goodput_per_s:.0f} per second were in time, 40 were asked for: some wait for longer than 2 s",
        )
    if burst_answered < 60:
        return Verdict(
            False,
            f"{goodput_per_s:.0f} per second at twice the capacity; but of a burst of 60 only {burst_answered} were answered",
        )
    return Verdict(
        True, f"{goodput_per_s:.0f} per second at twice the capacity, and a burst of 60 loses nobody."
    )


@lab
def lab_5(settings: dict[str, float]) -> Verdict:
    server = serve(**(SLEEPS | settings))
    burst = lesson.ask_together(server, [lesson.TEXT] * 60)
    time.sleep(2)
    df = load(server, "open", rate_per_s=100, duration_s=10, limit_s=2.0, timeout_s=6.0)
    answered = sum(reply.status == 200 and reply.ms < 2000 for reply in burst)
    return judge_5(generator.summary(df, 2.0)["goodput_per_s"], answered)


# --- lesson 6 ---------------------------------------------------------------------------------------------------------


def judge_6(mean_batch: float, clients: int) -> Verdict:
    """Threads enough to fill the batches."""
    if mean_batch < 0.8 * clients:
        return Verdict(
            False,
            f"{mean_batch:.0f} texts per call on average, of {clients} clients. How many can wait at the same time?",
        )
    return Verdict(True, f"{mean_batch:.0f} texts per call on average, of {clients} clients.")


@lab
def lab_6(threads: int) -> Verdict:
    mode = Mode(
        "your gthread", f"gunicorn -c workers/gunicorn/gthread.conf.py --workers 1 --threads {int(threads)}"
    )
    server = serve(mode, **SLEEPS, SLEEP_S=0.1, BATCH_SIZE=24)
    df = load(server, "closed", users=24, duration_s=4, limit_s=20)
    return judge_6(df.batch_size.count() / (1 / df.batch_size).sum(), 24)


# --- lesson 7 ---------------------------------------------------------------------------------------------------------


def judge_7(share: float, gain: float) -> Verdict:
    """The most Python with which two threads still give 1.3 times the answers of one."""
    if gain < 1.3:
        return Verdict(
            False,
            f"with {share:.0%} of Python two threads give {gain:.2f} times the answers of one, 1.3 were asked for. Do they take perfect turns?",
        )
    if share < 0.3:
        return Verdict(
            False,
            f"{gain:.2f} times; but {share:.0%} of Python is timid. For which s is 2 / (1 + s) = 1.3? Stay somewhat below it",
        )
    return Verdict(True, f"with {share:.0%} of Python two threads give {gain:.2f} times the answers of one.")


@lab
def lab_7(share: float) -> Verdict:
    from support import l07_measure

    if not 0 < share < 1:
        raise NotYet("a share lies between 0 and 1")
    turns = l07_measure.copies_in_threads(share, (1, 2), lesson.quick(1.5, 2.5))
    return judge_7(share, steady(turns[2]) / steady(turns[1]))


# --- lesson 8 ---------------------------------------------------------------------------------------------------------


def judge_8(back_after_s: float, measured_s: float) -> Verdict:
    """The seconds until a killed model process has a successor, to a third."""
    said = f"you said {back_after_s:.1f} s, it answered again after {measured_s:.1f} s"
    if not 2 / 3 < back_after_s / measured_s < 4 / 3:
        return Verdict(
            False, f"{said}. It starts a Python, imports torch and transformers, and loads the model"
        )
    return Verdict(True, f"{said}.")


@lab
def lab_8(back_after_s: float) -> Verdict:
    server = serve(OFFLOAD="process")
    lesson.ask(server)
    command = "workers.isolation.process"
    next(one for one in server.processes() if command in " ".join(one.cmdline())).kill()
    began = time.perf_counter()
    while (reply := lesson.ask(server)).status != 200:
        if time.perf_counter() - began > 60:
            raise NotYet(f"no answer for a minute: {reply.body}")
        time.sleep(0.05)
    return judge_8(float(back_after_s), time.perf_counter() - began)


# --- lesson 9 ---------------------------------------------------------------------------------------------------------


def judge_9(copies: dict[int, float], chosen: int) -> Verdict:
    """The fewest instances that keep the wait below one call."""
    enough = [k for k, wait_ms in sorted(copies.items()) if wait_ms < 20]
    if copies[chosen] >= 20:
        return Verdict(False, f"with {chosen} a text waits {copies[chosen]:.0f} ms on average, a call is 20")
    if enough[0] < chosen:
        return Verdict(
            False,
            f"with {chosen} a text waits {copies[chosen]:.0f} ms, but with {enough[0]} only {copies[enough[0]]:.0f}: one too many",
        )
    return Verdict(
        True,
        f"with {chosen} a text waits {copies[chosen]:.0f} ms on average, with one fewer {copies.get(chosen - 1, np.inf):.0f}.",
    )


@lab
def lab_9(instances: int) -> Verdict:
    waits = {}
    for k in (instances - 1, instances):
        if k > 0:
            server = serve(**SLEEPS, INSTANCES=k, MAX_QUEUE=10_000, DEADLINE_S=60, QUEUE_TARGET_S=0)
            df = load(server, "open", rate_per_s=80, duration_s=6, limit_s=60)
            waits[k] = float(df.queue_ms.mean())
            stop(server)
    return judge_9(waits, instances)


# --- lesson 10 --------------------------------------------------------------------------------------------------------


def judge_10(gain: float, score_gap: float) -> Verdict:
    """Five times the stock model's answers per second, and the same ones."""
    if score_gap > 0.001:
        return Verdict(
            False,
            f"{gain:.1f} times as many; but a score moved by {score_gap:.2g}, 0.001 was allowed. Which setting rounds?",
        )
    if gain < 5:
        return Verdict(
            False,
            f"{gain:.1f} times as many texts per second as the stock model, one by one; 5 were asked for. What costs in a call, and what in a text?",
        )
    return Verdict(
        True, f"{gain:.1f} times as many texts per second, and no score moved by more than {score_gap:.1g}."
    )


@lab
def lab_10(settings: dict[str, Any]) -> Verdict:
    from loadtests.load import texts
    from workers.settings import Settings

    if unknown := set(settings) - set(Settings.__annotations__):
        raise NotYet(f"{', '.join(sorted(unknown))}: not a setting; see docs/settings.md")
    asked = [text.text for text in texts.corpus("short")[:20]]
    per_s, scores = {}, {}
    for name, its in {"stock": {"FAST": "0"}, "yours": settings}.items():
        server = serve(**its)
        replies = lesson.ask_together(server, asked)
        scores[name] = [{one["token"]: one["score"] for one in reply.json} for reply in replies]
        per_s[name] = capacity(server, lesson.quick(1, 4), users=32)
        stop(server)
    gaps = [
        abs(score - mine[token])
        for theirs, mine in zip(scores["stock"], scores["yours"])
        for token, score in theirs.items()
        if token in mine  # the fifth word may be another one where two are as likely
    ]
    return judge_10(per_s["yours"] / per_s["stock"], max(gaps))


# --- lesson 11 --------------------------------------------------------------------------------------------------------


def judge_11(gains: dict[int, float], chosen: int) -> Verdict:
    """The shortest lists that carry five times as many texts as a text a call; half as many texts must not do."""
    gain = f"with lists of {chosen} {gains[chosen]:.1f} times as many texts"
    if gains[chosen] < 5:
        return Verdict(False, f"{gain}; 5 were asked for. What does a call cost, and what a text in it?")
    if gains[max(1, chosen // 2)] >= 5:
        return Verdict(
            False, f"{gain}, but with {chosen // 2} still {gains[chosen // 2]:.1f}: fewer would do"
        )
    return Verdict(True, f"{gain}, with lists of {max(1, chosen // 2)} {gains[max(1, chosen // 2)]:.1f}.")


@lab
def lab_11(texts_per_list: int) -> Verdict:
    from support import l11_grpc_and_http

    if not 1 < texts_per_list <= 64:
        raise NotYet("a list has 2 to 64 texts here")
    server = serve(MODEL="loadtests.bench.apps:Instant", BATCH_SIZE=64, GRPC_PORT=free_port())
    options = {"way": "lists", "model": "", "cpu": max(CLIENT_CORES), "duration_s": lesson.quick(0.3, 1.0)}
    sizes = sorted({1, max(1, texts_per_list // 2), texts_per_list})
    turns: dict[int, list[float]] = {n: [] for n in sizes}
    for _ in range(3):
        for n in sizes:
            turns[n].append(l11_grpc_and_http.visit(server, "HTTP", in_flight=n, **options)["per_s"])
    per_s = {n: float(np.median(found)) for n, found in turns.items()}
    return judge_11({n: found / per_s[1] for n, found in per_s.items()}, texts_per_list)


# --- lesson 12 --------------------------------------------------------------------------------------------------------


def judge_12(outcomes: dict[str, int]) -> Verdict:
    """Nobody is lost while a replica is killed."""
    unanswered = sum(n for outcome, n in outcomes.items() if outcome != "200")
    if unanswered:
        return Verdict(
            False, f"{outcomes}: {unanswered} without an answer. How much can the replica that is left do?"
        )
    return Verdict(True, f"all {outcomes.get('200', 0)} were answered, while one of two replicas was killed.")


@lab
def lab_12(rate_per_s: float) -> Verdict:
    from support import l12_growing

    if rate_per_s < 20:
        raise NotYet("that is timid: at least 20 per second")
    server = serve("haproxy-2", cores=None, **SLEEPS, DEADLINE_S=1.0)
    lost = l12_growing.disturb(
        server,
        lambda: load(server, "open", rate_per_s=rate_per_s, duration_s=8, limit_s=1.0, timeout_s=3.0),
        lambda: l12_growing.kill_a_replica(server),
        after_answers=40,
    )
    return judge_12(lost.rows.outcome.value_counts().to_dict())


# --- lesson 13 --------------------------------------------------------------------------------------------------------


def judge_13(usual_ms: float, gap_ms: float, more_ms: float) -> Verdict:
    """As many sequences in a step as leave each reader's gap within twice that of one alone."""
    if gap_ms > 2 * usual_ms:
        return Verdict(
            False,
            f"the gap is {gap_ms:.0f} ms, alone it is {usual_ms:.0f}: too many. What does each sequence bring that nobody else reads?",
        )
    if more_ms <= 2 * usual_ms:
        return Verdict(
            False,
            f"the gap is {gap_ms:.0f} ms, alone it is {usual_ms:.0f}; with half as many again it would be {more_ms:.0f}: there is room",
        )
    return Verdict(
        True,
        f"the gap is {gap_ms:.0f} ms, alone it is {usual_ms:.0f}, with half as many again {more_ms:.0f}.",
    )


@lab
def lab_13(sequences: int) -> Verdict:
    from support import l13_tokens

    most = l13_tokens.SLOTS * 2 // 3
    if not 1 <= sequences <= most:
        raise NotYet(f"from 1 to {most}: half as many again must fit into the slots")
    model = l13_tokens.loaded()
    steps = {n: l13_tokens.writing(n, 300) for n in (1, sequences, -(-sequences * 3 // 2))}
    turns = [
        {n: l13_tokens.step_ms(model, rows, 3) for n, rows in steps.items()}
        for _ in range(lesson.quick(3, 9))  # in turn, so that a slow moment of the machine meets all of them
    ]
    usual_ms, gap_ms, more_ms = (
        float(np.median([turn[n] for turn in turns])) for n in (1, sequences, -(-sequences * 3 // 2))
    )
    return judge_13(usual_ms, gap_ms, more_ms)


# --- lesson 14 --------------------------------------------------------------------------------------------------------


def judge_14(usual_ms: float, gap_ms: float, ttft_ms: float) -> Verdict:
    """A chunk was chosen: gaps within three usual steps, and the first token not later than need be."""
    if gap_ms > 3 * usual_ms:
        return Verdict(
            False, f"the longest gap was {gap_ms:.0f} ms, a usual one is {usual_ms:.0f}: a smaller chunk"
        )
    return Verdict(
        True,
        f"the longest gap was {gap_ms:.0f} ms, a usual one is {usual_ms:.0f}; the newcomer's first token came after {ttft_ms:.0f} ms.",
    )


@lab
def lab_14(chunk: int) -> Verdict:
    from support import l13_tokens, l14_first

    return judge_14(*l14_first.newcomer(l13_tokens.loaded(9), step_tokens=int(chunk) + 8))


# --- lesson 15 --------------------------------------------------------------------------------------------------------


def judge_15(late: float, retries: float) -> Verdict:
    """A retry rule that survives the rush and still retries."""
    if late < 0.82:
        return Verdict(False, f"after the rush {late:.0%} of the capacity are answered: the storm stays")
    if retries < 0.01:
        return Verdict(False, "it survives, because hardly anybody asks again: allow some retries")
    return Verdict(True, f"after the rush {late:.0%} of the capacity are answered, with retries.")


@lab
def lab_15(retries: Any) -> Verdict:
    from support import l15_fleet

    after = l15_fleet.storm(retries)
    return judge_15(float(after[20:].mean()), float(min(retries.most, 1) * min(1.0, retries.budget)))
