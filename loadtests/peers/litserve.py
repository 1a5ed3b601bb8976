"""LitServe: https://lightning.ai/docs/litserve/features/batching

    python -m loadtests.peers.litserve PORT

32 texts or 10 ms; one worker, replaced when it dies. Bodies are JSON. It has no bound on its queue.
"""

import os
import sys

import litserve as ls

from loadtests.peers import model


class FillMask(ls.LitAPI):
    def setup(self, device):
        self.model = model.load()

    def decode_request(self, request):
        return request

    def predict(self, texts):
        return self.model(texts)

    def encode_response(self, output):
        return output


if __name__ == "__main__":
    wait_s = float(os.environ.get("PEER_WAIT_S", "0.01"))
    api = FillMask(max_batch_size=32, batch_timeout=wait_s)
    timeout_s = float(os.environ.get("PEER_TIMEOUT_S", "30"))
    server = ls.LitServer(api, accelerator="cpu", timeout=timeout_s, restart_workers=True)
    port = int(sys.argv[1])
    server.run(host="127.0.0.1", port=port, generate_client_file=False, log_level="warning", access_log=False)
