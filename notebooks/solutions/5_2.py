"""Right and in time, per second."""


def answer(df, limit_s, duration_s):
    return ((df.outcome == "200") & (df.latency_ms <= limit_s * 1000)).sum() / duration_s
