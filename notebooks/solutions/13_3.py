"""Steps until all are written, in batches that wait for their longest, and with slots that are free at once."""

import heapq


def static(lengths, slots):
    return sum(max(lengths[i : i + slots]) for i in range(0, len(lengths), slots))


def continuous(lengths, slots):
    free_at = [0] * slots
    for length in lengths:
        heapq.heapreplace(free_at, free_at[0] + length)
    return max(free_at)


answer = static, continuous
