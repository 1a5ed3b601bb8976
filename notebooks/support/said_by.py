"""Who says what the lessons put to the test: for the ledger, by the claim's own words.

A source stands behind a claim only where its page says so. One that says the opposite is named as being `against` it.
"""

HEARD = "often heard"

TRANSFORMERS = (
    "Transformers, [Web server inference](https://huggingface.co/docs/transformers/pipeline_webserver)"
)
GUNICORN = "Gunicorn, [Design](https://docs.gunicorn.org/en/stable/design.html)"
TRITON = "Triton, [architecture](https://docs.nvidia.com/deeplearning/triton-inference-server/user-guide/docs/user_guide/architecture.html)"
TRITON_GUIDE = (
    "Triton, [conceptual guide, part 2](https://github.com/triton-inference-server/tutorials/tree/main/"
    "Conceptual_Guide/Part_2-improving_resource_utilization)"
)
TORCHSERVE = "TorchServe, [batch inference](https://docs.pytorch.org/serve/batch_inference_with_ts.html)"
PYTORCH = "PyTorch, [multiprocessing](https://docs.pytorch.org/docs/stable/notes/multiprocessing.html)"
PYTHON = "Python, [multiprocessing](https://docs.python.org/3/library/multiprocessing.html)"
SBERT = "Sentence Transformers, [release 3.2](https://github.com/UKPLab/sentence-transformers/releases/tag/v3.2.0)"
ANYSCALE = "Anyscale, [continuous batching](https://www.anyscale.com/blog/continuous-batching-llm-inference)"
ARITHMETIC = "[Transformer inference arithmetic](https://kipp.ly/transformer-inference-arithmetic/)"
SARATHI = "[Sarathi-Serve](https://arxiv.org/abs/2403.02310)"
DISTSERVE = "[DistServe](https://arxiv.org/abs/2401.09670)"
SPECULATIVE = "[Fast inference by speculative decoding](https://arxiv.org/abs/2211.17192)"
TAIL = "[The tail at scale](https://doi.org/10.1145/2408776.2408794)"
RETRIES = "Marc Brooker, [Fixing retries](https://brooker.co.za/blog/2022/02/28/retries.html)"
METASTABLE = "Marc Brooker, [Metastability](https://brooker.co.za/blog/2021/05/24/metastable.html)"
TWO_CHOICES = "Marc Brooker, [two random choices](https://brooker.co.za/blog/2012/01/17/two-random.html)"
RAY = "Ray Serve, [dynamic request batching](https://docs.ray.io/en/latest/serve/advanced-guides/dyn-req-batch.html)"
MODAL = "Modal, [dynamic batching](https://modal.com/docs/guide/dynamic-batching)"
BATCHING = (
    "[Static, dynamic and continuous batching]"
    "(https://machinelearningmastery.com/static-vs-dynamic-vs-continuous-batching-in-llm-inference/)"
)
LITSERVE = "LitServe, [parallelism types](https://lightning.ai/docs/litserve/how-tos/parallelism-types)"
UTILIZATION = (
    "Marc Brooker, [Latency sneaks up on you](https://brooker.co.za/blog/2021/08/05/utilization.html)"
)
NVML = "NVIDIA, [NVML](https://docs.nvidia.com/deploy/nvml-api/structnvmlUtilization__t.html)"
MICROSOFT = (
    "Microsoft, [gRPC and HTTP APIs compared](https://learn.microsoft.com/aspnet/core/grpc/comparison)"
)
KUBERNETES = (
    "Kubernetes, [autoscaling](https://kubernetes.io/docs/tasks/run-application/horizontal-pod-autoscale/)"
)


def against(source: str) -> str:
    """A claim that is heard, and a source that says the opposite or gives another figure."""
    return f"{HEARD}; against it: {source}"


SAID_BY = {
    "One copy of the model saves RAM": TRANSFORMERS,
    "no_grad halves the memory and doubles the speed": "PyTorch, [no_grad](https://docs.pytorch.org/docs/stable/generated/torch.no_grad.html), for the memory, without a figure",
    "A slow model makes a slow /health": f"{TRANSFORMERS}, of every request",
    "Threads don't help in Python because of the GIL": against(
        "Python, [glossary](https://docs.python.org/3/glossary.html#term-global-interpreter-lock), for extension modules that"
        " release the lock"
    ),
    "Dynamic batching gives 10×": against(f"{TRITON_GUIDE}, which measures 3.3 ×"),
    "Wait 10 ms for a batch": f"{TORCHSERVE}, in its example",
    "A full queue should answer 503, a late one 504": f"{TRANSFORMERS}: 503 or 504, without saying which",
    "Blocking the event loop matters only above 1 s an inference": against(
        f"{TRANSFORMERS}: it matters even more above 1 s"
    ),
    "Errors shown to the user help": f"{TRANSFORMERS}, with a warning",
    "Use (2 × cores) + 1 workers": f"{GUNICORN}, to start with",
    "Gunicorn supports only gevent for async": against(GUNICORN),
    "A model server serialises by default, one execution at a time": TRITON,
    "always spawn for PyTorch": against(f"{PYTORCH}: spawn or forkserver, and only CUDA needs it"),
    "CUDA can't be used after a fork": PYTORCH,
    "fork deadlocks with threads": f"{PYTORCH}; {PYTHON}",
    "clear the CUDA cache periodically": against(
        "PyTorch, [CUDA semantics](https://docs.pytorch.org/docs/stable/notes/cuda.html)"
    ),
    "preallocate the inputs": "PyTorch, [performance tuning guide](https://docs.pytorch.org/tutorials/recipes/recipes/tuning_guide.html), for training",
    "ONNX Runtime is 2–3 × faster": f"{SBERT}: up to",
    "A multi-stage build makes the image 84 % smaller": "Docker, [multi-stage builds](https://docs.docker.com/build/building/multi-stage/), without the figure",
    "A KV cache turns n² into n": ARITHMETIC,
    "Decode is memory bound": ARITHMETIC,
    "Continuous batching gives 23 ×": ANYSCALE,
    "A static batch is good enough": against(ANYSCALE),
    "A bigger batch makes every token later": SARATHI,
    "Batching tokens is free until the processor is full": ARITHMETIC,
    "Prefill first is fine": against(SARATHI),
    "Chunked prefill costs throughput": against(SARATHI),
    "Tokens per second say how good a server is": against(DISTSERVE),
    "Speculative decoding is 2–3 × faster": SPECULATIVE,
    "The tail is the business of one in a hundred": against(TAIL),
    "Hedged requests double the load": against(TAIL),
    "Three retries make a client robust": against(RETRIES),
    "An overload ends when its cause does": against(METASTABLE),
    "Two random choices are as good as a look at all": f"{TWO_CHOICES}, where the view is old",
    "Scale on CPU utilisation": KUBERNETES,
    "Loading lazily at the first request is fine": "Cloud Run, [lazy globals](https://cloud.google.com/run/docs/samples/cloudrun-tips-global-lazy),"
    " of what is not commonly needed",
    "95 % utilisation is well-used hardware": against(UTILIZATION),
    "Our load test shows a steady latency, so the server copes": against(
        "Gil Tene, [wrk2](https://github.com/giltene/wrk2), on coordinated omission"
    ),
    "Batching lifts GPU utilisation from 20 % to 80 %": f"{BATCHING}, without the figures",
    "Batching is essential for very large models": f"{RAY}, of models that are expensive to use",
    "A static batch hurts at low load": MODAL,
    "1,024 threads are too many": "Cruxible, [the C10k problem](https://www.cruxible.dev/learn/conc7-c10k-problem), of ten thousand",
    "More torch threads are faster": against(
        "KServe, [issue 1031](https://github.com/kserve/kserve/issues/1031)"
    ),
    "100,000 requests per second per core": "Japronto, [measured by a user](https://gist.github.com/imbolc/fa4109b241d081cd952d7af5d01de267):"
    " 117,000",
    "Use processes when Python pre- and post-processing is heavy": f"{LITSERVE}, for work that is bound by the processor",
    "round robin is good enough": "Oracle, [load balancing policies]"
    "(https://docs.oracle.com/en-us/iaas/compute-cloud-at-customer/topics/lbaas/load-balancing-policies.htm), where requests are alike",
    "several streams make one GPU faster": f"{TRITON}, of several instances",
    "instances lift a GPU from 20 % to 80 %": f"{TRITON}, without the figures",
    "the driver's utilisation says how full a GPU is": against(f"{NVML}: the time in which any kernel ran"),
    "gRPC's payloads are 30–50 % smaller": f"{MICROSOFT}, without the figures",
    "gRPC is 3–5 × faster than REST": "[REST vs gRPC](https://github.com/MedhaRudra/REST-vs-gRPC): 6 × for one small call",
    "A cold start takes 5–10 s": "Bringmark, [cold starts]"
    "(https://bringmark.com/faqs/what-is-a-cold-start-in-serverless-inference-and-why-does-it-impact-real-time-performance):"
    " 2 to 10 s",
    "Memory for the KV cache bounds the batch": "[PagedAttention](https://arxiv.org/abs/2309.06180)",
    "The same prompt gives the same text": against(
        "Thinking Machines, [Defeating nondeterminism]"
        "(https://thinkingmachines.ai/blog/defeating-nondeterminism-in-llm-inference/)"
    ),
    "Keep every server below 70 %": "[Latency and throughput](https://senior-stack.uz/Roadmap/Programming-Languages/quality-engineering/"
    "performance/03-latency-and-throughput/senior/)",
}


def link(claim: str) -> str:
    """Who says it, in Markdown."""
    return SAID_BY.get(claim, HEARD)
