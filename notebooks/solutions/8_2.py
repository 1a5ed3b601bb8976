"""What is shared is counted once."""


def memory_mb(n, method, libraries_mb, weights_mb):
    libraries = n if method == "spawn" else 1
    weights = 1 if method == "fork" else n
    return libraries * libraries_mb + weights * weights_mb


answer = memory_mb
