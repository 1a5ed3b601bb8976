"""The model: loaded once, answers a list of queries. The input check: what is refused before the queue."""

import copy
import os
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from workers.settings import Settings

# GNU OpenMP reads this when torch is loaded: how long its threads spin while they wait for each other. By default they
# do for so long that 2 of them, beside 2 busy processes on 2 cores, do 18 texts/s; so they do 86, and 238 where 224.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

LOADING = threading.Lock()  # two loads at once collide in Transformers: "Tensor on device meta"


class Query(NamedTuple):
    """One text and what is asked of it. `targets`: the only words to score, all when empty (fill-mask).

    `ids`: the tokens of the text where the input check has found them, so that they are not looked for twice.
    """

    text: str
    top_k: int = 5
    targets: tuple[str, ...] = ()
    ids: tuple[int, ...] = ()


class CannotAnswer(ValueError):
    """The text is well-formed but the model can't answer it; the message says what to change."""


def load_pipeline(settings: Settings, instance: int = 0) -> Any:
    """Return the Transformers pipeline that the settings ask for; instance i goes to `cuda:i` where there are several.

    Safetensors only (a pickled `.bin` can run code when loaded), no remote code. Raises OSError or ValueError when the
    model can't be had.
    """
    import torch  # takes seconds: not at import, so that liveness answers meanwhile
    import transformers

    from workers.fill_mask import FastFillMaskPipeline, pick_dtype

    torch.set_num_threads(settings.threads_per_instance)
    transformers.utils.logging.disable_progress_bar()
    device = settings.DEVICE
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        device = f"cuda:{instance % max(1, torch.cuda.device_count())}"
    fast = settings.FAST and settings.TASK == "fill-mask"
    with LOADING:
        return transformers.pipeline(
            settings.TASK,
            model=settings.MODEL,
            dtype=pick_dtype(settings.DTYPE, device),
            device=device,
            pipeline_class=FastFillMaskPipeline if fast else None,
            trust_remote_code=False,
            model_kwargs={"use_safetensors": True},
        )


class Model:
    """A loaded pipeline. Call it with queries, get one answer each, exactly as the pipeline gives for that text alone."""

    def __init__(self, settings: Settings, instance: int = 0) -> None:
        started = time.perf_counter()
        self.settings = settings
        self.pipe = load_pipeline(settings, instance)
        self.wraps_single = False
        self.warm_up()
        weights = self.pipe.model
        size_mb = sum(p.numel() * p.element_size() for p in weights.parameters()) / 1e6
        self.description = (
            f"{type(weights).__name__} from {settings.MODEL}: {size_mb:.0f} MB, {weights.dtype}, {weights.device}, "
            f"{settings.threads_per_instance} threads, ready in {time.perf_counter() - started:.1f} s"
        )

    def __call__(self, queries: list[Query]) -> list[Any]:
        """Answer each query; raises what the pipeline raises, for the whole batch."""
        if hasattr(self.pipe, "answer"):
            return self.pipe.answer(queries)
        if self.settings.TASK == "fill-mask":
            return self._fill_mask(queries)
        if len(queries) == 1:
            return [self.pipe(queries[0].text)]
        answers = self.pipe([query.text for query in queries], batch_size=len(queries))
        return [[answer] for answer in answers] if self.wraps_single else answers

    def warm_up(self) -> None:
        """Run once alone and once as a full batch, so that the first request isn't the slow one."""
        mask = getattr(self.pipe.tokenizer, "mask_token", None) or ""
        probe = Query(f"a {mask}")
        alone = self([probe])[0]
        if self.settings.TASK != "fill-mask" and self.settings.BATCH_SIZE > 1:
            # Some tasks answer a text with [x] but the same text in a list with x: learn which.
            in_batch = self([probe, probe])[0]
            self.wraps_single = isinstance(alone, list) and not isinstance(in_batch, list)
        self([probe] * self.settings.BATCH_SIZE)

    def _fill_mask(self, queries: list[Query]) -> list[Any]:
        """The stock pipeline takes one top_k and one list of targets a call, and unwraps a list of one."""
        answers: dict[int, Any] = {}
        groups: dict[tuple[Any, ...], list[int]] = {}
        for i, query in enumerate(queries):
            groups.setdefault((query.top_k, query.targets), []).append(i)
        for (top_k, targets), members in groups.items():
            texts = [queries[i].text for i in members]
            found = self.pipe(texts, top_k=top_k, targets=list(targets) or None, batch_size=len(texts))
            answers.update(zip(members, [found] if len(texts) == 1 else found, strict=True))
        return [answers[i] for i in range(len(queries))]


class InputCheck:
    """Says at once, on the event loop, whether the model can answer a query. Has a tokenizer of its own:

    two threads in one can raise "Already borrowed".
    """

    def __init__(self, settings: Settings) -> None:
        from transformers import AutoConfig, AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(settings.MODEL, trust_remote_code=False)
        config = AutoConfig.from_pretrained(settings.MODEL, trust_remote_code=False)
        self.limit = min(
            settings.MAX_TOKENS,
            tokenizer.model_max_length,
            getattr(config, "max_position_embeddings", None) or 1 << 30,
        )
        self.max_masks = settings.MAX_MASKS
        self.mask = tokenizer.mask_token if settings.TASK == "fill-mask" else None
        self.mask_id = tokenizer.mask_token_id if self.mask else None
        self.words = len(tokenizer)
        self.ids = self._encoder(tokenizer)
        self.around = len(self.ids(""))  # tokens around every text

    @staticmethod
    def _encoder(tokenizer: Any) -> Callable[[str], list[int]]:
        """The Rust tokenizer underneath is 5 times faster for one text; not every model has one."""
        if not tokenizer.is_fast:
            return lambda text: tokenizer(text)["input_ids"]
        backend = copy.deepcopy(tokenizer.backend_tokenizer)
        backend.no_truncation()
        backend.no_padding()
        return lambda text: backend.encode(text).ids

    def __call__(self, query: Query) -> Query:
        """Return the query with the tokens of its text; raises CannotAnswer."""
        ids = self.ids(query.text)
        if len(ids) > self.limit:
            raise CannotAnswer(f"the text has {len(ids)} tokens; send at most {self.limit}")
        if self.mask:
            masks = ids.count(self.mask_id or 0)
            if not masks:
                raise CannotAnswer(f"the text has no {self.mask}; put {self.mask} where the missing word is")
            if masks > self.max_masks:
                raise CannotAnswer(f"the text has {masks} {self.mask}; send at most {self.max_masks}")
            if query.top_k > self.words:
                raise CannotAnswer(f"top_k is {query.top_k}; the model knows {self.words} tokens")
            if query.targets and all(len(self.ids(word)) == self.around for word in query.targets):
                raise CannotAnswer("the targets are no words to this model; send others")
        return query._replace(ids=tuple(ids))
