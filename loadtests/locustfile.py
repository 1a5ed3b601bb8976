"""Load on the server, one question for each class of users: docs/loadtests.md says what to look at.

    $ make load                     # Locust's page on http://127.0.0.1:8089, and a server where none runs
    $ locust                        # the page alone; the server is at --host, http://127.0.0.1:8000
    $ locust --headless -t 30s OpenLoop --rate-per-s 50 --slo-p99-ms 200

`generator.Generator` runs the same classes and returns every request as a row.
"""

import argparse
import logging
import re
import signal
import sys
from collections.abc import Callable, Iterator
from itertools import chain, count, repeat
from pathlib import Path
from typing import Any, NamedTuple

import gevent
import locust.stats
from gevent import GreenletExit
from gevent.pool import Group
from locust import constant, events, task
from locust.exception import StopTest, StopUser
from locust.runners import LocalRunner, MasterRunner, WorkerRunner

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # `locust -f` does not

from loadtests.arguments import above, at_least_0, share
from loadtests.load import locust_page, texts
from loadtests.load.goodput import Goodput
from loadtests.load.locust_client import Asker, ask_info, url_problem
from loadtests.load.streaming import STREAM, Reader

# Locust rounds 147 ms to 150 and 3432 to 3400 by default; percentiles are compared here.
locust.stats.bucket_response_time = round  # type: ignore[assignment]
locust.stats.PERCENTILES_TO_CHART = [0.5, 0.95, 0.99]
LENGTH_S = 60  # of a test without -t
USERS = 8  # of a closed loop without -u
UNANSWERED = (" rejected", " failed", " wrong", " left")  # ends of names: their times are not an answer's
log = logging.getLogger("loadtests")


# --- options ----------------------------------------------------------------------------------------------------------


def goodput(text: str) -> str:
    if text and above(0.0)(text.removesuffix("%")) > 100 and text.endswith("%"):
        raise argparse.ArgumentTypeError(f"{text} is more than all")
    return text


class Option(NamedTuple):
    """An option of the command line, and of the page where `on_page`."""

    default: Any
    check: Callable[[str], Any]
    meaning: str
    on_page: bool = False
    choices: tuple[Any, ...] | None = None


GROUPS: dict[str, dict[str, Option]] = {
    "Load": {
        "rate_per_s": Option(20.0, above(0.0), "arrivals per second, of all classes but ClosedLoop", True),
        "limit_s": Option(2.0, above(0.0), "an answer after so many seconds is worth nothing to the client", True),
        "texts": Option("short", str, "short, mixed (one long text among ten) or long (200 tokens)", True, texts.KINDS),
        "timeout_s": Option(0.0, at_least_0, "the client hangs up so long after the request was due; 0: at twice its limit"),
        "api_key": Option("", str, "the server's key; also API_KEY in the environment, never shown on the page"),
        "seed": Option(0, int, "the same seed gives the same arrivals and texts"),
    },
    "Objectives: the exit code is 1 when one is missed": {
        "slo_p99_ms": Option(0.0, at_least_0, "p99 of the correct answers, late ones counted; 0: any", True),
        "slo_goodput": Option(
            "", goodput, "correct answers in time: per second (150) or, with a percent sign, of all requests; empty: any", True
        ),
    },
    "Shapes": {
        "steps": Option(8, above(0, int), "Steps: how many, up to rate_per_s", True),
        "spike_x": Option(4.0, above(0.0), "Spike: this many times rate_per_s", True),
        "spike_s": Option(0.0, at_least_0, "Spike: how long; 0: a tenth of the test"),
        "overload_x": Option(10.0, above(0.0), "Overload: this many times the capacity that it has measured", True),
    },
    "Single classes": {
        "max_tokens": Option(64, above(0, int), "StreamingClosedLoop, StreamingOpenLoop: tokens of a text at most", True),
        "health_per_s": Option(10.0, at_least_0, "HealthChecks: checks per second"),
        "burst": Option(32, above(0, int), "SlowCalls: texts that arrive at once, every burst_every_s"),
        "burst_every_s": Option(2.0, above(0.0), "SlowCalls: seconds from burst to burst"),
        "impatient_share": Option(0.5, share, "Impatient: the share of clients who hang up"),
        "leave_after_s": Option(0.2, above(0.0), "Impatient: when they do"),
        "honour": Option(1, int, "RetryStorm: 1 waits as Retry-After says, 0 retries after backoff_s", False, (0, 1)),
        "backoff_s": Option(0.05, above(0.0), "RetryStorm: the wait of those who do not honour Retry-After"),
        "attempts": Option(5, above(0, int), "RetryStorm: how often a client asks at most"),
    },
}  # fmt: skip
OPTIONS = dict(chain.from_iterable(group.items() for group in GROUPS.values()))
# Not options of Locust's: how long (it has -t), how another server wants to be asked, and a file of answers to agree with.
UNLISTED = {"duration_s": LENGTH_S, "form": "ours", "expected": ""}


# --- classes ----------------------------------------------------------------------------------------------------------


class ClosedLoop(Asker):
    """N users who each wait for their answer before they ask again. Hides overload: slow servers get fewer requests."""

    wait_time = constant(0)

    @task
    def ask_and_wait(self) -> None:
        if self.options.duration_s <= self.now_s():
            raise StopUser
        row = self.ask()
        if row.outcome == "503":
            # As Retry-After says, or users who ask on at once storm the server; NaN, where it is missing, is not below 1.
            gevent.sleep(min(1.0, row.retry_after_s))
        elif row.outcome == "lost":
            gevent.sleep(0.01)  # a dead server refuses thousands of connections per second


class StreamingClosedLoop(Reader, ClosedLoop):
    """Readers of TASK=text-generation who each ask for a new text at the end of the last: tokens per second at most."""


class OpenLoop(Asker):
    """Strangers who come whether or not others have been answered: an absolute schedule of exponential gaps."""

    fixed_count = 1

    def phases(self) -> list[tuple[float, float]]:
        """Return (seconds, arrivals per second), one after the other."""
        return [(self.options.duration_s, self.options.rate_per_s)]

    def schedule(self) -> Iterator[float]:
        """Yield when requests are due. Exponential gaps have no memory, so each phase may draw its first again."""
        start_s = 0.0
        for seconds, rate_per_s in self.phases():
            due_s = start_s + self.rng.expovariate(rate_per_s)
            while due_s < start_s + seconds:
                yield due_s
                due_s += self.rng.expovariate(rate_per_s)
            start_s += seconds

    @task
    def walk(self) -> None:
        """Spawn a greenlet for every arrival: none waits for the one before. Ends when all have their outcome."""
        under_way = Group()
        offset_s = self.now_s()
        try:
            for due_s in self.schedule():
                gevent.sleep(max(0.0, offset_s + due_s - self.now_s()))  # 0: let the others run when late
                if self.environment.stopping:
                    break
                under_way.spawn(self.arrive, offset_s + due_s)
        finally:
            drain(under_way)
        raise StopUser

    def arrive(self, due_s: float) -> None:
        """Do what one arrival does."""
        self.ask(due_s)


def drain(under_way: Group) -> None:
    """Wait until all have ended, also when Locust stops the test: the slowest must not be forgotten. Each ends by itself."""
    while True:
        try:
            under_way.join()
            return
        except GreenletExit:
            pass


class MixedLengths(OpenLoop):
    """One text in ten is twenty times as long: what the short ones pay for it."""

    texts_kind = "mixed"


class RampUp(OpenLoop):
    """The rate climbs evenly from nothing to rate_per_s: where goodput stops following is the knee."""

    def schedule(self) -> Iterator[float]:
        due_s, most, seconds = 0.0, self.options.rate_per_s, self.options.duration_s
        while (due_s := due_s + self.rng.expovariate(most)) < seconds:
            if self.rng.random() < due_s / seconds:
                yield due_s


class Steps(OpenLoop):
    """The rate climbs in steps to rate_per_s: each is long enough to read off."""

    def phases(self) -> list[tuple[float, float]]:
        n = self.options.steps
        return [(self.options.duration_s / n, self.options.rate_per_s * (i + 1) / n) for i in range(n)]


class Spike(OpenLoop):
    """A third of the time calm, then a spike, then calm again: how long does it take to recover?"""

    def phases(self) -> list[tuple[float, float]]:
        calm, total_s = self.options.rate_per_s, self.options.duration_s
        spike_s = min(self.options.spike_s or total_s / 10, total_s)
        before_s = (total_s - spike_s) / 3
        return [(before_s, calm), (spike_s, calm * self.options.spike_x), (2 * before_s, calm)]


class Overload(OpenLoop):
    """Measure the capacity for a fifth of the time, then offer ten times as much: goodput should stay where it was."""

    users = 64

    def phases(self) -> list[tuple[float, float]]:
        return [(0.8 * self.options.duration_s, self.options.overload_x * self.capacity_per_s)]

    @task
    def walk(self) -> None:
        seconds = 0.2 * self.options.duration_s
        rows: list[Any] = []

        def user() -> None:
            while self.now_s() < began_s + seconds and not self.environment.stopping:
                row = self.ask()
                rows.append(row)
                gevent.sleep(0.1 if row.outcome != "200" else 0)

        began_s, users = self.now_s(), Group()
        for _ in range(self.users):
            users.spawn(user)
        drain(users)
        self.capacity_per_s = sum(row.outcome == "200" for row in rows) / (self.now_s() - began_s)
        if not self.capacity_per_s:
            raise StopUser
        log.info(
            "Overload: %.0f requests/s are the capacity; offering %.0f.",
            self.capacity_per_s,
            self.capacity_per_s * self.options.overload_x,
        )
        super().walk()


class HealthChecks(OpenLoop):
    """A process manager asks /health beside the load: when it gets no answer, it restarts a healthy server."""

    def phases(self) -> list[tuple[float, float]]:
        return [(self.options.duration_s, self.options.health_per_s)]

    def arrive(self, due_s: float) -> None:
        self.check_health(due_s)


class SlowCalls(OpenLoop):
    """Bursts of long texts keep the model busy for a second or more. Run it beside HealthChecks."""

    texts_kind = "long"

    def schedule(self) -> Iterator[float]:
        for i in count():
            if self.options.duration_s <= i * self.options.burst_every_s:
                return
            yield from repeat(i * self.options.burst_every_s, self.options.burst)


class Impatient(OpenLoop):
    """Some clients hang up before their answer: nobody should pay for what they no longer want."""

    def arrive(self, due_s: float) -> None:
        leaves = self.rng.random() < self.options.impatient_share
        self.ask(due_s, leave_after_s=self.options.leave_after_s if leaves else None)


class RetryStorm(OpenLoop):
    """Rejected clients ask again: as Retry-After says (honour=1), or at once, which makes an overload last."""

    def arrive(self, due_s: float) -> None:
        for attempt in range(self.options.attempts):
            row = self.ask(due_s, attempt=attempt)
            if row.outcome != "503" or self.now_s() - due_s > self.timeout_s or self.environment.stopping:
                return
            retry_after_s = row.retry_after_s if row.retry_after_s == row.retry_after_s else 1.0
            gevent.sleep(retry_after_s if self.options.honour else self.options.backoff_s)


class StreamingOpenLoop(Reader, OpenLoop):
    """Readers of TASK=text-generation who come whether or not others have their text: TTFT and ITL at a rate."""


SCENARIOS: dict[str, type[Asker]] = {
    "closed": ClosedLoop,
    "open": OpenLoop,
    "ramp": RampUp,
    "steps": Steps,
    "spike": Spike,
    "overload": Overload,
    "mixed": MixedLengths,
    "slow": SlowCalls,
    "impatient": Impatient,
    "retry": RetryStorm,
    "streaming-closed": StreamingClosedLoop,
    "streaming-open": StreamingOpenLoop,
}


# --- Locust -----------------------------------------------------------------------------------------------------------


@events.init_command_line_parser.add_listener
def add_options(parser: Any) -> None:
    """Put OPTIONS on the command line and on the page; ClosedLoop runs alone where no class is named."""
    for title, options in GROUPS.items():
        group = parser.add_argument_group(title)
        for name, one in options.items():
            action = group.add_argument(
                f"--{name.replace('_', '-')}",
                type=one.check,
                default=one.default,
                choices=one.choices,
                help=one.meaning,
                **({"env_var": "API_KEY"} if name == "api_key" else {}),
            )
            action.include_in_web_ui = one.on_page
    parser.set_defaults(
        class_picker=True,
        host="http://127.0.0.1:8000",
        run_time=LENGTH_S,
        num_users=USERS,
        spawn_rate=USERS,
        stop_timeout=600,  # each request ends by itself, at its timeout
        user_classes=["ClosedLoop"],
        **UNLISTED,
    )


@events.init.add_listener
def begin(environment: Any, runner: Any, web_ui: Any, **_: Any) -> None:
    """Check what was given, before the first request; then count, and extend the page."""
    options = environment.parsed_options
    environment.goodput, environment.stopping = None, False
    count_times_of_answers_only(environment.stats)
    events.test_start.add_listener(restart)
    events.request.add_listener(
        lambda context, **_: environment.goodput.count(context["row"], context["kind"]) if context else None
    )
    if isinstance(runner, WorkerRunner):  # the master says which
        environment.user_classes = list(environment.available_user_classes.values())
        events.report_to_master.add_listener(
            lambda client_id, data: data.update(
                goodput=environment.goodput.take() if environment.goodput else None
            )
        )
        return
    end_on_ctrl_c()
    events.worker_report.add_listener(
        lambda client_id, data: environment.goodput.merge(data["goodput"]) if data.get("goodput") else None
    )
    if web_ui:
        locust_page.extend(web_ui, environment, lambda form: form_problem(environment, form))
    if (options.headless or options.autostart) and (sentence := test_problem(environment, vars(options))):
        print(f"locust: {sentence}", file=sys.stderr)
        sys.exit(2)


def end_on_ctrl_c() -> None:
    """Let Ctrl-C interrupt Locust's main greenlet, not whichever runs, which would end with a traceback. A second one kills."""
    main = gevent.getcurrent()

    def interrupt() -> None:
        watcher.cancel()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        gevent.kill(main, KeyboardInterrupt)

    watcher = gevent.signal_handler(signal.SIGINT, interrupt)


def count_times_of_answers_only(stats: Any) -> None:
    """Keep the times of rejections, faults and health checks, which are short, out of the row "Aggregated" and its charts."""

    def log_request(method: str, name: str, response_time: float, content_length: int) -> None:
        is_answer = method == "POST" and not name.endswith(UNANSWERED)
        # Tokens are not requests.
        if method != STREAM:
            stats.total.log(response_time if is_answer else None, content_length)
        stats.entries[name, method].log(response_time, content_length)

    stats.log_request = log_request


def form_problem(environment: Any, form: dict[str, Any]) -> str:
    """Return what is wrong with the page's form, empty where nothing is."""
    for name, text in form.items():
        one = OPTIONS.get(name)
        try:
            if one and one.choices and text not in one.choices:
                return f"{name}: choose one of {', '.join(one.choices)}"
            if one:
                one.check(text)
        except (ValueError, argparse.ArgumentTypeError) as exc:
            return f"{name}: {exc}"
    if form.get("run_time") == "":
        return "Run time is empty (under Advanced options); say how long, such as 60s"
    given = {
        "host": form.get("host") or environment.host,
        "num_users": int(form["user_count"]) if form.get("user_count", "").isdigit() else 0,
        "user_classes": form["user_classes"] or [one.__name__ for one in environment.user_classes],
        "run_time": LENGTH_S,
        "tags": None,
        "exclude_tags": None,
    }
    return test_problem(environment, given)


def test_problem(environment: Any, options: dict[str, Any]) -> str:
    """Return why a test with these options would tell nothing; empty where it can begin."""
    if sentence := url_problem(options["host"]):
        return sentence
    if options["tags"] or options["exclude_tags"]:
        return "these classes have no tags; name the classes that you want instead"
    if not options["run_time"]:
        return "the run time (-t) is 0; say how long, such as 60s"
    classes = [environment.available_user_classes[name] for name in options["user_classes"]]
    least = sum(one.fixed_count or 1 for one in classes)
    if options["num_users"] < least:
        names = ", ".join(options["user_classes"])
        return f"too few users ({options['num_users']}): {names} need {least}, one each"
    if not isinstance(environment.runner, LocalRunner):
        return ""  # the workers may see another network
    try:
        info = ask_info(options["host"], environment.parsed_options.api_key)
    except ConnectionError as exc:
        return str(exc)
    readers = [one.__name__ for one in classes if issubclass(one, Reader)]
    if info and readers and info["task"] != "text-generation":
        return f"{readers[0]} reads texts as they are written: start the server with TASK=text-generation, not {info['task']}"
    return ""


def restart(environment: Any, **_: Any) -> None:
    """Give every test its own time 0 and counts, and ask the server which task it has."""
    options, runner = environment.parsed_options, environment.runner
    environment.began, environment.numbers, environment.stopping = None, {}, False
    environment.goodput, environment.example, environment.mask = Goodput(), None, texts.MASK
    if not isinstance(runner, WorkerRunner):
        options.duration_s = options.run_time
        for one in environment.user_classes:
            if one.fixed_count and not isinstance(runner, WorkerRunner):
                log.info("%s is one user, however many there are: see --rate-per-s.", one.__name__)
    if isinstance(runner, MasterRunner):
        return
    try:
        info = ask_info(environment.host, options.api_key)
    except ConnectionError as exc:
        raise StopTest(str(exc)) from None
    if info is None:
        log.warning("%s has no /info of this project's: asking it as a fill-mask server.", environment.host)
    elif info["task"] == "fill-mask":
        found = re.search(r"\[MASK\]|<mask>", str(info["example"]))
        environment.mask = found[0] if found else texts.MASK
    else:
        environment.example = texts.sendable(info["example"], bool(info["media"]))


@events.test_stopping.add_listener
def stop(environment: Any, **_: Any) -> None:
    """Let no more requests begin."""
    environment.stopping = True


@events.test_stop.add_listener
def say(environment: Any, **_: Any) -> None:
    """Log what came of the test, for the page; a headless one says it last."""
    if environment.goodput and environment.web_ui:
        for line in environment.goodput.sentences(environment.parsed_options.limit_s):
            log.info(line)


@events.quitting.add_listener
def finish(environment: Any, **_: Any) -> None:
    """Wait for what is under way, judge the test by its objectives, and let Locust's CSV files have its last rows."""
    options, runner = environment.parsed_options, environment.runner
    if isinstance(runner, WorkerRunner):
        return
    runner.stop()
    if options.csv_prefix:
        gevent.sleep(locust.stats.CSV_STATS_INTERVAL_SEC + 0.1)  # its writer looks so often
        if environment.goodput:
            environment.goodput.write(Path(f"{options.csv_prefix}_goodput.csv"))
    if environment.goodput:
        environment.missed = environment.goodput.verdict(
            options.limit_s, options.slo_p99_ms, options.slo_goodput
        )
    else:
        environment.missed = ["no test was started"] if options.headless else []
    environment.process_exit_code = 1 if environment.missed else 0

    @events.quit.add_listener  # after Locust's own tables
    def conclude(exit_code: int, **_: Any) -> None:
        lines = environment.goodput.sentences(options.limit_s) if environment.goodput else []
        for line in [*lines, *environment.missed]:
            print(line, file=sys.stderr)
