"""A model that starts at once and does what a request tells it: `MODEL=tests.obedient:Obedient uvicorn server:app`."""

import math
import os
import time
from pathlib import Path
from typing import Any

BROKEN = "BROKEN"  # the environment variable with the path at which a file keeps it from loading


class Obedient:
    """Answers with its input; {"until": path} waits for a file, {"nan": 1} answers with no JSON, {"bug": 1} raises."""

    example = "a text"

    def __init__(self) -> None:
        if os.path.exists(os.environ.get(BROKEN, "")):
            raise OSError("Too many open files")

    @staticmethod
    def check(inputs: Any, parameters: dict[str, Any]) -> None:
        if isinstance(inputs, dict) and "bug" in inputs:
            raise KeyError("a bug of the check")

    def __call__(self, inputs: list[Any]) -> list[Any]:
        return [obey(told) for told in inputs]


def obey(told: Any) -> Any:
    if isinstance(told, dict) and "until" in told:
        while not Path(told["until"]).exists():
            time.sleep(0.01)
    return math.nan if isinstance(told, dict) and "nan" in told else told
