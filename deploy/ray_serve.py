"""The same app on many machines: Ray Serve keeps the replicas, each with its own model, queue and admission.

$ pip install -r deploy/requirements-ray.txt; serve run deploy.ray_serve:app
"""

import os
from dataclasses import fields
from typing import Any

from ray import serve
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from workers.settings import Settings

settings = Settings.read()  # a wrong one ends `serve run`, with one sentence
told = {knob.name: os.environ[knob.name] for knob in fields(Settings) if knob.name in os.environ}


class Hosted:
    """Gives requests the lifespan's state, which Serve does not (ray-project/ray#45395), and a path without Serve's prefix."""

    def __init__(self, app: ASGIApp) -> None:
        self.app, self.state = app, dict[str, Any]()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            self.state = scope["state"]
            return await self.app(scope, receive, send)

        async def send_without_id(message: Message) -> None:
            if message["type"] == "http.response.start":  # Serve adds the same one
                message["headers"] = [pair for pair in message["headers"] if pair[0] != b"x-request-id"]
            await send(message)

        path = scope["path"].removeprefix(scope["root_path"]) or "/"
        scope |= {"state": dict(self.state), "path": path, "root_path": ""}
        await self.app(scope, receive, send_without_id)


def build() -> ASGIApp:
    from server import app  # on the replica: it holds locks

    return Hosted(app)


@serve.deployment(
    num_replicas=int(os.environ.get("REPLICAS", 2)),
    max_ongoing_requests=settings.MAX_QUEUE + 1000,  # the app itself says no, and when to come back
    graceful_shutdown_timeout_s=settings.GRACE_S + 2,
    health_check_period_s=2,
    health_check_timeout_s=5,
    # WEB_CONCURRENCY above 1: the lifespan waits for the model. Else Serve would prefer who can only refuse.
    ray_actor_options={
        "num_cpus": 1,
        "runtime_env": {"env_vars": {"TORCH_THREADS": "1", **told, "WEB_CONCURRENCY": "2"}},
    },
)
@serve.ingress(build)
class Model:
    def check_health(self) -> None:
        if trouble := self.app.state["service"].trouble():
            raise RuntimeError(trouble)


app = Model.bind()
