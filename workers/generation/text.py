"""Tokens to text as they come, and chats to prompts."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from workers.generation.grammar import Matcher
from workers.generation.steps import Options

PRIMING = (
    32  # tokens of the prompt's end that decide how the first new one reads: with a blank before it or not
)


class TextStream:
    """The text of one sequence, token by token.

    Characters that are split over tokens come with their last token. Special tokens give no text. Where a stop string may
    have begun, the text is held back until it is complete, which ends the text before it, or has turned out to be another.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: list[int], stop: Sequence[str] = ()) -> None:
        self.tokenizer, self.stop = tokenizer, stop
        self.stopped = False
        self.decoder = DecodeStream(ids=prompt[-PRIMING:], skip_special_tokens=True)
        self.undecoded: list[int] = []  # tokens of an incomplete character
        self.held = ""

    def push(self, token: int) -> str:
        """Return the text that this token completes, as far as it is certain."""
        self.undecoded.append(token)
        text = self.decoder.step(self.tokenizer, token)
        if text is None:
            return ""
        self.undecoded.clear()
        return self._release(text)

    def rest(self) -> str:
        """Return what was held back: there will be no more tokens. Half a character reads as U+FFFD."""
        if self.stopped:
            return ""
        last = self.tokenizer.decode(self.undecoded, skip_special_tokens=True) if self.undecoded else ""
        self.undecoded.clear()
        text = self._release(last)
        return text if self.stopped else text + self.held

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


class Chat:
    """Chats to prompts, by the tokenizer's own template. Not for the event loop: a template may take its time."""

    def __init__(self, tokenizer: Any) -> None:
        """`tokenizer`: of Transformers. Raises ValueError where its template does not work."""
        self.tokenizer = tokenizer
        self.special = [token for token in tokenizer.all_special_tokens if token.strip()]
        try:
            self("user", "Hello")
        except Exception as exc:
            raise ValueError(f"its chat template does not work: {exc}") from exc

    def __call__(self, role: str, content: str) -> str:
        return self.render([{"role": role, "content": content}])

    def render(self, messages: list[dict[str, Any]], **more: Any) -> str:
        """Return the prompt of a chat. Raises ValueError with a sentence where the template does not take it."""
        for index, message in enumerate(messages):
            content = str(message.get("content", ""))
            if special := next((token for token in self.special if token in content), None):
                raise ValueError(
                    f"message {index} has {special} in it, which only the server may use; leave it out"
                )
        try:
            return self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True, **more
            )
        except Exception as exc:
            raise ValueError(f"the model's chat template does not take these messages: {exc}") from exc
