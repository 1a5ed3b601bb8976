"""The exercises' checkers. Each says what it thinks of an answer; none raises."""

import asyncio
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


class NotYet(Exception):
    """What is wrong, in a sentence that helps."""


@dataclass(frozen=True)
class Verdict:
    """True when the answer is right; shows itself as a sentence."""

    right: bool
    sentence: str

    def __bool__(self) -> bool:
        return self.right

    def __repr__(self) -> str:
        return f"{'● Right.' if self.right else '○'} {self.sentence}"


def exercise(praise: str) -> Callable[[Callable[[Any], None]], Callable[[Any], Verdict]]:
    """Make a soft checker of one that raises NotYet."""

    def soften(check: Callable[[Any], None]) -> Callable[[Any], Verdict]:
        @functools.wraps(check)
        def soft(answer: Any) -> Verdict:
            solution = f" (Stuck? solutions/{check.__name__.removeprefix('exercise_')}.py)"
            try:
                if answer is ... or answer is None:
                    raise NotYet("your turn: fill in the blank")
                check(answer)
            except NotYet as hint:
                return Verdict(False, str(hint) + solution)
            except Exception as error:
                return Verdict(False, f"your answer raised {type(error).__name__}: {error}{solution}")
            return Verdict(True, praise)

        return soft

    return soften


def run(coroutine: Any) -> Any:
    """Run it to its end, also inside Jupyter, whose own event loop is running; NotYet when it takes long."""
    import threading

    outcome: dict[str, Any] = {}

    def work() -> None:
        try:
            outcome["value"] = asyncio.run(asyncio.wait_for(coroutine, 5))
        except BaseException as error:
            outcome["error"] = error

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(6)
    if thread.is_alive():
        raise NotYet("it blocks its event loop and never lets go (asyncio.Lock waits without blocking)")
    if isinstance(outcome.get("error"), TimeoutError):
        raise NotYet("it did not come to an end within 5 s")
    if "error" in outcome:
        raise outcome["error"]
    return outcome["value"]


def near(value: Any, expected: float, relative: float = 0.01) -> bool:
    """Whether `value` is a number and almost `expected`; NotYet when it is none."""
    if value is None or value is ...:
        raise NotYet("your turn: fill in the blank")
    if not isinstance(value, (int, float)) and not hasattr(value, "__float__"):
        raise NotYet(f"a number is wanted, not {type(value).__name__}")
    return abs(float(value) - expected) <= relative * abs(expected) + 1e-12


# --- 1. One queue, one model ------------------------------------------------------------------------------------------


@exercise(
    "The bound of a queue is the clients' patience divided by the time of a call, less the call that runs."
)
def exercise_1_1(longest_queue: Any) -> None:
    if near(longest_queue, 100, 0):
        raise NotYet("close: the call that has just begun takes its 20 ms too")
    if not near(longest_queue, 99, 0):
        raise NotYet(
            "how many calls of 20 ms fit into 2 s? And which of them are not for those in the queue?"
        )


@exercise("That is almost `take_batch` in workers/loop.py.")
def exercise_1_2(serve_one_batch: Any) -> None:
    def pipe(texts: Any, batch_size: int = 1) -> Any:
        calls.append(len(texts) if isinstance(texts, list) else 1)
        answers = [
            [f"{text} {i}" for i in range(5)] for text in ([texts] if isinstance(texts, str) else texts)
        ]
        return answers[0] if len(answers) == 1 else answers

    async def attempt(n: int, most: int) -> tuple[list[Any], set[str]]:
        queue: asyncio.Queue[Any] = asyncio.Queue()
        replies: list[asyncio.Queue[Any]] = [asyncio.Queue() for _ in range(n)]
        for i, reply in enumerate(replies):
            queue.put_nowait((f"text {i}", reply))
        late = ("late", asyncio.Queue())
        asyncio.get_running_loop().call_later(0.0005, queue.put_nowait, late)
        if await serve_one_batch(queue, pipe, most) is None and not calls:
            raise NotYet("your turn: the pipeline was never called")
        answers = [reply.get_nowait() if reply.qsize() else None for reply in replies]
        return answers, {queue.get_nowait()[0] for _ in range(queue.qsize())}

    for n, most in ((1, 8), (2, 8), (8, 8), (11, 8), (5, 3)):
        calls: list[int] = []
        answers, left = run(attempt(n, most))
        for i in range(min(n, most)):
            if answers[i] is None:
                raise NotYet(f"{n} texts in the queue: client {i + 1} got no answer")
            if answers[i] != [f"text {i} {j}" for j in range(5)]:
                raise NotYet(
                    f"{n} texts in the queue: client {i + 1} did not get the five words for its text"
                )
        if max(calls) > most:
            raise NotYet(f"a batch of {max(calls)}: take {most} at most, the rest waits for the next one")
        if sum(calls) > min(n, most):
            raise NotYet(f"{n} texts in the queue: don't wait for one that has not come yet")
        if len(calls) > 1:
            raise NotYet(f"{len(calls)} calls of the pipeline: give it all texts of the batch at once")
        if not left >= {f"text {i}" for i in range(most, n)}:
            raise NotYet(f"{n} texts in the queue: those that you don't answer must stay in it")


@exercise(
    "The assignment makes the name local to the function, so its right side reads a variable without a value. The "
    "exception ends the task; all clients wait for ever; nothing is printed while the task object lives."
)
def exercise_1_3(exception: Any) -> None:
    name = (
        exception if isinstance(exception, str) else getattr(exception, "__name__", type(exception).__name__)
    )
    if name == "NameError":
        raise NotYet("its subclass has a more telling name")
    if name != "UnboundLocalError":
        raise NotYet("try it: a function with `print = print('x')` in it; call it")


# --- 2. Don't block the loop ------------------------------------------------------------------------------------------


@exercise("Half of the call on average, and only when it runs: 0.6 · 800 / 2.")
def exercise_2_1(mean_wait_ms: Any) -> None:
    if near(mean_wait_ms, 400):
        raise NotYet("that is for those who meet a call; four in ten don't")
    if near(mean_wait_ms, 480):
        raise NotYet("a probe comes in the middle of a call, not at its start")
    if not near(mean_wait_ms, 240):
        raise NotYet("how long is what is left of a call, on average? And what is the chance to meet one?")


@exercise("So a blocked loop and an impatient orchestrator make an outage out of a busy minute.")
def exercise_2_2(would_restart: Any) -> None:
    if would_restart([2000, 2000, 2000], 1000) is None:
        raise NotYet("your turn: it returned None")
    cases = [
        ([1, 2, 3], 1000, False, "all fast"),
        ([2000, 2000, 2000], 1000, True, "three slow ones"),
        ([2000, 2000, 2000], 3000, False, "a longer timeout"),
        ([2000, 2000, 1, 2000, 2000], 1000, False, "never three in a row"),
        ([1, 2000, 2000, 2000, 1], 1000, True, "three slow ones in the middle"),
        ([], 1000, False, "none at all"),
    ]
    for latencies, timeout_ms, expected, name in cases:
        if bool(would_restart(latencies, timeout_ms)) != expected:
            raise NotYet(f"{name}: {latencies} with a timeout of {timeout_ms} should give {expected}")


@exercise("One thread for the computation, one at a time: that is offload.Thread.")
def exercise_2_3(repaired: Any) -> None:
    import time

    inside: list[int] = [0, 0]

    def model(text: str) -> str:
        inside[0] += 1
        inside[1] = max(inside)
        time.sleep(0.1)
        inside[0] -= 1
        return text.upper()

    async def attempt() -> tuple[list[str], int]:
        ticks = 0

        async def tick() -> None:
            nonlocal ticks
            while True:
                await asyncio.sleep(0.01)
                ticks += 1

        ticker = asyncio.create_task(tick())
        server = repaired(model)
        answers = await asyncio.gather(*(server.answer(text) for text in "abc"))
        ticker.cancel()
        return answers, ticks

    answers, ticks = run(attempt())
    if answers != ["A", "B", "C"]:
        raise NotYet(f"the answers are {answers}; they should be A, B, C")
    if ticks < 5:
        raise NotYet("it still blocks: nothing else ran during the calls (asyncio.to_thread helps)")
    if inside[1] > 1:
        raise NotYet("the model was called twice at the same time: let one call wait for the other")


# --- 3. The cliff -----------------------------------------------------------------------------------------------------


@exercise("Three lines that tell you when to buy the next machine.")
def exercise_3_1(mean_time_s: Any) -> None:
    if mean_time_s(50, 0.01) is None:
        raise NotYet("your turn: it returned None")
    if mean_time_s(100, 0.01) != float("inf") or mean_time_s(200, 0.01) != float("inf"):
        raise NotYet("100 texts/s of 10 ms each, or more: the queue grows for ever; that is math.inf")
    for rate_per_s, expected in ((0, 0.01), (50, 0.015), (90, 0.055)):
        if not near(mean_time_s(rate_per_s, 0.01), expected):
            raise NotYet(f"at {rate_per_s} texts/s of 10 ms the mean time is {expected * 1000:g} ms")


@exercise("Both are Little's law: once for those inside the model, once for those before it.")
def exercise_3_2(busy_and_waiting: Any) -> None:
    before = {"model_call_seconds_sum": 5.0, "model_queue_wait_seconds_sum": 7.0}
    after = {"model_call_seconds_sum": 13.0, "model_queue_wait_seconds_sum": 37.0}
    answer = busy_and_waiting(before, after, 10.0)
    if answer is None:
        raise NotYet("your turn: it returned None")
    busy, waiting = answer
    if near(busy, 1.3) or near(waiting, 3.7):
        raise NotYet("counters count from the start of the server: take the difference of the two readings")
    if not near(busy, 0.8):
        raise NotYet("8 s of calls within 10 s: how busy was the model?")
    if not near(waiting, 3.0):
        raise NotYet("30 s of waiting within 10 s: how many waited on average?")


@exercise("Even a limit of ten calls' time leaves you with 95 %; a limit of two allows 67 %.")
def exercise_3_3(highest_rate_per_s: Any) -> None:
    if highest_rate_per_s(0.01, 0.02) is None:
        raise NotYet("your turn: it returned None")
    if abs(highest_rate_per_s(0.01, 0.01)) > 1e-6:
        raise NotYet("a limit of a single call's time leaves no room for any wait: 0")
    for limit_s, expected in ((0.02, 200 / 3), (0.015, 50.0), (0.1, 100 * 18 / 19)):
        if not near(highest_rate_per_s(0.01, limit_s), expected):
            raise NotYet(f"calls of 10 ms, a limit of {limit_s * 1000:g} ms: {expected:.1f} texts/s")


# --- 4. To batch or not to batch --------------------------------------------------------------------------------------


@exercise("(8 + 2) / 2; and even that only with endless batches.")
def exercise_4_1(most_gained: Any) -> None:
    if near(most_gained, 4):
        raise NotYet("a / b leaves out the text's own share")
    if not near(most_gained, 5):
        raise NotYet("one by one: 1 / (a + b) texts a second. In an endless batch: 1 / b")


@exercise("Most of the gain comes early: half of it takes a / b texts, nine tenths nine times as many.")
def exercise_4_2(smallest_batch: Any) -> None:
    for a_s, b_s, share, expected in (
        (0.008, 0.002, 0.45, 4),
        (0.008, 0.002, 0.79, 16),
        (0.001, 0.01, 0.5, 1),
    ):
        answer = smallest_batch(a_s, b_s, share)
        if not near(answer, expected, 0):
            raise NotYet(
                f"a = {a_s * 1000:g} ms, b = {b_s * 1000:g} ms, {share:.0%} of 1/b: {expected}, not {answer}"
            )


@exercise("At low load it is the whole delay, at high load half of it; never less.")
def exercise_4_3(mean_wait_s: Any) -> None:
    from lesson import simulate

    from loadtests.plan.planner import CostLaw

    if mean_wait_s(20, 0.05) is None:
        raise NotYet("your turn: it returned None")
    for rate_per_s in (5, 40, 200):
        found = simulate(
            CostLaw(0, 0),
            overhead_s=0,
            batch_size=10_000,
            delay_ms=50,
            rate_per_s=rate_per_s,
            duration_s=100,
        )
        expected = found.latency_ms.mean() / 1000
        if not near(mean_wait_s(rate_per_s, 0.05), expected, 0.1):
            raise NotYet(
                f"{rate_per_s} texts/s, a delay of 50 ms: the simulation says {expected * 1000:.1f} ms, "
                f"you {mean_wait_s(rate_per_s, 0.05) * 1000:.1f}. How many come during a delay, and how long does each wait?"
            )


# --- 5. Saying no -----------------------------------------------------------------------------------------------------


@exercise("Any more than that, and the last in the queue are served for nobody.")
def exercise_5_1(largest_bound: Any) -> None:
    if not (near(largest_bound, 60, 0) or near(largest_bound, 59, 0)):
        raise NotYet("how many texts can be done within the clients' patience?")


@exercise("That is the number to put on the wall, not requests per second.")
def exercise_5_2(my_goodput: Any) -> None:
    import pandas as pd

    df = pd.DataFrame(
        {"outcome": ["200", "200", "503", "200", "504", "wrong"], "latency_ms": [5, 1999, 1, 2500, 2000, 3]}
    )
    answer = my_goodput(df, 2.0, 4.0)
    if near(answer, 0.75):
        raise NotYet("an answer after 2.5 s is too late")
    if near(answer, 2):
        raise NotYet("per second, please")
    if not near(answer, 0.5):
        raise NotYet("two of these rows are right and in time, in 4 s: 0.5 per second")


@exercise("After that nobody is served in time, however long it lasts.")
def exercise_5_3(good_answers: Any) -> None:
    if good_answers(50, 2, 2, 20) is None:
        raise NotYet("your turn: it returned None")
    if near(good_answers(50, 2, 2, 20), 100) or near(good_answers(50, 3, 2, 20), 50):
        raise NotYet("those who come in the good time arrive at rho * mu a second")
    for rho, t, expected in ((2, 20, 200), (3, 20, 150), (11, 20, 110), (2, 1, 100)):
        if not near(good_answers(50, rho, 2, t), expected, 0.05):
            raise NotYet(
                f"mu = 50, rho = {rho}, a limit of 2 s, {t} s long: {expected}. (Who comes at x waits (rho - 1) x.)"
            )


# --- 6. Gunicorn ------------------------------------------------------------------------------------------------------


@exercise(
    "Both cores and memory bind, and the smaller one wins. Nine workers, as the rule says, would want 12.6 GB."
)
def exercise_6_1(number_of_workers: Any) -> None:
    if near(number_of_workers, 9, 0):
        raise NotYet("9 workers of 1.4 GB each do not fit")
    if near(number_of_workers, 4, 0):
        raise NotYet("each has a core, but four of 1.4 GB each do not fit")
    if not near(number_of_workers, 3, 0):
        raise NotYet("how many fit into memory? How many have a core?")


@exercise("That is `threads_per_instance` in workers/settings.py.")
def exercise_6_2(torch_threads: Any) -> None:
    if torch_threads(1, 4) is None:
        raise NotYet("your turn: it returned None")
    for workers, cores, expected in ((1, 4, 4), (2, 4, 2), (3, 4, 1), (8, 4, 1)):
        if not near(torch_threads(workers, cores), expected, 0):
            raise NotYet(
                f"{workers} workers on {cores} cores: {expected} each (a thread is the least there is)"
            )


@exercise(
    "One long text blocks every other one behind it, in its own queue only. So: one queue, several copies."
)
def exercise_6_3(functions: Any) -> None:
    in_turn, shared = functions
    if in_turn([0.0], [1.0]) is None or shared([0.0], [1.0]) is None:
        raise NotYet("your turn: one of them returned None")
    cases = [
        ([0, 0, 0], [4, 1, 1], 4 / 3, 1 / 3),
        ([0, 1, 2, 3], [10, 1, 1, 1], 8 / 4, 0),
        ([0, 0, 0, 0], [2, 2, 2, 2], 1, 1),
    ]
    for arrivals, durations, expected_in_turn, expected_shared in cases:
        for name, function, expected in (
            ("in turn", in_turn, expected_in_turn),
            ("shared", shared, expected_shared),
        ):
            if not near(function(list(arrivals), list(durations)), expected):
                raise NotYet(
                    f"{name}: arrivals {arrivals}, durations {durations}: a mean wait of {expected:.2f}"
                )


# --- 7. Your own model ------------------------------------------------------------------------------------------------


@exercise("Nearly two megabytes for half a page of text. One vector for the whole text would take 9 KB.")
def exercise_7_1(reply_mb: Any) -> None:
    if near(reply_mb, 1_843_200, 0.05):
        raise NotYet("in MB, please: a million bytes each")
    if near(reply_mb, 768 * 12 / 1e6, 0.05):
        raise NotYet("that is one vector; each of the 200 tokens has its own")
    if not near(reply_mb, 1.8432, 0.05):
        raise NotYet("how many numbers are there, and how many bytes does each take?")


@exercise("That is a class which the server can run: put it into a file, and name it with MODEL=file:Words.")
def exercise_7_2(words: Any) -> None:
    if not isinstance(words, type) or not hasattr(words, "check") or "__call__" not in dir(words):
        raise NotYet("your turn: a class with `__call__(self, inputs)` and `check(self, inputs, parameters)`")
    model = words()
    for wrong in (5, None, "", "   ", ["a list"]):
        try:
            model.check(wrong, {})
        except ValueError as error:
            if not str(error):
                raise NotYet("the ValueError has no sentence; the client would read nothing") from None
        else:
            raise NotYet(f"check takes {wrong!r}; it should raise a ValueError that says what to send")
    texts = ["one", "two words", "and three of  them"]
    for batch in (texts, texts[:1]):
        content = [model.check(text, {}) for text in batch]
        asked = [text if given is None else given for text, given in zip(batch, content)]
        counts = model(asked)
        if not isinstance(counts, list) or len(counts) != len(batch):
            raise NotYet(
                f"{len(batch)} inputs in a batch: `__call__` must give a list of {len(batch)} answers"
            )
        if counts != [len(text.split()) for text in batch]:
            raise NotYet(f"{batch} have {[len(text.split()) for text in batch]} words, not {counts}")


@exercise("With half of the time in Python, four threads are not worth two processes.")
def exercise_7_3(times_one_copy: Any) -> None:
    if times_one_copy("process", 1, 1, 0.5) is None:
        raise NotYet("your turn: it returned None")
    cases = [
        ("process", 2, 2, 0.5, 2, "two processes on two cores"),
        ("process", 4, 2, 0.5, 2, "four processes on two cores"),
        ("thread", 1, 2, 0.9, 1, "one thread"),
        ("thread", 2, 2, 0.6, 1.25, "two threads in step"),
        ("thread", 4, 4, 0.5, 1.6, "four threads in step"),
        ("thread", 4, 2, 0.5, 4 / 3, "four threads on two cores"),
        ("thread", 2, 2, 0.0, 2, "threads without any Python"),
        ("thread", 8, 8, 1.0, 1, "threads with nothing but Python"),
    ]
    for *asked, expected, name in cases:
        if not near(times_one_copy(*asked), expected):
            raise NotYet(f"{name}: {', '.join(map(str, asked))} gives {expected:.2f} times one copy")


# --- 8. Starting processes --------------------------------------------------------------------------------------------


@exercise("Rare once is not rare often: two days in three somebody hangs.")
def exercise_8_1(chance: Any) -> None:
    if near(chance, 1.0):
        raise NotYet("50 · 2 % is the mean number of children that hang, not a chance")
    if near(chance, 0.98**50):
        raise NotYet("that is the chance that none of them hangs")
    if near(chance, 63.6, 0.01):
        raise NotYet("a chance lies between 0 and 1, please")
    if not near(chance, 1 - 0.98**50):
        raise NotYet("what is the chance that a single child is well? And that all 50 are?")


@exercise("A model's weights can be shared by a fork alone, and a fork after computing is what hangs.")
def exercise_8_2(memory_mb: Any) -> None:
    if memory_mb(1, "spawn", 400, 1200) is None:
        raise NotYet("your turn: it returned None")
    for n, method, expected in (
        (1, "spawn", 1600),
        (4, "spawn", 6400),
        (4, "forkserver", 5200),
        (4, "fork", 1600),
    ):
        answer = memory_mb(n, method, 400, 1200)
        if not near(answer, expected):
            raise NotYet(
                f"{n} by {method}, libraries 400 and weights 1,200 MB: {expected:,} MB, not {answer:,.0f}"
            )


@exercise("So a forkserver saves the imports, unless what ended the model ended its helper, too.")
def exercise_8_3(next_answer_s: Any) -> None:
    if next_answer_s("spawn", 0.1, 2.0, 0.5) is None:
        raise NotYet("your turn: it returned None")
    for method, helper_died, expected in (
        ("spawn", False, 2.6),
        ("spawn", True, 2.6),
        ("forkserver", False, 0.5),
        ("forkserver", True, 2.6),
    ):
        answer = next_answer_s(method, 0.1, 2.0, 0.5, helper_died=helper_died)
        if not near(answer, expected):
            raise NotYet(
                f"{method}, its helper {'dead' if helper_died else 'alive'}; 0.1 s Python, 2 s imports, 0.5 s weights: "
                f"{expected} s, not {answer:.2f}"
            )


# --- 9. Sharing the work ----------------------------------------------------------------------------------------------


@exercise("Three devices' worth of work would need three that never rest: four.")
def exercise_9_1(devices: Any) -> None:
    if near(devices, 3):
        raise NotYet("three would be busy all the time, and a queue before them would grow without end")
    if near(devices, 3.75):
        raise NotYet("whole devices, please")
    if not near(devices, 4):
        raise NotYet("how many seconds of work come each second? And how much of it may one device do?")


@exercise("One thread that does this for all callers, and the devices may be processes or other machines.")
def exercise_9_2(hand_out: Any) -> None:
    import queue
    import threading
    from concurrent.futures import Future

    replies: queue.Queue[Any] = queue.Queue()
    futures: list[Future[Any]] = [Future() for _ in range(4)]
    waiting = dict(enumerate(futures))
    for pair in ((2, "two"), (9, "nobody's"), (0, "zero"), (3, ValueError("three")), None):
        replies.put(pair)
    ended = threading.Event()
    errors: list[BaseException] = []

    def work() -> None:
        try:
            hand_out(replies, waiting)
        except BaseException as error:
            errors.append(error)
        ended.set()

    threading.Thread(target=work, daemon=True).start()
    if not ended.wait(2):
        raise NotYet("it did not come to an end within 2 s: `None` says that nothing more will come")
    if errors:
        if isinstance(errors[0], KeyError):
            raise NotYet("it raised KeyError: nobody waits for number 9, and that is fine")
        raise errors[0]
    if not any(future.done() for future in futures):
        raise NotYet("your turn: no future got its answer")
    if futures[1].done():
        raise NotYet("number 1 got an answer that was never sent")
    for number, expected in ((0, "zero"), (2, "two")):
        if not futures[number].done() or futures[number].result() != expected:
            raise NotYet(f"number {number} did not get {expected!r}")
    if not futures[3].done() or not isinstance(futures[3].exception(), ValueError):
        raise NotYet("an answer that is an exception: `set_exception`")
    if set(waiting) != {1}:
        raise NotYet(f"still in `waiting`: {sorted(waiting)}; only 1 waits: take out those who were answered")


@exercise("It counts texts and not their time: two short ones weigh more than a long one.")
def exercise_9_3(wait_least_loaded: Any) -> None:
    if wait_least_loaded([0.0], [1.0], 1) is None:
        raise NotYet("your turn: it returned None")
    cases = [
        ([0, 1, 2], [2, 2, 2], 1, 1.0, "one device: 0, 1 and 2 to wait"),
        ([0, 0, 0, 0], [5, 1, 1, 1], 2, 1.5, "two devices"),
        ([0, 0, 1, 1], [9, 1, 1, 1], 2, 2.0, "the fourth finds one text on each device"),
        ([0, 1, 2, 3], [1, 1, 1, 1], 3, 0.0, "a text that ends when another comes is finished"),
    ]
    for arrivals, durations, n, expected, name in cases:
        answer = wait_least_loaded(list(arrivals), list(durations), n)
        if not near(answer, expected):
            raise NotYet(
                f"{name}: arrivals {arrivals}, durations {durations}, {n} devices: {expected:.2f}, not {answer:.2f}"
            )


# --- 10. Faster runtimes ----------------------------------------------------------------------------------------------


@exercise(
    "That is the wall: no compiler, graph or file format gets past it. Fewer operations do, and smaller numbers."
)
def exercise_10_1(most_per_s: Any) -> None:
    if near(most_per_s, 100):
        raise NotYet("a multiplication and an addition are two operations")
    if near(most_per_s, 1000) or near(most_per_s, 2000):
        raise NotYet("a text has 20 tokens, and each meets all weights")
    if not near(most_per_s, 50):
        raise NotYet("how many operations does one text take: tokens x weights x 2?")


@exercise("Sort by length, or lay the texts end to end, and it is gone.")
def exercise_10_2(padding_share: Any) -> None:
    if padding_share([1, 2]) is None:
        raise NotYet("your turn: it returned None")
    for lengths in ([10, 10], [5, 10], [200] + [10] * 9, [7]):
        expected = 1 - sum(lengths) / (len(lengths) * max(lengths))
        if not near(padding_share(list(lengths)), expected):
            raise NotYet(
                f"{lengths}: {expected:.2f} of {len(lengths) * max(lengths)} tokens, not {padding_share(list(lengths))}"
            )


@exercise("A process that restarts often may never earn its compiler.")
def exercise_10_3(texts_until_paid: Any) -> None:
    import math

    cases = [
        (30.0, (0.010, 0.005), (0.004, 0.005), 1, 5000.0),
        (30.0, (0.010, 0.005), (0.004, 0.005), 10, 50_000.0),
        (12.0, (0.010, 0.006), (0.010, 0.004), 8, 6000.0),
        (30.0, (0.010, 0.005), (0.010, 0.005), 4, math.inf),
        (30.0, (0.004, 0.005), (0.010, 0.005), 4, math.inf),
    ]
    for later_s, old, new, n, expected in cases:
        found = texts_until_paid(later_s, old, new, n)
        if found is None:
            raise NotYet("your turn: it returned None")
        if not (found == expected or (math.isfinite(expected) and near(found, expected))):
            raise NotYet(
                f"{later_s:g} s later, old {old}, new {new}, {n} texts a call: {expected:g}, not {found}"
            )


# --- 11. Protocols and packages ---------------------------------------------------------------------------------------


@exercise("Half a millisecond of 41: a protocol saves only its own share.")
def exercise_11_1(times_as_many: Any) -> None:
    if near(times_as_many, 0.8 / 0.3):
        raise NotYet("that is for a model that takes no time")
    if near(times_as_many, 40.3 / 40.8, 0.001):
        raise NotYet("upside down: gRPC is the quicker one here")
    if not near(times_as_many, 40.8 / 40.3, 0.001):
        raise NotYet("how long is a call over HTTP, and how long over gRPC? The model is in both")


@exercise("At n = 1 it is the call that you pay for; with long lists only the texts are left.")
def exercise_11_2(texts_per_s: Any) -> None:
    if texts_per_s(1, 2.0, 0.5) is None:
        raise NotYet("your turn: it returned None")
    for n, call_ms, text_ms, expected in (
        (1, 2.0, 0.5, 400.0),
        (8, 2.0, 0.5, 8000 / 6),
        (32, 1.0, 0.0, 32_000.0),
    ):
        answer = texts_per_s(n, call_ms, text_ms)
        if not near(answer, expected):
            raise NotYet(
                f"lists of {n}, {call_ms:g} ms a call and {text_ms:g} ms a text: {expected:,.0f} texts/s, not {answer:,.0f}"
            )


@exercise("No points and no weights: limits that you know, and one figure that you want.")
def exercise_11_3(choose: Any) -> None:
    servers: dict[str, dict[str, float]] = {
        "a": {"texts/s": 90, "MB": 900},
        "b": {"texts/s": 60, "MB": 500},
        "c": {"texts/s": 70, "MB": 800},
        "d": {"texts/s": 99},
        "e": {"texts/s": 10, "MB": 100},
    }
    if (found := choose(servers, {"texts/s": 20}, {"MB": 800}, "texts/s")) is None:
        raise NotYet("your turn: it returned None")
    if list(found) != ["c", "b"]:
        raise NotYet(f"at least 20 texts/s, at most 800 MB: c, b, not {', '.join(found)}")
    if list(choose(servers, {}, {}, "texts/s")) != ["d", "a", "c", "b", "e"]:
        raise NotYet("without any limit all of them are left, the fastest first")


# --- 12. Replicas -----------------------------------------------------------------------------------------------------


@exercise("Two in a million. What it costs to have one to spare is another question.")
def exercise_12_1(share: Any) -> None:
    month_s = 30 * 24 * 3600
    if near(share, 12 / month_s, 1e-3):
        raise NotYet("the one that is left answers some of them")
    if near(share, 0.6 * 12 / month_s, 1e-3):
        raise NotYet("that is the share that it still answers")
    if not near(share, 0.4 * 12 / month_s, 1e-3):
        raise NotYet(
            "for what share of a month is one away? And what share of the requests is rejected then?"
        )


@exercise("That is one to spare. A fleet of two stands half idle for it, one of twenty a twentieth.")
def exercise_12_2(replicas_wanted: Any) -> None:
    if replicas_wanted(80, 50) is None:
        raise NotYet("your turn: it returned None")
    for rate_per_s, one_per_s, expected in (
        (80, 50, 3),
        (100, 50, 3),
        (101, 50, 4),
        (20, 50, 2),
        (1000, 50, 21),
    ):
        answer = replicas_wanted(rate_per_s, one_per_s)
        if not near(answer, expected, 0):
            raise NotYet(
                f"{rate_per_s} texts/s, {one_per_s} each: {expected}, not {answer}."
                " How many must be left, and how many may die?"
            )


@exercise(
    "Closed, open, half open. Put one before anything that can be down: a database, another model, a neighbour."
)
def exercise_12_3(Breaker: Any) -> None:
    def expect(truth: bool, when: str) -> None:
        allowed = breaker.allows()
        if allowed is None:
            raise NotYet("your turn: allows() returned None")
        if bool(allowed) != truth:
            raise NotYet(f"{when}: allows() should be {truth}")

    now_s = 0.0
    breaker = Breaker(3, 10.0, lambda: now_s)
    expect(True, "at the beginning")
    for ok in (False, False, True, False, False):
        breaker.note(ok)
    expect(True, "failures that are not three in a row")
    breaker.note(False)
    expect(False, "after three failures in a row")
    now_s = 9.0
    expect(False, "9 s later, where pause_s is 10")
    now_s = 11.0
    expect(True, "11 s later, where pause_s is 10")
    expect(False, "while that one try is under way")
    breaker.note(False)
    expect(False, "after that try has failed")
    now_s = 20.0
    expect(False, "9 s after that try has failed")
    now_s = 22.0
    expect(True, "11 s after that try has failed")
    breaker.note(True)
    expect(True, "after a success")
    breaker.note(False)
    expect(True, "after a success and one failure")


# --- lesson 13 --------------------------------------------------------------------------------------------------------


@exercise("Weights over bandwidth: no program makes a single reader's tokens faster than that.")
def exercise_13_1(ms_a_token: Any) -> None:
    if near(ms_a_token, 16 / 2 * 1000 / 400, 0.02):
        raise NotYet("that is half of it: bfloat16 has 2 bytes per weight")
    if not near(ms_a_token, 40, 0.02):
        raise NotYet("bytes to read: weights times 2. Divide by bytes per second")


@exercise("Which is why long contexts, and not weights, decide how many readers fit.")
def exercise_13_2(sequences_that_fit: Any) -> None:
    for arguments, expected in (
        ((1e9, 30, 3, 64, 4, 512), 42),
        ((16e9, 32, 8, 128, 2, 4096), 29),
        ((1e6, 32, 8, 128, 2, 4096), 0),
    ):
        answer = sequences_that_fit(*arguments)
        if not near(answer, expected, 0):
            raise NotYet(
                f"{arguments}: {expected}, not {answer}. Keys and values, in each layer, for each token; whole sequences"
            )


@exercise("Static batches finish with their longest; a slot that is free at once is the whole trick.")
def exercise_13_3(functions: Any) -> None:
    static, continuous = functions
    for lengths, slots, expected in (
        ([1, 1, 1, 9], 2, (10, 10)),
        ([9, 1, 1, 1], 2, (10, 9)),
        ([5, 1, 5, 1], 2, (10, 6)),
        ([3], 4, (3, 3)),
    ):
        found = static(lengths, slots), continuous(lengths, slots)
        if found != expected:
            raise NotYet(
                f"lengths {lengths}, {slots} slots: {expected[0]} and {expected[1]} steps, not {found[0]} and {found[1]}"
            )


# --- lesson 14 --------------------------------------------------------------------------------------------------------


@exercise("The gap is bounded by the budget, and the newcomer pays with more steps.")
def exercise_14_1(longest_gap_ms: Any) -> None:
    if not near(longest_gap_ms, 20 + 64 * 0.5, 0.01):
        raise NotYet("a step takes 20 ms, and 0.5 ms more for each token of the prompt in it")


@exercise("Both limits, for each request: a mean would hide the readers that were stalled.")
def exercise_14_2(meets: Any) -> None:
    for ttft_s, gaps_s, expected in (
        (0.4, [0.05, 0.05], True),
        (1.2, [0.05], False),
        (0.4, [0.05, 0.3, 0.05], False),
        (0.4, [], True),
    ):
        if meets(ttft_s, gaps_s, 1.0, 0.2) is not expected:
            raise NotYet(f"first token after {ttft_s} s, gaps {gaps_s}, limits 1.0 and 0.2 s: {expected}")


@exercise("A draft pays where it is cheap and right, and where the model's step hardly grows with k.")
def exercise_14_3(speedup: Any) -> None:
    for p, k, b, expected in (
        (0.0, 4, 0.0, 1.0),
        (0.8, 4, 0.0, 3.3616),
        (0.8, 4, 0.5, 1.12053),
        (0.5, 1, 0.1, 1.5 / 1.1),
    ):
        answer = speedup(p, k, b)
        if not near(answer, expected, 0.01):
            raise NotYet(
                f"p = {p}, k = {k}, each further token {b} of a step: {expected:.2f}, not {answer}."
                " Tokens per step, divided by how much longer a step is"
            )


# --- lesson 15 --------------------------------------------------------------------------------------------------------


@exercise("Work first, then its root.")
def exercise_15_1(replicas: Any) -> None:
    if near(replicas, 90, 0):
        raise NotYet("that is the work: nothing to spare for its fluctuations")
    if not (near(replicas, 100, 0) or near(replicas, 99.49, 0.001)):
        raise NotYet("R = 900 x 0.1; then R + the root of R, rounded up")


@exercise("One in ten thousand, a hundred times: one page in a hundred.")
def exercise_15_2(slow_pages: Any) -> None:
    for parts in (1, 10, 100):
        answer, expected = slow_pages(parts), 1 - (1 - 0.01**2) ** parts
        if not near(answer, expected, 0.01):
            raise NotYet(f"{parts} parts: {expected:.4f}, not {answer}. A part is slow when both tries are")


@exercise("A tenth of the requests at most, whatever happens: no storm can feed on it.")
def exercise_15_3(Budget: Any) -> None:
    budget = Budget(0.1)
    if budget.may_retry():
        raise NotYet("nothing has come yet, so nothing is earned: no retry")
    for _ in range(25):
        budget.came()
    granted = sum(bool(budget.may_retry()) for _ in range(10))
    if granted != 2:
        raise NotYet(f"25 requests earn 2 retries at a tenth each, not {granted}")
    for _ in range(10_000):
        budget.came()
    granted = sum(bool(budget.may_retry()) for _ in range(50))
    if granted != 10:
        raise NotYet(f"it keeps ten at most, not {granted}: or a quiet day would pay for a storm")
