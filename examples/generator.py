"""MODEL=examples.generator:Primes uvicorn server:app -- items as they are found, until the client has enough.

$ curl -N -d 5 http://127.0.0.1:8000/
2
3
5
7
11
$ curl -N -d 2 -H "Accept: text/event-stream" http://127.0.0.1:8000/
data: 2

event: progress
data: 0.5

data: 3

event: progress
data: 1.0
"""

from collections.abc import Iterator
from typing import Any

from workers.tasks.calls import CallContext


class Primes:
    """The first primes, as many as are asked for."""

    example = "3"
    streams = True

    def check(self, inputs: Any, parameters: dict[str, Any]) -> int:
        return int(inputs)

    def __call__(self, inputs: list[int], contexts: list[CallContext]) -> list[Iterator[int]]:
        return [self.primes(*pair) for pair in zip(inputs, contexts)]

    def primes(self, n: int, context: CallContext) -> Iterator[int]:
        found: list[int] = []
        number = 2
        while len(found) < n and not context.cancelled:
            if all(number % prime for prime in found):
                found.append(number)
                yield number  # the client has it now; when the client leaves, the generator ends here
                context.progress(len(found) / n)
            number += 1
