"""Any other TASK: the stock Transformers pipeline of that name, for one text."""

import copy
import os
import threading
import time
from collections.abc import Callable
from typing import Any

from workers.settings import Settings
from workers.tasks import CannotAnswer, Description, Malformed, Query, unknown_parameters

# GNU OpenMP reads this when torch is loaded: how long its threads spin while they wait for each other. By default they
# do for so long that 2 of them, beside 2 busy processes on 2 cores, do 18 texts/s; so they do 86, and 238 where 224.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

LOADING = threading.Lock()  # two loads at once collide in Transformers: "Tensor on device meta"


def load_pipeline(settings: Settings, instance: int = 0, pipeline_class: Any = None) -> Any:
    """Return the Transformers pipeline that the settings ask for; instance i goes to `cuda:i` where there are several.

    Safetensors only (a pickled `.bin` can run code when loaded), no remote code. Raises OSError or ValueError when the
    model can't be had.
    """
    import torch  # takes seconds: not at import, so that liveness answers meanwhile
    import transformers

    from workers.tasks.fast_fill_mask import pick_dtype

    torch.set_num_threads(settings.threads_per_instance)
    transformers.utils.logging.disable_progress_bar()
    device = settings.DEVICE
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        device = f"cuda:{instance % max(1, torch.cuda.device_count())}"
    with LOADING:
        return transformers.pipeline(
            settings.TASK,
            model=settings.MODEL,
            dtype=pick_dtype(settings.DTYPE, device),
            device=device,
            pipeline_class=pipeline_class,
            trust_remote_code=False,
            model_kwargs={"use_safetensors": True},
        )


class TextTask:
    """What all tasks with one text share. Has a tokenizer of its own:

    two threads in one can raise "Already borrowed".
    """

    media: tuple[str, ...] = ()

    def __init__(self, settings: Settings) -> None:
        from transformers import AutoConfig, AutoTokenizer

        self.settings = settings
        self.tokenizer = AutoTokenizer.from_pretrained(settings.MODEL, trust_remote_code=False)
        config = AutoConfig.from_pretrained(settings.MODEL, trust_remote_code=False)
        self.limit = min(
            settings.MAX_TOKENS,
            self.tokenizer.model_max_length,
            getattr(config, "max_position_embeddings", None) or 1 << 30,
        )
        self.ids = self._encoder(self.tokenizer)
        self.around = len(self.ids(""))  # tokens around every text

    @staticmethod
    def _encoder(tokenizer: Any) -> Callable[[str], list[int]]:
        """The Rust tokenizer underneath is 5 times faster for one text; not every model has one."""
        if not tokenizer.is_fast:
            return lambda text: tokenizer(text)["input_ids"]
        backend = copy.deepcopy(tokenizer.backend_tokenizer)
        backend.no_truncation()
        backend.no_padding()
        # encode() would keep the interpreter to itself.
        return lambda text: backend.encode_batch([text])[0].ids

    @staticmethod
    def text(inputs: Any) -> str:
        """`inputs`, if it is a text."""
        if not isinstance(inputs, str):
            raise Malformed('"inputs" must be one text or a list of texts: {"inputs": "a text"}')
        if not inputs.strip():
            raise Malformed("the text is empty; send one")
        return inputs

    def tokens(self, text: str) -> list[int]:
        """Its tokens, if the model can take so many."""
        ids = self.ids(text)
        if len(ids) > self.limit:
            raise CannotAnswer(f"the text has {len(ids)} tokens; send at most {self.limit}")
        return ids


class Task(TextTask):
    """A text in, the pipeline's answer out."""

    def check(self, inputs: Any, parameters: dict[str, Any]) -> Query:
        unknown_parameters(parameters)
        text = self.text(inputs)
        return Query(text, len(self.tokens(text)))

    def load(self, instance: int) -> "Pipeline":
        return Pipeline(self.settings, load_pipeline(self.settings, instance))

    def examples(self) -> list[Query]:
        return [self.check(text, {}) for text in ("a text", "a text " * 50)]

    def describe(self) -> Description:
        return Description("a text", f"what the {self.settings.TASK} pipeline answers", {"inputs": "a text"})


class Pipeline:
    """A loaded pipeline. Call it with texts, get one answer each, as the pipeline gives for that text alone."""

    def __init__(self, settings: Settings, pipe: Any) -> None:
        started = time.perf_counter()
        self.settings, self.pipe = settings, pipe
        self.wraps_single = False
        weights = self.pipe.model
        size_mb = sum(p.numel() * p.element_size() for p in weights.parameters()) / 1e6
        self.description = (
            f"{type(weights).__name__} from {settings.MODEL}: {size_mb:.0f} MB, {weights.dtype}, {weights.device}, "
            f"{settings.threads_per_instance} threads, ready in {time.perf_counter() - started:.1f} s"
        )

    def __call__(self, contents: list[Any]) -> list[Any]:
        return [self.pipe(content) for content in contents]
