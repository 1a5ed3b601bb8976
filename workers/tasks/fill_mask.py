"""TASK=fill-mask: a text with a mask; its likeliest words.

Besides what the shared encoder saves: the output head runs over the masks only, there is one top-k for all that ask
alike, and the text around a mask is decoded once, not once for each word.
"""

import logging
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any

from workers.errors import Unprocessable
from workers.settings import MOST, Settings
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

LONGEST_TARGET = 100  # characters: a target is a word
Want = tuple[int, tuple[int, ...]]  # top_k, the ids of the targets, if any
Candidates = list[tuple[float, int]]  # (score, token), best first


class Task(TextTask):
    """What `pipeline("fill-mask")` takes and gives."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self.mask = self.special("mask_token") or ""
        if self.tokens.id(self.mask) is None:
            raise ValueError(
                f"{settings.MODEL} has no mask token, so it can't fill one; set another TASK or MODEL"
            )
        most = settings.MAX_TOP_K
        self.rules = {"top_k": number_rule(1, most), "targets": words_rule(most, longest=LONGEST_TARGET)}

    def adopt(self, tokenizer: Any) -> None:
        super().adopt(tokenizer)
        self.mask = tokenizer.mask_token or ""

    def agrees(self, tokenizer: Any) -> bool:
        return super().agrees(tokenizer) and self.mask == tokenizer.mask_token

    def check(self, inputs: Any, parameters: dict[str, Any]) -> Query:
        if isinstance(targets := parameters.get("targets"), str):
            parameters = parameters | {"targets": [targets]}
        check_parameters(parameters, self.rules)
        row = self.row(require_text(inputs))
        mask_id = self.tokens.id(self.mask)
        masks = sum(token == mask_id for token in row.ids)
        if not masks:
            raise Unprocessable(f"the text has no {self.mask}; put {self.mask} where the missing word is")
        if masks > self.settings.MAX_MASKS:
            raise Unprocessable(f"the text has {masks} {self.mask}; send at most {self.settings.MAX_MASKS}")
        if parameters.get("top_k", 1) > len(self.tokens):
            raise Unprocessable(f"top_k is {parameters['top_k']}; the model knows {len(self.tokens)} tokens")
        return self.query(inputs, parameters, row, targets=self.target_ids(parameters.get("targets", ())))

    def target_ids(self, targets: Sequence[str]) -> tuple[int, ...]:
        """Return the ids of the targets: of a word that is not in the vocabulary that of its first piece, as the pipeline does."""
        known = {word: self.tokens.id(word) for word in targets}
        ids = {self.tokens.first_id(word) if token is None else token for word, token in known.items()}
        if targets and ids == {None}:
            raise Unprocessable("the model knows none of the targets; send other words")
        return tuple(token for token in ids if token is not None)

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

    def __init__(self, task: TextTask, pipe: Any) -> None:
        super().__init__(task, pipe)
        self.description = self.description._replace(strategy="the stock pipeline, padded", max_batch=MOST)
        # It logs targets that are not in the vocabulary, and what clients send stays out of the log.
        logging.getLogger("transformers.pipelines.fill_mask").setLevel(logging.ERROR)

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
        self.mask_id = pipe.tokenizer.mask_token_id
        self.float32, self.tokenizer = torch.float32, pipe.tokenizer
        self.pieces: dict[int, tuple[str, str, str]] = {}
        # This decoder, and only this one of those in use, turns each token into text by itself.
        decoder = getattr(getattr(self.tokenizer, "backend_tokenizer", None), "decoder", None)
        self.is_piecewise = (
            type(decoder).__name__ == "WordPiece" and not self.tokenizer.clean_up_tokenization_spaces
        )

    def answers(self, contents: list[Content]) -> list[Any]:
        rows = [content.rows[0] for content in contents]
        masks = [[i for i, token in enumerate(row.ids) if token == self.mask_id] for row in rows]
        wants = [(content.parameters.get("top_k", 5), content.targets) for content in contents]
        ids, types = self.batch(rows)
        logits = self.encoder.logits(ids, masks, types)
        best = self.best(logits, [want for want, found in zip(wants, masks) for _ in found])
        ends = accumulate(map(len, masks))
        return [
            self.answer(row.ids, at, best[end - len(at) : end]) for row, at, end in zip(rows, masks, ends)
        ]

    def best(self, logits: Any, wants: list[Want]) -> list[Candidates]:
        """Return the candidates for each row of logits. Softmax before top-k, as in the stock class: ties fall alike."""
        alike: dict[Want, list[int]] = defaultdict(list)  # the rows that one top-k can serve
        for row, want in enumerate(wants):
            alike[want].append(row)
        best: list[Candidates] = [[]] * len(wants)
        for (top_k, targets), rows in alike.items():
            scores = logits if len(alike) == 1 else logits[self.encoder.tensor(rows)]
            scores = scores.softmax(-1, dtype=self.float32)
            ids = self.encoder.tensor(targets) if targets else None
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
        """Yield the text with each of `tokens` at the mask; special tokens are left out if `skip`, padding always."""
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
        """Return the token's `token_str`; its part of a text where it is first, and later: empty if only the whole text tells."""
        if token not in self.pieces:
            first = later = ""
            if self.is_piecewise:
                first = self.decode([token], True)
                later = self.decode([token, token], True)[len(first) :]
            self.pieces[token] = self.decode([token], False), first, later
        return self.pieces[token]

    def decode(self, ids: list[int], skip: bool) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=skip)
