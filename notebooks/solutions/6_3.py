"""Note when each server becomes free; the one who comes takes the next in turn, or whichever is free first."""


def mean_wait(arrivals, durations, choose):
    free_at, waits = [0.0, 0.0], []
    for i, (arrival, duration) in enumerate(zip(arrivals, durations, strict=True)):
        server = choose(i, free_at)
        start = max(arrival, free_at[server])
        waits.append(start - arrival)
        free_at[server] = start + duration
    return sum(waits) / len(waits)


def in_turn(arrivals, durations):
    return mean_wait(arrivals, durations, lambda i, free_at: i % 2)


def shared(arrivals, durations):
    return mean_wait(arrivals, durations, lambda i, free_at: free_at.index(min(free_at)))


answer = (in_turn, shared)
