"""Pictures for light and for dark pages, and how a page shows the one that its reader needs."""

from pathlib import Path

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from PIL import Image

PAPER, INK = (13, 17, 23), (230, 237, 243)  # GitHub's dark theme
WIDTH = 838  # pixels of a page at GitHub


def save(figure: Figure, path: Path, dpi: int, *, footer: str = "") -> None:
    """Write `path` and its dark variant, and close the figure."""
    if footer:
        figure.text(0.012, 0.012, footer, fontsize=8, color="#555555")
    figure.savefig(path, dpi=dpi, facecolor="white")
    plt.close(figure)
    write_dark(path)


def dark(path: Path) -> Path:
    """The file of the dark variant."""
    return path.with_stem(f"{path.stem}-dark")


def write_dark(path: Path) -> None:
    """Write the dark variant of a picture: lightness reversed, hues kept (HSL), between the dark page's own two colours."""
    light = np.asarray(Image.open(path).convert("RGB"), float) / 255
    # Lightness is the middle of the largest and the smallest channel, so this addition turns it into 1 - lightness.
    reversed_ = light + 1 - light.max(axis=2, keepdims=True) - light.min(axis=2, keepdims=True)
    between = np.array(PAPER) + reversed_ * (np.array(INK) - np.array(PAPER))
    Image.fromarray(between.round().astype(np.uint8)).save(dark(path), optimize=True)


def picture(name: str, alt: str, width: int = WIDTH) -> str:
    """Return the HTML by which a page shows `name`, or its dark variant to who reads in the dark."""
    return (
        f'<picture>\n  <source media="(prefers-color-scheme: dark)" srcset="{dark(Path(name))}">\n'
        f'  <img alt="{alt}" src="{name}" width="{width}">\n</picture>\n'
    )
