"""One list is under way: n texts in the time of a call."""


def texts_per_s(n, call_ms, text_ms):
    return 1000 * n / (call_ms + n * text_ms)


answer = texts_per_s
