"""What the text tasks share: the light half reads and checks texts where HTTP is; the model is on the shared encoder.

The light half needs neither torch nor transformers: `tokenizers` and the model's JSON files.
"""

import contextlib
import copy
import json
import logging
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from tokenizers import Tokenizer

from workers.errors import Malformed, Unprocessable
from workers.settings import Settings
from workers.tasks import Query, unknown_parameters

log = logging.getLogger("uvicorn.error")

# RoBERTa and its like count positions from behind the padding's.
BEHIND_PADDING = {"camembert", "longformer", "mpnet", "roberta", "xlm-roberta", "xlm-roberta-xl"}


class Row(NamedTuple):
    """A text, or a pair of them, as token ids, special ones included."""

    text: str
    pair: str | None
    ids: list[int]
    # Which of the pair each token belongs to, 0 or 1; None where all are 0, or the model takes no types.
    types: list[int] | None = None
    encoding: Any = None  # what else `tokenizers` knows of the whole text
    window: list[int] | None = None  # which of its tokens these are; None: all

    def each(self, name: str) -> list[Any]:
        """What an encoding knows of each token: its "offsets", "word_ids", "sequence_ids", "special_tokens_mask"."""
        values = getattr(self.encoding, name)
        return values if self.window is None else [values[i] for i in self.window]


class Content(NamedTuple):
    """One checked input of a text task: as its stock pipeline takes it, and the rows that the model has to see."""

    inputs: Any
    parameters: dict[str, Any]
    rows: list[Row]


class Rule(NamedTuple):
    """What a parameter must be: in words, whether a value is, and as a JSON Schema."""

    words: str
    is_allowed: Callable[[Any], bool]
    schema: dict[str, Any]


TEXT_RULE = Rule("a text", lambda value: isinstance(value, str), {"type": "string"})
BOOLEAN_RULE = Rule("true or false", lambda value: isinstance(value, bool), {"type": "boolean"})
TEXT_SCHEMA = {"type": "string", "pattern": r"\S"}  # what `require_text` takes


def number_rule(least: int, most: int) -> Rule:
    """A whole number."""
    return Rule(
        f"a whole number from {least} to {most}",
        lambda value: type(value) is int and least <= value <= most,
        {"type": "integer", "minimum": least, "maximum": most},
    )


def choice_rule(*choices: str) -> Rule:
    """One of a few words."""
    return Rule(" or ".join(choices), lambda value: value in choices, {"enum": list(choices)})


def words_rule(most: int, least: int = 1) -> Rule:
    """A list of texts, none of them blank."""
    return Rule(
        f"a list of {least} to {most} words",
        lambda value: (
            isinstance(value, list)
            and least <= len(value) <= most
            and all(isinstance(word, str) and word.strip() for word in value)
        ),
        {"type": "array", "items": TEXT_SCHEMA, "minItems": least, "maxItems": most},
    )


def schemas(rules: dict[str, Rule]) -> dict[str, Any]:
    """The JSON Schema of each parameter."""
    return {name: rule.schema for name, rule in rules.items()}


def object_schema(required: dict[str, Any], **optional: Any) -> dict[str, Any]:
    """The JSON Schema of an object with these fields and no others."""
    return {
        "type": "object",
        "properties": required | optional,
        "required": list(required),
        "additionalProperties": False,
    }


def check_parameters(parameters: dict[str, Any], rules: dict[str, Rule]) -> dict[str, Any]:
    """The parameters, if each keeps its rule. Raises Malformed with a sentence on the first that doesn't.

    JSON has one kind of number: 5.0 becomes 5 where a whole number is due.
    """
    unknown_parameters(parameters, *rules)
    for name, value in parameters.items():
        if type(value) is float and value.is_integer() and rules[name].schema.get("type") == "integer":
            value = parameters[name] = int(value)
        if not rules[name].is_allowed(value):
            raise Malformed(f'"{name}" must be {rules[name].words}')
    return parameters


def require_text(value: Any, name: str = "inputs") -> str:
    """`value`, if it is a text with something in it. Raises Malformed."""
    if not isinstance(value, str):
        raise Malformed(f'"{name}" must be a text')
    if not value.strip():
        raise Malformed(f'"{name}" is empty; send a text')
    return value


class Tokens:
    """A tokenizer, for several threads at once, that neither cuts nor pads."""

    def __init__(self, backend: Tokenizer, has_types: bool) -> None:
        self.backend, self.has_types = backend, has_types
        backend.no_truncation()
        backend.no_padding()

    @classmethod
    def of(cls, tokenizer: Any) -> "Tokens":
        """Those of a Transformers tokenizer. Two threads in one can raise "Already borrowed": this is a copy."""
        if not tokenizer.is_fast:
            return SlowTokens(tokenizer)
        backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        return cls(backend, "token_type_ids" in tokenizer.model_input_names)

    def __call__(self, text: str, pair: str | None = None) -> Row:
        # encode() would keep the interpreter to itself.
        (encoding,) = self.backend.encode_batch([text if pair is None else (text, pair)])
        types = encoding.type_ids if self.has_types else None
        return Row(text, pair, encoding.ids, types if types and any(types) else None, encoding)

    def windows(self, most: int, length: int, stride: int, text: str, pair: str | None = None) -> list[Row]:
        """The text, or the second of a pair, in windows of at most `length` tokens that overlap by `stride`.

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
        """The id of a token as it stands in the vocabulary."""
        return self.backend.token_to_id(token)

    def agrees(self, other: "Tokens") -> bool:
        """Whether both give the same ids and types, as far as samples tell."""
        samples = [("Its 3rd Café's NAÏVE  über-straße\n東京 не 'tis… <s>[SEP]",), ("Is it?", " It IS.")]
        return all(self(*sample)[:4] == other(*sample)[:4] for sample in samples)


class SlowTokens(Tokens):
    """A Transformers tokenizer, by its own call, for one thread: where in the text a token stands isn't known."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def __call__(self, text: str, pair: str | None = None) -> Row:
        found = self.tokenizer(text, pair)
        types = found.get("token_type_ids")
        return Row(text, pair, found["input_ids"], types if types and any(types) else None)

    def windows(self, most: int, length: int, stride: int, text: str, pair: str | None = None) -> list[Row]:
        raise Unprocessable("this model's tokenizer is a slow one, which can't cut a text into windows")

    def __len__(self) -> int:
        return len(self.tokenizer)

    def id(self, token: str) -> int | None:
        return self.tokenizer.get_vocab().get(token)


class TextTask:
    """What all tasks with a text share, where HTTP is."""

    media: tuple[str, ...] = ()
    rules: dict[str, Rule]  # of its parameters

    def __init__(self, settings: Settings) -> None:
        self.settings, self.rules = settings, {}
        self.config = read_model_json(settings, "config.json")
        self.names = read_model_json(settings, "tokenizer_config.json")
        self.tokens = self.read_tokens()
        positions = self.config.get("max_position_embeddings") or self.config.get("n_positions") or 1 << 30
        if self.config.get("model_type") in BEHIND_PADDING:
            positions -= self.config.get("pad_token_id", 1) + 1
        self.longest = min(self.names.get("model_max_length") or 1 << 30, positions)  # that the model takes
        self.limit = min(settings.MAX_TOKENS, self.longest)  # that we take

    def read_tokens(self) -> Tokens:
        """Read the tokenizer. A model without a tokenizer.json needs Transformers for it."""
        if path := find(self.settings.MODEL, "tokenizer.json"):
            inputs = self.names.get("model_input_names", ["token_type_ids"])
            # Where a model has no second type its tokenizer says none.
            return Tokens(
                Tokenizer.from_file(path),
                "token_type_ids" in inputs and self.config.get("type_vocab_size", 0) > 1,
            )
        from transformers import AutoTokenizer

        return Tokens.of(AutoTokenizer.from_pretrained(self.settings.MODEL, trust_remote_code=False))

    def special(self, name: str) -> str | None:
        """A special token by its name, such as "mask_token"."""
        found = self.names.get(name) or read_model_json(self.settings, "special_tokens_map.json").get(name)
        return found["content"] if isinstance(found, dict) else found

    def row(self, text: str, pair: str | None = None) -> Row:
        """Its tokens, if the model can take so many."""
        row = self.tokens(text, pair)
        if len(row.ids) > self.limit:
            raise Unprocessable(f"the text has {len(row.ids)} tokens; send at most {self.limit}")
        return row

    def check(self, inputs: Any, parameters: dict[str, Any]) -> Query:
        """Return the query that asks this. Raises Malformed or Unprocessable."""
        raise NotImplementedError

    def examples(self) -> list[Query]:
        """A short text and a long one."""
        return self.fitting("a text", "a text " * 50)

    def fitting(self, first: Any, *others: Any, **parameters: Any) -> list[Query]:
        """Queries for examples: the first, and those of the others that the model can take."""
        queries = [self.check(first, parameters)]
        for inputs in others:
            with contextlib.suppress(Unprocessable):
                queries.append(self.check(inputs, parameters))
        return queries

    def query(self, inputs: Any, parameters: dict[str, Any], *rows: Row) -> Query:
        """The query for rows that have been checked; its size is their tokens."""
        return Query(Content(inputs, parameters, list(rows)), sum(len(row.ids) for row in rows))


class TextModel:
    """A loaded instance of a text task's model: its stock pipeline, with the forward pass of the shared encoder.

    `per_text`: whether the model's head says something of a text, not of each token.
    """

    per_text = False

    def __init__(self, task: TextTask, pipe: Any) -> None:
        from workers.tasks.common.encoder import Encoder  # torch takes seconds: not at import

        self.pipe, self.task = pipe, task
        self.checks_again = not task.tokens.agrees(SlowTokens(pipe.tokenizer))
        if self.checks_again:
            log.warning("tokenizer.json isn't what Transformers makes of it: each text is tokenised twice")
            self.task = copy.copy(task)
            self.task.tokens = Tokens.of(pipe.tokenizer)
        probe = [row for query in self.task.examples() for row in query.content.rows]
        self.encoder = Encoder(pipe.model, *ids_and_types(probe), self.per_text, task.settings.FAST)
        self.description = f"{describe(pipe.model, task.settings)}, {self.encoder.way}"

    def __call__(self, contents: list[Content]) -> list[Any]:
        if self.checks_again:
            contents = [self.task.check(content.inputs, content.parameters).content for content in contents]
        return self.answers(contents)

    def answers(self, contents: list[Content]) -> list[Any]:
        """Answer each as its pipeline would if it were alone."""
        raise NotImplementedError

    def logits(self, rows: Sequence[Row], keep: Sequence[Sequence[int]] | None = None) -> Any:
        """What the model says of each row, or of the tokens kept: float32, on the CPU."""
        ids, types = ids_and_types(rows)
        return self.encoder.logits(ids, keep, types).float().cpu()


def ids_and_types(rows: Sequence[Row]) -> tuple[list[list[int]], list[list[int]] | None]:
    """What the encoder takes."""
    types = [row.types or [0] * len(row.ids) for row in rows] if any(row.types for row in rows) else None
    return [row.ids for row in rows], types


def describe(model: Any, settings: Settings) -> str:
    """One line on a loaded model for the log."""
    size_mb = sum(p.numel() * p.element_size() for p in model.parameters()) / 1e6
    return (
        f"{type(model).__name__} from {settings.MODEL}: {size_mb:.0f} MB, {model.dtype}, {model.device}, "
        f"{settings.threads_per_instance} threads"
    )


def find(model: str, name: str) -> str | None:
    """The path of a file of the model, a folder's or the hub's; None where there is none."""
    if os.path.isdir(model):
        path = os.path.join(model, name)
        return path if os.path.isfile(path) else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        return hf_hub_download(model, name)
    except EntryNotFoundError:
        return None


def read_model_json(settings: Settings, name: str) -> dict[str, Any]:
    """A JSON file of the model; empty where there is none. Raises ValueError, which names it, where it can't be read."""
    path = find(settings.MODEL, name)
    if path is None:
        return {}
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
    except ValueError as exc:
        raise ValueError(f"{name} is no JSON: {exc}") from exc
    kind: Any = list if name == "modules.json" else dict
    if not isinstance(content, kind):
        raise ValueError(f"{name} is no {kind.__name__}")
    return content
