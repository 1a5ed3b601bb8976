"""How long the next model call will take: the cost law seconds = a + b * size, fitted to the recent calls."""


class Speed:
    """Exponentially weighted least squares over (size, seconds) of past calls.

    `forget` is the weight that a call loses with each later one. Until anything was measured every prediction is 0: a
    new server admits. See https://en.wikipedia.org/wiki/Recursive_least_squares_filter for the weighting.
    """

    def __init__(self, forget: float = 0.1) -> None:
        self.forget = forget
        self.weight = self.size = self.seconds = self.size_size = self.size_seconds = 0.0
        self.a = self.b = 0.0  # seconds a call, seconds a unit of size; never below 0

    def observe(self, size: float, seconds: float) -> None:
        """Learn that a call of `size` took `seconds`."""
        keep = 1 - self.forget
        self.weight = keep * self.weight + 1
        self.size = keep * self.size + size
        self.seconds = keep * self.seconds + seconds
        self.size_size = keep * self.size_size + size * size
        self.size_seconds = keep * self.size_seconds + size * seconds
        mean_size, mean_s = self.size / self.weight, self.seconds / self.weight
        variance = self.size_size / self.weight - mean_size**2
        covariance = self.size_seconds / self.weight - mean_size * mean_s
        proportional = mean_s / mean_size if mean_size else 0.0
        # All calls of about one size: the slope is noise, so take the time as proportional to size.
        b = covariance / variance if variance > 1e-3 * mean_size**2 else proportional
        self.b = min(max(b, 0.0), proportional)
        self.a = mean_s - self.b * mean_size

    def predict_s(self, size: float, calls: int = 1) -> float:
        """Seconds that `calls` calls with `size` altogether will take."""
        return self.a * calls + self.b * size
