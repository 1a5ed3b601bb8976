"""The formula, and its end."""

import math


def answer(rate_per_s, call_s):
    rho = rate_per_s * call_s
    return call_s + rho * call_s / (2 * (1 - rho)) if rho < 1 else math.inf
