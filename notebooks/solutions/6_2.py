"""Cores divided by workers, at least one."""


def answer(workers, cores):
    return max(1, cores // workers)
