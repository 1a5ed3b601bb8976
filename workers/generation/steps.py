"""What goes to the model and comes back in a step: plain data that can be pickled."""

from collections.abc import Mapping
from typing import NamedTuple


class Options(NamedTuple):
    """How one sequence's tokens are chosen, and when it ends."""

    max_tokens: int = 20
    temperature: float = 0.0  # 0: always the likeliest token (greedy)
    top_p: float = 1.0
    top_k: int = 0  # 0: all
    min_p: float = 0.0
    seed: int = 0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = {}
    logprobs: int = 0  # how many of the likeliest tokens to report beside the chosen one
    min_tokens: int = 0  # no end-of-sequence token before
    end_ids: frozenset[int] = frozenset()  # end-of-sequence tokens

    @property
    def has_penalties(self) -> bool:
        """Whether the choice depends on the tokens so far."""
        return bool(self.repetition_penalty != 1 or self.presence_penalty or self.frequency_penalty)


class Choice(NamedTuple):
    """That a row's last token is followed by a new one, and by which rules that is chosen."""

    options: Options
    generated: int  # tokens of the sequence so far
    prompt: list[int] | None = None  # where there are penalties
    tokens: list[int] | None = None
    mask: bytes | None = None  # where a grammar says which tokens may come: a bit each


class Row(NamedTuple):
    """One sequence's part of a step: these tokens go into its slot, from position `start` on."""

    slot: int
    start: int
    ids: list[int]
    choice: Choice | None = None  # None: more of the prompt is to come


class Token(NamedTuple):
    """A generated token. `logprob`: the logarithm of its probability before any option changed that."""

    id: int
    logprob: float
    likeliest: list[tuple[int, float]] = []  # noqa: RUF012  (id, logprob), where they were asked for


# What a step gives for each row: its token, None while its prompt goes on, or a sentence on why this row failed.
Outcome = Token | str | None


class Limits(NamedTuple):
    """What a loaded model has room for."""

    slots: int  # sequences at once
    capacity: int  # tokens of a slot: a prompt and what is generated
