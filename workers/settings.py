"""Every knob: why, name, default, unit. Each is an environment variable of the same name, or a line in `.env`."""

import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from starlette.config import Config

from workers.resources import usable_cores

HERE = Path(__file__).resolve().parent.parent
EMBEDDED = str(HERE / "models" / "minilm-mlm")
MOST = 10**9


def knob(default: Any, allowed: str, is_allowed: Callable[[Any], bool]) -> Any:
    """A dataclass field with a default and the rule that its value must keep; its why is the comment above it."""
    return field(default=default, metadata={"allowed": allowed, "is_allowed": is_allowed})


def switch(default: bool) -> Any:
    """On or off."""
    return knob(default, "1 or 0", lambda value: True)


def at_least(least: int, default: int) -> Any:
    """A whole number."""
    return knob(default, f"a whole number from {least} to {MOST}", lambda value: least <= value <= MOST)


def seconds(default: float) -> Any:
    """A positive duration."""
    return knob(default, "a number of seconds above 0, below a million", lambda value: 0 < value < 1e6)


def zero_or_more(unit: str, default: float) -> Any:
    """A duration that may be none."""
    return knob(default, f"a number of {unit} of at least 0, below a million", lambda value: 0 <= value < 1e6)


def one_of(*choices: str) -> Any:
    """One of a few words; the first is the default."""
    return knob(choices[0], " or ".join(choices), lambda value: value in choices)


def secret() -> Any:
    """A text that is shown nowhere."""
    allowed = {"allowed": "printable, without blanks", "is_allowed": is_key, "is_secret": True}
    return field(default="", repr=False, metadata=allowed)


def is_key(keys: str) -> bool:
    """Whether a header can carry each of these."""
    return all(
        key.isascii() and key.isprintable() and " " not in key for key in map(str.strip, keys.split(","))
    )


def is_port(address: str) -> bool:
    """Whether it is a port, alone or after a host's name or address and a colon."""
    host, colon, port = address.rpartition(":")
    return bool(host) == bool(colon) and port.isascii() and port.isdigit() and int(port) < 65536


def are_origins(names: str) -> bool:
    """Whether each of these is one."""
    return all(one.strip() == "*" or "://" in one for one in names.split(",") if one.strip())


def is_object(text: str) -> bool:
    """Whether it is a JSON object, or empty."""
    return not text or isinstance(json.loads(text), dict)


CUSTOM_CLASS = re.compile(r"[^\W\d][\w.]*:[^\W\d]\w*")  # my_model:Iris


def is_model(name: str) -> bool:
    """Whether `name` is a folder with a model, a class of one's own, or could be a hub id."""
    if os.path.isdir(name):
        return os.path.isfile(os.path.join(name, "config.json"))
    return bool(name) and not name.startswith(("/", ".")) and not name.isspace()


@dataclass(frozen=True)
class Settings:
    """What the server was told. Immutable, picklable: a spawned model process gets the same."""

    # What to serve

    # a folder, a hub id, or a class of your own
    MODEL: str = knob(EMBEDDED, "a folder with a config.json, a hub id, or module:Class", is_model)
    # what a custom class is made with: a JSON object, its fields are keyword arguments
    MODEL_ARGS: str = knob("", 'a JSON object, such as {"path": "weights.pt"}', is_object)
    # what the model does, as Transformers calls it
    TASK: str = knob("fill-mask", "a pipeline task", bool)
    # auto: bfloat16 where the processor multiplies it natively, or on a GPU
    DTYPE: str = one_of("float32", "auto", "bfloat16", "float16")
    # auto: the GPU when there is one
    DEVICE: str = knob("auto", "auto, cpu, cuda or cuda:N", bool)
    # 0: the stock pipeline, to compare with
    FAST: bool = switch(True)

    # The queue and the batch

    # opt-in: `make plan` tells whether it pays for your model
    BATCH_SIZE: int = at_least(1, 1)
    # a batch waits this long for company
    BATCH_WINDOW_MS: float = zero_or_more("milliseconds", 0.0)
    # single requests that may wait, and inputs of lists; the deadline bounds the wait
    MAX_QUEUE: int = at_least(1, 256)
    # how long an admitted job waits while there is always a queue; 0: as long as the deadline allows
    QUEUE_TARGET_S: float = zero_or_more("seconds", 0.5)
    # an answer after this helps nobody; clients may ask for less
    DEADLINE_S: float = seconds(10.0)

    # Where inference runs

    # process survives a crash or a hang; inline blocks the event loop, to compare; dirty: see dirty.conf.py
    OFFLOAD: str = one_of("thread", "inline", "process", "dirty")
    # instances of the model on one queue
    INSTANCES: int = at_least(1, 1)
    # per instance; 0: cores / instances, fewer while others use the cores
    TORCH_THREADS: int = at_least(0, 0)
    # worker processes; uvicorn reads it too, Gunicorn's configs set it
    WEB_CONCURRENCY: int = at_least(1, 1)
    # a model call this long is a hang
    HANG_S: float = seconds(60.0)

    # What is taken in

    # 0: 1 MB of text, 16 MB where the task takes images or sound
    MAX_BODY_BYTES: int = at_least(0, 0)
    # a body that stalls this long is 408; uvicorn itself waits for ever
    BODY_TIMEOUT_S: float = seconds(10.0)
    # of one input; or fewer, where the model takes fewer
    MAX_TOKENS: int = at_least(1, 512)
    # of one text; the reply grows with masks x top_k x text
    MAX_MASKS: int = at_least(1, 8)
    # candidates or labels; the reply grows with it
    MAX_TOP_K: int = at_least(1, 100)
    # in one request; each is a job of its own
    MAX_INPUTS: int = at_least(1, 64)

    # Who may ask

    # one or several, with commas between; empty: everybody may ask
    API_KEY: str = secret()
    # 1: /metrics needs no API_KEY
    METRICS_OPEN: bool = switch(False)
    # this server's names, with commas between, *.example.com for all below; empty: any, on loopback only its own names
    ALLOWED_HOSTS: str = knob("", "names with commas between", lambda value: "/" not in value)
    # web pages from elsewhere that may ask, such as https://example.com, with commas between
    CORS_ORIGINS: str = knob("", "origins with commas between, or *", are_origins)
    # headers that take longer close the connection; see web/http_protocol.py, uvicorn itself waits for ever
    HEADERS_TIMEOUT_S: float = seconds(10.0)
    # of one client's address; 0: any number; behind a proxy all have the proxy's
    MAX_CONNECTIONS: int = at_least(0, 0)
    # gRPC on this port of loopback, or at HOST:PORT, which needs API_KEY; 0: none
    GRPC_PORT: str = knob("0", "a port, or HOST:PORT", is_port)

    # The page

    # 0: no page at GET /
    PAGE: bool = switch(True)

    # What is told

    # json: a line a request; see request_log.py
    LOG_FORMAT: str = one_of("text", "json")

    # Stopping

    # from SIGTERM to exit at the latest; keep it under your supervisor's own
    GRACE_S: float = seconds(10.0)

    @classmethod
    def read(cls) -> "Settings":
        """Read the environment and `.env`; exit with one sentence where a value is wrong."""
        config = Config(".env" if os.path.isfile(".env") else None)
        return cls(**{knob.name: cls._read_one(config, knob) for knob in fields(cls)})

    @staticmethod
    def _read_one(config: Config, knob: Any) -> Any:
        raw = config(knob.name, default=None)
        if raw is None:
            return knob.default
        try:
            value = config(knob.name, cast=knob.type)
            if knob.metadata["is_allowed"](value):
                return value
        except ValueError:
            pass
        shown = "…" if knob.metadata.get("is_secret") else repr(raw)
        raise SystemExit(f"{knob.name}={shown} is not allowed: it must be {knob.metadata['allowed']}")

    @property
    def is_custom(self) -> bool:
        """Whether MODEL names a Python class."""
        return bool(CUSTOM_CLASS.fullmatch(self.MODEL)) and not os.path.isdir(self.MODEL)

    @property
    def model_name(self) -> str:
        """MODEL without the folders above it: nobody's business."""
        return os.path.basename(os.path.normpath(self.MODEL)) if os.path.isdir(self.MODEL) else self.MODEL

    @property
    def threads_per_instance(self) -> int:
        """Torch threads of one instance: never more in total than there are cores, unless asked for."""
        return self.TORCH_THREADS or max(1, usable_cores() // (self.INSTANCES * self.WEB_CONCURRENCY))
