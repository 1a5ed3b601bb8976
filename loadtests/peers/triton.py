"""NVIDIA Triton through PyTriton: https://triton-inference-server.github.io/pytriton/latest/

    python -m loadtests.peers.triton PORT

Batches of 32 at most, 10 ms; one instance; a queue of 64: more can't be answered within a second. Texts and answers travel as bytes in its JSON (KServe's protocol v2).
"""

import json
import signal
import sys

import numpy as np
from pytriton.decorators import batch
from pytriton.model_config import DynamicBatcher, ModelConfig, QueuePolicy, Tensor
from pytriton.triton import Triton, TritonConfig

from loadtests.peers import model

predict = model.load()


@batch
def infer(text):
    answers = predict([row[0].decode() for row in text])
    return {"answer": np.array([[json.dumps(answer).encode()] for answer in answers], dtype=object)}


if __name__ == "__main__":
    port = int(sys.argv[1])
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # `serve` stops in good order at Ctrl-C
    config = TritonConfig(http_address="127.0.0.1", http_port=port, grpc_address="127.0.0.1", grpc_port=port + 1,
                          metrics_address="127.0.0.1", metrics_port=port + 2, log_verbose=0)  # fmt: skip
    batcher = DynamicBatcher(
        max_queue_delay_microseconds=10_000, default_queue_policy=QueuePolicy(max_queue_size=64)
    )
    with Triton(config=config) as triton:
        triton.bind(
            model_name="fill_mask",
            infer_func=infer,
            inputs=[Tensor(name="text", dtype=bytes, shape=(1,))],
            outputs=[Tensor(name="answer", dtype=bytes, shape=(1,))],
            config=ModelConfig(max_batch_size=32, batcher=batcher),
        )
        triton.serve()
