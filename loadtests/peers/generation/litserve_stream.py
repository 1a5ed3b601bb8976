"""LitServe, streaming: https://lightning.ai/docs/litserve/features/streaming

    python -m loadtests.peers.generation.litserve_stream PORT

One worker. It streams one text at a time: LitServe batches streams only where the class batches the steps itself.
"""

import json
import os
import sys
import threading

import litserve as ls
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TextIteratorStreamer


class Write(ls.LitAPI):
    def setup(self, device):
        torch.set_num_threads(1)
        folder = os.environ["PEER_MODEL"]
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=os.environ["PEER_DTYPE"])

    def decode_request(self, request):
        return request["prompt"], request["max_tokens"]

    def predict(self, request):
        prompt, max_tokens = request
        inputs = self.tokenizer([prompt], return_tensors="pt")
        streamer = TextIteratorStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        options = dict(inputs, streamer=streamer, max_new_tokens=max_tokens, do_sample=False)
        threading.Thread(target=self.model.generate, kwargs=options).start()
        yield from streamer

    def encode_response(self, texts):
        for text in texts:
            yield f"data: {json.dumps({'choices': [{'text': text}]})}\n\n"


if __name__ == "__main__":
    server = ls.LitServer(Write(api_path="/v1/completions", stream=True), accelerator="cpu", timeout=60)
    port = int(sys.argv[1])
    server.run(host="127.0.0.1", port=port, generate_client_file=False, log_level="warning", access_log=False)
