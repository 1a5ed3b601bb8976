"""MODEL=my_model:Iris: your own class, found where Python finds modules, the current folder first.

    class Iris:
        def __call__(self, inputs: list) -> list: ...   # one answer for each: what JSON can say, NumPy's and torch's
                                                        # numbers and arrays, too
        example = {"petal_length": 1.4, ...}            # optional: warms up, and shows what to send

        def check(self, inputs, parameters): ...        # optional: a ValueError's sentence is the 422;
                                                        # what it returns, if anything, is what __call__ gets
        def size(self, inputs) -> int: ...              # optional: its cost, relative to other inputs; 1 by default

`check` and `size` are asked before the queue, on the event loop: be quick. Of bodies over 1 KB they are asked in threads,
several at a time: change nothing there that they share. In OFFLOAD=process they have an instance of their own where HTTP
is, unless they are static methods.
"""

import functools
import importlib
import inspect
import sys
from collections.abc import Iterable, Mapping, Set
from typing import Any

from workers.errors import Unprocessable
from workers.settings import MOST, Settings
from workers.tasks import Description, Query, unknown_parameters

NO_LIST = (Mapping, Set, str, bytes)  # can be made a list, too, but not one of answers in their order


class Task:
    """Any JSON in, any JSON out."""

    media: tuple[str, ...] = ()

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.own = find_class(settings.MODEL)
        self.instance: Any = None
        # Without the cache, looking up a method would take half as long as everything else that a request costs.
        self.asked = functools.cache(self._asked)

    def _asked(self, name: str) -> Any:
        """The class's method `name`, on an instance where it needs one; None where there is none."""
        method = inspect.getattr_static(self.own, name, None)
        if method is None or isinstance(method, staticmethod | classmethod):
            return getattr(self.own, name, None)
        if self.instance is None:
            self.instance = self.own()
        return getattr(self.instance, name)

    def check(self, inputs: Any, parameters: dict[str, Any]) -> Query:
        content = None
        if check := self.asked("check"):
            try:
                content = check(inputs, parameters)
            except ValueError as exc:
                raise Unprocessable(str(exc)) from exc
        else:
            unknown_parameters(parameters)
        content = inputs if content is None else content
        size = self.asked("size")
        n = int(size(content)) if size else 1
        if not 0 <= n <= MOST:
            raise TypeError(f"size() gives {n}; it must be from 0 to {MOST}")
        return Query(content, n)

    def load(self, instance: int) -> "Own":
        if torch := sys.modules.get("torch"):
            torch.set_num_threads(self.settings.threads_per_instance)
        made = self.own()
        if self.instance is None:
            self.instance = made  # a server that runs the model itself needs no second one to check with
        return Own(made, self.settings.MODEL)

    def examples(self) -> list[Query]:
        for name in ("check", "size"):
            self.asked(name)  # makes the instance now, if they need one: no request waits for it
        return [self.check(self.own.example, {})] if hasattr(self.own, "example") else []

    def describe(self) -> Description:
        what = inspect.getdoc(self.own) or self.settings.MODEL
        example = {"inputs": getattr(self.own, "example", None)}
        parameters: dict[str, Any] | None = None if hasattr(self.own, "check") else {}
        return Description("any JSON", what.splitlines()[0].rstrip("."), example, {}, parameters)


class Own:
    """An instance of the class, as a model."""

    def __init__(self, instance: Any, name: str) -> None:
        self.instance, self.description = instance, name

    def __call__(self, contents: list[Any]) -> list[Any]:
        answers = self.instance(contents)
        if not isinstance(answers, Iterable) or isinstance(answers, NO_LIST):
            what = type(answers).__name__
            raise TypeError(f"__call__ gives {what}; it must give a list, with an answer for each input")
        return list(answers)


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
    for method in ("__call__", "check", "size"):
        if is_async(getattr(found, method, None)):
            raise ImportError(
                f"{name}: {method} is async; make it a plain method, it has a thread of its own"
            )
    return found


def is_async(method: Any) -> bool:
    """Whether nothing happens when it is called."""
    return inspect.iscoroutinefunction(method) or inspect.isasyncgenfunction(method)
