"""All are as long as the longest; what is not theirs is padding."""


def answer(lengths):
    return 1 - sum(lengths) / (len(lengths) * max(lengths))
