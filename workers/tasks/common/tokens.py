"""Texts as token ids, where HTTP is and beside the model: without torch, for several threads at once.

What a text costs is bounded before it is tokenised: a megabyte of dots takes seconds and 480 MB. `start` finds the part of a
text that holds as many tokens as anybody needs; the rest is never looked at.
"""

from functools import cached_property, lru_cache
from typing import Any, NamedTuple

from tokenizers import Encoding, Tokenizer

from workers.errors import Unprocessable

# So many tokens can change before the place where a text was cut: WordPiece takes a word of over 100 letters for one token.
UNSURE_TOKENS = 128
CHARACTERS_PER_TOKEN = 16  # a first guess, on the high side, of what holds the tokens asked for


class Row(NamedTuple):
    """A text, or a pair of them, as token ids, special ones included."""

    text: str
    pair: str | None
    ids: list[int]
    # Which of the pair each token belongs to; None where the tokenizer doesn't say.
    types: list[int] | None = None
    encoding: Any = None  # what else `tokenizers` knows of the whole text, where the task keeps that
    window: list[int] | None = None  # which of its tokens these are; None: all

    def each(self, name: str) -> list[Any]:
        """Return what an encoding knows of each token: "offsets", "word_ids", "sequence_ids", "special_tokens_mask"."""
        values = getattr(self.encoding, name)
        return values if self.window is None else [values[i] for i in self.window]


class Tokens:
    """A tokenizer that neither cuts nor pads. `keeps_encodings`: rows carry theirs, for where tokens stand in a text."""

    def __init__(self, backend: Tokenizer, has_types: bool, keeps_encodings: bool = False) -> None:
        self.backend, self.has_types, self.keeps_encodings = backend, has_types, keeps_encodings
        backend.no_truncation()
        backend.no_padding()
        # A request can send one text, or one list of labels, for many inputs.
        self.start = lru_cache(4)(self._start)
        self.short_part, self.long_part = lru_cache(128)(self._part), lru_cache(4)(self._part)

    @classmethod
    def of(cls, tokenizer: Any, keeps_encodings: bool = False) -> "Tokens":
        """Return those of a Transformers tokenizer: a copy, as two threads in one can raise "Already borrowed"."""
        if not tokenizer.is_fast:
            return SlowTokens(tokenizer)
        backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        return cls(backend, "token_type_ids" in tokenizer.model_input_names, keeps_encodings)

    def __call__(self, text: str, pair: str | None = None) -> Row:
        # encode() would keep the interpreter to itself.
        (encoding,) = self.backend.encode_batch([text if pair is None else (text, pair)])
        return self._row(text, pair, encoding)

    def _row(self, text: str, pair: str | None, encoding: Any) -> Row:
        types = encoding.type_ids if self.has_types else None
        return Row(text, pair, encoding.ids, types, encoding if self.keeps_encodings else None)

    def count(self, text: str) -> int:
        """Return how many tokens a text has, special ones included."""
        return len(self.backend.encode_batch_fast([text])[0])

    @cached_property
    def ends_special(self) -> bool:
        """Whether a special token stands after every text."""
        return bool(self.frame[1])

    @cached_property
    def frame(self) -> tuple[list[int], list[int]]:
        """The special tokens before every text, and those after it."""
        (empty,), (one,) = (self.backend.encode_batch([text]) for text in ("", "a"))
        before = next((i for i, special in enumerate(one.special_tokens_mask) if not special), len(one.ids))
        return one.ids[:before], empty.ids[before:]

    def _start(self, text: str, tokens: int, from_end: bool = False) -> str:
        """Return as much of a text as holds its first `tokens` tokens, or its last, and some more; or all of it.

        Tokens keep their ids where the text goes on after `UNSURE_TOKENS` more of them. (A single word of many
        thousand letters can still be split otherwise from its end.)
        """
        n = CHARACTERS_PER_TOKEN * (tokens + UNSURE_TOKENS)
        while n < len(text):
            part = text[-n:] if from_end else text[:n]
            if self.count(part) >= tokens + UNSURE_TOKENS:
                return part
            n *= 4
        return text

    def part(self, text: str) -> Any:
        """Return a text's own tokens, as `join` takes them."""
        return (self.short_part if len(text) < 1 << 14 else self.long_part)(text)

    def _part(self, text: str) -> Any:
        return self.backend.encode_batch([text], add_special_tokens=False)[0]

    def join(
        self, text: str, pair: str | None = None, limit: int | None = None, direction: str = "right"
    ) -> Row:
        """Return the row of a text or a pair. Beyond the limit the longer is cut first, as "longest_first" does.

        What several rows share is tokenised once.
        """
        texts = [text] if pair is None else [text, pair]
        parts = [self.part(one) for one in texts]
        if limit is not None:
            room = limit - self.backend.num_special_tokens_to_add(pair is not None)
            parts = [Encoding.merge([part]) for part in parts]  # copies: they are cut below
            for number, part in enumerate(sorted(parts, key=len)):  # the first where they are equal
                kept = max(0, min(len(part), room // (len(parts) - number)))
                part.truncate(kept, direction=direction)
                room -= kept
        return self._row(text, pair, self.backend.post_process(*parts))

    def windows(self, most: int, length: int, stride: int, text: str, pair: str | None = None) -> list[Row]:
        """Return the text, or the second of a pair, in windows of at most `length` tokens that overlap by `stride`.

        The same windows as `tokenizers` makes. Raises ValueError where there is no room for them, Unprocessable where they
        would be more than `most`: one text would keep the model for minutes.
        """
        whole = self(text, pair)
        count, part = len(whole.ids), 0 if pair is None else 1
        inside = [i for i, of in enumerate(whole.encoding.sequence_ids) if of == part] or [count]
        start, stop = inside[0], min(inside[-1] + 1, count)
        room = length - (count - (stop - start))
        if room <= stride:
            raise ValueError(f"{length} tokens leave no room for a stride of {stride}")
        starts, rows = range(start, max(start + 1, stop - stride), room - stride), []
        if len(starts) > most:
            raise Unprocessable(
                f"the text takes {len(starts)} windows of {length} tokens; send one that takes at most {most}"
            )
        for first in starts:
            last = min(first + room, stop)
            window = [*range(start), *range(first, last), *range(stop, count)]
            ids, types = ([of[i] for i in window] if of else None for of in (whole.ids, whole.types))
            rows.append(whole._replace(ids=ids or [], types=types, window=window))
        return rows

    def __len__(self) -> int:
        return self.backend.get_vocab_size()

    def id(self, token: str) -> int | None:
        """Return the id of a token as it stands in the vocabulary."""
        return self.backend.token_to_id(token)

    def first_id(self, word: str) -> int | None:
        """Return the id of a word's first token; None where it has none."""
        return next(iter(self.part(word).ids), None)

    def agrees(self, other: "Tokens") -> bool:
        """Return whether both give the same ids and types, as far as samples tell. Types that are all 0 are as good as none."""

        def seen(tokens: Tokens, texts: tuple[str, ...]) -> Any:
            row = tokens(*texts)
            return row.ids, row.types if row.types and any(row.types) else None

        samples = [("Its 3rd Café's NAÏVE  über-straße\n東京 не 'tis… <s>[SEP]",), ("Is it?", " It IS.")]
        return all(seen(self, sample) == seen(other, sample) for sample in samples)


class SlowTokens(Tokens):
    """A Transformers tokenizer, by its own call: where in the text a token stands isn't known."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.keeps_encodings = tokenizer, False
        self.start, self.ends_special = lru_cache(4)(self._start), True
        self.frame = [], []  # not known

    def __call__(self, text: str, pair: str | None = None) -> Row:
        encoding = self.tokenizer(text, pair)
        return Row(text, pair, encoding["input_ids"], encoding.get("token_type_ids"))

    def count(self, text: str) -> int:
        return len(self.tokenizer(text)["input_ids"])

    def join(
        self, text: str, pair: str | None = None, limit: int | None = None, direction: str = "right"
    ) -> Row:
        if limit is not None:
            raise Unprocessable(f"the text has more than {limit} tokens; send a shorter one")
        return self(text, pair)

    def windows(self, most: int, length: int, stride: int, text: str, pair: str | None = None) -> list[Row]:
        raise Unprocessable("this model has no fast tokenizer, which is needed to split long texts")

    def __len__(self) -> int:
        return len(self.tokenizer)

    def id(self, token: str) -> int | None:
        return self.tokenizer.get_vocab().get(token)

    def first_id(self, word: str) -> int | None:
        return next(iter(self.tokenizer(word, add_special_tokens=False)["input_ids"]), None)
