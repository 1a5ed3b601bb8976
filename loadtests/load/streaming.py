"""One streamed completion for a Locust user: when its first token came, how long the next ones took, and how many there were."""

import json
import time
from itertools import pairwise
from typing import Any

from loadtests.load.locust_client import Asker
from loadtests.load.rows import Row

PATH = "/v1/completions"
# Locust's request type of what is not a request: times of tokens, and tokens per second where other rows have milliseconds.
STREAM = "stream"
# For a whole text, without --timeout-s.
PATIENCE_S = 60.0


class Reading:
    """The events of one stream as they come."""

    def __init__(self) -> None:
        self.came_at: list[float] = []  # of each event with text
        self.tokens = 0
        self.is_whole = False

    def line(self, line: bytes) -> None:
        """Take one line of the reply."""
        if line.startswith(b"data: [DONE]"):
            self.is_whole = True
        elif line.startswith(b"data: {"):
            event = json.loads(line[6:])
            if any(choice.get("text") for choice in event.get("choices", ())):
                self.came_at.append(time.perf_counter())
            self.tokens = (event.get("usage") or {}).get("completion_tokens", self.tokens)

    def gaps_ms(self) -> list[float]:
        """Return the milliseconds from one event with text to the next."""
        return [1000 * (b - a) for a, b in pairwise(self.came_at)]


class Reader(Asker):
    """A Locust user who reads a text as it is written. A request is late when its first token is."""

    abstract = True

    def __init__(self, environment: Any) -> None:
        super().__init__(environment)
        self.timeout_s = self.options.timeout_s or PATIENCE_S

    def ask(self, due_s: float | None = None, *, leave_after_s: float | None = None, attempt: int = 0) -> Row:
        """Ask for one text and read it to its end."""
        due_s = self.now_s() if due_s is None else due_s
        reading = Reading()
        body = {
            "prompt": str(getattr(next(self.texts), "inputs", "")),
            "max_tokens": self.options.max_tokens,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        row = self._send(
            "model",
            "POST",
            PATH,
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
            lambda _: reading.is_whole and bool(reading.came_at),
            due_s,
            leave_after_s,
            attempt,
            each_line=reading.line,
            judged_ms=lambda: 1000 * (reading.came_at[0] - self.began - due_s),
        )
        if row.outcome == "200":
            self._tell(reading, due_s)
        return row

    def _tell(self, reading: Reading, due_s: float) -> None:
        """Tell Locust of the first token, from when the request was due, of each next one, and of the speed between them."""
        first, last = reading.came_at[0], reading.came_at[-1]
        numbers = [("TTFT", 1000 * (first - self.began - due_s)), *(("ITL", ms) for ms in reading.gaps_ms())]
        if last > first:
            numbers.append(("tokens/s, not ms", (reading.tokens - 1) / (last - first)))
        for name, number in numbers:
            self.environment.events.request.fire(
                request_type=STREAM,
                name=name,
                response_time=number,
                response_length=0,
                exception=None,
                context={},
            )
