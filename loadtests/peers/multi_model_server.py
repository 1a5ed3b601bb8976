"""Multi Model Server (MXNet's): https://github.com/awslabs/multi-model-server/blob/master/docs/batch_inference_with_mms.md

    python -m loadtests.peers.multi_model_server PORT

Its successor's handler, packed by its own archiver. 32 texts or 10 ms, which only its management API can set; one worker; a
queue of 64.
"""

import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

from loadtests.peers.torchserve import LOG

SERVER = """inference_address=http://127.0.0.1:{0}\nmanagement_address=http://127.0.0.1:{1}
job_queue_size=64\nvmargs=-Xmx512m -Djava.io.tmpdir={2}"""
ASK = "http://127.0.0.1:{}/models?url=fill_mask.mar&batch_size=32&max_batch_delay=10&initial_workers=1&response_timeout={}"


def register(port, timeout_s, tries=200):
    """Ask its management API, once it answers, to serve the model."""
    for _ in range(tries):
        try:
            return urllib.request.urlopen(urllib.request.Request(ASK.format(port, timeout_s), method="POST"))
        except OSError:
            time.sleep(0.1)


if __name__ == "__main__":
    port, programs = int(sys.argv[1]), Path(sys.executable).parent
    with tempfile.TemporaryDirectory() as store:
        Path(store, "code").mkdir()
        Path(store, "code", "service.py").write_text("from loadtests.peers.torchserve import handle\n")
        Path(store, "log4j2.xml").write_text(LOG)
        Path(store, "server").write_text(SERVER.format(port, port + 1, store))
        subprocess.run([sys.executable, programs / "model-archiver", "--model-name", "fill_mask", "--model-path", f"{store}/code",
                        "--handler", "service:handle", "--export-path", store], check=True)  # fmt: skip
        os.chdir(store)  # its logs
        os.environ["TMPDIR"] = store  # it notes there that it runs
        command = [sys.executable, programs / "multi-model-server"]
        signal.signal(signal.SIGTERM, lambda *_: subprocess.run([*command, "--stop"]))
        server = subprocess.Popen([*command, "--start", "--foreground", "--mms-config", f"{store}/server",
                                   "--model-store", store, "--log-config", f"{store}/log4j2.xml"])  # fmt: skip
        register(port + 1, os.environ.get("PEER_TIMEOUT_S", "60"))
        sys.exit(server.wait())
