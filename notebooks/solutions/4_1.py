"""1 / b against 1 / (a + b)."""

answer = (8 + 2) / 2
