"""Two operations for each weight and token."""

answer = 200e9 / (2 * 100e6 * 20)
