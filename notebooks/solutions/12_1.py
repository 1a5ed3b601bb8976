"""For 12 s of a month, the part that the other one can't do."""

answer = 12 / (30 * 24 * 3600) * (1 - 0.6)
