"""OpenVINO GenAI's continuous batching: https://docs.openvino.ai/2026/openvino-workflow-generative/inference-with-genai.html

    uvicorn loadtests.peers.generation.openvino_steps:app

It brings no server in Python: one thread makes its steps, and hands each request its tokens.
"""

import asyncio
import json
import os
import threading

import openvino
import openvino_genai as genai
from starlette.applications import Starlette
from starlette.responses import StreamingResponse
from starlette.routing import Route
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

scheduler = genai.SchedulerConfig()
scheduler.cache_size, scheduler.max_num_batched_tokens = 2, 256
scheduler.max_num_seqs = int(os.environ.get("PEER_SEQUENCES", "64"))
precision = {"float32": "f32", "bfloat16": "bf16"}[os.environ["PEER_DTYPE"]]
options = {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": precision}
pipe = genai.ContinuousBatchingPipeline(os.environ["PEER_GGUF"], scheduler, "CPU", options)
tokenizer = Tokenizer.from_file(os.environ["PEER_MODEL"] + "/tokenizer.json")
EOS = 2
arrived, running, number = threading.Event(), {}, 0  # number: (handle, queue, its event loop)


def run_steps():
    while arrived.wait():
        arrived.clear()
        while pipe.has_non_finished_requests():
            pipe.step()
            for handle, tokens, loop in list(running.values()):
                while handle.can_read():
                    ids = next(iter(handle.read().values())).generated_ids
                    loop.call_soon_threadsafe(tokens.put_nowait, list(ids))


async def write(prompt, max_tokens):
    global number
    number, mine = number + 1, number
    tokens, text, left = asyncio.Queue(), DecodeStream(skip_special_tokens=True), max_tokens
    ids = openvino.Tensor([tokenizer.encode(prompt).ids])
    config = genai.GenerationConfig(max_new_tokens=max_tokens, do_sample=False, eos_token_id=EOS)
    handle = pipe.add_request(mine, ids, config)
    running[mine] = handle, tokens, asyncio.get_running_loop()
    arrived.set()
    try:
        while left > 0:
            for token in await tokens.get():
                left = 0 if token == EOS else left - 1
                if piece := text.step(tokenizer, token):
                    yield f"data: {json.dumps({'choices': [{'text': piece}]})}\n\n"
    finally:
        del running[mine]
        handle.cancel()


async def complete(request):
    body = await request.json()
    return StreamingResponse(write(body["prompt"], body["max_tokens"]), media_type="text/event-stream")


threading.Thread(target=run_steps, daemon=True).start()
app = Starlette(routes=[Route("/v1/completions", complete, methods=["POST"])])
