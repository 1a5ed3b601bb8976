"""How long the next step will take: seconds = a + b * prompt tokens + c * sequences + d * cached tokens.

`a` is what any step costs, above all reading the weights; `b` is the arithmetic of a prompt's token, `c` of a sequence's
token, and `d` is attention: reading the keys and values that are in the cache.
"""

from collections.abc import Sequence
from typing import NamedTuple


class Work(NamedTuple):
    """What is in a step."""

    prompt: float = 0.0  # tokens of prompts
    sequences: float = 0.0  # that get their next token
    cached: float = 0.0  # tokens that these attend to


LEAST_S = 1e-6
# How far one step may be from what was expected: beyond it is an outlier and counts as this much.
SURPRISE = 2.0
FRESH = 0.05  # how far one step moves the law towards itself
WARM_UP_ROUNDS = 400


class StepCost:
    """The law, learnt at `warm_up` and kept fresh by `observe`."""

    def __init__(self, a: float = 0.0, b: float = 0.0, c: float = 0.0, d: float = 0.0) -> None:
        self.law = [a, b, c, d]
        self.error = 0.0  # mean relative error of the predictions

    def predict_s(self, work: Work) -> float:
        """Seconds that a step with this in it will take."""
        a, b, c, d = self.law
        return a + b * work.prompt + c * work.sequences + d * work.cached

    @property
    def shortest_s(self) -> float:
        """How long a step with one sequence takes."""
        return self.predict_s(Work(sequences=1))

    @property
    def margin(self) -> float:
        """Factor to lengthen a prediction by before anything is promised on it."""
        return 1.1 + self.error

    def warm_up(self, steps: Sequence[tuple[Work, float]]) -> None:
        """Find the law behind these steps and how many seconds each took."""
        if not any(self.law):
            # Begin with a fifth of the shortest step for each term, and let the steps correct that.
            least_s = max(min(seconds for _, seconds in steps), LEAST_S)
            largest = [max(work[i] for work, _ in steps) for i in range(3)]
            self.law = [least_s / 2, *(least_s / 2 / size if size else 0.0 for size in largest)]
        for _ in range(WARM_UP_ROUNDS):
            for work, seconds in steps:
                self._learn(work, seconds, 0.5)
        self.error = 0.0

    def observe(self, work: Work, seconds: float) -> None:
        """Learn that a step with this in it took so long."""
        ratio = self._learn(work, seconds, FRESH)
        self.error += (min(1.0, abs(ratio - 1)) - self.error) / 20

    def _learn(self, work: Work, seconds: float, rate: float) -> float:
        """Correct each term in proportion to its share of the prediction; return seconds / prediction.

        So no term gets below zero, and none is changed by steps that it has no part in.
        """
        predicted_s = max(self.predict_s(work), LEAST_S)
        ratio = seconds / predicted_s
        surprise = min(max(ratio, 1 / SURPRISE), SURPRISE) - 1
        sizes = (1.0, *work)
        self.law = [
            term * (1 + rate * surprise * term * size / predicted_s) for term, size in zip(self.law, sizes)
        ]
        return ratio
