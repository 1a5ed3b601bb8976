"""MODEL=notebooks.support.l11_fails:Fails: a model with a bug and a killer text.

"raise …" raises as code does that misses a file, "die …" ends the process as a bug in C does.
"""

import os
from typing import Any

LICENCE = "/srv/models/customer-4711/licence.key"


class Fails:
    """Any other text comes back as it is."""

    example = "hello"

    def __call__(self, inputs: list[Any]) -> list[Any]:
        for text in inputs:
            if text.startswith("raise"):
                open(LICENCE).close()
            if text.startswith("die"):
                os._exit(139)
        return inputs
