"""Traffic splitting: one name, several versions, each an application of its own; shadow traffic for one more.

deploy/ray/serve.yaml says which. The shadow version's answers are dropped; its metrics tell how it does.
"""

import asyncio
import random

import aiohttp  # Ray's own
from ray import serve
from ray.serve import Application
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

PROXY = "http://127.0.0.1:8000/m"  # each node has one
OURS = {"connection", "content-length", "date", "host", "server", "transfer-encoding"}


@serve.deployment(max_ongoing_requests=2000, ray_actor_options={"num_cpus": 0})
class Split:
    def __init__(self, shares: dict[str, float], shadow: str = "") -> None:
        self.shares, self.shadow = shares, shadow
        self.shadow_requests: set[asyncio.Task[Response]] = set()

    async def __call__(self, request: Request) -> Response:
        body = await request.body()
        (version,) = random.choices(list(self.shares), list(self.shares.values()))
        if self.shadow:
            self.shadow_requests.add(task := asyncio.create_task(self.ask(self.shadow, request, body)))
            task.add_done_callback(self.shadow_requests.discard)
        return await self.ask(version, request, body)

    async def ask(self, version: str, request: Request, body: bytes) -> Response:
        url = f"{PROXY}/{version}{request.scope['path'].removeprefix(request.scope['root_path'])}"
        headers = {name: value for name, value in request.headers.items() if name not in OURS}
        try:
            async with aiohttp.request(request.method, url, data=body, headers=headers) as reply:
                kept = {k: v for k, v in reply.headers.items() if k.lower() not in OURS | {"x-request-id"}}
                return Response(await reply.read(), reply.status, kept)
        except aiohttp.ClientError:
            return JSONResponse({"error": "the version that had this request is gone; retry"}, 502)


def split(args: dict[str, object]) -> Application:
    return Split.bind(**args)
