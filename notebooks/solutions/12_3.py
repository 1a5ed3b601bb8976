"""It counts failures in a row. From the last one that counts the pause begins, and each try begins it again."""


class Breaker:
    def __init__(self, failures, pause_s, now):
        self.failures, self.pause_s, self.now = failures, pause_s, now
        self.in_a_row, self.since_s = 0, 0.0

    def allows(self):
        if self.in_a_row < self.failures:
            return True
        if self.now() - self.since_s < self.pause_s:
            return False
        self.since_s = self.now()  # nobody else tries until this one has ended, or the pause is over again
        return True

    def note(self, ok):
        self.in_a_row = 0 if ok else self.in_a_row + 1
        self.since_s = self.now()


answer = Breaker
