"""Limits first; what is left is sorted by one figure."""


def choose(servers, least, most, by):
    left = [
        name
        for name, figures in servers.items()
        if all(figures.get(key, float("-inf")) >= limit for key, limit in least.items())
        and all(figures.get(key, float("inf")) <= limit for key, limit in most.items())
    ]
    return sorted(left, key=lambda name: servers[name][by], reverse=True)


answer = choose
