"""A part is slow when both tries are."""


def answer(parts):
    return 1 - (1 - 0.01**2) ** parts
