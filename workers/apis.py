"""What a file in `protocols/` must offer to be an API, and `discover`, which finds them for `server.py`.

It stands beside that folder, so that a file of it, or all of them, can be deleted: nothing else names them.
"""

import contextlib
import functools
import importlib
import pkgutil
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol, cast

from starlette.routing import Route

from workers.context import ErrorBody, error_body
from workers.service import Service
from workers.settings import Settings

FOLDER = "protocols"


class Routes(Protocol):
    """What every protocol module must offer. It never talks to the model."""

    def routes(self, settings: Settings) -> list[Route]:
        """Return what it answers to: nothing if it does not fit the TASK."""


@dataclass(frozen=True)
class API:
    """One protocol module, with the defaults for what it does not offer."""

    routes: Callable[[Settings], list[Route]]
    error_body: ErrorBody = error_body  # the JSON of its errors
    operations: Callable[[Service], dict[str, Any]] = lambda service: {}  # its paths, as OpenAPI has them
    # what runs beside the app, for as long as the app does
    serving: Callable[[Service], AbstractAsyncContextManager[None]] = lambda service: contextlib.nullcontext()

    @classmethod
    def of(cls, module: ModuleType) -> "API":
        optional = ("error_body", "operations", "serving")
        offered = {name: getattr(module, name) for name in optional if hasattr(module, name)}
        return cls(cast(Routes, module).routes, **offered)


@functools.cache
def discover() -> list[API]:
    """Return the APIs in the folder, in the order of their names."""
    found = pkgutil.iter_modules([str(Path(__file__).parent / FOLDER)])
    return [API.of(importlib.import_module(f"workers.{FOLDER}.{module.name}")) for module in found]
