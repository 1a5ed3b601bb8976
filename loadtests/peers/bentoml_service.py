"""BentoML: https://docs.bentoml.com/en/latest/get-started/adaptive-batching.html

    bentoml serve loadtests.peers.bentoml_service:FillMask --host 127.0.0.1 --port PORT

Adaptive batches of 32 at most; one worker. 64 requests at a time, more are refused; a latency bound that refuses nobody else.
"""

import os

import bentoml

from loadtests.peers import model


@bentoml.service(
    workers=1,
    traffic={"timeout": float(os.environ.get("PEER_TIMEOUT_S", "30")), "max_concurrency": 64},
    logging={"access": {"enabled": False}},
)
class FillMask:
    def __init__(self):
        self.model = model.load()

    @bentoml.api(batchable=True, max_batch_size=32, max_latency_ms=10_000)
    def predict(self, texts: list[str]) -> list[list[dict]]:
        return self.model(texts)
