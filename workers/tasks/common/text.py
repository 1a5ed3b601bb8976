"""What the text tasks share: how texts and parameters are checked, and the loaded model.

`TextTask` checks and tokenises where HTTP is, and needs neither torch nor Transformers: `tokenizers` and the model's JSON
files. Only what these files leave open is asked of Transformers. `TextModel` runs the model, on the shared encoder.
"""

import contextlib
import json
import logging
import os
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, NamedTuple

from tokenizers import Tokenizer

from workers.errors import Malformed, Unprocessable
from workers.settings import Settings
from workers.tasks import ModelInfo, Query, unknown_parameters
from workers.tasks.common.tokens import Row, SlowTokens, Tokens

log = logging.getLogger("uvicorn.error")

# These count positions from after the padding's, as RoBERTa does.
AFTER_PADDING = set(
    [
        "camembert",
        "data2vec-text",
        "esm",
        "ibert",
        "layoutlmv3",
        "lilt",
        "longformer",
        "luke",
        "markuplm",
        "mpnet",
        "roberta",
        "roberta-prelayernorm",
        "xlm-roberta",
        "xlm-roberta-xl",
        "xmod",
    ]
)
# Their tokenizers gave the second text of a pair another type in Transformers 4, and don't in 5:
# https://github.com/huggingface/transformers/issues/48128
LOST_TYPES = {"albert", "funnel", "rembert", "roformer", "splinter", "xlnet"}


class Content(NamedTuple):
    """One checked input of a text task: as its stock pipeline takes it, and the rows that the model computes."""

    inputs: Any
    parameters: dict[str, Any]
    rows: list[Row]
    targets: tuple[int, ...] = ()  # fill-mask: the only tokens to choose from, if any


class Rule(NamedTuple):
    """What a parameter must be: in words, as a test, and as a JSON Schema."""

    words: str
    is_allowed: Callable[[Any], bool]
    schema: dict[str, Any]


TEXT_RULE = Rule("a text", lambda value: isinstance(value, str), {"type": "string"})
BOOLEAN_RULE = Rule("true or false", lambda value: isinstance(value, bool), {"type": "boolean"})
TEXT_SCHEMA = {"type": "string", "pattern": r"\S"}  # what `require_text` takes


def number_rule(least: int, most: int) -> Rule:
    """Return the rule for a whole number."""
    return Rule(
        f"a whole number from {least} to {most}",
        lambda value: type(value) is int and least <= value <= most,
        {"type": "integer", "minimum": least, "maximum": most},
    )


def choice_rule(*choices: str) -> Rule:
    """Return the rule for one of a few words."""
    return Rule(" or ".join(choices), lambda value: value in choices, {"enum": list(choices)})


def words_rule(most: int, least: int = 1, longest: int | None = None) -> Rule:
    """Return the rule for a list of texts, none of them blank or of more than `longest` characters."""
    item = TEXT_SCHEMA | ({"maxLength": longest} if longest else {})
    return Rule(
        f"a list of {least} to {most} words" + (f" of at most {longest} characters" if longest else ""),
        lambda value: (
            isinstance(value, list)
            and least <= len(value) <= most
            and all(isinstance(word, str) and word.strip() for word in value)
            and (longest is None or all(len(word) <= longest for word in value))
        ),
        {"type": "array", "items": item, "minItems": least, "maxItems": most},
    )


def schemas(rules: dict[str, Rule]) -> dict[str, Any]:
    """Return the JSON Schema of each parameter."""
    return {name: rule.schema for name, rule in rules.items()}


def object_schema(required: dict[str, Any], **optional: Any) -> dict[str, Any]:
    """Return the JSON Schema of an object with these fields and no others."""
    return {
        "type": "object",
        "properties": required | optional,
        "required": list(required),
        "additionalProperties": False,
    }


def check_parameters(parameters: dict[str, Any], rules: dict[str, Rule]) -> dict[str, Any]:
    """Return the parameters, if each keeps its rule. Raises Malformed with a sentence on the first that doesn't.

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
    """Return `value`, if it is a text with something in it. Raises Malformed."""
    if not isinstance(value, str):
        raise Malformed(f'"{name}" must be a text')
    if not value.strip():
        raise Malformed(f'"{name}" is empty; send a text')
    return value


class TextTask:
    """What all tasks with a text share, where HTTP is."""

    media: tuple[str, ...] = ()
    rules: dict[str, Rule]  # of its parameters
    keeps_encodings = False  # whether its model needs to know where in a text the tokens stand

    def __init__(self, settings: Settings) -> None:
        self.settings, self.rules = settings, {}
        self.config = read_model_json(settings, "config.json")
        self.names = read_model_json(settings, "tokenizer_config.json")
        self.tokens = self.read_tokens()
        positions = self.config.get("max_position_embeddings") or self.config.get("n_positions") or 0
        positions = positions if positions > 0 else 1 << 30
        if self.config.get("model_type") in AFTER_PADDING:
            positions -= self.config.get("pad_token_id", 1) + 1
        self.longest = min(self.names.get("model_max_length") or 1 << 30, positions)  # that the model takes
        self.limit = min(settings.MAX_TOKENS, self.longest)  # that this server takes

    def read_tokens(self) -> Tokens:
        """Read the tokenizer. A model without a tokenizer.json needs Transformers for it."""
        if path := find(self.settings.MODEL, "tokenizer.json"):
            inputs = self.names.get("model_input_names", ["token_type_ids"])
            # The tokenizers of models without a second type give none.
            has_types = "token_type_ids" in inputs and self.config.get("type_vocab_size", 0) > 1
            return Tokens(Tokenizer.from_file(path), has_types, self.keeps_encodings)
        return Tokens.of(self.made_by_transformers, self.keeps_encodings)

    @cached_property
    def made_by_transformers(self) -> Any:
        """The tokenizer as Transformers makes it of the model's files."""
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.settings.MODEL, trust_remote_code=False)

    def adopt(self, tokenizer: Any) -> None:
        """Check texts by this tokenizer of Transformers from now on."""
        self.made_by_transformers = tokenizer
        self.tokens = Tokens.of(tokenizer, self.keeps_encodings)

    def agrees(self, tokenizer: Any) -> bool:
        """Return whether texts are checked as this tokenizer of Transformers would."""
        return self.tokens.agrees(SlowTokens(tokenizer))

    def special(self, name: str) -> str | None:
        """Return a special token by its name, such as "mask_token": as the files say, else the tokenizer's class."""
        token = self.names.get(name) or read_model_json(self.settings, "special_tokens_map.json").get(name)
        if token is None:
            self.adopt(self.made_by_transformers)
            token = getattr(self.made_by_transformers, name, None)
        return token["content"] if isinstance(token, dict) else token

    def row(self, text: str, pair: str | None = None) -> Row:
        """Return its tokens. Raises Unprocessable if the server doesn't take so many."""
        start, pair_start = self.starts(self.limit, text, pair)
        return self.fits(self.tokens(start, pair_start), is_whole=(start, pair_start) == (text, pair))

    def starts(
        self, tokens: int, text: str, pair: str | None, from_end: bool = False
    ) -> tuple[str, str | None]:
        """Return as much of each text as holds so many tokens: to tokenise no more than that."""
        start = self.tokens.start
        return start(text, tokens, from_end), None if pair is None else start(pair, tokens, from_end)

    def fits(self, row: Row, is_whole: bool = True, or_else: str = "") -> Row:
        """Return the row. Raises Unprocessable if the server doesn't take so many tokens."""
        if (n := len(row.ids)) > self.limit:
            count = n if is_whole else f"more than {self.limit}"
            raise Unprocessable(f"the text has {count} tokens; send at most {self.limit}{or_else}")
        return row

    def windows(
        self, length: int, stride: int, text: str, pair: str | None = None, or_else: str = ""
    ) -> list[Row]:
        """Return the windows of `Tokens.windows`. Raises Unprocessable if the server doesn't take so many, or so long ones."""
        most, longest = self.settings.MAX_INPUTS, min(length, self.limit)
        # Beyond that, no window is looked at.
        text = self.tokens.start(text, longest if pair else most * longest)
        pair = pair and self.tokens.start(pair, most * longest)
        windows = self.tokens.windows(most, length, stride, text, pair)
        return [self.fits(window, or_else=or_else) for window in windows]

    def check(self, inputs: Any, parameters: dict[str, Any]) -> Query:
        """Return the query that asks this. Raises Malformed or Unprocessable."""
        raise NotImplementedError

    def examples(self) -> list[Query]:
        """Return the queries for a short text and a long one."""
        return self.fitting("a text", "a text " * 50)

    def fitting(self, first: Any, *others: Any, **parameters: Any) -> list[Query]:
        """Return queries for examples: the first, and those of the others that the model can take."""
        queries = [self.check(first, parameters)]
        for inputs in others:
            with contextlib.suppress(Unprocessable):
                queries.append(self.check(inputs, parameters))
        return queries

    def query(
        self, inputs: Any, parameters: dict[str, Any], *rows: Row, targets: tuple[int, ...] = ()
    ) -> Query:
        """Return the query for rows that have been checked; its size is their tokens."""
        return Query(Content(inputs, parameters, list(rows), targets), sum(len(row.ids) for row in rows))


class TextModel:
    """A loaded instance of a text task's model: its stock pipeline, with the forward pass of the shared encoder.

    `per_text`: whether the model's head gives one row per text, not per token.
    """

    per_text = False

    def __init__(self, task: TextTask, pipe: Any) -> None:
        from workers.tasks.common.encoder import Encoder  # torch takes seconds: not at import

        self.pipe, self.task, settings = pipe, task, task.settings
        # The encoder's passes change nothing of the model, but BigBird's own do: by a text's length they set its attention.
        self.shareable = not hasattr(pipe.model.base_model, "set_attention_type")
        agrees = task.agrees(pipe.tokenizer)
        # Where the model has a process of its own, the web process has a task of its own, which stays as it is.
        self.checks_again = not agrees and settings.OFFLOAD in ("process", "dirty")
        if not agrees:
            task.adopt(pipe.tokenizer)
            if self.checks_again:
                log.warning(
                    "tokenizer.json isn't what Transformers makes of it: each text is tokenised twice"
                )
        self.gives_types = "token_type_ids" in pipe.tokenizer("a text")
        self.warn_of_lost_types()
        rows = [row for query in task.examples() for row in query.content.rows]
        self.encoder = Encoder(pipe.model, *self.batch(rows), self.per_text, settings.FAST, task.limit)
        self.description = describe(pipe.model, settings, str(self.encoder.strategy))

    def __call__(self, contents: list[Content]) -> list[Any]:
        if self.checks_again:
            contents = [self.task.check(content.inputs, content.parameters).content for content in contents]
        return self.answers(contents)

    def answers(self, contents: list[Content]) -> list[Any]:
        """Answer each as its pipeline would if it were alone."""
        raise NotImplementedError

    def logits(self, rows: Sequence[Row], keep: Sequence[Sequence[int]] | None = None) -> Any:
        """Return the model's output for each row, or for the tokens kept: float32, on the CPU."""
        ids, types = self.batch(rows)
        return self.encoder.logits(ids, keep, types).float().cpu()

    def batch(self, rows: Sequence[Row]) -> tuple[list[list[int]], list[list[int]] | None]:
        """Return ids and types as the encoder takes them: types if the pipeline gives the model any, even if all are 0."""
        types = [row.types or [0] * len(row.ids) for row in rows] if self.gives_types else None
        return [row.ids for row in rows], types

    def warn_of_lost_types(self) -> None:
        """Say it where the pipeline, with which answers agree, has a known fault."""
        kind, types = (
            self.pipe.model.config.model_type,
            SlowTokens(self.pipe.tokenizer)("a", "b").types or [0],
        )
        if kind in LOST_TYPES and 1 not in types:
            log.warning(
                "Transformers 5 gives %s models no token types: answers to pairs of texts differ from those of 4.57",
                kind,
            )


def describe(model: Any, settings: Settings, strategy: str) -> ModelInfo:
    """Return the facts on a loaded model."""
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    dtype, device = str(model.dtype).removeprefix("torch."), str(model.device)
    name, threads = type(model).__name__, settings.threads_per_instance
    return ModelInfo(settings.TASK, settings.MODEL, name, size, dtype, device, threads, strategy)


def find(model: str, name: str) -> str | None:
    """Return the path of a file of the model, a folder's or the Hub's; None where there is none."""
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
    """Return a JSON file of the model; empty where there is none. Raises ValueError, which names it, where it can't be read."""
    path = find(settings.MODEL, name)
    if path is None:
        return {}
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
    except ValueError as exc:
        raise ValueError(f"{name} is not valid JSON: {exc}") from exc
    kind: Any = list if name == "modules.json" else dict
    if not isinstance(content, kind):
        raise ValueError(f"{name} is not a JSON {'array' if kind is list else 'object'}")
    return content
