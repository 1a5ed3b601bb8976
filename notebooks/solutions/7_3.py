"""Each copy needs a core; threads in step share the lock."""


def answer(place, copies, cores, share):
    useful = min(copies, cores)
    return useful if place == "process" else useful / (1 + (useful - 1) * share)
