"""A probe meets a call with chance 0.6, and then waits for half of it on average."""

answer = 0.6 * 800 / 2
