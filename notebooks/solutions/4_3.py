"""One waits w; lambda w more come during its window and wait w / 2 on average."""


def answer(rate_per_s, window_s):
    others = rate_per_s * window_s
    return (window_s + others * window_s / 2) / (1 + others)
