"""Any other TASK: the stock Transformers pipeline of that name.

Texts and tables one by one, as padding to the longest of a batch changes some answers: feature-extraction's, for one. Images
and sounds together where that is exact and gains (`common/stock.py`).
"""

import base64
import difflib
import os
import pkgutil
import threading
from types import SimpleNamespace
from typing import Any

from workers import tasks
from workers.errors import Malformed, Unprocessable
from workers.settings import Settings
from workers.tasks import Description, ModelInfo, Query
from workers.tasks.common import media
from workers.tasks.common.parameters import (
    REFUSED,
    TAKES,
    WHISPER_S,
    rules_of,
    speech_size,
    window_is_too_short,
)
from workers.tasks.common.stock import Batched, Prepared, Stock
from workers.tasks.common.text import (
    TEXT_SCHEMA,
    Content,
    Rule,
    TextTask,
    check_parameters,
    object_schema,
    read_model_json,
    require_text,
    schemas,
)

__all__ = ["Stock", "Task", "load_model", "load_pipeline"]

# GNU OpenMP reads this when torch is loaded: how long its threads spin while they wait for each other. The default is very
# long. Measured with 2 threads on 2 cores: beside 2 busy processes 86 texts/s instead of 18, without them 238 instead of 224.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

# Or one that was never trained.
NO_POOLER = Rule("false: this model has no pooler", lambda value: value is False, {"const": False})
LOADING = threading.Lock()  # two loads at once collide in Transformers: "Tensor on device meta"


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

    All but the pooler of a model without a head: only `pool` asks it, and `can_pool` sees to that.
    """
    missing = [name for name in made_up(model) if not name.startswith("pooler.")]
    if missing:
        raise ValueError(
            f"its files have no {missing[-1]} for TASK={settings.TASK}; "
            f"set the TASK that it was trained for: it is a {' or '.join(model.config.architectures or ['?'])}"
        )


def made_up(model: Any) -> list[str]:
    """Return the names of the weights that were not in the model's files."""
    weights = dict(model.named_parameters())
    read = {name for name, weight in weights.items() if getattr(weight, "_is_hf_initialized", False)}
    # It is Transformers' own mark, and may be gone one day.
    return sorted(weights.keys() - read) if read else []


def can_pool(pipe: Any, image: bytes) -> bool:
    """Return whether an image model has a pooler, with weights of its own."""
    outputs = pipe.forward(pipe.preprocess(media.read_image(image)))
    return "pooler_output" in outputs and not any(name.startswith("pooler.") for name in made_up(pipe.model))


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
    """A text, a table, an image or a sound in, the pipeline's answer out."""

    def __init__(self, settings: Settings) -> None:
        self.name = tasks.ALIASES.get(settings.TASK, settings.TASK)
        if self.name not in TAKES:
            raise ValueError(not_served(settings.TASK))
        self.takes = TAKES[self.name]
        if self.takes == "text":
            super().__init__(settings)
        else:
            self.settings, self.config = settings, read_model_json(settings, "config.json")
            self.media = (f"{self.takes}/", "application/octet-stream") if self.takes != "table" else ()
        self.generation = read_model_json(settings, "generation_config.json")
        self.rules = rules_of(self.name, settings, self.config, self.generation)
        self.model: Batched | None = None  # once it is loaded, if it is loaded here
        if self.takes == "audio":
            media.ffmpeg()  # missed at the start, not by clients
            features = read_model_json(settings, "preprocessor_config.json")
            self.rate: int = features.get("sampling_rate") or 16_000
            self.is_whisper = self.config.get("model_type") == "whisper"

    def check(self, inputs: Any, parameters: dict[str, Any]) -> Query:
        if self.name == "document-question-answering" and isinstance(inputs, bytes):
            parameters = dict(parameters)  # a form: its question is another field
            inputs = {"image": inputs, "question": parameters.pop("question", None)}
        parameters = self.checked(parameters)
        if self.takes == "table":
            return self.check_table(inputs, parameters)
        if self.takes != "text":
            return self.check_medium(inputs, parameters)
        row = self.row(require_text(inputs))
        if self.name == "text-generation":
            parameters = self.bounded(parameters, len(row.ids))
        query = self.query(inputs, parameters, row)
        return query._replace(size=query.size + parameters.get("max_new_tokens", 0))

    def checked(self, parameters: dict[str, Any]) -> dict[str, Any]:
        """The parameters, if each keeps its rule and none is missing. Raises Malformed."""
        labels = parameters.get("candidate_labels")
        if isinstance(labels, str):
            labels = [label.strip() for label in labels.split(",") if label.strip()]
            parameters = parameters | {"candidate_labels": labels}
        parameters = check_parameters(parameters, self.rules)
        # Whisper raises at it for a sound of more than one window.
        if parameters.get("return_timestamps") is False:
            parameters = {name: value for name, value in parameters.items() if name != "return_timestamps"}
        if "candidate_labels" in self.rules and labels is None:
            raise Malformed('there are no "candidate_labels"; send those that may fit, as a parameter')
        if window_is_too_short(parameters):
            raise Malformed('"chunk_length_s" must be at least three times "stride_length_s"')
        return parameters

    def bounded(self, parameters: dict[str, Any], n_tokens: int) -> dict[str, Any]:
        """The parameters with `max_new_tokens`, as the model has room for: what a client does not say counts, too."""
        new = parameters.get("max_new_tokens") or self.generation.get("max_new_tokens") or 256
        if (room := min(new, self.longest - n_tokens)) < 1:
            raise Unprocessable(f"the model takes {self.longest} tokens; send a shorter text")
        return parameters | {"max_new_tokens": room}

    def check_table(self, inputs: Any, parameters: dict[str, Any]) -> Query:
        """The query for {"table": {column: [cells]}, "query": text}; its size is about its tokens."""
        if not isinstance(inputs, dict) or inputs.keys() != {"table", "query"}:
            raise Malformed('"inputs" must be {"table": {"a column": ["a cell", …]}, "query": "a question"}')
        table, question = inputs["table"], require_text(inputs["query"], "query")
        columns = list(table.values()) if isinstance(table, dict) else []
        cells = [cell for column in columns if isinstance(column, list) for cell in column]
        is_table = cells and all(isinstance(one, list) and len(one) == len(columns[0]) for one in columns)
        if not is_table or not all(isinstance(cell, str) for cell in cells):
            raise Malformed('"table" must be an object of columns, each a list of as many texts')
        if not any(text.strip() for text in (*table, *cells)):
            raise Malformed("there is nothing in the table; send one with texts")
        # Of TAPAS, which counts them from 1.
        most = min(self.config.get("type_vocab_sizes", [1 << 30] * 3)[1:3]) - 2
        if max(len(columns), len(columns[0])) > most:
            raise Unprocessable(f"the table is too large; send at most {most} rows and {most} columns")
        size = (sum(map(len, cells)) + sum(map(len, table)) + len(question)) // 4 + len(cells)
        if size > self.settings.MAX_TOKENS * 4:  # the tokenizer drops rows that the model has no room for
            raise Unprocessable(f"the table is too long: about {size} tokens; send fewer rows")
        return Query(Content({"table": table, "query": question}, parameters, []), size)

    def check_medium(self, inputs: Any, parameters: dict[str, Any]) -> Query:
        """The query for an image or a sound, as the model takes it where that is loaded here."""
        query = self.opened(inputs, parameters)
        if self.model is None:  # it is in a process of its own: an image is smaller as it came
            return self.opened(inputs, parameters, as_bytes=True) if self.takes == "image" else query
        try:
            return query._replace(content=query.content._replace(inputs=self.model.prepare(query.content)))
        except Exception as exc:
            raise Unprocessable(f"the {self.takes} can't be prepared for this model; send another") from exc

    def opened(self, inputs: Any, parameters: dict[str, Any], as_bytes: bool = False) -> Query:
        """The query for an image or a sound, as its pipeline takes it: pixels, samples; or still as bytes."""
        question, n_labels = None, len(parameters.get("candidate_labels", ()))
        if self.name == "document-question-answering":
            if not isinstance(inputs, dict) or inputs.keys() != {"image", "question"}:
                raise Malformed('"inputs" must be {"image": "base64", "question": "a text"}')
            question, inputs = require_text(inputs["question"], "question"), inputs["image"]
            if len(question) > 4 * self.settings.MAX_TOKENS:
                raise Unprocessable("the question is too long; send a shorter one")
        data = media.bytes_of(inputs, self.takes)
        size, value = 8 + n_labels if n_labels else 1, data if as_bytes else self.read(data)
        if self.takes == "audio":
            size += speech_size(len(value) / self.rate, parameters, self.is_whisper)
        return Query(
            Content({"image": value, "question": question} if question else value, parameters, []), size
        )

    def read(self, data: bytes) -> Any:
        """The image or the samples. Raises Unprocessable."""
        if self.takes == "image":
            return media.read_image(data)
        return media.read_sound(data, self.rate, self.settings.MAX_SOUND_S)

    def seconds(self, query: Query) -> float:
        """How long the sound of a query is."""
        sound = query.content.inputs
        return (sound.length if isinstance(sound, Prepared) else len(sound)) / self.rate

    def load(self, instance: int) -> Stock:
        pipe = load_pipeline(self.settings, instance)
        if self.takes in ("text", "table"):
            return Stock(self, pipe)
        if "pool" in self.rules and not can_pool(pipe, media.example_image()):
            self.rules["pool"] = NO_POOLER
        self.model = model = Batched(self, pipe, [self.opened(*probe).content for probe in self.probes()])
        model.description = model.description._replace(pools=self.rules.get("pool") is not NO_POOLER)
        return model

    def learn(self, info: ModelInfo) -> None:
        """Where the model is loaded in a process of its own, `check` learns of it here whether it can pool."""
        if not info.pools:
            self.rules["pool"] = NO_POOLER

    def probes(self) -> list[tuple[Any, dict[str, Any]]]:
        """Inputs that exercise a batch: different ones of the same shape, and one of another."""
        if self.takes == "image":
            shapes = [(1, 64, 64), (2, 64, 64), (3, 64, 64), (4, 96, 48)]
            return [self.example(media.example_image(*shape)) for shape in shapes]
        return [
            self.example(media.example_sound(*shape)) for shape in [(1, 1.0), (2, 1.0), (3, 1.0), (4, 1.3)]
        ]

    def example(self, data: bytes, n_labels: int = 2) -> tuple[Any, dict[str, Any]]:
        """An input with what it needs besides."""
        words = ["dog", "river", "a red house", "music"] * 25
        parameters = {"candidate_labels": words[: min(n_labels, self.settings.MAX_TOP_K)]}
        code = base64.b64encode(data).decode()
        is_document = self.name == "document-question-answering"
        inputs = {"image": code, "question": "what is it?"} if is_document else code
        return inputs, parameters if "candidate_labels" in self.rules else {}

    def examples(self) -> list[Query]:
        match self.takes:
            case "text":
                return self.fitting("a text", "a text " * 20)
            case "table":
                return [self.check(self.body()["inputs"], {})]
            case "image":
                counts = (2, 16) if "candidate_labels" in self.rules else (2,)
                return [self.check(*self.example(media.example_image(), n)) for n in counts]
        lengths = (1.0, min(5.0, self.settings.MAX_SOUND_S))
        queries = [self.check(*self.example(media.example_sound(0, length))) for length in lengths]
        if self.is_whisper and self.settings.MAX_SOUND_S > WHISPER_S:  # two of its windows
            sound, parameters = self.example(media.example_sound(0, WHISPER_S + 1))
            queries[1] = self.check(sound, {**parameters, "chunk_length_s": WHISPER_S})
        return queries

    def describe(self) -> Description:
        gives = f"what the {self.name} pipeline answers"
        parameters, example = schemas(self.rules), self.body()
        if self.takes == "text":
            return Description("a text", gives, example, TEXT_SCHEMA, parameters)
        if self.takes == "table":
            table = {"type": "object", "additionalProperties": {"type": "array", "items": {"type": "string"}}}
            schema = object_schema({"table": table, "query": TEXT_SCHEMA})
            return Description("a table of texts and a question", gives, example, schema, parameters)
        if self.name == "document-question-answering":
            schema = object_schema({"image": TEXT_SCHEMA, "question": TEXT_SCHEMA})
            return Description("an image in base64 and a question", gives, example, schema, parameters)
        return Description(f"the bytes of the {self.takes}", gives, example, {"type": "string"}, parameters)

    def body(self) -> dict[str, Any]:
        """The body of an example."""
        match self.takes:
            case "text":
                return {"inputs": "a text"}
            case "table":
                table = {"name": ["Ada", "Alan"], "age": ["36", "41"]}
                return {"inputs": {"table": table, "query": "how old is Ada?"}}
        data = media.example_image(0, 16, 16) if self.takes == "image" else media.example_sound(0, 0.5)
        inputs, parameters = self.example(data)
        return {"inputs": inputs, "parameters": parameters} if parameters else {"inputs": inputs}


def not_served(task: str) -> str:
    """The sentence that says so: why it is not, or which name was probably meant."""
    name = task.lower().replace("_", "-")
    if reason := REFUSED.get("translation" if name.startswith("translation") else name):
        return f"TASK={task} is not served: {reason}"
    files = (module.name.replace("_", "-") for module in pkgutil.iter_modules(tasks.__path__))
    known = sorted({*filter(tasks.file_of, files), *TAKES, *tasks.ALIASES})
    # So strict, as another word in place of "text" is another task, not a misspelt one.
    meant = difflib.get_close_matches(name, known, 1, 0.9)
    hint = f", did you mean {meant[0]}?" if meant else ";"
    return f"TASK={task} is not known{hint} known are {', '.join(known)}; or a custom class: MODEL=my_model:Class"
