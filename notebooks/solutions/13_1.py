"""8 billion weights in bfloat16, 400 GB per second."""

answer = 8e9 * 2 / 400e9 * 1000
