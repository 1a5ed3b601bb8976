"""How a server wants to be asked, and where the answer is in its reply: ours takes the text and returns the answer."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Form:
    """The path, the body made of a text, and the answer taken out of a reply's JSON."""

    path: str = "/"
    health: str = "/health"
    wrap: Callable[[str], Any] | None = None  # None: the bare text
    unwrap: Callable[[Any], Any] = lambda reply: reply
    health_says: bytes = b""

    def body(self, text: str) -> bytes:
        return text.encode() if self.wrap is None else json.dumps(self.wrap(text)).encode()

    @property
    def media_type(self) -> str:
        return "text/plain" if self.wrap is None else "application/json"

    def answer(self, body: bytes) -> Any:
        """The answer in a reply; None where there is none."""
        try:
            return self.unwrap(json.loads(body))
        except (ValueError, LookupError, TypeError):
            return None


def tensor(text: str) -> dict[str, Any]:
    """One text in the Open Inference Protocol."""
    return {"inputs": [{"name": "text", "shape": [1, 1], "datatype": "BYTES", "data": [text]}]}


FORMS = {
    "ours": Form(health_says=b'"status"'),
    "text": Form(),
    "litserve": Form("/predict", wrap=lambda text: text),
    "mosec": Form("/inference", "/"),
    "ray": Form(health="/-/healthz"),
    "bentoml": Form("/predict", "/livez", lambda text: {"texts": [text]}, lambda reply: reply[0]),
    "torchserve": Form("/predictions/fill_mask", "/ping"),
    "pytriton": Form(
        "/v2/models/fill_mask/infer",
        "/v2/health/live",
        tensor,
        lambda reply: json.loads(reply["outputs"][0]["data"][0]),
    ),
    "embeddings": Form(
        "/embeddings",
        "/health",
        lambda text: {"input": [text], "model": "all-MiniLM-L6-v2"},
        lambda reply: reply["data"][0]["embedding"],
    ),
    "embeddings-ours": Form(wrap=lambda text: {"inputs": text}),
}
