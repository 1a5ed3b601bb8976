"""TorchServe: https://docs.pytorch.org/serve/batch_inference_with_ts.html

    python -m loadtests.peers.torchserve PORT

This file is the handler, and packs itself with torch-model-archiver. 32 texts or 10 ms; one worker; a queue of 64: more
can't be answered within a second.
"""

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from loadtests.peers import model

MODEL = "minWorkers: 1\nmaxWorkers: 1\nbatchSize: 32\nmaxBatchDelay: 10\njobQueueSize: 64\nresponseTimeout: {timeout}\n"
SERVER = """inference_address=http://127.0.0.1:{0}\nmanagement_address=http://127.0.0.1:{1}
metrics_address=http://127.0.0.1:{2}\ngrpc_inference_address=127.0.0.1\ngrpc_management_address=127.0.0.1
grpc_inference_port={3}\ngrpc_management_port={4}\nload_models=fill_mask.mar\ndisable_system_metrics=true
enable_envvars_config=false\ninstall_py_dep_per_model=false\nvmargs=-Xmx512m -Djava.io.tmpdir={5}
"""
LOG = '<Configuration><Loggers><Root level="error"/></Loggers></Configuration>'
predict = None


def handle(data, context):
    """TorchServe calls it with None when it loads the model, then with a list of requests."""
    global predict
    predict = predict or model.load()
    if data is None:
        return None
    return predict([row["body"] if isinstance(row["body"], str) else row["body"].decode() for row in data])


if __name__ == "__main__":
    port, programs = int(sys.argv[1]), Path(sys.executable).parent
    with tempfile.TemporaryDirectory() as store:
        Path(store, "model.yaml").write_text(MODEL.format(timeout=os.environ.get("PEER_TIMEOUT_S", "60")))
        Path(store, "server").write_text(SERVER.format(*range(port, port + 5), store))
        Path(store, "log4j2.xml").write_text(LOG)
        subprocess.run([sys.executable, programs / "torch-model-archiver", "--model-name", "fill_mask", "--version", "1", "--handler",
                        __file__, "--config-file", f"{store}/model.yaml", "--export-path", store], check=True)  # fmt: skip
        os.chdir(store)  # its logs
        os.environ["TMPDIR"] = store  # it notes there which process to stop
        command = [sys.executable, programs / "torchserve"]
        signal.signal(signal.SIGTERM, lambda *_: subprocess.run([*command, "--stop"]))
        sys.exit(subprocess.call([*command, "--foreground", "--ncs", "--disable-token-auth", "--ts-config", f"{store}/server",
                                  "--model-store", store, "--log-config", f"{store}/log4j2.xml"]))  # fmt: skip
