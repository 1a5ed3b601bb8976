"""From logits to tokens: each row by its own options, all rows at once.

The order is the usual one: penalties and biases, temperature, top_k, top_p, min_p. Then one of the tokens that are left is drawn,
by random numbers that follow from the sequence's seed and the token's index alone. So the same seed gives the same text, alone
and in any batch, unless rounding decides between two tokens.
"""

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from workers.generation.steps import Choice, Options, Outcome, Token

NOT_NUMBERS = "the model's probabilities are not numbers"
# So many of the likeliest tokens are sorted to find which are left, more only where these are not enough. To sort all 49,152 of a
# small vocabulary takes 20 times as long.
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
    temperatures = [max(choice.options.temperature, LEAST_TEMPERATURE) for choice in choices]
    probs = (logits / torch.tensor(temperatures, device=logits.device)[:, None]).softmax(-1)
    seeds = torch.tensor([seed_of(choice) for choice in choices], device=logits.device)[:, None]
    options, vocabulary = [choice.options for choice in choices], logits.shape[1]
    left = [i for i, o in enumerate(options) if o.top_k or o.top_p < 1 or o.min_p]
    every = torch.arange(vocabulary, device=logits.device)
    if not left:
        return race(probs, every, seeds)
    drawn = race(probs, every, seeds) if len(left) < len(options) else torch.empty_like(seeds[:, 0])
    for n in (FEW, MORE, vocabulary):
        kept, ids, is_sure = keep(probs[left], [options[i] for i in left], min(n, vocabulary))
        drawn[left] = ids.gather(1, race(kept, ids, seeds[left])[:, None])[:, 0]
        left = [i for i, sure in zip(left, is_sure.tolist()) if not sure]
        if not left:
            break
    return drawn


def keep(probs: Tensor, options: Sequence[Options], n: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return what top_k, top_p and min_p leave of each row's `n` likeliest tokens: their probabilities [rows, n], 0 of those that
    go, and their ids; and whether so many were enough to see which are left."""
    vocabulary = probs.shape[1]

    def each(values: list[float]) -> Tensor:
        return torch.tensor(values, device=probs.device)[:, None]

    top_k = each([o.top_k or vocabulary for o in options])
    top_p, min_p = each([o.top_p for o in options]), each([o.min_p for o in options])
    probs, ids = probs.topk(n)
    # Where top_k cuts first, its tokens' probabilities are what top_p counts in.
    probs = probs * (torch.arange(n, device=probs.device) < top_k)
    whole = probs.sum(-1, keepdim=True).where(top_k < vocabulary, 1.0)
    probs = probs * (probs.cumsum(-1) - probs < top_p * whole) * (probs >= min_p * probs[:, :1])
    is_whole = (top_k <= n) | (top_k == vocabulary)
    is_sure = ((probs[:, -1:] == 0) & is_whole) | (n == vocabulary)
    return probs, ids, is_sure[:, 0]


def race(probs: Tensor, ids: Tensor, seeds: Tensor) -> Tensor:
    """Return which token of each row is drawn: each runs for an exponential time over its probability, and the first wins.

    So each is drawn as often as its probability says (Gumbel-max). Rounding, which is another one in another batch, changes the
    winner only where two come in nearly at once. To walk down the tokens to a random height would change it where any two of
    thousands of unlikely ones change places.
    """
    # SplitMix64 of the row's seed and the token's id; products wrap around.
    x = seeds + ids * 0x632BE59BD9B4E019
    x = (x ^ x >> 30) * -0x40A7B892E31B1A47
    x = (x ^ x >> 27) * -0x6B2FB644ECCEEE15
    uniform = ((x ^ x >> 31) & 0x7FFFFFFF).float() / (1 << 31)
    return (probs / -torch.log1p(-uniform).clamp(max=-1e-12)).argmax(-1)


def seed_of(choice: Choice) -> int:
    """Return a number that follows from a sequence's seed and a token's index; those of neighbours are unlike. (SplitMix64.)"""
    x = (choice.options.seed + 1 + choice.generated * 0x9E3779B97F4A7C15) & (1 << 64) - 1
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & (1 << 64) - 1
    x = (x ^ x >> 27) * 0x94D049BB133111EB & (1 << 64) - 1
    return (x ^ x >> 31) >> 1
