"""JSON as the only thing that may be written: which tokens can come next, by llguidance.

    matcher = Grammars(tokenizer, end_id).matcher(schema)
    matcher.mask()        which tokens may be next, a bit each
    matcher.accept(token) it was this one

A mask of 49,152 tokens takes 0.02 ms, one in a hundred 3 ms; the tokenizer's tables take a second, once. It is optional.
"""

import importlib
import json
from typing import Any

LAYOUT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}  # no endless blanks
MISSING = "llguidance is not installed on the server: pip install -r requirements-optional.txt"


class GrammarError(ValueError):
    """A sentence on why there is no grammar for this schema."""


class Matcher:
    """Where one sequence is in its grammar."""

    def __init__(self, matcher: Any) -> None:
        self.matcher = matcher

    def mask(self) -> bytes:
        """Return a bit per token, the lowest of the first byte first: 1 where it may come next."""
        mask: bytes = self.matcher.compute_bitmask()
        return mask

    def accept(self, token: int) -> bool:
        """Go on with this token. Once the text is complete only the end-of-sequence token may come.

        Return whether that went well. It doesn't where the grammar takes more work than its library allows: then too only the
        end-of-sequence token may come, but the text is not complete.
        """
        self.matcher.consume_token(token)
        return not self.matcher.is_error()

    def copy(self) -> "Matcher":
        """Return another one at the same place."""
        return Matcher(self.matcher.deep_copy())


class Grammars:
    """Grammars over the tokens of one tokenizer. `end_id`: the token that ends a text."""

    def __init__(self, tokenizer: Any, end_id: int) -> None:
        """Raises GrammarError where llguidance is not installed."""
        try:
            self.library: Any = importlib.import_module("llguidance")
        except ImportError:
            raise GrammarError(MISSING) from None
        self.tokens = self.library.LLTokenizer(tokenizer.to_str(), eos_token=end_id)

    def matcher(self, schema: dict[str, Any]) -> Matcher:
        """Return what follows this JSON Schema. Raises GrammarError where it says what llguidance can't keep to."""
        try:
            grammar = self.library.LLMatcher.grammar_from_json_schema(json.dumps(schema), defaults=LAYOUT)
        except ValueError as exc:
            raise GrammarError(f"the schema can't be used: {exc}") from exc
        matcher = self.library.LLMatcher(self.tokens, grammar)
        if matcher.is_error():
            raise GrammarError(f"the schema can't be used: {matcher.get_error().splitlines()[0]}")
        return Matcher(matcher)
