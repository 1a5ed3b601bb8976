"""From logits to tokens: each row by its own options, all rows at once.

The order is the usual one: penalties and biases, temperature, top_k, top_p, min_p. Then a row's tokens stand in the order of
their probability, and a random number says how far down to go. It follows from the sequence's seed and the token's index
alone, so the same seed gives the same text, alone and in any batch.
"""

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from workers.generation.steps import Choice, Outcome, Token

NOT_NUMBERS = "the model's probabilities are not numbers"
# So many of the likeliest tokens are sorted, more only where these are not enough. At temperature 1 they are for 9 rows in 10.
# To sort all 49,152 of a small vocabulary takes 20 times as long.
FEW, MORE = 256, 4096
ROWS = 4
# Less is the same choice, and logits divided by much less are infinite.
LEAST_TEMPERATURE = 1e-6


def choose(logits: Tensor, choices: Sequence[Choice]) -> list[Outcome]:
    """Return the next token of each row of logits [rows, vocabulary]; a sentence where there is none."""
    # Some at a time, so that all that is computed of them stays in the processor's cache.
    parts = (slice(at, at + ROWS) for at in range(0, len(choices), ROWS))
    return [outcome for part in parts for outcome in choose_few(logits[part], choices[part])]


def choose_few(logits: Tensor, choices: Sequence[Choice]) -> list[Outcome]:
    """Return the next token of each of a few rows, as `choose` does."""
    raw = logits = logits.float()
    if any(is_changed(choice) for choice in choices):
        logits = logits.clone()
        for row, choice in zip(logits, choices):
            change(row, choice)
    # `max` takes a third of the time of `argmax`. A NaN among the logits is the largest of them.
    best, ids = logits.max(-1)
    if drawn := [i for i, choice in enumerate(choices) if choice.options.temperature > 0]:
        some = logits if len(drawn) == len(choices) else logits[drawn]  # a copy takes as long as the choice
        ids[drawn] = draw(some, [choices[i] for i in drawn])
    total = raw.logsumexp(-1)
    logprobs = raw.gather(1, ids[:, None])[:, 0] - total
    likeliest = alternatives(raw, total, choices)
    return [
        Token(id_, logprob, others) if is_good else NOT_NUMBERS
        for id_, logprob, others, is_good in zip(
            ids.tolist(), logprobs.tolist(), likeliest, best.isfinite().tolist()
        )
    ]


def alternatives(logits: Tensor, total: Tensor, choices: Sequence[Choice]) -> list[list[tuple[int, float]]]:
    """Return the likeliest tokens with their log-probabilities, as many as each row asks for."""
    most = max(choice.options.logprobs for choice in choices)
    if not most:
        return [[] for _ in choices]
    values, ids = logits.topk(min(most, logits.shape[1]))
    pairs = (zip(*row) for row in zip(ids.tolist(), (values - total[:, None]).tolist()))
    return [list(row)[: choice.options.logprobs] for row, choice in zip(pairs, choices)]


def is_changed(choice: Choice) -> bool:
    """Whether anything is done to its logits before the choice."""
    options = choice.options
    return bool(
        options.has_penalties or options.logit_bias or choice.generated < options.min_tokens or choice.mask
    )


def change(logits: Tensor, choice: Choice) -> None:
    """Apply a row's penalties and biases to its logits, in place."""
    options = choice.options
    if options.has_penalties:
        counts = Counter(choice.tokens)
        # As Transformers has it, the prompt counts for the repetition penalty; as OpenAI has it, not for the others.
        seen = torch.tensor(sorted({*(choice.prompt or ()), *counts}), device=logits.device)
        scores = logits[seen]
        factor = torch.where(scores > 0, 1 / options.repetition_penalty, options.repetition_penalty)
        logits[seen] = scores * factor
        if counts:
            ids = torch.tensor(list(counts), device=logits.device)
            times = torch.tensor(list(counts.values()), device=logits.device)
            logits[ids] -= options.presence_penalty + options.frequency_penalty * times
    for token, bias in options.logit_bias.items():
        logits[token] += bias
    if choice.generated < options.min_tokens:
        logits[list(options.end_ids)] = -torch.inf
    if choice.mask:
        logits[~allowed(choice.mask, len(logits)).to(logits.device)] = -torch.inf


def allowed(mask: bytes, vocabulary: int) -> Tensor:
    """Return which tokens a grammar's mask allows; those beyond it, which no tokenizer has, it does not."""
    bits = torch.frombuffer(bytearray(mask), dtype=torch.uint8)[:, None] >> torch.arange(8) & 1
    found = torch.zeros(vocabulary, dtype=torch.bool)
    n = min(vocabulary, bits.numel())
    found[:n] = bits.flatten()[:n].bool()
    return found


def draw(logits: Tensor, choices: Sequence[Choice]) -> Tensor:
    """Return a random token of each row."""
    ids, is_sure = pick(logits, choices, min(FEW, logits.shape[1]))
    for n in (MORE, logits.shape[1]):
        if not is_sure.all():
            left = (~is_sure).nonzero()[:, 0]
            some = [choices[i] for i in left.tolist()]
            ids[left], is_sure[left] = pick(logits[left], some, min(n, logits.shape[1]))
    return ids


def pick(logits: Tensor, choices: Sequence[Choice], n: int) -> tuple[Tensor, Tensor]:
    """Return a random token of each row, and whether its `n` likeliest tokens were enough to find it."""
    options, vocabulary = [choice.options for choice in choices], logits.shape[1]

    def each(values: list[float]) -> Tensor:
        return torch.tensor(values, device=logits.device)[:, None]

    logits = logits / each([max(o.temperature, LEAST_TEMPERATURE) for o in options])
    top_k = each([o.top_k or vocabulary for o in options])
    top_p, min_p = each([o.top_p for o in options]), each([o.min_p for o in options])
    values, ids = logits.topk(n)
    probs = (values - logits.logsumexp(-1, keepdim=True)).exp()
    # Where top_k cuts first, its tokens' probabilities are what top_p counts in.
    probs = probs * (torch.arange(n, device=logits.device) < top_k)
    whole = probs.sum(-1, keepdim=True).where(top_k < vocabulary, 1.0)
    probs = probs * (probs.cumsum(-1) - probs < top_p * whole) * (probs >= min_p * probs[:, :1])
    reached = probs.cumsum(-1)
    last, is_cut = reached[:, -1:], (top_k < vocabulary) | (top_p < 1) | (min_p > 0)
    wanted = each([uniform(choice) for choice in choices])
    wanted = wanted * (last if n == vocabulary else last.where(is_cut, 1.0))
    is_whole = (top_k <= n) | (top_k == vocabulary)
    is_sure = ((probs[:, -1:] == 0) & is_whole).where(is_cut, wanted < last) | (n == vocabulary)
    at = torch.searchsorted(reached, wanted).clamp(max=n - 1)
    return ids.gather(1, at)[:, 0], is_sure[:, 0]


def uniform(choice: Choice) -> float:
    """Return a number from 0 to 1 by a sequence's seed and a token's index, as random as neighbours need. (SplitMix64.)"""
    x = (choice.options.seed + 1 + choice.generated * 0x9E3779B97F4A7C15) & (1 << 64) - 1
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & (1 << 64) - 1
    x = (x ^ x >> 27) * 0x94D049BB133111EB & (1 << 64) - 1
    return ((x ^ x >> 31) >> 40) / (1 << 24)
