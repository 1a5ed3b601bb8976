"""Any other TASK: the stock Transformers pipeline of that name, one input after the other.

One after the other, as padding to the longest of a batch changes some answers: feature-extraction's, for one.
"""

import base64
import binascii
import contextlib
import difflib
import io
import itertools
import os
import pkgutil
import threading
import wave
from types import SimpleNamespace
from typing import Any

from workers import tasks
from workers.errors import Malformed, Unprocessable
from workers.settings import Settings
from workers.tasks import Description, Query
from workers.tasks.common.text import (
    TEXT_RULE,
    Content,
    Rule,
    TextTask,
    check_parameters,
    choice_rule,
    describe,
    number_rule,
    require_text,
    schemas,
    words_rule,
)

# GNU OpenMP reads this when torch is loaded: how long its threads spin while they wait for each other. The default is very
# long. Measured with 2 threads on 2 cores: beside 2 busy processes 86 texts/s instead of 18, without them 238 instead of 224.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

LOADING = threading.Lock()  # two loads at once collide in Transformers: "Tensor on device meta"
MAX_PIXELS = 1 << 25  # a small file can unfold to gigabytes
# For others Pillow runs programs: PostScript's, for one.
FORMATS = ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"]
# A text would be taken for an address or a path of this machine by pipelines of images and sounds: there it is base64.
TAKEN = {
    "image": {
        "depth-estimation",
        "document-question-answering",
        "image-classification",
        "image-feature-extraction",
        "image-segmentation",
        "object-detection",
        "zero-shot-image-classification",
    },
    "audio": {"audio-classification", "automatic-speech-recognition", "zero-shot-audio-classification"},
    "text": {"feature-extraction", "table-question-answering", "text-generation", "text-to-audio"},
}


def load_pipeline(settings: Settings, instance: int = 0) -> Any:
    """Return the Transformers pipeline that the settings ask for; instance i goes to `cuda:i` where there are several.

    Safetensors only (a pickled `.bin` can run code when loaded), no remote code. Raises OSError or ValueError when the
    model can't be had.
    """
    with LOADING:
        device, dtype = place(settings, instance)
        import transformers

        pipe = transformers.pipeline(
            settings.TASK,
            model=settings.MODEL,
            dtype=dtype,
            device=device,
            trust_remote_code=False,
            model_kwargs={"use_safetensors": True},
        )
    check_weights(pipe.model, settings)
    return pipe


def load_model(settings: Settings, instance: int, kind: str) -> Any:
    """The same for what has no pipeline: its `model`, by one of Transformers' automatic classes, and its `tokenizer`."""
    safe = {"trust_remote_code": False}
    with LOADING:
        device, dtype = place(settings, instance)
        import transformers

        model = getattr(transformers, kind).from_pretrained(
            settings.MODEL, dtype=dtype, use_safetensors=True, **safe
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(settings.MODEL, **safe)
    check_weights(model, settings)
    return SimpleNamespace(model=model.to(device).eval(), tokenizer=tokenizer)


def check_weights(model: Any, settings: Settings) -> None:
    """Raise ValueError where weights were not in the files: Transformers makes them up, and so would the answers be.

    All but the pooler of a model without a head: nothing here asks it.
    """
    weights = dict(model.named_parameters())
    read = {name for name, weight in weights.items() if getattr(weight, "_is_hf_initialized", False)}
    missing = [name for name in weights.keys() - read if not name.startswith("pooler.")]
    if read and missing:  # Transformers' own mark: were it gone, nothing would be marked
        raise ValueError(
            f"its files have no {missing[-1]} for TASK={settings.TASK}; "
            f"set the TASK that it was trained for: it is a {' or '.join(model.config.architectures or ['?'])}"
        )


def place(settings: Settings, instance: int) -> tuple[str, Any]:
    """The device and the dtype of an instance; gives torch its threads."""
    import torch  # takes seconds: not at import, so that liveness answers meanwhile
    import transformers

    from workers.tasks.common.packed import pick_dtype

    torch.set_num_threads(settings.threads_per_instance)
    transformers.utils.logging.disable_progress_bar()
    device = settings.DEVICE
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        device = f"cuda:{instance % max(1, torch.cuda.device_count())}"
    return device, pick_dtype(settings.DTYPE, device)


class Task(TextTask):
    """A text, JSON, an image or a sound in, the pipeline's answer out."""

    def __init__(self, settings: Settings) -> None:
        self.kind = next((kind for kind, tasks in TAKEN.items() if settings.TASK in tasks), None)
        if self.kind is None:
            raise ValueError(not_known(settings.TASK))
        if self.kind == "text":
            super().__init__(settings)
        else:
            self.settings, self.media = settings, (f"{self.kind}/", "application/octet-stream")
        self.rules = self.find_rules()

    def check(self, inputs: Any, parameters: dict[str, Any]) -> Query:
        parameters = check_parameters(parameters, self.rules)
        if self.kind != "text":
            return Query(Content(self.medium(inputs), parameters, []))
        if isinstance(inputs, str):
            return self.query(inputs, parameters, self.row(require_text(inputs)))
        return Query(Content(inputs, parameters, []))

    def find_rules(self) -> dict[str, Rule]:
        """What a client may set. Not whatever the pipeline takes: with some of it a client can load code."""
        most, apply = self.settings.MAX_TOP_K, choice_rule("softmax", "sigmoid", "none")
        match self.settings.TASK:
            case "image-classification" | "audio-classification":
                return {"top_k": number_rule(1, most), "function_to_apply": apply}
            case "zero-shot-image-classification" | "zero-shot-audio-classification":
                return {"candidate_labels": words_rule(most), "hypothesis_template": TEXT_RULE}
            case "text-generation":
                return {"max_new_tokens": number_rule(1, self.settings.MAX_TOKENS)}
        return {}

    def medium(self, inputs: Any) -> Any:
        """An image's or a sound's bytes, with a question beside them where they are a field of an object."""
        kind = str(self.kind)
        if isinstance(inputs, dict) and inputs.keys() == {kind, "question"}:
            return {kind: self.medium(inputs[kind]), "question": require_text(inputs["question"], "question")}
        if isinstance(inputs, str):  # a data URL, or only what follows its comma
            with contextlib.suppress(binascii.Error):
                inputs = base64.b64decode(inputs.partition("base64,")[2] or inputs, validate=True)
        if not isinstance(inputs, bytes):
            raise Malformed(
                f'"inputs" must be the {kind} in base64; or send it as the body, with its Content-Type'
            )
        if kind == "image":
            check_image(inputs)
        return inputs

    def load(self, instance: int) -> "Stock":
        return Stock(self, load_pipeline(self.settings, instance))

    def examples(self) -> list[Query]:
        if self.kind == "text":
            return [self.check(text, {}) for text in ("a text", "a text " * 50)]
        needs_more = self.settings.TASK.startswith(("document-", "zero-shot-"))
        return [] if needs_more else [self.check(an_example(self.kind), {})]

    def describe(self) -> Description:
        takes = "a text" if self.kind == "text" else f"the bytes of the {self.kind}"
        example = "a text" if self.kind == "text" else base64.b64encode(an_example(self.kind)).decode()
        gives = f"what the {self.settings.TASK} pipeline answers"
        return Description(takes, gives, {"inputs": example}, {}, schemas(self.rules))


def not_known(task: str) -> str:
    """The sentence that says so, with the names that are, first the one that was probably meant."""
    files = (module.name.replace("_", "-") for module in pkgutil.iter_modules(tasks.__path__))
    known = sorted({*filter(tasks.file_of, files), *itertools.chain(*TAKEN.values())})
    # So strict, as another word in place of "text" is another task, not a misspelt one.
    meant = difflib.get_close_matches(task.lower().replace("_", "-"), known, 1, 0.9)
    hint = f", did you mean {meant[0]}?" if meant else ";"
    return f"TASK={task} is not known{hint} known are {', '.join(known)}; or a class of your own: MODEL=my_model:Class"


class Stock:
    """A loaded pipeline: one answer for each input, as the pipeline gives for that alone."""

    def __init__(self, task: TextTask, pipe: Any) -> None:
        self.pipe = pipe
        self.description = describe(pipe.model, task.settings, "the stock pipeline, one by one")

    def __call__(self, contents: list[Content]) -> list[Any]:
        return [in_json(self.pipe(self.opened(content.inputs), **content.parameters)) for content in contents]

    def opened(self, inputs: Any) -> Any:
        """As pipelines take it: an image as Pillow's."""
        if isinstance(inputs, dict):
            return {name: self.opened(value) for name, value in inputs.items()}
        return open_image(inputs) if isinstance(inputs, bytes) and self.pipe.image_processor else inputs


def in_json(answer: Any) -> Any:
    """Its images, such as masks, as Hugging Face's hosted pipelines give them: a PNG in base64."""
    if isinstance(answer, dict):
        return {name: in_json(value) for name, value in answer.items()}
    if isinstance(answer, list):
        return [in_json(value) for value in answer]
    if not callable(save := getattr(answer, "save", None)):
        return answer
    file = io.BytesIO()
    save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def an_example(kind: str | None) -> bytes:
    """A grey image, or a second of silence: what it needs (Pillow, ffmpeg) is missed at the start, not by clients."""
    file = io.BytesIO()
    if kind == "image":
        from PIL import Image

        Image.new("RGB", (64, 64), "grey").save(file, "PNG")
    else:
        with wave.open(file, "wb") as sound:
            sound.setparams((1, 2, 16_000, 0, "NONE", ""))
            sound.writeframes(bytes(32_000))
    return file.getvalue()


def open_image(data: bytes) -> Any:
    """A Pillow image, of which only the head has been read."""
    from PIL import Image  # only those who serve images need it

    return Image.open(io.BytesIO(data), formats=FORMATS)


def check_image(data: bytes) -> None:
    """Raise Unprocessable where this is no image, or half of one, or one that would take gigabytes."""
    try:
        image = open_image(data)
        if (pixels := image.width * image.height) <= MAX_PIXELS:
            image.load()  # only this notices that the end is missing
            return
    except Exception:  # of a broken file Pillow raises anything
        raise Unprocessable("the image cannot be read; send a whole JPEG or PNG") from None
    raise Unprocessable(f"the image has {pixels} pixels; send at most {MAX_PIXELS}")
