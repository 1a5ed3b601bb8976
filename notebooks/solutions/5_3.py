"""Who comes at x waits (rho - 1) x: those before limit / (rho - 1) are in time."""


def answer(mu, rho, limit_s, t):
    return rho * mu * min(t, limit_s / (rho - 1))
