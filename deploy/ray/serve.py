"""serve run deploy.ray.serve:app: the same app, as replicas that Ray Serve keeps. Needs deploy/ray/requirements.txt."""

import os

from ray import serve
from starlette.types import Message, Receive, Scope, Send

from workers.settings import Settings

settings = Settings.read()  # a wrong one ends `serve run`, with one sentence
given = {name: os.environ[name] for name in Settings.__annotations__ if name in os.environ}
# WEB_CONCURRENCY above 1: the lifespan waits for the model. Else Serve would prefer a replica that can only reject.
env = {"TORCH_THREADS": "1", **given, "WEB_CONCURRENCY": "2"}


class Hosted:
    """The app, called as it expects: with the lifespan's state (ray-project/ray#45395), without Serve's prefix."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        from server import app  # on the replica: it holds locks

        async def send_without_id(message: Message) -> None:  # Serve adds the same one
            if "headers" in message:
                message["headers"] = [pair for pair in message["headers"] if pair[0] != b"x-request-id"]
            await send(message)

        if scope["type"] == "lifespan":
            self.state = scope["state"]
            return await app(scope, receive, send)
        path = scope["path"].removeprefix(scope["root_path"]) or "/"
        await app(scope | {"state": self.state, "path": path, "root_path": ""}, receive, send_without_id)


@serve.deployment(
    num_replicas=int(os.environ.get("REPLICAS", 2)),
    max_ongoing_requests=settings.MAX_QUEUE + 1000,  # the app itself rejects, with Retry-After
    graceful_shutdown_timeout_s=settings.GRACE_S + 5,  # ray.env keeps it reachable for 3 s before it stops
    health_check_period_s=2,
    ray_actor_options={"num_cpus": 1, "runtime_env": {"env_vars": env}},
)
@serve.ingress(Hosted())
class Model:
    def check_health(self) -> None:
        if trouble := self.app.state["service"].trouble():
            raise RuntimeError(trouble)


app = Model.bind()
