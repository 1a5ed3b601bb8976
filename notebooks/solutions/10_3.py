"""What a call saves, for each of its texts, pays back what the start took longer."""

import math


def answer(later_s, old, new, n):
    saved_s = (old[0] + old[1] * n - new[0] - new[1] * n) / n
    return later_s / saved_s if saved_s > 1e-12 else math.inf
