"""MODEL=examples.image_model:Edges uvicorn server:app -- an image in, an image out, as bytes or by a web form.

$ pip install pillow
$ curl -F file=@docs/page.png -o edges.png http://127.0.0.1:8000/
$ curl --data-binary @docs/page.png -H "Content-Type: image/png" -o edges.png http://127.0.0.1:8000/
"""

import io
from typing import Any

import numpy as np
import torch
from PIL import Image


class Edges:
    """The edges in an image, by Sobel's filter."""

    media = ("image/",)  # bodies of these types, and forms with a file, come as bytes

    def __init__(self) -> None:
        across = torch.tensor([[1.0, 0.0, -1.0], [2.0, 0.0, -2.0], [1.0, 0.0, -1.0]])
        self.filters = torch.stack([across, across.T])[:, None]

    def check(self, inputs: bytes, parameters: dict[str, Any]) -> torch.Tensor:
        """In a thread of its own, while the model computes: decode, and bound what is decoded."""
        image = Image.open(io.BytesIO(inputs), formats=["JPEG", "PNG", "WEBP"])
        if image.width * image.height > 1 << 24:
            raise ValueError("the image is too large; send at most 16 megapixels")
        return torch.from_numpy(np.array(image.convert("L"), np.float32))

    def size(self, inputs: torch.Tensor) -> int:
        return inputs.numel()  # what a call costs grows with the pixels

    @torch.inference_mode()
    def __call__(self, inputs: list[torch.Tensor]) -> list[Image.Image]:
        return [self.edges(pixels) for pixels in inputs]  # each has its own shape

    def edges(self, pixels: torch.Tensor) -> Image.Image:
        slopes = torch.nn.functional.conv2d(pixels[None, None], self.filters, padding=1)
        return Image.fromarray(slopes.square().sum((0, 1)).sqrt().clamp(0, 255).byte().numpy())
