"""The model's time is in both calls."""

answer = (40 + 0.8) / (40 + 0.3)
