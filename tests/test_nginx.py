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
from tests.support.gated_model import check_that_items_pass

CONFIG = Path("deploy/nginx.conf")
BIN = "/usr/sbin:/usr/bin"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not shutil.which("nginx", path=BIN), reason="nginx is not installed"),
]


@contextmanager
def nginx(folder: Path, model: str) -> Iterator[str]:
    """Run nginx with our file, without TLS, before the server at `model`; yield its address."""
    port = free_port()
    site = CONFIG.read_text().replace("127.0.0.1:8000", model)
    site = site.replace("listen 443 ssl http2;", f"listen 127.0.0.1:{port};")
    site = re.sub(r"ssl_certificate\S* .*", "", site)
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    folders = "".join(f"{kind}_temp_path {folder}/{kind}; " for kind in kinds)
    (folder / "nginx.conf").write_text(
        f"daemon off; pid {folder}/pid; error_log {folder}/log; events {{}}\n"
        f"http {{ access_log off; {folders}\n"
        f"{site} }}\n"
    )
    command = ["nginx", "-p", str(folder), "-c", str(folder / "nginx.conf")]
    running = subprocess.Popen(command, env={"PATH": BIN})
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


def test_first_item_passes_nginx_before_there_is_a_second_and_metrics_do_not(tmp_path: Path) -> None:
    with (
        start(MODES["thread"], {"MODEL": "tests.support.gated_model:Gated"}) as server,
        nginx(tmp_path, server.url.split("/")[2]) as url,
    ):
        assert httpx2.get(url + "metrics").status_code == 403
        check_that_items_pass(url, tmp_path / "gate")
