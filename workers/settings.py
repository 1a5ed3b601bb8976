"""All settings: why, name, default, unit. Each is an environment variable of the same name, or a line in `.env`."""

import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

from starlette.config import Config

from workers.resources import usable_cores

HERE = Path(__file__).resolve().parent.parent
EMBEDDED = str(HERE / "models" / "minilm-mlm")
MOST = 10**9
# Settings of earlier releases, and what to do instead.
GONE = {"BATCH_WINDOW_MS": "remove it; the server learns by itself when holding a batch pays"}


def knob(default: Any, allowed: str, is_allowed: Callable[[Any], bool]) -> Any:
    """Return a dataclass field with a default and the rule for its value; the comment above it becomes its description."""
    return field(default=default, metadata={"allowed": allowed, "is_allowed": is_allowed})


def switch(default: bool) -> Any:
    """Return a field that is on or off."""
    return knob(default, "1 or 0", lambda value: True)


def at_least(least: int, default: int) -> Any:
    """Return a field for a whole number."""
    return knob(default, f"an integer from {least} to {MOST:,}", lambda value: least <= value <= MOST)


def seconds(default: float) -> Any:
    """Return a field for a positive duration."""
    return knob(default, "a number of seconds above 0, below a million", lambda value: 0 < value < 1e6)


def zero_or_more(unit: str, default: float) -> Any:
    """Return a field for a duration that may be 0."""
    return knob(default, f"a number of {unit} of at least 0, below a million", lambda value: 0 <= value < 1e6)


def one_of(*choices: str) -> Any:
    """Return a field for one of a few words; the first is the default."""
    return knob(choices[0], " or ".join(choices), lambda value: value in choices)


def secret() -> Any:
    """Return a field for a text that is shown nowhere."""
    allowed = {
        "allowed": "comma-separated keys of printable ASCII without spaces",
        "is_allowed": partial(is_list_of, is_allowed=is_key),
        "is_secret": True,
    }
    return field(default="", repr=False, metadata=allowed)


ENV_LINE = re.compile(r"(?:export\s+)?([A-Za-z_]\w*)\s*=\s*(.*?)", re.ASCII)


def read_env_file(path: str) -> dict[str, str]:
    """Return the settings in a file of NAME=VALUE lines, none if there is no file. Exit with a sentence for any other line.

    A byte order mark or `export` before the first of them must not lose it: it may be the API_KEY.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError) as exc:
        raise SystemExit(f"{path} cannot be read ({exc}): save it as UTF-8") from None
    found = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not (line := line.strip()) or line.startswith("#"):
            continue
        if not (match := ENV_LINE.fullmatch(line)):
            raise SystemExit(f"line {number} of {path} is not NAME=VALUE")
        name, value = match.groups()
        is_quoted = len(value) > 1 and value[0] == value[-1] and value[0] in "'\""
        found[name] = value[1:-1] if is_quoted else value
    return found


def is_list_of(names: str, is_allowed: Callable[[str], bool]) -> bool:
    """Return whether there is nothing, or a list with at least one name, all of them allowed.

    Commas alone, as "${A},${B}" may leave, would be no key, or no name: the server would be open.
    """
    some = [name.strip() for name in names.split(",") if name.strip()]
    return not names or (bool(some) and all(map(is_allowed, some)))


def is_key(key: str) -> bool:
    """Return whether a header can carry it."""
    return key.isascii() and key.isprintable() and " " not in key


def is_port(address: str) -> bool:
    """Return whether it is a port, alone or after a host's name or address and a colon."""
    host, colon, port = address.rpartition(":")
    return bool(host) == bool(colon) and port.isascii() and port.isdigit() and int(port) < 65536


def is_origin(name: str) -> bool:
    """Return whether it is an origin, or any."""
    return name == "*" or "://" in name


def is_object(text: str) -> bool:
    """Return whether `text` is a JSON object, or empty."""
    return not text or isinstance(json.loads(text), dict)


CUSTOM_CLASS = re.compile(r"[^\W\d][\w.]*:[^\W\d]\w*")  # my_model:Iris


def is_model(name: str) -> bool:
    """Return whether `name` is a folder with a model or a custom class, or could be a hub id."""
    if os.path.isdir(name):
        return os.path.isfile(os.path.join(name, "config.json"))
    return bool(name) and not name.startswith(("/", ".")) and not name.isspace()


@dataclass(frozen=True)
class Settings:
    """All settings of a server. Immutable, picklable: a spawned model process gets the same."""

    # What to serve

    # a folder, a hub id, or a custom class
    MODEL: str = knob(EMBEDDED, "a folder with a config.json, a hub id, or module:Class", is_model)
    # what a custom class is made with: a JSON object, its fields are keyword arguments
    MODEL_ARGS: str = knob("", 'a JSON object, such as {"path": "weights.pt"}', is_object)
    # what the model does, as Transformers calls it
    TASK: str = knob("fill-mask", "a pipeline task", bool)
    # auto: bfloat16 where the processor multiplies it natively, or on a GPU
    DTYPE: str = one_of("float32", "auto", "bfloat16", "float16")
    # auto: the GPU if there is one
    DEVICE: str = knob("auto", "auto, cpu, cuda or cuda:N", bool)
    # 0: the stock pipeline, for comparison
    FAST: bool = switch(True)

    # The queue and the batch

    # maximum inputs per model call; 1: no batching. docs/tuning.md recommends 32
    BATCH_SIZE: int = at_least(1, 1)
    # maximum number of waiting jobs, of single requests and of lists each; the deadline bounds the wait
    MAX_QUEUE: int = at_least(1, 256)
    # wait of an admitted job to aim at while the queue never empties; 0: as long as the deadline allows
    QUEUE_TARGET_S: float = zero_or_more("seconds", 0.5)
    # longest time from a request's arrival to its answer, 504 after it; clients may ask for less
    DEADLINE_S: float = seconds(10.0)

    # Text generation (TASK=text-generation)

    # prompt and new tokens of one sequence; or fewer, where the model takes fewer
    CONTEXT_TOKENS: int = at_least(16, 1024)
    # sequences that run at once; or fewer, where the KV cache has room for fewer
    MAX_SEQUENCES: int = at_least(1, 64)
    # for keys and values, taken at the start; 0: an eighth of the memory that the container may use, or 0.8 of what a GPU has
    # free beside the weights
    KV_CACHE_MB: int = at_least(0, 0)
    # per step, prompts and next tokens together; 0: as many as let nobody's next token wait for three steps
    STEP_TOKENS: int = at_least(0, 0)

    # Where inference runs

    # process survives a crash or a hang; inline blocks the event loop, for comparison; dirty: see gunicorn/dirty.conf.py
    OFFLOAD: str = one_of("thread", "inline", "process", "dirty")
    # instances of the model on one queue; 0: as many threads as answer most, measured at the start
    INSTANCES: int = at_least(0, 1)
    # threads per instance; 0: cores / instances, fewer while others use the cores
    TORCH_THREADS: int = at_least(0, 0)
    # worker processes; uvicorn reads it too, Gunicorn's configs set it
    WEB_CONCURRENCY: int = at_least(1, 1)
    # duration from which a model call counts as a hang
    HANG_S: float = seconds(60.0)

    # Limits of a request

    # maximum size of a body; 0: 1 MB, or 16 MB if the task takes images or sound
    MAX_BODY_BYTES: int = at_least(0, 0)
    # longest time for a body, 408 after it, and for a part of a reply that the client does not read
    BODY_TIMEOUT_S: float = seconds(10.0)
    # maximum tokens per input; the model's own limit applies if it is lower
    MAX_TOKENS: int = at_least(1, 512)
    # maximum length of a sound; 2.5 MB of FLAC can hold three hours
    MAX_SOUND_S: float = seconds(60.0)
    # maximum masks per text; the reply grows with masks x top_k x text
    MAX_MASKS: int = at_least(1, 8)
    # maximum number of candidates or labels; the reply grows with it
    MAX_TOP_K: int = at_least(1, 100)
    # maximum inputs per request; each is a job of its own
    MAX_INPUTS: int = at_least(1, 64)

    # Access

    # comma-separated keys; empty: no authentication
    API_KEY: str = secret()
    # 1: /metrics needs no API_KEY
    METRICS_OPEN: bool = switch(False)
    # the server's names, with commas between, *.example.com for all below; empty: any, on loopback only its own names
    ALLOWED_HOSTS: str = knob(
        "", "names with commas between", partial(is_list_of, is_allowed=lambda name: "/" not in name)
    )
    # origins of other web pages that are allowed, such as https://example.com, with commas between
    CORS_ORIGINS: str = knob(
        "", "origins with commas between, or *", partial(is_list_of, is_allowed=is_origin)
    )
    # longest time for headers, and for the client to read part of a reply; needs web/http_protocol.py
    HEADERS_TIMEOUT_S: float = seconds(10.0)
    # open connections per client address; 0: unlimited. Behind a proxy, all clients share its address
    MAX_CONNECTIONS: int = at_least(0, 0)
    # port of gRPC on loopback, or HOST:PORT, which needs API_KEY; 0: off
    GRPC_PORT: str = knob("0", "a port, or HOST:PORT", is_port)

    # The page

    # 0: GET / shows no page
    PAGE: bool = switch(True)

    # Logging

    # json: one line per request; see observability/request_log.py
    LOG_FORMAT: str = one_of("text", "json")

    # Stopping

    # longest time from SIGTERM to exit; keep it below that of your process manager
    GRACE_S: float = seconds(10.0)

    @classmethod
    def read(cls) -> "Settings":
        """Read the environment and `.env`; exit with one sentence where a value is wrong."""
        file = read_env_file(".env")
        # `API_KEY: ${API_KEY}` of a compose file is an empty variable where there is none: it must not beat the file's key.
        environ = {name: value for name, value in os.environ.items() if value or name not in file}
        config = Config(environ=file | environ)
        for name, now in GONE.items():
            if config(name, default=None) is not None:
                raise SystemExit(f"{name} is not a setting any more: {now}")
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
        """Return whether MODEL names a Python class."""
        return bool(CUSTOM_CLASS.fullmatch(self.MODEL)) and not os.path.isdir(self.MODEL)

    @property
    def is_token_by_token(self) -> bool:
        """Return whether the token loop serves the model."""
        return self.TASK == "text-generation" and self.FAST and not self.is_custom

    @property
    def model_name(self) -> str:
        """Return MODEL without the folders above it, which clients need not know."""
        return os.path.basename(os.path.normpath(self.MODEL)) if os.path.isdir(self.MODEL) else self.MODEL

    @property
    def threads_per_instance(self) -> int:
        """Return the torch threads per instance: never more in total than there are cores, unless TORCH_THREADS says so."""
        instances = max(1, self.INSTANCES)
        return self.TORCH_THREADS or max(1, usable_cores() // (instances * self.WEB_CONCURRENCY))
