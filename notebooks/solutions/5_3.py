"""Who comes before limit / (rho - 1) is in time; of them, no more than mu t are done by the end."""


def answer(mu, rho, limit_s, t):
    return min(rho * mu * limit_s / (rho - 1), mu * t)
