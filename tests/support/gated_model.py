"""A model whose stream waits for a file between its two items, to see whether a proxy holds the first one back."""

import time
from collections.abc import Iterator
from pathlib import Path

import httpx2


class Gated:
    streams = True

    def __call__(self, inputs: list[str]) -> list[Iterator[str]]:
        return list(map(self.items, inputs))

    def items(self, path: str) -> Iterator[str]:
        yield "first"
        while not Path(path).exists():
            time.sleep(0.01)
        yield "last"


def check_that_items_pass(url: str, gate: Path) -> None:
    """Read streams of both forms from the model at `url`. Raises httpx2.ReadTimeout where a first item comes only with the last."""
    for accept in ("application/x-ndjson", "text/event-stream"):
        body, headers = {"inputs": str(gate)}, {"Accept": accept}
        try:
            with httpx2.stream("POST", url, json=body, headers=headers, timeout=10) as reply:
                lines = (line.removeprefix("data: ") for line in reply.iter_lines() if line)
                assert next(lines) == '"first"'
                gate.touch()
                assert list(lines) == ['"last"']
        finally:
            gate.touch()  # no thread of the model may wait on
        gate.unlink()
