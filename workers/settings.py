"""Every knob: name, default, unit, why. Each is an environment variable of the same name, or a line in `.env`."""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from starlette.config import Config

from workers.threads import usable_cores

HERE = Path(__file__).resolve().parent.parent
MOST = 10**9


def knob(why: str, default: Any, allowed: str, is_allowed: Callable[[Any], bool]) -> Any:
    """A dataclass field with a default, the rule that its value must keep, and one line of why."""
    return field(default=default, metadata={"why": why, "allowed": allowed, "is_allowed": is_allowed})


def at_least(least: int, default: int, why: str) -> Any:
    """A whole number."""
    return knob(why, default, f"a whole number from {least} to {MOST}", lambda value: least <= value <= MOST)


def seconds(default: float, why: str) -> Any:
    """A positive duration."""
    return knob(why, default, "a number of seconds above 0, below a million", lambda value: 0 < value < 1e6)


def one_of(*choices: str, why: str) -> Any:
    """One of a few words; the first is the default."""
    return knob(why, choices[0], " or ".join(choices), lambda value: value in choices)


def secret(why: str) -> Any:
    """A text that is shown nowhere."""
    allowed = {"why": why, "allowed": "printable, without blanks", "is_allowed": is_key, "is_secret": True}
    return field(default="", repr=False, metadata=allowed)


def is_key(keys: str) -> bool:
    """Whether a header can carry each of these."""
    return all(
        key.isascii() and key.isprintable() and " " not in key for key in map(str.strip, keys.split(","))
    )


OWN_CLASS = re.compile(r"[^\W\d][\w.]*:[^\W\d]\w*")  # my_model:Iris


def is_model(name: str) -> bool:
    """Whether `name` is a folder with a model, a class of one's own, or could be a hub id."""
    if os.path.isdir(name):
        return os.path.isfile(os.path.join(name, "config.json"))
    return bool(name) and not name.startswith(("/", ".")) and not name.isspace()


@dataclass(frozen=True)
class Settings:
    """What the server was told. Immutable, picklable: a spawned model process gets the same."""

    # What to serve
    MODEL: str = knob(
        "a folder, a hub id, or a class of your own",
        str(HERE / "models" / "minilm-mlm"),
        "a folder with a config.json, a hub id, or module:Class",
        is_model,
    )
    TASK: str = knob("what the model does, as Transformers calls it", "fill-mask", "a pipeline task", bool)
    DTYPE: str = one_of(
        "float32", "auto", "bfloat16", "float16", why="auto: bfloat16 where the hardware multiplies it"
    )
    DEVICE: str = knob("auto: the GPU when there is one", "auto", "auto, cpu, cuda or cuda:N", bool)
    FAST: bool = knob("0: the stock pipeline, to compare with", True, "1 or 0", lambda value: True)

    # The queue and the batch
    BATCH_SIZE: int = at_least(1, 1, "opt-in: `make plan` tells whether it pays for your model")
    BATCH_WINDOW_MS: float = knob(
        "a batch waits this long for company",
        0.0,
        "a number of milliseconds of at least 0",
        lambda value: 0 <= value < 1e6,
    )
    MAX_QUEUE: int = at_least(
        1, 256, "single requests that may wait, and inputs of lists; the deadline bounds the wait"
    )
    QUEUE_TARGET_S: float = knob(
        "how long who is admitted waits while there is always a queue; 0: as long as the deadline allows",
        0.5,
        "a number of seconds of at least 0, below a million",
        lambda value: 0 <= value < 1e6,
    )
    DEADLINE_S: float = seconds(10.0, "an answer after this helps nobody; clients may ask for less")

    # Where inference runs
    OFFLOAD: str = one_of(
        "thread",
        "inline",
        "process",
        "dirty",
        why="process survives a crash or a hang; inline blocks the event loop, to compare; dirty: see dirty.conf.py",
    )
    INSTANCES: int = at_least(1, 1, "copies of the model on one queue")
    TORCH_THREADS: int = at_least(0, 0, "per copy; 0: cores / copies, fewer while others use the cores")
    WEB_CONCURRENCY: int = at_least(1, 1, "worker processes; uvicorn reads it too, Gunicorn's configs set it")
    HANG_S: float = seconds(60.0, "a model call this long is a hang")

    # What is taken in
    MAX_BODY_BYTES: int = at_least(0, 0, "0: 1 MB of text, 16 MB where the task takes images or sound")
    BODY_TIMEOUT_S: float = seconds(10.0, "uvicorn itself waits for ever")
    MAX_TOKENS: int = at_least(1, 512, "or fewer, where the model takes fewer")
    MAX_MASKS: int = at_least(1, 8, "the reply grows with masks x top_k x text")
    MAX_TOP_K: int = at_least(1, 100, "the reply grows with it")
    MAX_INPUTS: int = at_least(1, 64, "in one request; each is a job of its own")

    # Who may ask
    API_KEY: str = secret("one or several, with commas between; empty: everybody may ask")
    METRICS_OPEN: bool = knob("1: /metrics needs no API_KEY", False, "1 or 0", lambda value: True)
    ALLOWED_HOSTS: str = knob(
        "this server's names, with commas between, *.example.com for all below; empty: any, but loopback's own on loopback",
        "",
        "names with commas between",
        lambda value: "/" not in value,
    )
    CORS_ORIGINS: str = knob(
        "the web pages from elsewhere that may ask, such as https://example.com, with commas between",
        "",
        "origins with commas between, or *",
        lambda value: all(one.strip() == "*" or "://" in one for one in value.split(",") if one.strip()),
    )
    HEADERS_TIMEOUT_S: float = seconds(10.0, "uvicorn itself waits for ever; see patient.py")
    MAX_CONNECTIONS: int = at_least(
        0, 0, "of one client's address, 0: any number; behind a proxy all have the proxy's"
    )

    # The page
    PAGE: bool = knob("0: no page at GET /", True, "1 or 0", lambda value: True)

    # What is told
    LOG_FORMAT: str = one_of("text", "json", why="json: a line a request; see request_log.py")

    # Stopping
    GRACE_S: float = seconds(10.0, "from SIGTERM to exit at the latest; keep it under your supervisor's own")

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
    def is_own_class(self) -> bool:
        """Whether MODEL names a Python class."""
        return bool(OWN_CLASS.fullmatch(self.MODEL)) and not os.path.isdir(self.MODEL)

    @property
    def model_name(self) -> str:
        """MODEL without the folders above it: nobody's business."""
        return os.path.basename(os.path.normpath(self.MODEL)) if os.path.isdir(self.MODEL) else self.MODEL

    @property
    def threads_per_instance(self) -> int:
        """Torch threads of one copy: never more in total than there are cores, unless asked for."""
        return self.TORCH_THREADS or max(1, usable_cores() // (self.INSTANCES * self.WEB_CONCURRENCY))
