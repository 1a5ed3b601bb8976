"""Which steps are timed before the first request: they teach the law of a step's cost."""

from workers.generation.steps import Choice, Limits, Options, Row


def warm_up_steps(limits: Limits) -> list[list[Row]]:
    """Return steps of different kinds: a token alone, of many sequences, with much in the cache, chunks of prompts."""
    choice, far = Choice(Options(), generated=1), limits.capacity - 1
    several = sorted({min(n, limits.slots) for n in (1, 4, 16)})
    decode = [[Row(slot, 8, [1], choice) for slot in range(n)] for n in several if far >= 8]
    decode += [[Row(slot, min(far, 256), [1], choice) for slot in range(n)] for n in several[-2:]]
    prompts = [[Row(0, 0, [1] * n, Choice(Options(), 0))] for n in (8, 32, 128, 256) if n <= far]
    return decode + prompts
