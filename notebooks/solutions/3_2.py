"""Seconds spent, per second that passed."""


def answer(before, after, seconds):
    names = "model_call_seconds_sum", "model_queue_wait_seconds_sum"
    return tuple((after[name] - before[name]) / seconds for name in names)
