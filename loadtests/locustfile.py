"""Load on the server, one idea for each class of users. Choose some on Locust's page:

    $ locust -f loadtests/locustfile.py

or without it: `locust -f loadtests/locustfile.py --headless -t 10s -u 1 OpenLoop --rate-per-s 50`.
`drive.Generator` runs the same classes and returns every request as a row.
"""

import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gevent
import locust.stats
from gevent.pool import Group
from locust import constant, events, task
from locust.exception import StopUser

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # `locust -f` does not

from loadtests.load.locust_client import Asker

# Locust rounds 147 ms to 150 and 3432 to 3400 by default; percentiles are compared here.
locust.stats.bucket_response_time = round  # type: ignore[assignment]

# name: (default, what it means); also on the command line and on Locust's page
OPTIONS: dict[str, tuple[Any, str]] = {
    "rate_per_s": (20.0, "arrivals a second (open loop)"),
    "limit_s": (2.0, "an answer after this is worth nothing to the client"),
    "timeout_s": (0.0, "the client hangs up this long after the request was due; 0: at twice its limit"),
    "texts": ("short", "short, mixed (a long one among ten) or long (200 tokens)"),
    "form": ("ours", "how the server wants to be asked: a name in forms.py"),
    "expected": ("", "file of answers that those to fill-mask must agree with, see expected.py"),
    "seed": (0, "the same seed gives the same arrivals and texts"),
    "duration_s": (0.0, "0: until stopped"),
    "health_per_s": (0.0, "health checks a second beside the load (class HealthChecks)"),
    "steps": (8, "ramp: steps up to rate_per_s"),
    "spike_x": (4.0, "spike: this many times rate_per_s"),
    "spike_s": (1.0, "spike: how long"),
    "burst": (32, "slow: texts that arrive at once, every burst_every_s"),
    "burst_every_s": (2.0, "slow: seconds from burst to burst"),
    "impatient_share": (0.5, "impatient: the share of clients who hang up"),
    "leave_after_s": (0.2, "impatient: when they do"),
    "honour": (1, "retry: 1 waits as Retry-After says, 0 retries after backoff_s"),
    "backoff_s": (0.05, "retry: the wait of those who do not honour Retry-After"),
    "attempts": (5, "retry: how often a client asks at most"),
}


class ClosedLoop(Asker):
    """N users who each wait for their answer before they ask again. Hides overload: slow servers get fewer requests."""

    wait_time = constant(0)

    @task
    def ask_and_wait(self) -> None:
        if 0 < self.options.duration_s <= self.now_s():
            raise StopUser
        row = self.ask()
        if row.outcome == "503":
            # As told, or who asks on at once storms the server; NaN, where it told nothing, is not below 1.
            gevent.sleep(min(1.0, row.retry_after_s))
        elif row.outcome == "lost":
            gevent.sleep(0.01)  # a dead server refuses thousands of times a second


class OpenLoop(Asker):
    """Strangers who come whether or not others have been answered: an absolute schedule of exponential gaps."""

    fixed_count = 1

    def phases(self) -> list[tuple[float, float]]:
        """(seconds, arrivals a second), one after the other."""
        return [(self.options.duration_s or 60.0, self.options.rate_per_s)]

    def schedule(self) -> Iterator[float]:
        """When requests are due. Exponential gaps have no memory, so every phase may draw its first anew."""
        start_s = 0.0
        for seconds, rate_per_s in (
            self.phases() if self.options.duration_s else itertools.cycle(self.phases())
        ):
            due_s = start_s + self.rng.expovariate(rate_per_s)
            while due_s < start_s + seconds:
                yield due_s
                due_s += self.rng.expovariate(rate_per_s)
            start_s += seconds

    @task
    def walk(self) -> None:
        """A greenlet for every arrival: nobody waits for the one before. Ends when all have their outcome."""
        under_way = Group()
        offset_s = self.now_s()
        try:
            for due_s in self.schedule():
                gevent.sleep(max(0.0, offset_s + due_s - self.now_s()))  # 0: let the others run when late
                under_way.spawn(self.arrive, offset_s + due_s)
        finally:  # also when Locust stops it: the slowest requests are not to be forgotten
            under_way.join()  # each ends by itself: no client waits longer than timeout_s
        raise StopUser

    def arrive(self, due_s: float) -> None:
        """What one arrival does."""
        self.ask(due_s)


class MixedLengths(OpenLoop):
    """One text in ten is twenty times as long: what the short ones pay for it."""

    def __init__(self, environment: Any) -> None:
        environment.parsed_options.texts = "mixed"
        super().__init__(environment)


class RampUp(OpenLoop):
    """The rate climbs in steps to rate_per_s; where goodput stops following is the knee."""

    def phases(self) -> list[tuple[float, float]]:
        steps = self.options.steps
        seconds = (self.options.duration_s or 60.0) / steps
        return [(seconds, self.options.rate_per_s * (i + 1) / steps) for i in range(steps)]


class Spike(OpenLoop):
    """A third of the time calm, then a spike, then calm again: how long does it take to recover?"""

    def phases(self) -> list[tuple[float, float]]:
        calm = self.options.rate_per_s
        total_s, spike_s = self.options.duration_s or 60.0, self.options.spike_s
        before_s = (total_s - spike_s) / 3
        return [(before_s, calm), (spike_s, calm * self.options.spike_x), (2 * before_s, calm)]


class HealthChecks(OpenLoop):
    """A supervisor asks /health beside the load: when it gets no answer, it restarts a healthy server."""

    def phases(self) -> list[tuple[float, float]]:
        return [(self.options.duration_s or 60.0, self.options.health_per_s or 10.0)]

    def arrive(self, due_s: float) -> None:
        self.check_health(due_s)


class SlowCalls(OpenLoop):
    """Bursts of long texts keep the model busy for a second or more. Run it beside HealthChecks."""

    def __init__(self, environment: Any) -> None:
        environment.parsed_options.texts = "long"
        super().__init__(environment)

    def schedule(self) -> Iterator[float]:
        for i in itertools.count():
            if 0 < self.options.duration_s <= i * self.options.burst_every_s:
                return
            yield from itertools.repeat(i * self.options.burst_every_s, self.options.burst)


class Impatient(OpenLoop):
    """Some clients hang up before their answer: nobody should pay for what they no longer want."""

    def arrive(self, due_s: float) -> None:
        leaves = self.rng.random() < self.options.impatient_share
        self.ask(due_s, leave_after_s=self.options.leave_after_s if leaves else None)


class RetryStorm(OpenLoop):
    """Who is refused asks again: as Retry-After says (honour=1), or at once, which makes an overload last."""

    def arrive(self, due_s: float) -> None:
        for attempt in range(self.options.attempts):
            row = self.ask(due_s, attempt=attempt)
            if row.outcome != "503" or self.now_s() - due_s > self.options.timeout_s:
                return
            told_s = row.retry_after_s if row.retry_after_s == row.retry_after_s else 1.0
            gevent.sleep(told_s if self.options.honour else self.options.backoff_s)


SCENARIOS: dict[str, type[Asker]] = {
    "closed": ClosedLoop,
    "open": OpenLoop,
    "ramp": RampUp,
    "spike": Spike,
    "mixed": MixedLengths,
    "slow": SlowCalls,
    "impatient": Impatient,
    "retry": RetryStorm,
}


@events.init_command_line_parser.add_listener
def add_options(parser: Any) -> None:
    """Put OPTIONS on the command line and on the page, and let the user pick from the classes."""
    for name, (default, meaning) in OPTIONS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default, help=meaning)
    parser.set_defaults(class_picker=True, host="http://127.0.0.1:8000")


@events.test_start.add_listener
def restart_clock(environment: Any, **_: Any) -> None:
    """Every test on the page has its own time 0."""
    environment.began = None
    options = environment.parsed_options
    options.timeout_s = options.timeout_s or 2 * options.limit_s
