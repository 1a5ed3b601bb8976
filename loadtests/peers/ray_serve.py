"""Ray Serve with `@serve.batch`: https://docs.ray.io/en/latest/serve/advanced-guides/dyn-req-batch.html

    python -m loadtests.peers.ray_serve PORT

One replica; 32 texts or 10 ms. 64 requests at a time, since the default of 5 would starve the batch; more are refused.
Its control ports listen on all addresses, with a token, whatever is set here.
"""

import signal
import sys

import ray
from ray import serve
from starlette.requests import Request

from loadtests.peers import model


@serve.deployment(max_ongoing_requests=64, max_queued_requests=8, ray_actor_options={"num_cpus": 0.5})
class FillMask:
    def __init__(self):
        self.model = model.load()

    @serve.batch(max_batch_size=32, batch_wait_timeout_s=0.01)
    async def predict(self, texts):
        return self.model(texts)

    async def __call__(self, request: Request):
        return await self.predict((await request.body()).decode())


if __name__ == "__main__":
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=200 * 2**20,
             _node_ip_address="127.0.0.1")  # fmt: skip
    serve.start(http_options={"host": "127.0.0.1", "port": int(sys.argv[1])})
    serve.run(FillMask.bind(), route_prefix="/")
    signal.sigwait({signal.SIGTERM, signal.SIGINT})
    serve.shutdown()
    ray.shutdown()
