"""Admission by the first token: reject a prompt whose first token would be late.

`scheduling/admission.py` one level down. How long an answer will be nobody knows, so its end is not a reason.
"""

import math
from collections.abc import Sequence as Several

from workers.errors import QUEUE_FULL, RETRY_LATER, Rejected
from workers.generation.estimate import FirstTokenEstimate
from workers.generation.scheduler import Scheduler, Sequence, Step
from workers.generation.text import Asked
from workers.scheduling.admission import HOPELESS_FACTOR, RETRIAL_FACTOR
from workers.scheduling.instances import Instances

# How much of the usual prompt, and of the usual length, is the last sequence's.
USUAL_SHARE = 0.05


class Admission:
    """Decides early. `most_waiting`: tokens of prompts in the queue; `budget_s`: until the first token, at most."""

    def __init__(
        self, scheduler: Scheduler, instances: Instances, most_waiting: int, budget_s: float
    ) -> None:
        self.scheduler, self.instances, self.now = scheduler, instances, instances.now
        self.most_waiting, self.budget_s = most_waiting, budget_s
        self.length = 1.0  # what part of its max_tokens a sequence uses
        self.usual_prompt = 0.0
        self.waiting_tokens = 0
        # How much later than predicted a first token may come: for 99 in 100.
        self.slack_s = budget_s / 10
        self.no_trial_until = -math.inf
        self.trial: Sequence | None = None  # the last one that was admitted though hopeless
        self._estimate: FirstTokenEstimate | None = None

    def admit_each(self, asked: Several[Asked], budget_s: float) -> list[float]:
        """Admit all of several prompts; return in how many seconds each will have its first token. Raises Rejected."""
        waiting_tokens, firsts_s = self.waiting_tokens, list[float]()
        for prompt, options, *_ in asked:
            self.usual_prompt += (len(prompt) - self.usual_prompt) * (USUAL_SHARE if self.usual_prompt else 1)
            first_s = self.expect(len(prompt), budget_s)
            if isinstance(first_s, Rejected):
                self.waiting_tokens = waiting_tokens
                self.changed()
                raise first_s
            firsts_s.append(first_s)
            self.estimate.add(len(prompt), options.max_tokens)
            self.waiting_tokens += len(prompt)
        return firsts_s

    def expect(self, prompt: int, budget_s: float) -> float | Rejected:
        """Return in how many seconds a prompt of so many tokens would have its first token, or why it is not admitted."""
        free_s = self.instances.free_s()
        if unavailable := self.instances.unavailable(free_s):
            return unavailable
        first_s = free_s[0] + self.estimate.first_token_s(max(1, prompt))
        idle = not (free_s[0] or self.scheduler.running or self.waiting_tokens)
        # The slack is for what others' prompts and texts do to a prediction: an idle server needs none.
        if idle and (not self.is_hopeless(first_s, budget_s) or self.now() >= self.no_trial_until):
            return first_s
        if self.waiting_tokens and self.waiting_tokens + prompt > self.most_waiting:
            return Rejected(QUEUE_FULL, first_s)
        if first_s * self.scheduler.cost.margin + self.slack_s > budget_s:
            sentence = f"the first token would take {math.ceil(first_s)} s; {RETRY_LATER}"
            # Then half of the backlog that is too much is gone, and a bit.
            return Rejected(sentence, first_s - budget_s / 2)
        return first_s

    @property
    def estimate(self) -> FirstTokenEstimate:
        """What lies ahead of a sequence that comes now: made once, until something changes."""
        if not self._estimate:
            self._estimate = FirstTokenEstimate(self.scheduler, self.length)
        return self._estimate

    def changed(self) -> None:
        """Note that a step begins or ends, or that a sequence has ended."""
        self._estimate = None

    def is_hopeless(self, first_s: float, budget_s: float) -> bool:
        """Return whether a first token expected in `first_s` would be so late that even an idle server should not try.

        It tries now and then, as `scheduling/admission.py` does, which corrects a wrong estimate.
        """
        return first_s * self.scheduler.cost.margin >= HOPELESS_FACTOR * budget_s

    def note_trial(self, step: Step) -> None:
        """Note how long the trial has taken so far, if it was in `step`. One that was in time allows the next at once."""
        if self.trial and self.trial in step.sequences:
            took_s = self.now() - self.trial.started_at
            self.no_trial_until = -math.inf if self.trial.tokens else self.now() + RETRIAL_FACTOR * took_s

    def note_first_token(self, is_later: bool) -> None:
        """Note whether a first token came later than predicted and the slack; let one in a hundred do so.

        The slack goes as often up by much as down by little. One stall makes all late who wait: it must not take more than
        half of the budget, which is long unlearnt.
        """
        slack_s = self.slack_s + self.budget_s / 20 * (0.99 if is_later else -0.01)
        self.slack_s = min(max(0.0, slack_s), self.budget_s / 2)

    def note_whole(self, sequence: Sequence) -> None:
        """Note that `sequence` was answered whole: how much of its max_tokens it used."""
        used = len(sequence.tokens) / sequence.options.max_tokens
        self.length += (used - self.length) * USUAL_SHARE
