"""TASK=fill-mask: a text with a mask; its likeliest words.

Besides what the shared encoder saves: the output head runs over the masks only, there is one top-k for all that ask
alike, and the text around a mask is decoded once, not once for each word.
"""

import logging
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Any

from workers.errors import Unprocessable
from workers.settings import Settings
from workers.tasks import Description, Query
from workers.tasks.common.text import (
    TEXT_SCHEMA,
    Content,
    TextModel,
    TextTask,
    check_parameters,
    number_rule,
    require_text,
    schemas,
    words_rule,
)
from workers.tasks.pipeline import Stock, load_pipeline

log = logging.getLogger("uvicorn.error")

Want = tuple[int, tuple[int, ...] | None]  # top_k, the ids of the targets
Candidates = list[tuple[float, int]]  # (score, token), best first


class Task(TextTask):
    """What `pipeline("fill-mask")` takes and gives."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self.mask = self.special("mask_token") or ""
        mask_id = self.tokens.id(self.mask)
        if mask_id is None:
            raise ValueError(f"{settings.MODEL} has no mask token; it can't fill one")
        self.mask_id = mask_id
        self.around = len(self.tokens("").ids)  # tokens around every text
        most = settings.MAX_TOP_K
        self.rules = {"top_k": number_rule(1, most), "targets": words_rule(most)}

    def check(self, inputs: Any, parameters: dict[str, Any]) -> Query:
        if isinstance(targets := parameters.get("targets"), str):
            parameters = parameters | {"targets": [targets]}
        check_parameters(parameters, self.rules)
        row = self.row(require_text(inputs))
        masks = row.ids.count(self.mask_id)
        if not masks:
            raise Unprocessable(f"the text has no {self.mask}; put {self.mask} where the missing word is")
        if masks > self.settings.MAX_MASKS:
            raise Unprocessable(f"the text has {masks} {self.mask}; send at most {self.settings.MAX_MASKS}")
        if parameters.get("top_k", 1) > len(self.tokens):
            raise Unprocessable(f"top_k is {parameters['top_k']}; the model knows {len(self.tokens)} tokens")
        if targets and all(len(self.tokens(word).ids) == self.around for word in parameters["targets"]):
            raise Unprocessable("the targets are no words to this model; send others")
        return self.query(inputs, parameters, row)

    def load(self, instance: int) -> Any:
        kind = FillMask if self.settings.FAST else StockFillMask
        return kind(self, load_pipeline(self.settings, instance))

    def examples(self) -> list[Query]:
        short = f"Paris is the {self.mask} of France."
        return self.fitting(short, short + " Or so they say." * 20)

    def describe(self) -> Description:
        example = {"inputs": f"Paris is the {self.mask} of France.", "parameters": {"top_k": 5}}
        some_text = TEXT_SCHEMA | {"pattern": re.escape(self.mask)}
        targets = {"anyOf": [TEXT_SCHEMA, self.rules["targets"].schema]}  # one is a list of one
        parameters = schemas(self.rules) | {"targets": targets}
        takes = f"a text with one {self.mask} or a few"
        return Description(takes, "the likeliest words", example, some_text, parameters)


class StockFillMask(Stock):
    """The stock pipeline, in batches: what the fast one is measured against."""

    def __call__(self, contents: list[Content]) -> list[Any]:
        # It takes one top_k and one list of targets a call, and unwraps a list of one.
        answers: dict[int, Any] = {}
        groups: dict[str, list[int]] = defaultdict(list)
        for i, content in enumerate(contents):
            groups[repr(content.parameters)].append(i)
        for members in groups.values():
            texts = [contents[i].inputs for i in members]
            found = self.pipe(texts, **contents[members[0]].parameters, batch_size=len(texts))
            answers.update(zip(members, [found] if len(texts) == 1 else found, strict=True))
        return [answers[i] for i in range(len(contents))]


class FillMask(TextModel):
    """The loaded model on the shared encoder."""

    def __init__(self, task: TextTask, pipe: Any) -> None:
        import torch

        super().__init__(task, pipe)
        self.float32, self.tokenizer = torch.float32, pipe.tokenizer
        self.pieces: dict[int, tuple[str, str, str]] = {}
        self.vocab: dict[str, int] = pipe.tokenizer.get_vocab()
        # This decoder, and only this one of those in use, turns each token into text by itself.
        decoder = getattr(getattr(self.tokenizer, "backend_tokenizer", None), "decoder", None)
        self.is_piecewise = (
            type(decoder).__name__ == "WordPiece" and not self.tokenizer.clean_up_tokenization_spaces
        )

    def answers(self, contents: list[Content]) -> list[Any]:
        rows = [content.rows[0] for content in contents]
        mask = self.tokenizer.mask_token_id
        masks = [[i for i, token in enumerate(row.ids) if token == mask] for row in rows]
        wants = [self.want(content.parameters) for content in contents]
        logits = self.encoder.logits([row.ids for row in rows], masks)
        best = self.best(logits, [want for want, found in zip(wants, masks) for _ in found])
        ends = accumulate(map(len, masks))
        return [
            self.answer(row.ids, at, best[end - len(at) : end]) for row, at, end in zip(rows, masks, ends)
        ]

    def want(self, parameters: dict[str, Any]) -> Want:
        targets = parameters.get("targets")
        return parameters.get("top_k", 5), tuple(self.target_ids(targets)) if targets else None

    def target_ids(self, targets: Sequence[str]) -> set[int]:
        """The stock ids of the targets, without the 10 ms that the stock class spends on listing the vocabulary."""
        ids: list[int] = []
        for target in targets:
            if target in self.vocab:
                ids.append(self.vocab[target])
            else:
                tell_unknown(target[:50])
                first = {"add_special_tokens": False, "max_length": 1, "truncation": True}
                ids += self.tokenizer(target, **first)["input_ids"][:1]
        return set(ids)

    def best(self, logits: Any, wants: list[Want]) -> list[Candidates]:
        """The candidates for each row of logits. Softmax before top-k, as in the stock class: ties fall alike."""
        alike: dict[Want, list[int]] = defaultdict(list)  # the rows that one top-k can serve
        for row, want in enumerate(wants):
            alike[want].append(row)
        best: list[Candidates] = [[]] * len(wants)
        for (top_k, targets), rows in alike.items():
            scores = logits if len(alike) == 1 else logits[self.encoder.tensor(rows)]
            scores = scores.softmax(-1, dtype=self.float32)
            ids = None if targets is None else self.encoder.tensor(targets)
            scores = scores if ids is None else scores[:, ids]
            values, tokens = scores.topk(min(top_k, scores.shape[-1]))
            tokens = tokens if ids is None else ids[tokens]
            for row, *found in zip(rows, values.tolist(), tokens.tolist()):
                best[row] = list(zip(*found))
        return best

    def answer(self, ids: Sequence[int], masks: list[int], best: list[Candidates]) -> Any:
        found = []
        for mask, candidates in zip(masks, best):
            texts = self.sequences(ids, mask, [token for _, token in candidates], len(masks) == 1)
            found.append(
                [
                    {"score": score, "token": token, "token_str": self.piece(token)[0], "sequence": text}
                    for (score, token), text in zip(candidates, texts)
                ]
            )
        return found[0] if len(masks) == 1 else found

    def sequences(self, ids: Sequence[int], mask: int, tokens: list[int], skip: bool) -> Iterator[str]:
        """The text with each of `tokens` at the mask; special tokens are left out if `skip`, padding always."""
        pad, after, before = self.tokenizer.pad_token_id, None, ""
        if self.is_piecewise:
            before = self.decode([token for token in ids[:mask] if token != pad], skip)
        for token in tokens:
            _, first, later = self.piece(token)
            piece = later if before else first
            if after is not None and piece:
                yield before + piece + after
                continue
            text = self.decode([t for t in (*ids[:mask], token, *ids[mask + 1 :]) if t != pad], skip)
            after = text[len(before) + len(piece) :] if piece else after
            yield text

    def piece(self, token: int) -> tuple[str, str, str]:
        """The token's `token_str`; its share in a text where it is first, and later: empty if only the whole tells."""
        if token not in self.pieces:
            first = later = ""
            if self.is_piecewise:
                first = self.decode([token], True)
                later = self.decode([token, token], True)[len(first) :]
            self.pieces[token] = self.decode([token], False), first, later
        return self.pieces[token]

    def decode(self, ids: list[int], skip: bool) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=skip)


@lru_cache(maxsize=1024)
def tell_unknown(target: str) -> None:
    """Log it, but not at every request."""
    log.warning("target %r is not in the vocabulary: its first piece is taken, if any", target)
