"""limit = S + x S / 2 with x = rho / (1 - rho); so rho = x / (1 + x), and the rate is rho / S."""


def answer(call_s, limit_s):
    x = 2 * (limit_s - call_s) / call_s
    return x / (1 + x) / call_s
