"""Transformers' `generate` with its streamer: https://huggingface.co/docs/transformers/main/en/generation_features#streaming
behind FastAPI's StreamingResponse: https://fastapi.tiangolo.com/advanced/custom-response/#streamingresponse

    uvicorn loadtests.peers.generation.fastapi_generate:app

A lock lets one text at a time have the core; without it all share it, and nobody's next token comes in time.
"""

import json
import os
import threading

import torch
from fastapi import Body, FastAPI
from fastapi.responses import StreamingResponse
from transformers import AutoModelForCausalLM, AutoTokenizer, TextIteratorStreamer

torch.set_num_threads(1)
tokenizer = AutoTokenizer.from_pretrained(os.environ["PEER_MODEL"])
model = AutoModelForCausalLM.from_pretrained(os.environ["PEER_MODEL"], dtype=os.environ["PEER_DTYPE"])
one_at_a_time = threading.Lock()
app = FastAPI()


def generate(options):
    with one_at_a_time:
        model.generate(**options)


def write(prompt, max_tokens):
    inputs = tokenizer([prompt], return_tensors="pt")
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    options = dict(inputs, streamer=streamer, max_new_tokens=max_tokens, do_sample=False)
    threading.Thread(target=generate, args=[options]).start()
    for text in streamer:
        yield f"data: {json.dumps({'choices': [{'text': text}]})}\n\n"


@app.post("/v1/completions")
def complete(prompt: str = Body(), max_tokens: int = Body()):
    return StreamingResponse(write(prompt, max_tokens), media_type="text/event-stream")
