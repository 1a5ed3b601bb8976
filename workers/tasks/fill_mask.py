"""TASK=fill-mask: a text with a mask; its likeliest words."""

from typing import Any, NamedTuple

from workers.settings import Settings
from workers.tasks import CannotAnswer, Description, Malformed, Query, unknown_parameters
from workers.tasks.pipeline import Pipeline, TextTask, load_pipeline


class Content(NamedTuple):
    """One text and what is asked of it. `targets`: the only words to score, all when empty. `ids`: its tokens."""

    text: str
    top_k: int = 5
    targets: tuple[str, ...] = ()
    ids: tuple[int, ...] = ()


class Task(TextTask):
    """What `pipeline("fill-mask")` takes and gives."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self.mask, self.mask_id = self.tokenizer.mask_token, self.tokenizer.mask_token_id

    def check(self, inputs: Any, parameters: dict[str, Any]) -> Query:
        unknown_parameters(parameters, "top_k", "targets")
        content = Content(self.text(inputs), *self.want(**parameters))
        ids = self.tokens(content.text)
        masks = ids.count(self.mask_id)
        if not masks:
            raise CannotAnswer(f"the text has no {self.mask}; put {self.mask} where the missing word is")
        if masks > self.settings.MAX_MASKS:
            raise CannotAnswer(f"the text has {masks} {self.mask}; send at most {self.settings.MAX_MASKS}")
        if content.top_k > len(self.tokenizer):
            raise CannotAnswer(f"top_k is {content.top_k}; the model knows {len(self.tokenizer)} tokens")
        if content.targets and all(len(self.ids(word)) == self.around for word in content.targets):
            raise CannotAnswer("the targets are no words to this model; send others")
        return Query(content._replace(ids=tuple(ids)), len(ids))

    def want(self, top_k: Any = None, targets: Any = None) -> tuple[int, tuple[str, ...]]:
        most = self.settings.MAX_TOP_K
        top_k = Content._field_defaults["top_k"] if top_k is None else top_k
        if type(top_k) is not int or not 1 <= top_k <= most:
            raise Malformed(f'"top_k" must be a whole number from 1 to {most}')
        targets = [targets] if isinstance(targets, str) else targets
        if targets is not None and not is_list_of_words(targets, most):
            raise Malformed(f'"targets" must be a list of 1 to {most} words')
        return top_k, tuple(targets or ())

    def load(self, instance: int) -> "FillMask":
        from workers.tasks.fast_fill_mask import FastFillMaskPipeline

        kind = FastFillMaskPipeline if self.settings.FAST else None
        return FillMask(self.settings, load_pipeline(self.settings, instance, kind))

    def examples(self) -> list[Query]:
        short = f"Paris is the {self.mask} of France."
        return [self.check(text, {}) for text in (short, short + " Or so they say." * 20)]

    def describe(self) -> Description:
        example = {"inputs": f"Paris is the {self.mask} of France.", "parameters": {"top_k": 5}}
        return Description(f"a text with one {self.mask} or a few", "the likeliest words", example)


class FillMask(Pipeline):
    """The loaded pipeline."""

    def __call__(self, contents: list[Content]) -> list[Any]:
        if hasattr(self.pipe, "answer"):
            return self.pipe.answer(contents)
        # The stock pipeline takes one top_k and one list of targets a call, and unwraps a list of one.
        answers: dict[int, Any] = {}
        groups: dict[tuple[Any, ...], list[int]] = {}
        for i, content in enumerate(contents):
            groups.setdefault((content.top_k, content.targets), []).append(i)
        for (top_k, targets), members in groups.items():
            texts = [contents[i].text for i in members]
            found = self.pipe(texts, top_k=top_k, targets=list(targets) or None, batch_size=len(texts))
            answers.update(zip(members, [found] if len(texts) == 1 else found, strict=True))
        return [answers[i] for i in range(len(contents))]


def is_list_of_words(value: Any, most: int) -> bool:
    """Whether `value` is a list of 1 to `most` texts, none of them blank."""
    return (
        isinstance(value, list)
        and 1 <= len(value) <= most
        and all(isinstance(w, str) and w.strip() for w in value)
    )
