"""Tokens to text as they come, and chats to prompts."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from tokenizers import Tokenizer

from workers.generation.grammar import Matcher
from workers.generation.steps import Options

# Tokens of the prompt's end that decide how the first new one reads: with a blank before it or not.
PRIMING = 32
BROKEN = "\ufffd"  # how bytes read that are not a whole character


class TextStream:
    """The text of one sequence, token by token.

    Characters that are split over tokens come with their last token. Special tokens give no text. Where a stop string may
    have begun, the text is held back until it is complete, which ends the text before it, or has turned out to be another.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: list[int], stop: Sequence[str] = ()) -> None:
        self.tokenizer, self.stop = tokenizer, stop
        self.stopped = False
        self.undecoded: list[int] = []  # tokens of an incomplete character
        self.held = ""
        self._go_on_from(prompt[-PRIMING:])

    def push(self, token: int) -> str:
        """Return the text that this token completes, as far as it is certain."""
        self.undecoded.append(token)
        text = self._decoded()
        if not text or text.endswith(BROKEN):
            return ""
        self._go_on_from(self.undecoded)
        self.undecoded = []
        return self._release(text)

    def rest(self) -> str:
        """Return what was held back: there will be no more tokens. Half a character reads as U+FFFD."""
        if self.stopped:
            return ""
        text = self._release(self._decoded() if self.undecoded else "")
        self.undecoded = []
        return text if self.stopped else text + self.held

    def _go_on_from(self, ids: list[int]) -> None:
        """Note which tokens come before the undecoded ones: how a token reads depends on them."""
        self.before, self.text_before = ids, self.tokenizer.decode(ids, skip_special_tokens=True)

    def _decoded(self) -> str:
        """Return the text of the undecoded tokens."""
        text = self.tokenizer.decode(self.before + self.undecoded, skip_special_tokens=True)
        # A prompt that ends with half a character reads otherwise once that is complete.
        for before in (self.text_before, self.text_before.rstrip(BROKEN)):
            if text.startswith(before):
                return text[len(before) :]
        # With byte fallback a broken byte breaks those before it, too. (tokenizers' own DecodeStream raises there.)
        return self.tokenizer.decode(self.undecoded, skip_special_tokens=True)

    def _release(self, text: str) -> str:
        """Return what can be said of the held text and this; hold the rest."""
        if not self.stop:
            return text
        text = self.held + text
        found = [at for stop in self.stop if (at := text.find(stop)) >= 0]
        if found:
            self.stopped, self.held = True, ""
            return text[: min(found)]
        hold = max(overlap(text, stop) for stop in self.stop)
        self.held = text[len(text) - hold :]
        return text[: len(text) - hold]


class Asked(NamedTuple):
    """A prompt, how to go on with it, and what turns its tokens into text, where that is wanted."""

    prompt: list[int]
    options: Options = Options()
    text: TextStream | None = None
    grammar: Matcher | None = None


def overlap(text: str, stop: str) -> int:
    """Return how many characters at the end of `text` are the beginning of `stop`."""
    most = min(len(text), len(stop) - 1)
    return next((n for n in range(most, 0, -1) if text.endswith(stop[:n])), 0)


def nodes(value: Any) -> Iterator[Any]:
    """Yield every value in some JSON, names too."""
    todo = [value]
    while todo:
        yield (node := todo.pop())
        if isinstance(node, dict):
            todo += [*node, *node.values()]
        elif isinstance(node, list):
            todo += node


class Chat:
    """Chats to prompts, by the tokenizer's own template. Not for the event loop: a template may take its time."""

    def __init__(self, tokenizer: Any) -> None:
        """`tokenizer`: of Transformers. Raises ValueError where its template does not work."""
        self.tokenizer = tokenizer
        # Llama 3 has <|start_header_id|> among the added ones only.
        added = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
        self.special = [token for token in (*tokenizer.all_special_tokens, *added) if token.strip()]
        try:
            self("user", "Hello")
        except Exception as exc:
            raise ValueError(f"its chat template does not work: {exc}") from exc

    @property
    def tool_template(self) -> str:
        """The source of the template for chats with tools."""
        return str(self.tokenizer.get_chat_template(tools=[{}]))

    def __call__(self, role: str, content: str) -> str:
        return self.render([{"role": role, "content": content}])

    def render(self, messages: list[dict[str, Any]], **more: Any) -> str:
        """Return the prompt of a chat. Raises ValueError with a sentence where the template does not take it."""
        for index, message in enumerate(messages):
            self.reject_special(f"message {index}", message)
        self.reject_special("a tool", more.get("tools"))
        try:
            return self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True, **more
            )
        except Exception as exc:
            raise ValueError(f"the model's chat template does not take these messages: {exc}") from exc

    def reject_special(self, where: str, value: Any) -> None:
        """Raise ValueError where a text in it would read as a special token."""
        for text in (node for node in nodes(value) if isinstance(node, str)):
            if special := next((token for token in self.special if token in text), None):
                raise ValueError(f"{where} has {special} in it, which only the server may use; leave it out")
