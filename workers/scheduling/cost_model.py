"""How long the next model call will take: the cost law seconds = a + b * size, learnt from the calls so far."""

from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

Run = Callable[[list[Any]], Awaitable[Sequence[Any]]]

# A call that is off by more than this factor is an outlier, and moves the law by no more than the second one.
OUTLIER_FACTOR, OUTLIER_STEP = 2.0, 1.1
# If the median of so many calls is an outlier, the speed has changed: 4 of them do it, 3 don't.
RECENT_CALLS = 7
# How many calls of its octave a typical call averages, and how many calls the mean error.
TYPICAL_CALLS, ERROR_CALLS = 5, 20
# What is predicted is lengthened by this factor and the mean error.
MARGIN = 1.1
# Sizes that vary less than this (relative variance) show no slope, only noise.
LEAST_SPREAD = 1e-3
# A clock of whole milliseconds may say 0, and no later ratio could scale that up.
LEAST_S = 1e-6


class CostModel:
    """A line through one typical call for each octave of size (1, 2 to 3, 4 to 7, ...).

    The octaves remember: a day of single texts does not forget how long a batch of 32 takes. Until anything was
    measured every prediction is 0: a new server admits.
    """

    def __init__(self) -> None:
        self.a = self.b = 0.0  # seconds a call, seconds a unit of size; never below 0
        self.typical: dict[int, tuple[float, float]] = {}  # octave: size, seconds
        self.error = 0.0  # how far off the predictions are on average, as a fraction
        self.ratios = deque([1.0] * RECENT_CALLS, RECENT_CALLS)  # of the measured to the predicted seconds

    def observe(self, size: float, seconds: float) -> None:
        """Learn that a call of `size` took `seconds`."""
        seconds = max(seconds, LEAST_S)
        octave, expected_s = int(size).bit_length(), self.predict_s(size)
        is_law = self.is_law
        if octave in self.typical or is_law:
            ratio = seconds / max(expected_s, 1e-9)
            self.error += (min(1.0, abs(ratio - 1)) - self.error) / ERROR_CALLS
            if self._follow_change(ratio):
                return
            # An outlier counts a little: where the law is not a line, it may be right.
            most = OUTLIER_FACTOR if self._is_near(ratio) else OUTLIER_STEP
            seconds = min(max(seconds, expected_s / most), expected_s * most)
        mean_size, mean_s = self.typical.get(octave, (size, expected_s if is_law else seconds))
        mean_size += (size - mean_size) / TYPICAL_CALLS
        self.typical[octave] = mean_size, mean_s + (seconds - mean_s) / TYPICAL_CALLS
        self._fit()

    def predict_s(self, size: float) -> float:
        """Seconds that a call with `size` altogether will take."""
        return self.a + self.b * size

    @property
    def is_law(self) -> bool:
        """Whether calls of enough sizes were measured to predict others."""
        return len(self.typical) >= 3

    @property
    def largest_size(self) -> float:
        """The largest typical size of a call so far."""
        return max((size for size, _ in self.typical.values()), default=0.0)

    @property
    def shortest_s(self) -> float:
        """How long the smallest call so far takes, 0 before the first."""
        return min((seconds for _, seconds in self.typical.values()), default=0.0)

    @property
    def margin(self) -> float:
        """By how much to lengthen what is predicted: an admitted job that ends late has cost model time for nothing."""
        return MARGIN + self.error

    def _follow_change(self, ratio: float) -> bool:
        """Scale all that is known when most of the last calls say so; return whether they did."""
        self.ratios.append(ratio)
        median = sorted(self.ratios)[RECENT_CALLS // 2]
        if self._is_near(median):
            return False
        self.typical = {i: (size, s * median) for i, (size, s) in self.typical.items()}
        self.ratios.extend([1.0] * RECENT_CALLS)
        self._fit()
        return True

    def _is_near(self, ratio: float) -> bool:
        """Return whether measured over predicted seconds of `ratio` are not an outlier."""
        return 1 / OUTLIER_FACTOR < ratio < OUTLIER_FACTOR

    def _fit(self) -> None:
        """Weighted least squares of the relative errors: a short call counts as much as a long one."""
        w = ws = wss = wt = wst = 0.0
        for size, seconds in self.typical.values():
            weight = 1 / max(seconds, 1e-9) ** 2
            w, ws, wss = w + weight, ws + weight * size, wss + weight * size * size
            wt, wst = wt + weight * seconds, wst + weight * size * seconds
        proportional = wst / wss if wss else 0.0
        spread = w * wss - ws * ws
        # All calls of about one size: the slope is noise, so take the time as proportional to size.
        b = (w * wst - ws * wt) / spread if spread > LEAST_SPREAD * ws * ws else proportional
        self.b = min(max(b, 0.0), proportional)
        self.a = max(0.0, (wt - self.b * ws) / w)
