"""JSON as the only thing that may be written: which tokens can come next, by llguidance.

    matcher = Grammars(tokenizer, end_id).matcher(schema)
    matcher.mask()        which tokens may be next, a bit each
    matcher.accept(token) it was this one

A mask of 49,152 tokens takes 0.01 ms, at most 0.13 with common schemas (`python -m loadtests.bench.grammars`), and LIMITS end one
that takes longer than about 10 ms. The first ones, which can take 0.1 s, are computed with the grammar, in its thread. The tokenizer's
tables take 0.2 s, once. It is optional.
"""

import importlib
import json
from typing import Any

from workers.errors import Malformed, ModelFailed

LAYOUT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}  # no endless blanks
# llguidance's units, for a schema of few bytes may cost seconds: of its own defaults a fifth (0.1 s), a quarter and two fifths.
LIMITS = {"initial_lexer_fuel": 200_000, "step_lexer_fuel": 50_000, "step_max_items": 20_000}
FIRST_TOKENS = 4  # are tried with the grammar: a schema beyond the limits shows it with its first masks
MOST_PATTERNS = 8  # at once: each doubles the time, 12 take 0.5 s, and no limit of llguidance's ends that
MISSING = "llguidance is not installed on the server: pip install -r requirements-optional.txt"


class GrammarError(ValueError):
    """A sentence on why there is no grammar for this schema."""


class SchemaFailed(ModelFailed, Malformed):
    """A text can't follow its JSON Schema any further. Not the server's fault, so 400."""


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
        """Return what follows this JSON Schema. Raises GrammarError where it says what llguidance can't keep to, or not in time."""
        if patterns_at_once(schema) > MOST_PATTERNS:
            most = f"with allOf, or a $ref beside a pattern, it may have {MOST_PATTERNS} patterns and formats"
            raise GrammarError(f"the schema can't be used: {most}; send one with fewer")
        try:
            grammar = self.library.LLMatcher.grammar_from_json_schema(json.dumps(schema), defaults=LAYOUT)
        except ValueError as exc:
            raise GrammarError(f"the schema can't be used: {exc}") from exc
        limits = self.library.LLParserLimits(**LIMITS, verbose_errors=False)
        matcher = self.library.LLMatcher(self.tokens, grammar, log_level=0, limits=limits)
        tried = matcher.deep_copy()  # what it computes is kept, also for the copies of a request
        for _ in range(FIRST_TOKENS):
            mask = int.from_bytes(tried.compute_bitmask(), "little") if not tried.is_error() else 0
            if not mask or tried.is_stopped():
                break
            tried.consume_token((mask & -mask).bit_length() - 1)  # the first that may come
        if tried.is_error():
            raise GrammarError(f"the schema can't be used: {tried.get_error().splitlines()[0]}")
        return Matcher(matcher)


def patterns_at_once(schema: Any) -> int:
    """Return how many patterns and formats one text may have to match: 1 where nothing joins parts of the schema."""
    found: set[str] = set()
    is_joined, todo = False, [schema]
    while todo:
        match todo.pop():
            case dict() as node:
                own = {one for name in ("pattern", "format") if isinstance(one := node.get(name), str)}
                found |= own
                is_joined |= isinstance(node.get("allOf"), list) or ("$ref" in node and bool(own))
                todo.extend(node.values())
            case list() as nodes:
                todo.extend(nodes)
    return len(found) if is_joined else 1
