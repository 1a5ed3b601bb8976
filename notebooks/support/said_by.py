"""Who says what the lessons put to the test: for the ledger, by the claim's own words."""

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
SBERT = (
    "Sentence Transformers, [efficiency](https://sbert.net/docs/sentence_transformer/usage/efficiency.html)"
)
GRPC = "[gRPC](https://grpc.io/about/) and many comparisons"
ANYSCALE = "Anyscale, [continuous batching](https://www.anyscale.com/blog/continuous-batching-llm-inference)"
ARITHMETIC = "[Transformer inference arithmetic](https://kipp.ly/transformer-inference-arithmetic/)"
SARATHI = "[Sarathi-Serve](https://arxiv.org/abs/2403.02310)"
DISTSERVE = "[DistServe](https://arxiv.org/abs/2401.09670)"
SPECULATIVE = "[Fast inference by speculative decoding](https://arxiv.org/abs/2211.17192)"
TAIL = "[The tail at scale](https://doi.org/10.1145/2408776.2408794)"
RETRIES = "Marc Brooker, [Fixing retries](https://brooker.co.za/blog/2022/02/28/retries.html)"
METASTABLE = "Marc Brooker, [Metastability](https://brooker.co.za/blog/2021/05/24/metastable.html)"
TWO_CHOICES = "Marc Brooker, [two random choices](https://brooker.co.za/blog/2012/01/17/two-random.html)"
KUBERNETES = (
    "Kubernetes, [autoscaling](https://kubernetes.io/docs/tasks/run-application/horizontal-pod-autoscale/)"
)

SAID_BY = {
    "One copy of the model saves RAM": TRANSFORMERS,
    "no_grad halves the memory and doubles the speed": "PyTorch, [no_grad](https://docs.pytorch.org/docs/stable/generated/torch.no_grad.html), for the memory",
    "A slow model makes a slow /health": TRANSFORMERS,
    "Threads don't help in Python because of the GIL": "Python, [glossary](https://docs.python.org/3/glossary.html#term-global-interpreter-lock)",
    "Dynamic batching gives 10×": TRITON_GUIDE,
    "Batching lifts GPU utilisation from 20 % to 80 %": TRITON_GUIDE,
    "Wait 10 ms for a batch": TORCHSERVE,
    "Asynchronous batching costs 10 ms at p95": TRANSFORMERS,
    "A full queue should answer 503, a late one 504": TRANSFORMERS,
    "Blocking the event loop matters only above 1 s an inference": TRANSFORMERS,
    "One bad input fails the whole batch": TORCHSERVE,
    "Errors shown to the user help": TRANSFORMERS,
    "Use (2 × cores) + 1 workers": GUNICORN,
    "Gunicorn supports only gevent for async": GUNICORN,
    "A model server serialises by default, one execution at a time": TRITON,
    "instances lift a GPU from 20 % to 80 %": TRITON_GUIDE,
    "always spawn for PyTorch": PYTORCH,
    "CUDA can't be used after a fork": PYTORCH,
    "fork deadlocks with threads": PYTHON,
    "set the start method before importing torch": PYTHON,
    "clear the CUDA cache periodically": "the opposite of PyTorch, [CUDA semantics](https://docs.pytorch.org/docs/stable/notes/cuda.html)",
    "preallocate the inputs": "PyTorch, [CUDA semantics](https://docs.pytorch.org/docs/stable/notes/cuda.html)",
    "ONNX Runtime is 2–3 × faster": SBERT,
    "gRPC is 3–5 × faster than REST": GRPC,
    "gRPC does 10k requests/s where REST does 3k": GRPC,
    "gRPC's payloads are 30–50 % smaller": GRPC,
    "A multi-stage build makes the image 84 % smaller": "Docker, [multi-stage builds](https://docs.docker.com/build/building/multi-stage/), without the figure",
    "A KV cache turns n² into n": ARITHMETIC,
    "Decode is memory bound": ARITHMETIC,
    "Continuous batching gives 23 ×": ANYSCALE,
    "A static batch is good enough": ANYSCALE,
    "A bigger batch makes every token later": SARATHI,
    "Batching tokens is free until the processor is full": ARITHMETIC,
    "Memory for the KV cache bounds the batch": ANYSCALE,
    "Prefill first is fine": SARATHI,
    "Chunked prefill costs throughput": SARATHI,
    "Tokens per second say how good a server is": DISTSERVE,
    "Speculative decoding is 2–3 × faster": SPECULATIVE,
    "The tail is the business of one in a hundred": TAIL,
    "Hedged requests double the load": TAIL,
    "Three retries make a client robust": RETRIES,
    "An overload ends when its cause does": METASTABLE,
    "Two random choices are as good as a look at all": TWO_CHOICES,
    "Scale on CPU utilisation": KUBERNETES,
}


def link(claim: str) -> str:
    """Who says it, in Markdown."""
    return SAID_BY.get(claim, HEARD)
