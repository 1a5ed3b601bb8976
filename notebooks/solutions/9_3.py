"""Note when each text of each device ends; those that have ended don't count."""


def answer(arrivals, durations, n):
    ends, waits = [[] for _ in range(n)], []
    for came, takes in zip(arrivals, durations, strict=True):
        unfinished = [sum(end > came for end in device) for device in ends]
        device = ends[unfinished.index(min(unfinished))]
        begins = max([came, *device[-1:]])
        device.append(begins + takes)
        waits.append(begins - came)
    return sum(waits) / len(waits)
