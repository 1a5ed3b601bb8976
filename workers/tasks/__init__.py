"""What a model is: a task says what may be asked of it, and answers. One file per task, found by its name.

    TASK=fill-mask          workers/tasks/fill_mask.py
    TASK=anything else      workers/tasks/pipeline.py: the stock pipeline of that name
    MODEL=my_model:Iris     workers/tasks/custom.py: a custom class

A task knows neither HTTP nor where it runs: its errors are sentences for the client.
"""

import base64
import importlib
import importlib.util
import itertools
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from workers.errors import Malformed
from workers.settings import MOST, Settings
from workers.tasks.threads import Threads

# Transformers' own other names.
ALIASES = {
    "ner": "token-classification",
    "sentiment-analysis": "text-classification",
    "text-to-speech": "text-to-audio",
}


class Query(NamedTuple):
    """One input that was checked: what the model gets of it, picklable, and its size in the model's unit of cost."""

    content: Any
    size: int = 1


@dataclass(frozen=True, slots=True)
class Media:
    """An answer, or a part of one, that is bytes: an image, a sound. Alone it is the reply's body; in JSON it is base64."""

    body: bytes
    media_type: str

    def tolist(self) -> str:
        """Return what JSON says in its place."""
        return base64.b64encode(self.body).decode()


class ModelInfo(NamedTuple):
    """What is loaded, and where; as a text, one line for the log."""

    task: str
    name: str  # MODEL
    kind: str = ""  # its class
    size_bytes: int = 0
    dtype: str = ""
    device: str = ""
    threads: int = 0
    strategy: str = ""  # how it computes a batch
    process_id: int = 0  # 0: the server's own
    max_batch: int = MOST  # how many inputs it gains from in one call
    pools: bool = True  # of an image model: whether its pooler has weights of its own

    def __str__(self) -> str:
        parts = [self.name, self.strategy]
        if self.kind:
            size = f"{self.kind} from {self.name}: {self.size_bytes / 1e6:.0f} MB"
            parts = [size, self.dtype, self.device, f"{self.threads} threads", self.strategy]
        return ", ".join(filter(None, [*parts, f"process {self.process_id}" * bool(self.process_id)]))


class Model(Protocol):
    """A loaded instance of the model. It may have a `close()`, called in its own thread when the server stops.

    With `shareable`, a call changes nothing of the model: several threads may call it at once.
    """

    description: ModelInfo

    def __call__(self, contents: list[Any]) -> list[Any]:
        """Answer each query's content as if it were alone, in JSON's types, NumPy's or torch's. May raise anything."""


class Description(NamedTuple):
    """What a task says of itself, to people and to machines."""

    takes: str  # a sentence on `inputs`
    gives: str  # a sentence on the answer
    example: dict[str, Any]  # a body that works: {"inputs": ..., "parameters": {...}}
    inputs: dict[str, Any] = {}  # noqa: RUF012  the JSON Schema of one input
    parameters: dict[str, Any] | None = None  # the JSON Schema of each parameter; None: any


class Task(Protocol):
    """Made from the settings where HTTP is. Only `load` may need the framework: the model may run elsewhere."""

    # The media types that it takes as raw bytes, besides text and JSON: "image/", "audio/".
    media: tuple[str, ...] = ()
    # Whether a short body is checked in a moment: on the event loop. Without this attribute it is.
    checks_at_once: bool = True
    # What instances in this process share. Without this attribute there is none yet.
    shared: "Shared | None" = None

    def __init__(self, settings: Settings) -> None: ...

    def check(self, inputs: Any, parameters: dict[str, Any]) -> Query:
        """Return the query that asks this. Raises Malformed or Unprocessable. Several threads may call it at once."""

    def load(self, instance: int) -> Model:
        """Load an instance of the model; instance i goes to `cuda:i` where there are several. Raises whatever it raises."""

    def is_one(self, inputs: list[Any]) -> bool:
        """Whether this JSON list is one input. Without this method a list is several."""

    def examples(self) -> list[Query]:
        """Queries of different sizes, from small to large, to warm up with; none where it knows none."""

    def describe(self) -> Description: ...

    # Optional: `learn(info: ModelInfo)` hears of the loaded model what the task can't know of its files.


def make(settings: Settings) -> Task:
    """Return the task that the settings name. Raises whatever reading its files raises."""
    name = "custom" if settings.is_custom else file_of(ALIASES.get(settings.TASK, settings.TASK))
    if name == "text_generation" and not settings.FAST:
        name = "pipeline"
    task: Callable[[Settings], Task] = importlib.import_module(f"{__name__}.{name or 'pipeline'}").Task
    return task(settings)


def file_of(task: str) -> str | None:
    """The module in this folder that is the task of this name; None where there is none."""
    name = task.replace("-", "_")
    if "_" in task or task in ("custom", "pipeline") or not name.isidentifier():
        return None
    path = f"{__name__}.{name}"
    return name if importlib.util.find_spec(path) and hasattr(importlib.import_module(path), "Task") else None


class AdaptiveThreads:
    """A model that computes with as many of torch's threads as others leave cores for."""

    def __init__(self, model: Model, threads: Threads) -> None:
        self.model, self.threads, self.description = model, threads, model.description
        if hasattr(model, "close"):
            self.close = model.close

    def __call__(self, contents: list[Any]) -> list[Any]:
        self.threads.between_calls()
        return self.model(contents)


def load(task: Task, settings: Settings, instance: int = 0, *, beside: int = 0) -> Model:
    """Load an instance of the model and warm it up: kernels are built, and one that can't answer its examples raises here.

    `beside`: how many other instances in this process share its cores.
    """
    share = beside or getattr(task, "shared", None)
    model = load_or_share(task, settings, instance) if share else task.load(instance)
    for batch in batches_of(model, task, settings):
        answers = model([query.content for query in batch])
        if len(answers) != len(batch):
            raise ValueError(f"it gives {len(answers)} answers to {len(batch)} inputs")
    if settings.TORCH_THREADS or "torch" not in sys.modules:
        return model
    return AdaptiveThreads(model, Threads(settings.threads_per_instance, 1 + beside))


class Shared:
    """One of several instances that share a model, its weights included. The last one to close closes that."""

    def __init__(self, model: Model) -> None:
        self.model, self.description = model, model.description
        self.left = itertools.count(1)  # atomic
        self.instances = 1

    def __call__(self, contents: list[Any]) -> list[Any]:
        return self.model(contents)

    def close(self) -> None:
        if next(self.left) == self.instances and callable(close := getattr(self.model, "close", None)):
            close()


ONE_AT_A_TIME = threading.Lock()


def load_or_share(task: Task, settings: Settings, instance: int) -> Model:
    """Load an instance, or share the model of another one in this process: where that is on the CPU and says that it may be shared."""
    with ONE_AT_A_TIME:
        if shared := getattr(task, "shared", None):
            if torch := sys.modules.get("torch"):
                torch.set_num_threads(settings.threads_per_instance)  # of this thread
            shared.instances += 1
            return shared
        model = task.load(instance)
        if may_be_shared(model):
            model = task.shared = Shared(model)
        return model


def load_to_share(task: Task) -> Model | None:
    """Load the model that the instances made afterwards share. None where threads can't: then the instance loads its own."""
    model = task.load(0)
    if not may_be_shared(model):
        getattr(model, "close", lambda: None)()
        return None
    task.shared = Shared(model)
    task.shared.instances = 0
    return model


def may_be_shared(model: Model) -> bool:
    """Return whether threads may call the model at once: it says so, and is on the CPU."""
    is_on_cpu = getattr(model.description, "device", "") in ("", "cpu")
    return is_on_cpu and getattr(model, "shareable", False)


def load_alone(settings: Settings, instance: int = 0) -> Model:
    """Make the task and load an instance: for a process of its own, where there is no task yet."""
    return load(make(settings), settings, instance)


def batches_of(model: Model, task: Task, settings: Settings) -> list[list[Query]]:
    """Batches to warm a loaded model up with, none larger than it gains from."""
    most = getattr(model.description, "max_batch", MOST)
    return warm_up_batches(task, min(settings.BATCH_SIZE, most))


def warm_up_batches(task: Task, batch_size: int) -> list[list[Query]]:
    """Batches of at least three sizes, as far as the task has examples: each alone, a full batch, half of one.

    None of more than 32: the law is known by then, and a start should not take long.
    """
    examples, full = task.examples(), min(batch_size, 32)
    alone = [[query] for query in examples]
    return alone + [examples[:1] * n for n in (full // 2, full) if n > 1 and examples]


def unknown_parameters(parameters: dict[str, Any], *known: str) -> None:
    """Raise Malformed where `parameters` has any but the known ones."""
    if unknown := sorted(parameters.keys() - set(known)):
        raise Malformed(f'"{unknown[0]}" is not a known field; leave it out')
