"""From logits to tokens: each row by its own options, all rows at once.

The order is the usual one: penalties and biases, temperature, top_k, top_p, min_p. A token is then drawn by the Gumbel trick:
the likeliest one after a random number was added to each. These numbers follow from the sequence's seed and the token's
index alone, so the same seed gives the same text, alone and in any batch.
"""

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from workers.generation.steps import Choice, Outcome, Token

NOT_NUMBERS = "the model's probabilities are not numbers"
FEW = 1024  # so many of the likeliest tokens are sorted first; all of them only where these are not enough


def choose(logits: Tensor, choices: Sequence[Choice]) -> list[Outcome]:
    """Return the next token of each row of logits [rows, vocabulary]; a sentence where there is none."""
    if not choices:
        return []
    logits = logits.float()
    total = logits.logsumexp(-1)
    raw = logits
    if any(is_changed(choice) for choice in choices):
        logits = logits.clone()
        for row, choice in zip(logits, choices):
            change(row, choice)
    ids = logits.argmax(-1)
    if drawn := [i for i, choice in enumerate(choices) if choice.options.temperature > 0]:
        ids[drawn] = draw(logits[drawn], [choices[i] for i in drawn])
    logprobs = raw.gather(1, ids[:, None])[:, 0] - total
    likeliest = alternatives(raw, total, choices)
    # A NaN among the logits, or nothing that is left to choose, makes these no numbers.
    good = (total.isfinite() & logits.gather(1, ids[:, None])[:, 0].isfinite()).tolist()
    return [
        Token(id_, logprob, best) if is_good else NOT_NUMBERS
        for id_, logprob, best, is_good in zip(ids.tolist(), logprobs.tolist(), likeliest, good)
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
    return bool(options.has_penalties or options.logit_bias or choice.generated < options.min_tokens)


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


def draw(logits: Tensor, choices: Sequence[Choice]) -> Tensor:
    """Return a random token of each row."""
    options = [choice.options for choice in choices]

    def each(values: list[float]) -> Tensor:
        return torch.tensor(values, device=logits.device)[:, None]

    logits = logits / each([o.temperature for o in options])
    if any(o.top_k or o.top_p < 1 for o in options):
        logits = keep_likeliest(
            logits,
            each([o.top_k or logits.shape[1] for o in options]),
            each([o.top_p for o in options]),
        )
    if any(o.min_p for o in options):
        floor = logits.amax(-1, keepdim=True) + each([o.min_p for o in options]).log()
        logits = logits.masked_fill(logits < floor, -torch.inf)
    return (logits + gumbel(logits, choices)).argmax(-1)


def keep_likeliest(logits: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """Set all but the likeliest `top_k` tokens to -inf, and of these all but the fewest that have `top_p` together."""
    shares = logits.logsumexp(-1, keepdim=True)
    for n in (min(FEW, logits.shape[1]), logits.shape[1]):
        values, _ = logits.topk(n)
        probs = (values - shares).exp()
        within = torch.arange(n, device=logits.device) < top_k
        # Where top_k cuts first, its tokens' probabilities are what top_p counts in.
        probs = probs * within
        whole = probs.sum(-1, keepdim=True).where(top_k < logits.shape[1], torch.ones_like(shares))
        before = probs.cumsum(-1) - probs
        kept = within & (before < top_p * whole)
        if n == logits.shape[1] or not bool((kept[:, -1] & (top_p < 1)).any()):
            break
    last = (kept.sum(-1, keepdim=True) - 1).clamp(min=0)
    threshold = values.gather(1, last)
    # A row that asks for neither keeps all, also beyond the first few.
    threshold = threshold.where((top_k < logits.shape[1]) | (top_p < 1), -torch.inf)
    return logits.masked_fill(logits < threshold, -torch.inf)


def gumbel(logits: Tensor, choices: Sequence[Choice]) -> Tensor:
    """Return random numbers with Gumbel's distribution for every token, by each row's seed and index."""
    generator = torch.Generator()
    noise = torch.empty(logits.shape)
    for row, choice in zip(noise, choices):
        generator.manual_seed(mixed(choice.options.seed, choice.generated))
        row.exponential_(generator=generator)
    return noise.log_().neg_().to(logits.device)


def mixed(seed: int, index: int) -> int:
    """Return a seed for the token of this index: neighbours must not be alike. (SplitMix64's finaliser.)"""
    x = (seed + 1 + index * 0x9E3779B97F4A7C15) & (1 << 64) - 1
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & (1 << 64) - 1
    x = (x ^ x >> 27) * 0x94D049BB133111EB & (1 << 64) - 1
    return (x ^ x >> 31) >> 1
