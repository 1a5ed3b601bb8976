"""n / (a + b n) >= share / b; solved for n."""

import math


def answer(a_s, b_s, share):
    return max(1, math.ceil(share * a_s / ((1 - share) * b_s)))
