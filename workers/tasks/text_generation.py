"""TASK=text-generation: a prompt; the text that follows it, token by token.

Takes what the Hugging Face text-generation task takes, and gives what its pipeline gives. What is not set is as the model's
own generation_config.json has it. Served by the token loop (`workers/generation/`); FAST=0 serves the stock pipeline
instead, one prompt after the other.
"""

import random
from typing import Any, NamedTuple

from workers import resources
from workers.errors import Unprocessable
from workers.generation.steps import Options, Token
from workers.generation.text import Chat, TextStream
from workers.settings import Settings
from workers.tasks import Description, Query
from workers.tasks.common.text import (
    TEXT,
    YES_OR_NO,
    Rule,
    TextTask,
    a_number,
    a_text,
    checked,
    find,
    read_json,
    schemas,
    some_words,
)
from workers.tasks.pipeline import load_model

MOST_STOPS, MOST_BIASES, MOST_LOGPROBS = 16, 300, 20
CACHE_SHARE = 8  # one part in so many of the memory that this container may use
# Recurrent models have no keys and values that could be in slots.
STATEFUL = (
    "mamba",
    "rwkv",
    "rwkv5",
    "rwkv6",
    "rwkv7",
    "jamba",
    "zamba",
    "bamba",
    "recurrent",
    "xlstm",
    "nemotron_h",
)


class Prompt(NamedTuple):
    """One checked input: what the token loop takes, and how the answer should look."""

    ids: list[int]
    options: Options
    stop: tuple[str, ...] = ()
    text: str = ""
    full_text: bool = True  # the answer begins with the prompt
    details: bool = False
    stream: bool = False


def a_float(least: float, most: float, above: bool = False) -> Rule:
    """A number; `above`: it is larger than `least`."""
    words = f"a number {'above' if above else 'from'} {least:g} {'up ' if above else ''}to {most:g}"
    return Rule(
        words,
        lambda value: (
            type(value) in (int, float) and (least < value if above else least <= value) and value <= most
        ),
        {"type": "number", "exclusiveMinimum" if above else "minimum": least, "maximum": most},
    )


class Task(TextTask):
    """What `pipeline("text-generation")` takes and gives, and what the token loop needs of it."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        refuse_unsuitable(self.config)
        self.limit = self.capacity = min(settings.CONTEXT_TOKENS, self.longest)  # prompt and new tokens
        self.defaults = read_json(settings, "generation_config.json")
        self.end_ids = self._end_ids()
        self.vocabulary = len(self.tokens)
        self.rules = self._rules()
        self._chat: Chat | None = None

    def _end_ids(self) -> frozenset[int]:
        """The tokens that end a text."""
        ids = self.defaults.get("eos_token_id", self.config.get("eos_token_id"))
        return frozenset(ids if isinstance(ids, list) else [] if ids is None else [ids])

    def _rules(self) -> dict[str, Rule]:
        """What a client may set."""
        stops = some_words(MOST_STOPS, least=0)
        return {
            "max_new_tokens": a_number(1, self.capacity),
            "do_sample": YES_OR_NO,
            "temperature": a_float(0, 100),
            "top_k": a_number(0, self.vocabulary),
            "top_p": a_float(0, 1, above=True),
            "min_p": a_float(0, 1),
            "seed": a_number(0, (1 << 63) - 1),
            "repetition_penalty": a_float(0, 10, above=True),
            "frequency_penalty": a_float(-2, 2),
            "presence_penalty": a_float(-2, 2),
            "stop": stops,
            "stop_sequences": stops,
            "min_new_tokens": a_number(0, self.capacity),
            "ignore_eos": YES_OR_NO,
            "return_full_text": YES_OR_NO,
            "details": YES_OR_NO,
            "stream": YES_OR_NO,
        }

    def check(self, inputs: Any, parameters: dict[str, Any]) -> Query:
        given = checked(parameters, self.rules)
        text = a_text(inputs)
        stop = tuple(given.get("stop") or given.get("stop_sequences") or ())
        options = self.options(given)
        prompt = Prompt(
            self.tokens(text).ids,
            options,
            stop,
            text,
            given.get("return_full_text", not given.get("details") and not given.get("stream")),
            bool(given.get("details")),
            bool(given.get("stream")),
        )
        return self.fits(prompt)

    def fits(self, prompt: Prompt) -> Query:
        """Return the query for this prompt. Raises Unprocessable where it could never be answered."""
        n, new, most = len(prompt.ids), prompt.options.max_tokens, self.capacity
        if not n:
            raise Unprocessable("the prompt has no tokens; send a text")
        if n + new > most:
            raise Unprocessable(
                f"the prompt has {n} tokens and {new} new ones may follow; send a prompt and max_new_tokens "
                f"of at most {most} together"
            )
        return Query(prompt, n)

    def options(self, given: dict[str, Any]) -> Options:
        """Return how tokens are chosen: as these parameters say, and where they don't as the model's own defaults do."""
        asked = {"temperature", "top_p", "top_k", "min_p", "seed"} & given.keys()
        set_ = {name: value for name, value in self.defaults.items() if value is not None} | given
        sample = given.get("do_sample", bool(self.defaults.get("do_sample")) or bool(asked))
        ends = frozenset[int]() if given.get("ignore_eos") else self.end_ids
        return Options(
            max_tokens=given.get("max_new_tokens", min(set_.get("max_new_tokens", 256), self.capacity // 2)),
            temperature=float(set_.get("temperature", 1.0)) if sample else 0.0,
            top_p=set_.get("top_p", 1.0),
            top_k=set_.get("top_k", 0),
            min_p=set_.get("min_p", 0.0),
            seed=given.get("seed", random.getrandbits(63)),
            repetition_penalty=set_.get("repetition_penalty", 1.0),
            presence_penalty=given.get("presence_penalty", 0.0),
            frequency_penalty=given.get("frequency_penalty", 0.0),
            logit_bias=given.get("logit_bias", {}),
            logprobs=given.get("logprobs", 0),
            min_tokens=given.get("min_new_tokens", 0),
            end_ids=ends,
        )

    # --- chats ----------------------------------------------------------------------------------------------------------

    @property
    def has_chat(self) -> bool:
        """Whether the model's files have a chat template."""
        return bool(self.names.get("chat_template") or find(self.settings.MODEL, "chat_template.jinja"))

    def read_chat_template(self) -> None:
        """Read it, where there is one. Raises ValueError where it does not work."""
        if self.has_chat:
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(self.settings.MODEL, trust_remote_code=False)
            self._chat = Chat(tokenizer)

    def chat_prompt(self, messages: list[dict[str, Any]], **more: Any) -> list[int]:
        """Return the prompt of a chat as token ids; call it in a thread. Raises Unprocessable, which says what to change."""
        if not self._chat:
            raise Unprocessable("this model has no chat template; send a prompt")
        try:
            text = self._chat.render(messages, **more)
        except ValueError as exc:
            raise Unprocessable(str(exc)) from exc
        return self.tokens.backend.encode(text, add_special_tokens=False).ids

    # --- answers --------------------------------------------------------------------------------------------------------

    def opened(self, prompt: Prompt) -> dict[str, Any]:
        """Return what the token loop's `submit` takes."""
        text = TextStream(self.tokens.backend, prompt.ids, prompt.stop)
        return {"prompt": prompt.ids, "options": prompt.options, "text": text}

    def answered(self, prompt: Prompt, text: str, tokens: list[Token], reason: str) -> list[dict[str, Any]]:
        """Return a whole answer, as the pipeline gives it."""
        answer: dict[str, Any] = {"generated_text": prompt.text + text if prompt.full_text else text}
        if prompt.details:
            answer["details"] = self.details(prompt, tokens, reason) | {
                "prefill": [],
                "tokens": [self.shown(token) for token in tokens],
            }
        return [answer]

    def details(self, prompt: Prompt, tokens: list[Token], reason: str) -> dict[str, Any]:
        """Return how a text came to its end, in Hugging Face's words."""
        ended_by_token = tokens and tokens[-1].id in prompt.options.end_ids
        words = {"stop": "eos_token" if ended_by_token else "stop_sequence"}
        seed = prompt.options.seed if prompt.options.temperature else None
        return {
            "finish_reason": words.get(reason, reason),
            "generated_tokens": len(tokens),
            "input_length": len(prompt.ids),
            "seed": seed,
        }

    def shown(self, token: Token, text: str | None = None) -> dict[str, Any]:
        """Return a token as Hugging Face shows it; without a text of its own as the vocabulary has it."""
        if text is None:
            text = self.tokens.backend.decode([token.id], skip_special_tokens=False)
        return {"id": token.id, "text": text, "logprob": token.logprob, "special": token.id in self.end_ids}

    # --- the model ------------------------------------------------------------------------------------------------------

    def load(self, instance: int) -> Any:
        from workers.generation.model import load  # torch takes seconds: not at import

        settings = self.settings
        return load(
            lambda: load_model(settings, instance, "AutoModelForCausalLM").model,
            self.capacity,
            settings.KV_CACHE_MB * 10**6 or resources.limit_bytes() // CACHE_SHARE,
            settings.MAX_SEQUENCES,
        )

    def examples(self) -> list[Query]:
        """None: the token loop warms the model up with steps of its own."""
        return []

    def describe(self) -> Description:
        return Description(
            "a prompt",
            "the text that follows it: a list with one object, whose generated_text it is",
            {"inputs": "Paris is", "parameters": {"max_new_tokens": 5}},
            TEXT,
            schemas(self.rules),
        )


def refuse_unsuitable(config: dict[str, Any]) -> None:
    """Raise ValueError where the token loop can't serve a model, with a sentence on what can be done."""
    kind = str(config.get("model_type", ""))
    if config.get("is_encoder_decoder"):
        raise ValueError(f"a {kind} model has an encoder: it does not continue texts; set another TASK")
    if kind.startswith(STATEFUL):
        raise ValueError(
            f"a {kind} model has a state, not a KV cache; set FAST=0 to serve it one prompt at a time"
        )
