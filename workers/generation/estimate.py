"""When a sequence that came now would have its first token: the scheduler's future, in a few large steps.

    estimate = FirstTokenEstimate(scheduler, length)
    estimate.first_token_s(prompt)      of one more sequence, behind all that wait
    estimate.add(prompt, max_tokens)    it is admitted: the next one is behind it

Prompts are read one after the other, by the budget that the scheduler would give them, and where no slot is free the next
one waits for the sequence that ends first. Nobody knows how long an answer will be: `length` is what part of its
`max_tokens` a sequence has used lately.
"""

import copy
from heapq import heapify, heappop, heappush

from workers.generation.scheduler import CHUNK_SHARES, Scheduler
from workers.generation.step_cost import Work

SOON = 0.5  # a sequence that is longer than expected already is taken to be half way through the rest


class FirstTokenEstimate:
    """Made after a step was planned, good until the next one is. Times count from the end of that step."""

    def __init__(self, scheduler: Scheduler, length: float) -> None:
        self.scheduler, self.length = scheduler, length
        self.seconds = self.steps = 0.0  # so far into the future
        self.free = len(scheduler.slots)
        self.cached = 0.0  # tokens in the slots of those who decode
        self.ends: list[float] = []  # when, in steps, each sequence that decodes then will end: a heap
        for sequence in scheduler.running:
            if sequence.tokens:
                most, n = sequence.options.max_tokens, len(sequence.tokens)
                self.ends.append(max(most * length - n, (most - n) * SOON if n >= most * length else 1.0))
                self.cached += sequence.cached
        heapify(self.ends)
        for sequence in scheduler.running:
            if not sequence.tokens:
                self._read(len(sequence.prompt) - sequence.cached, sequence.options.max_tokens)
        for sequence in scheduler.waiting:
            self.add(len(sequence.prompt), sequence.options.max_tokens)

    def first_token_s(self, prompt: int) -> float:
        """Return in how many seconds one more sequence with a prompt of so many tokens would have its first token."""
        ahead = copy.copy(self)
        ahead.ends = self.ends[:]
        ahead.add(prompt, 1)
        # It comes at the end of the step that reads the last of the prompt.
        return ahead.seconds + self.scheduler.cost.predict_s(Work(0, len(ahead.ends), ahead.cached))

    def add(self, prompt: int, max_tokens: int) -> None:
        """Let one more sequence start as soon as a slot is free, and read its prompt."""
        while not self.free and self.ends:
            self._decode(self.ends[0] - self.steps)
        self.free -= 1
        self._read(prompt, max_tokens)

    def _read(self, prompt: float, max_tokens: int) -> None:
        """Read a prompt in chunks beside those who decode, of whom some end meanwhile."""
        start = 0.0
        while prompt > 0:
            budget = self.scheduler.prompt_budget(len(self.ends), self.cached, start)
            steps = prompt / budget
            if self.ends:
                steps = min(steps, max(self.ends[0] - self.steps, 1e-9))
            start += steps * budget / 2
            self._decode(steps, budget, start * budget / CHUNK_SHARES)
            start += steps * budget / 2
            prompt -= steps * budget + 1e-9
        heappush(self.ends, self.steps + max(1.0, max_tokens * self.length))

    def _decode(self, steps: float, prompt: float = 0.0, seen: float = 0.0) -> None:
        """Let so many steps pass, each with so many tokens of prompts, which look back at `seen`; those who are done end."""
        steps = max(steps, 0.0)
        decoding = len(self.ends)
        self.seconds += steps * self.scheduler.cost.predict_s(Work(prompt, decoding, self.cached + seen))
        self.steps += steps
        self.cached += steps * decoding
        while self.ends and self.ends[0] <= self.steps + 1e-6:
            heappop(self.ends)
            self.cached -= self.cached / (len(self.ends) + 1)
            self.free += 1
