"""NVML of a machine with two GPUs, for machines without one. The second can't tell how busy it is, as some can't."""

from types import SimpleNamespace
from typing import Any


class NVMLError(Exception):
    pass


def nvmlInit() -> None: ...


def nvmlDeviceGetCount() -> int:
    return 2


def nvmlDeviceGetHandleByIndex(index: int) -> int:
    return index


def nvmlDeviceGetMemoryInfo(handle: int) -> Any:
    return SimpleNamespace(total=80e9, used=20e9 + handle)


def nvmlDeviceGetUtilizationRates(handle: int) -> Any:
    if handle:
        raise NVMLError("Not Supported")
    return SimpleNamespace(gpu=40, memory=10)
