"""Tokens per step over how much longer a step is."""


def answer(p, k, b):
    return sum(p**i for i in range(k + 1)) / (1 + k * b)
