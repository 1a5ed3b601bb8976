"""One waits w; lambda w more come during its delay and wait w / 2 on average."""


def answer(rate_per_s, delay_s):
    others = rate_per_s * delay_s
    return (delay_s + others * delay_s / 2) / (1 + others)
