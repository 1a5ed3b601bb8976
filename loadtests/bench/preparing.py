"""What is gained by preparing inputs while the model computes: `python -m loadtests.bench.preparing`.

    $ python -m loadtests.bench.preparing          # about 3 minutes on two idle cores
    $ python -m loadtests.bench.preparing --quick

Photos of 12 megapixels, decoded and scaled in the threads that check requests, one image per call. One client that waits for
each answer has them prepared and computed one after the other; of eight, some are prepared while another computes. Server and
clients share the cores. The models are random; one "elsewhere" sleeps, as this process does while a GPU computes.
"""

import argparse
import asyncio
import io
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from loadtests import arguments
from loadtests.bench.overhead import ask, side_by_side
from loadtests.load.raw_client import http
from loadtests.modes import Mode, Server, start
from loadtests.plan.planner import markdown
from workers.tasks.common.media import read_image

WIDTH, HEIGHT = 4000, 3000
ELSEWHERE_S = 0.05
USERS = 8
SIZES = {
    "ViT-Tiny": (192, 3),
    "ViT-Small": (384, 6),
}  # width, heads; 12 layers, patches of 16 pixels, images of 224


class Elsewhere:
    """Decodes and scales an image; its model computes on another device, while this process sleeps."""

    media = ("image/",)

    def check(self, inputs: bytes, parameters: dict[str, Any]) -> Any:
        return np.asarray(read_image(inputs).resize((224, 224)))

    def __call__(self, inputs: list[Any]) -> list[Any]:
        time.sleep(ELSEWHERE_S)
        return [image.mean() for image in inputs]


def photo() -> bytes:
    """A JPEG of 12 megapixels that compresses as a photo does: to about 3 MB."""
    from PIL import Image

    draw = np.random.default_rng(0)
    coarse = Image.fromarray(draw.integers(0, 256, (60, 80, 3), dtype=np.uint8)).resize((WIDTH, HEIGHT))
    noisy = np.asarray(coarse, np.int16) + draw.integers(-9, 10, (HEIGHT, WIDTH, 1), dtype=np.int16)
    file = io.BytesIO()
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=88)
    return file.getvalue()


def vit(folder: Path, width: int, heads: int) -> dict[str, str]:
    """Write a random ViT; return the settings that serve it with one thread."""
    import transformers

    config = transformers.ViTConfig(
        hidden_size=width, num_attention_heads=heads, intermediate_size=4 * width, num_labels=1000
    )
    for part in (transformers.ViTForImageClassification(config), transformers.ViTImageProcessor()):
        part.save_pretrained(folder)
    return {"MODEL": str(folder), "TASK": "image-classification", "TORCH_THREADS": "1"}


@contextmanager
def models() -> Iterator[dict[str, dict[str, str]]]:
    """The settings of each model, while their folders are there."""
    with tempfile.TemporaryDirectory() as folder:
        made = {name: vit(Path(folder) / name, *size) for name, size in SIZES.items()}
        yield {**made, "elsewhere": {"MODEL": "loadtests.bench.preparing:Elsewhere"}}


def rate(server: Server, request: bytes, users: int, duration_s: float) -> float:
    """Images per second."""
    found = asyncio.run(ask(server.url, [request] * users, duration_s))
    server.wait_until_idle()
    return found


def model_ms(url: str, image: bytes) -> float:
    """How long the model takes for one image, by its own account."""
    headers = {"Content-Type": "image/jpeg"}
    times = []
    for _ in range(5):
        reply = httpx.post(url, content=image, headers=headers, timeout=60).raise_for_status()
        times.append(float(reply.headers["server-timing"].partition("model;dur=")[2].partition(",")[0]))
    return statistics.median(times)


def measured(name: str, env: dict[str, str], image: bytes, rounds: int, duration_s: float) -> dict[str, str]:
    """One model's row."""
    with start(Mode(name, "uvicorn server:app --no-access-log"), {"DEADLINE_S": "60", **env}) as server:
        request = http(server.url, image, media_type="image/jpeg")
        computes_ms = model_ms(server.url, image)
        ways: dict[str, Callable[[float], float]] = {
            way: partial(rate, server, request, users) for way, users in (("one", 1), ("many", USERS))
        }
        rates = side_by_side(ways, rounds, duration_s)
    one, many = (statistics.median(rates[way]) for way in ways)
    ratios = [b / a for a, b in zip(rates["one"], rates["many"], strict=True)]
    low, middle, high = statistics.quantiles(ratios) if rounds > 1 else ratios * 3
    return {
        "model": name,
        "all else, ms": f"{1000 / one - computes_ms:.0f}",
        "model, ms": f"{computes_ms:.0f}",
        "one after the other, images/s": f"{one:.1f}",
        "overlapping, images/s": f"{many:.1f}",
        "ratio (quartiles)": f"{middle:.2f} ({low:.2f} to {high:.2f})",
    }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one short round: shows that it runs")
    quick = parser.parse_args().quick
    rounds, duration_s = (1, 3.0) if quick else (4, 4.0)
    print(f"About {1 if quick else 3} minutes on two idle cores.", file=sys.stderr, flush=True)
    image = photo()
    with models() as envs:
        print(markdown([measured(name, env, image, rounds, duration_s) for name, env in envs.items()]))


if __name__ == "__main__":
    arguments.run(main)
