"""deploy/nginx.conf before a server: streams pass item by item, and /metrics does not."""

import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
import pytest

from loadtests.modes import MODES, free_port, start
from tests.support.client import until

CONFIG = Path("deploy/nginx.conf")
MODEL = """
import time
from pathlib import Path
class Gated:
    streams = True
    def __call__(self, inputs): return [self.items(path) for path in inputs]
    def items(self, path):
        yield "first"
        while not Path(path).exists(): time.sleep(0.01)
        yield "last"
"""
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not shutil.which("nginx", path="/usr/sbin:/usr/bin"), reason="nginx is not installed"),
]


@contextmanager
def nginx(folder: Path, model: str) -> Iterator[str]:
    """Run nginx with our file, without TLS, before the server at `model`; yield its address."""
    port = free_port()
    site = CONFIG.read_text().replace("127.0.0.1:8000", model)
    site = site.replace("listen 443 ssl http2;", f"listen 127.0.0.1:{port};")
    site = re.sub(r"ssl_certificate\S* .*", "", site)
    (folder / "nginx.conf").write_text(
        f"daemon off; pid {folder}/pid; error_log {folder}/log; events {{}}\n"
        f"http {{ access_log off; {''.join(f'{one}_temp_path {folder}/{one}; ' for one in ('client_body', 'proxy', 'fastcgi', 'uwsgi', 'scgi'))}\n"
        f"{site} }}\n"
    )
    command = ["nginx", "-p", str(folder), "-c", str(folder / "nginx.conf")]
    running = subprocess.Popen(command, env={"PATH": "/usr/sbin:/usr/bin"})
    try:
        until(lambda: running.poll() is None and is_up(f"http://127.0.0.1:{port}/"))
        yield f"http://127.0.0.1:{port}/"
    finally:
        running.terminate()
        running.wait(20)


def is_up(url: str) -> bool:
    try:
        return httpx2.get(url + "health").is_success
    except httpx2.TransportError:
        return False


def test_first_item_passes_nginx_before_there_is_a_second_and_metrics_do_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gated_model.py").write_text(MODEL)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    gate = tmp_path / "gate"
    with (
        start(MODES["thread"], {"MODEL": "gated_model:Gated"}) as server,
        nginx(tmp_path, server.url.split("/")[2]) as url,
        httpx2.Client(timeout=20) as client,
    ):
        assert client.get(url + "metrics").status_code == 403
        try:
            for accept in ("application/x-ndjson", "text/event-stream"):
                body, headers = {"inputs": str(gate)}, {"Accept": accept}
                with client.stream("POST", url, json=body, headers=headers) as reply:
                    lines = (line for line in reply.iter_lines() if line)
                    assert next(lines).endswith('"first"')  # nginx would hold it: then this times out
                    gate.touch()
                    assert [line.removeprefix("data: ") for line in lines] == ['"last"']
                gate.unlink()
        finally:
            gate.touch()
