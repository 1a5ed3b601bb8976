"""Images and sounds: from bytes to pixels and samples, each bounded before it is unfolded. Needs neither torch nor Transformers."""

import base64
import binascii
import functools
import io
import shutil
import subprocess
import wave
from typing import Any

from workers.errors import Malformed, Unprocessable

MAX_PIXELS = 1 << 25  # a small file can unfold to gigabytes
# For others Pillow runs programs, for PostScript for one.
FORMATS = ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"]
MIN_SOUND_S = 0.1  # the convolutions of speech models need 0.025 s at least
DECODE_S = 30.0  # ffmpeg is ended after this


def bytes_of(inputs: Any, kind: str) -> bytes:
    """Return the bytes of a body, of base64 or of a data URL. Raises Malformed, also at a path or an address."""
    if isinstance(inputs, str):
        try:
            return base64.b64decode(inputs.partition("base64,")[2] or inputs, validate=True)
        except (binascii.Error, ValueError):
            inputs = None
    if not isinstance(inputs, bytes):
        raise Malformed(
            f'"inputs" must be the {kind} in base64; or send it as the body, with its Content-Type'
        )
    return inputs


def open_image(data: bytes) -> Any:
    """Return a Pillow image, of which only the header has been read."""
    from PIL import Image  # only image tasks need it

    return Image.open(io.BytesIO(data), formats=FORMATS)


def read_image(data: bytes) -> Any:
    """Return a Pillow image, read to its end. Raises Unprocessable where it is not one, is cut short, or takes gigabytes."""
    try:
        image = open_image(data)
        if (pixels := image.width * image.height) <= MAX_PIXELS:
            image.load()  # only this notices that the end is missing
            return image
    except Exception:  # of a broken file Pillow raises anything
        raise Unprocessable("the image cannot be read; send a whole JPEG or PNG") from None
    raise Unprocessable(f"the image has {pixels} pixels; send at most {MAX_PIXELS}")


@functools.cache
def ffmpeg() -> str:
    """Return the path of ffmpeg: the system's, or that of the package imageio-ffmpeg. Raises ValueError where there is none."""
    if path := shutil.which("ffmpeg"):
        return path
    try:
        import imageio_ffmpeg
    except ImportError:
        raise ValueError(
            "sounds need ffmpeg: install it with your system's packages, or pip install imageio-ffmpeg"
        ) from None
    return str(imageio_ffmpeg.get_ffmpeg_exe())


def read_sound(data: bytes, rate: int, max_s: float) -> Any:
    """Return mono samples at `rate`, a NumPy float32 array. Raises Unprocessable where it can't be read or has not the length.

    No more than `max_s` is decoded: 2.5 MB of FLAC can hold three hours of silence. The same samples as Transformers' own call.
    """
    import numpy as np

    limits = ["-threads", "1", "-protocol_whitelist", "pipe", "-i", "pipe:0", "-t", f"{max_s + 0.1:g}"]
    form = ["-ac", "1", "-ar", str(rate), "-f", "f32le", "-hide_banner", "-loglevel", "quiet", "pipe:1"]
    try:
        done = subprocess.run([ffmpeg(), *limits, *form], input=data, capture_output=True, timeout=DECODE_S)
    except subprocess.TimeoutExpired:
        raise Unprocessable("the sound takes too long to decode; send a shorter one, as WAV") from None
    samples = np.frombuffer(done.stdout[: len(done.stdout) // 4 * 4], np.float32)
    if not len(samples):
        raise Unprocessable("the sound cannot be read; send a whole WAV, FLAC, MP3 or Ogg")
    if not rate * MIN_SOUND_S <= len(samples) <= rate * max_s:
        raise Unprocessable(f"the sound must last from {MIN_SOUND_S:g} s to {max_s:g} s; this one does not")
    return samples


def example_image(seed: int = 0, width: int = 64, height: int = 64) -> bytes:
    """Return a PNG of noise."""
    import random

    from PIL import Image

    file, noise = io.BytesIO(), random.Random(seed)
    Image.frombytes("RGB", (width, height), noise.randbytes(3 * width * height)).save(file, "PNG")
    return file.getvalue()


def example_sound(seed: int = 0, seconds: float = 1.0) -> bytes:
    """Return a WAV of noise at 16 kHz."""
    import random

    file = io.BytesIO()
    with wave.open(file, "wb") as sound:
        sound.setparams((1, 2, 16_000, 0, "NONE", ""))
        sound.writeframes(random.Random(seed).randbytes(2 * int(16_000 * seconds)))
    return file.getvalue()
