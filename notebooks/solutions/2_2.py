"""Count the slow ones in a row."""


def answer(latencies_ms, timeout_ms=1000):
    in_a_row = 0
    for latency_ms in latencies_ms:
        in_a_row = in_a_row + 1 if latency_ms > timeout_ms else 0
        if in_a_row == 3:
            return True
    return False
