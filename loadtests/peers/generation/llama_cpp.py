"""llama.cpp's own server (https://github.com/ggml-org/llama.cpp/tree/master/tools/server), out of the wheel xllamacpp

    python -m loadtests.peers.generation.llama_cpp PORT

64 slots of 512 tokens; one thread. Its caches across requests are off, as the prompts differ.
"""

import os
import sys
import threading

import xllamacpp

params = xllamacpp.CommonParams()
params.model.path = os.environ["PEER_GGUF"]
params.port, params.hostnames = int(sys.argv[1]), ["127.0.0.1"]
params.n_parallel, params.n_ctx, params.kv_unified = 64, 64 * 512, False
params.cache_ram_mib, params.cache_prompt = 0, False
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
server = xllamacpp.Server(params)
threading.Event().wait()
