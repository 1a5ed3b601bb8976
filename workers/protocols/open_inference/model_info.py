"""What the Open Inference Protocol and Triton's extensions of it say of the server and its model, as JSON and protobuf have it."""

import math
from typing import Any

import workers
from workers.protocols import embeds, samples
from workers.protocols.open_inference.tensors import ANSWER, VERSION
from workers.service import Service

EXTENSIONS = [
    "binary_tensor_data",
    "model_configuration",
    "model_repository(index)",
    "parameters",
    "schedule_policy(timeout)",
    "statistics",
]


def server() -> dict[str, Any]:
    """Return the server's metadata."""
    return {"name": "one-queue", "version": workers.__version__, "extensions": EXTENSIONS}


def metadata(service: Service) -> dict[str, Any]:
    """Return the model's metadata: of the possible inputs it names the one that the task's example is."""
    name = input_name(service)
    is_numbers, is_vector = name == "numbers", embeds(service)
    return {
        "name": service.settings.model_name,
        "versions": [VERSION],
        "platform": "python",
        "inputs": [
            {
                "name": name,
                "datatype": "FP32" if is_numbers else "BYTES",
                "shape": [-1, -1] if is_numbers else [-1],
            }
        ],
        "outputs": [
            {
                "name": ANSWER,
                "datatype": "FP32" if is_vector else "BYTES",
                "shape": [-1, -1] if is_vector else [-1],
            }
        ],
    }


def input_name(service: Service) -> str:
    """Return the name of the tensor that the task's example would be."""
    if service.task.media:
        return "bytes"
    example = service.task.describe().example.get("inputs")
    if isinstance(example, str):
        return "text"
    is_numbers = isinstance(example, list) and example and all(type(one) in (int, float) for one in example)
    return "numbers" if is_numbers else "json"


def config(service: Service) -> dict[str, Any]:
    """Return the model's configuration, as far as it has one of Triton's form: batches are this server's own affair."""
    tensors = metadata(service)
    types = {"BYTES": "TYPE_STRING", "FP32": "TYPE_FP32"}

    def of(some: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [
            {"name": one["name"], "data_type": types[one["datatype"]], "dims": one["shape"]} for one in some
        ]

    return {
        "name": tensors["name"],
        "platform": tensors["platform"],
        "backend": "python",
        "max_batch_size": 0,  # the shape of a tensor is its whole shape
        "input": of(tensors["inputs"]),
        "output": of(tensors["outputs"]),
    }


def index(service: Service) -> list[dict[str, Any]]:
    """Return the repository's index: the one model."""
    reason = service.unready()
    state = "UNAVAILABLE" if reason else "READY"
    return [{"name": service.settings.model_name, "version": VERSION, "state": state, "reason": reason}]


def statistics(service: Service) -> dict[str, Any]:
    """Return what this worker has counted since it started. Durations that are not measured are left out."""
    metrics = service.metrics
    by_status = {s.labels["status"]: int(s.value) for s in samples(metrics.requests, "_total")}
    successes = by_status.pop("200", 0)
    return {
        "model_stats": [
            {
                "name": service.settings.model_name,
                "version": VERSION,
                "inference_count": int(total(metrics.batch_size, "_sum")),
                "execution_count": int(total(metrics.batch_size, "_count")),
                "inference_stats": {
                    "success": {"count": successes},
                    "fail": {"count": sum(by_status.values())},
                    "queue": duration(metrics.queue_wait),
                    "compute_infer": duration(metrics.call),
                },
            }
        ]
    }


def duration(histogram: Any) -> dict[str, int]:
    """Return the count and the sum in nanoseconds."""
    nanoseconds = math.floor(total(histogram, "_sum") * 1e9)
    return {"count": int(total(histogram, "_count")), "ns": nanoseconds}


def total(metric: Any, ending: str) -> float:
    return sum(sample.value for sample in samples(metric, ending))
