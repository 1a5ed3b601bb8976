"""MODEL=my_model:Iris: a custom class, found where Python finds modules, the current folder first.

    class Iris:
        def __call__(self, inputs: list) -> list: ...   # one answer per input

All that it may have besides is in `CustomModel`. `check` and `size` are called before the queue, on the event loop: they must
be quick. For bodies over 1 KB they are called in threads, several at a time: they must change nothing that they share. With
OFFLOAD=process they have an instance of their own in the server's process, unless they are static methods.
"""

import base64
import contextlib
import functools
import importlib
import inspect
import io
import json
import logging
import math
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from typing import Any, ClassVar, NoReturn, Protocol

from workers.errors import Malformed, Unprocessable
from workers.settings import MOST, Settings
from workers.tasks import Description, Media, ModelInfo, Query, unknown_parameters
from workers.tasks.calls import CallContext, Followed

log = logging.getLogger("uvicorn.error")

NO_LIST = (Mapping, Set, str, bytes)  # can be made a list, too, but not one of answers in their order
# What JSON has beside objects and lists.
PLAIN = {str, int, float, bool, type(None)}
# What a `check` raises at an input of another form than it expects.
NOT_THE_FORM = (AttributeError, LookupError, TypeError)


class CustomModel(Protocol):
    """What a custom class may have. Only `__call__` is required.

    `__init__` gets the fields of MODEL_ARGS, a JSON object, as keyword arguments.
    """

    # An input that the model can answer: for warm-up, and shown as the example. A model that fails on it is never ready.
    example: ClassVar[Any]
    # How deeply one input is nested in lists: 1 for a vector, 2 for a matrix. By default a list is several inputs.
    input_rank: ClassVar[int] = 0
    # Media types of bodies that it takes as bytes, such as ("image/",). In JSON such an input is base64.
    media: ClassVar[tuple[str, ...]] = ()
    # The Content-Type of an answer that is bytes, and the form of one that is a PIL image, "image/png" by default.
    media_type: ClassVar[str] = "application/octet-stream"
    # Whether an answer is a generator, whose items are sent as they come. Such inputs are answered one at a time.
    streams: ClassVar[bool] = False
    # Whether several threads may call one instance at once: then INSTANCES=n in threads share it, and its weights.
    shareable: ClassVar[bool] = False

    def __call__(self, inputs: list[Any]) -> list[Any]:
        """Return one answer per input: JSON's types, NumPy's or torch's numbers and arrays, pydantic models, bytes, PIL images.

        With a second parameter `contexts` it gets a `CallContext` for each input: `cancelled`, `deadline`, `progress(0.4)`.
        """

    def check(self, inputs: Any, parameters: dict[str, Any]) -> Any:
        """Return what `__call__` gets of one input; None: the input as it is. The sentence of a ValueError is the 422.

        Where `inputs` or `parameters` is annotated with a pydantic model, it is validated first.
        """

    def size(self, inputs: Any) -> int:
        """Return the cost of one input, as `check` has returned it, relative to other inputs: 1 by default."""

    def close(self) -> None:
        """Give back what it holds: called once when the server stops, after the last call, in the model's own thread.

        The server waits for it no longer than GRACE_S. Without it `__exit__` is called, as at the end of a `with`.
        """


class Task:
    """Any JSON in, any JSON out; or bytes."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.own = find_class(settings.MODEL)
        self.arguments: dict[str, Any] = json.loads(settings.MODEL_ARGS or "{}")
        self.media: tuple[str, ...] = tuple(getattr(self.own, "media", ()))
        self.rank: int = getattr(self.own, "input_rank", 0)
        if (rank := nested(getattr(self.own, "example", None))) > self.rank:
            raise ValueError(
                f"the example of {settings.MODEL} is a list, and a list is several inputs; set input_rank = {rank} in "
                "the class if one input is such a list"
            )
        self.streams: bool = getattr(self.own, "streams", False)
        self.follows = self.streams or takes_contexts(self.own)  # whether the model gets a context per input
        self.instance: Any = None
        # Without the cache, looking up a method would take half as long as everything else that a request costs.
        self.method = functools.cache(self._method)

    def is_one(self, inputs: list[Any]) -> bool:
        """Whether this list is one input."""
        return nested(inputs) <= self.rank

    def _method(self, name: str) -> Any:
        """The class's method `name`, on an instance where it needs one; None where there is none."""
        method = inspect.getattr_static(self.own, name, None)
        if method is None or isinstance(method, staticmethod | classmethod):
            bound = getattr(self.own, name, None)
        else:
            if self.instance is None:
                self.instance = self.make()
            bound = getattr(self.instance, name)
        return validating(bound) if bound and name == "check" else bound

    def make(self) -> Any:
        """Return an instance of the class. Raises whatever it raises."""
        return self.own(**self.arguments)

    def check(self, inputs: Any, parameters: dict[str, Any]) -> Query:
        content = None
        if self.media and isinstance(inputs, str):
            inputs = decoded(inputs)
        if check := self.method("check"):
            try:
                content = check(inputs, parameters)
            except ValueError as exc:
                raise Unprocessable(sentence(exc)) from exc
            except NOT_THE_FORM as exc:
                reject_form(exc)
        else:
            unknown_parameters(parameters)
        content = inputs if content is None else content
        size = self.method("size")
        n = int(size(content)) if size else 1
        if not 0 <= n <= MOST:
            raise TypeError(f"size() gives {n}; it must be from 0 to {MOST}")
        return Query(Followed(content, CallContext(), self.streams) if self.follows else content, n)

    def load(self, instance: int) -> "Own":
        if torch := sys.modules.get("torch"):
            torch.set_num_threads(self.settings.threads_per_instance)
        made = self.make()
        if self.instance is None:
            self.instance = made  # a server that runs the model itself needs no second one to check with
        return Own(made, self.settings.MODEL, self.settings.DEADLINE_S)

    def examples(self) -> list[Query]:
        for name in ("check", "size"):
            self.method(name)  # makes the instance now, if they need one: no request waits for it
        return [self.check(self.own.example, {})] if hasattr(self.own, "example") else []

    def describe(self) -> Description:
        what = inspect.getdoc(self.own) or self.settings.MODEL
        example = getattr(self.own, "example", None)
        shown = base64.b64encode(example).decode() if isinstance(example, bytes) else example
        parameters: dict[str, Any] | None = None if hasattr(self.own, "check") else {}
        takes = f"{' or '.join(self.media)} in base64, or as the body" if self.media else "any JSON"
        return Description(takes, what.splitlines()[0].rstrip("."), {"inputs": shown}, {}, parameters)


class Own:
    """An instance of the class, as a model."""

    def __init__(self, instance: Any, name: str, deadline_s: float = math.inf) -> None:
        self.instance, self.description = instance, ModelInfo("custom", name)
        self.deadline_s = deadline_s
        self.takes_contexts = takes_contexts(type(instance))
        self.streams: bool = getattr(instance, "streams", False)
        self.shareable: bool = getattr(instance, "shareable", False)
        if self.streams:  # or the items of one would wait for those of all
            self.description = self.description._replace(max_batch=1)
        self.media_type: str | None = getattr(instance, "media_type", None)
        if callable(close := getattr(instance, "close", None)):
            self.close = close
        elif callable(leave := getattr(instance, "__exit__", None)):
            instance.__enter__()
            self.close = functools.partial(leave, None, None, None)

    def __call__(self, contents: list[Any]) -> list[Any]:
        contexts = [content.context for content in contents if isinstance(content, Followed)]
        for context in contexts:  # at warm-up and in a process of its own it has no deadline yet
            context.deadline = min(context.deadline, time.monotonic() + self.deadline_s)
        inputs = [content.content for content in contents] if contexts else contents
        answers = self.instance(inputs, contexts) if self.takes_contexts else self.instance(inputs)
        if not isinstance(answers, Iterable) or isinstance(answers, NO_LIST):
            what = type(answers).__name__
            raise TypeError(f"__call__ gives {what}; it must give a list, with an answer for each input")
        if not self.streams:
            return [self.plain(answer) for answer in answers]
        return [self.run_through(*pair) for pair in zip(answers, contexts, strict=True)]

    def run_through(self, items: Any, context: CallContext) -> list[Any]:
        """Give each item to the client as it comes, until nobody waits; return those that no client has taken."""
        if not isinstance(items, Iterator):
            raise TypeError(
                f"streams = True, but an answer is {type(items).__name__}; it must be a generator"
            )
        left: list[Any] = []
        while not context.cancelled:
            try:
                item = self.plain(next(items))
            except StopIteration:
                return left
            if not context.give(item):
                left.append(item)
        if callable(close := getattr(items, "close", None)):
            close()
        if not context.has_left:  # somebody may take these for all items
            raise TimeoutError("the deadline has passed before the last item")
        return left

    def plain(self, answer: Any) -> Any:
        """Return the answer as JSON or HTTP can have it: what it holds of images, bytes and pydantic models included."""
        match answer:
            case dict() if not PLAIN.issuperset(map(type, answer.values())):
                return {name: self.plain(value) for name, value in answer.items()}
            case list() | tuple() if answer and type(answer[0]) not in PLAIN:
                return [self.plain(value) for value in answer]
            case dict() | list() | tuple() | str() | int() | float() | None:
                return answer
            case bytes() | bytearray() | memoryview():
                return Media(bytes(answer), self.media_type or "application/octet-stream")
        if inspect.isgenerator(answer):
            raise TypeError("an answer is a generator; set streams = True in the class")
        if callable(dump := getattr(answer, "model_dump", None)):
            return dump(mode="json")
        if callable(save := getattr(answer, "save", None)) and hasattr(answer, "getbands"):
            kind, file = self.media_type or "image/png", io.BytesIO()
            save(file, kind.partition("/")[2])
            return Media(file.getvalue(), kind)
        return answer


def takes_contexts(own: type) -> bool:
    """Whether its `__call__` has a parameter `contexts`."""
    with contextlib.suppress(TypeError, ValueError):  # of a class in C
        return "contexts" in inspect.signature(own.__call__).parameters
    return False


def nested(value: Any) -> int:
    """How many lists stand in each other, by the first of each."""
    depth = 0
    while isinstance(value, list):
        value, depth = (value[0] if value else None), depth + 1
    return depth


def decoded(text: str) -> bytes:
    """The bytes of a data URL or of base64. Raises Malformed."""
    try:
        return base64.b64decode(text.partition("base64,")[2] or text, validate=True)
    except ValueError:  # binascii.Error; plain where a character is not ASCII
        raise Malformed(
            '"inputs" must be base64; or send the bytes as the body, with its Content-Type'
        ) from None


def annotation(check: Any, n: int) -> Any:
    """How `check` annotates its `inputs` (0) or its `parameters` (1); None where it doesn't."""
    names = [name for name in inspect.signature(check).parameters if name != "self"] if check else []
    try:
        hints = inspect.get_annotations(inspect.unwrap(check), eval_str=True) if names else {}
    except NameError:  # of a name that is there for type checkers only
        return None
    return hints.get(names[n]) if n < len(names) else None


def validating(check: Any) -> Callable[[Any, dict[str, Any]], Any]:
    """Return `check` with pydantic's models made of what comes in, where it is annotated with them."""
    models = [getattr(annotation(check, n), "model_validate", None) for n in (0, 1)]
    if not any(models):
        return check

    def validated(inputs: Any, parameters: dict[str, Any]) -> Any:
        made = [make(value) if make else value for make, value in zip(models, (inputs, parameters))]
        content = check(*made)
        return made[0] if content is None else content

    return validated


def sentence(exc: ValueError) -> str:
    """What is wrong with the input; of pydantic's errors the first, with its field."""
    if not callable(errors := getattr(exc, "errors", None)):
        return str(exc)
    first = errors(include_url=False, include_context=False, include_input=False)[0]
    field = ".".join(map(str, first["loc"]))
    what = first["msg"].removeprefix("Value error, ")
    return f'"{field}": {what}' if field else what


def reject_form(exc: BaseException) -> NoReturn:
    """Raise Unprocessable: the input has not the form that `check` expects. The log says where, nothing of the input."""
    last = traceback.extract_tb(exc.__traceback__)[-1]
    log.warning("check raised %s at %s, line %s: 422", type(exc).__name__, last.filename, last.lineno)
    if isinstance(exc, KeyError) and exc.args and isinstance(exc.args[0], str):
        raise Unprocessable(f'"{exc.args[0][:100]}" is missing or not known') from exc
    raise Unprocessable(
        "the input does not have the form that the model takes; GET /info shows an example"
    ) from exc


def find_class(name: str) -> type:
    """The class that `module:Class` names. Raises ImportError with a sentence."""
    module_name, _, class_name = name.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")  # the current folder: `gunicorn` and spawned processes don't have it
    found = getattr(importlib.import_module(module_name), class_name, None)
    if not isinstance(found, type):
        raise ImportError(f"there is no class {class_name} in {module_name}")
    if "__call__" not in dir(found):
        raise ImportError(f"{name} has no __call__(self, inputs)")
    for method in ("__call__", "check", "size", "close"):
        if is_async(getattr(found, method, None)):
            raise ImportError(
                f"{name}: {method} is async; make it a plain method, it has a thread of its own"
            )
    return found


def is_async(method: Any) -> bool:
    """Whether nothing happens when it is called."""
    return inspect.iscoroutinefunction(method) or inspect.isasyncgenfunction(method)
