"""mosec: https://mosecorg.github.io/mosec/

    python -m loadtests.peers.mosec --capacity 64 --timeout 30000 --address 127.0.0.1 --port PORT

32 texts or 10 ms; one worker process; who finds 64 before it is refused, as they can't be answered within a second.
Its time limit for a request is 3 s by default, too short for a batch of long texts here.
"""

import os

from mosec import Server, Worker

from loadtests.peers import model


class FillMask(Worker):
    def __init__(self):
        self.model = model.load()

    def deserialize(self, data):
        return data.decode()

    def forward(self, data):
        return self.model(data)


if __name__ == "__main__":
    server = Server()
    timeout_s = int(os.environ.get("PEER_TIMEOUT_S", "30"))
    wait_ms = round(1000 * float(os.environ.get("PEER_WAIT_S", "0.01")))
    server.append_worker(FillMask, num=1, max_batch_size=32, max_wait_time=wait_ms, timeout=timeout_s)
    server.run()
