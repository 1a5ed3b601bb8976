"""The door: what a request meets before the model does. On stand-ins for the model, in a real server where it matters."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import httpx2

from loadtests.modes import ROOT, free_port

STAND_IN = """
    class Upper:
        example = "a text"

        def __call__(self, inputs):
            return [text.upper() for text in inputs]

        def check(self, inputs, parameters):
            if not isinstance(inputs, str):
                raise ValueError("send a text")
"""
PROTOCOL = '''
    """POST /shout/{how}: {"say": "a text"} -> {"said": "A TEXT!"}."""

    import json

    from starlette.requests import Request
    from starlette.responses import JSONResponse
    from starlette.routing import Route


    def routes(settings):
        return [Route("/shout/{how}", shout, methods=["POST"])]


    def error_body(status, sentence):
        return {"code": status, "message": sentence}


    async def shout(request: Request) -> JSONResponse:
        service = request.state.service
        body = await service.clients.read(request)
        queries = await service.check([json.loads(body)["say"]], {}, len(body))
        (answer,) = await service.clients.wait(request, queries)
        return JSONResponse({"said": answer.value + "!"})
'''


@contextlib.contextmanager
def served(folder: Path, **env: str) -> Iterator[httpx2.Client]:
    """The server of `folder` with its `stand_in.Upper` as the model, and a client of it."""
    (folder / "stand_in.py").write_text(textwrap.dedent(STAND_IN))
    port = free_port()
    url, transport = f"http://127.0.0.1:{port}", httpx2.HTTPTransport(retries=100)
    command = [sys.executable, "-m", "uvicorn", "server:app", "--port", str(port), "--log-level", "warning"]
    environ = {**os.environ, "MODEL": "stand_in:Upper", **env}
    with subprocess.Popen(command, cwd=folder, env=environ) as process:
        try:
            with httpx2.Client(base_url=url, transport=transport, timeout=30) as client:
                until = time.monotonic() + 60
                while client.get("/ready").status_code != 200:
                    assert process.poll() is None and time.monotonic() < until
                yield client
        finally:
            process.kill()


def copy_of_the_core(folder: Path) -> Path:
    """What whoever takes the app over copies: server.py and workers/, without the other protocols."""
    shutil.copy(ROOT / "server.py", folder)
    shutil.copytree(
        ROOT / "workers", folder / "workers", ignore=shutil.ignore_patterns("protocols", "__pycache__")
    )
    return folder


def test_the_core_serves_without_the_other_protocols(tmp_path: Path) -> None:
    with served(copy_of_the_core(tmp_path)) as client:
        assert client.post("/", content="a text").json() == "A TEXT"


def test_a_file_in_protocols_is_a_protocol_whose_errors_are_in_its_own_words(tmp_path: Path) -> None:
    folder = copy_of_the_core(tmp_path)
    (folder / "workers" / "protocols").mkdir()
    (folder / "workers" / "protocols" / "shout.py").write_text(textwrap.dedent(PROTOCOL))
    with served(folder, MAX_BODY_BYTES="99") as client:
        reply = client.post("/shout/loud", content=json.dumps({"say": "a text"}))
        assert (reply.status_code, reply.json()) == (200, {"said": "A TEXT!"})
        reply = client.post("/shout/loud", content='{"say": 1}')
        assert (reply.status_code, reply.json()) == (422, {"code": 422, "message": "send a text"})
        reply = client.post("/shout/loud", content="x" * 100)
        assert reply.status_code == reply.json()["code"] == 413
        assert client.get("/shout/loud").json()["code"] == 405
        reply = client.post("/", content=b"\xff")
        assert reply.status_code == 400 and reply.json().keys() == {"error"}
        metrics = client.get("/metrics").text
        assert 'model_requests_total{status="422"} 1.0' in metrics, "its requests count as the model's"
