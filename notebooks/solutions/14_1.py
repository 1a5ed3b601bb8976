"""A step with a chunk in it."""

answer = 20 + 64 * 0.5
