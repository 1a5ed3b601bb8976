"""Tokens that requests earn and retries spend."""


class answer:
    def __init__(self, share):
        self.share, self.tokens = share, 0.0

    def came(self):
        self.tokens = min(10.0, self.tokens + self.share)

    def may_retry(self):
        if self.tokens < 1 - 1e-9:
            return False
        self.tokens -= 1
        return True
