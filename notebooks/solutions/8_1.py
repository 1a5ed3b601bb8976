"""All 50 must be well: each of them with 98 %."""

answer = 1 - 0.98**50
