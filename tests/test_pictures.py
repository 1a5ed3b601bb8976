"""Pictures have a variant for dark pages that says the same."""

import colorsys
from pathlib import Path

import pytest
from PIL import Image

from loadtests import pictures

COLOURS = [(255, 255, 255), (0, 0, 0), (0, 114, 178), (213, 94, 0), (119, 119, 119), (0, 158, 115)]


def test_dark_variant_reverses_lightness_and_keeps_hues(tmp_path: Path) -> None:
    light = Image.new("RGB", (len(COLOURS), 1))
    light.putdata(COLOURS)
    light.save(tmp_path / "a.png")
    pictures.write_dark(tmp_path / "a.png")
    with Image.open(tmp_path / "a-dark.png") as dark:
        found = [dark.getpixel((i, 0)) for i in range(len(COLOURS))]
    assert found[:2] == [pictures.PAPER, pictures.INK]
    for colour, other in zip(COLOURS[2:], found[2:]):
        # Back from the dark page's two colours to 0 to 1, where HLS knows lightness.
        spread = [(c - p) / (i - p) for c, p, i in zip(other, pictures.PAPER, pictures.INK)]
        hue, lightness, _ = colorsys.rgb_to_hls(*(c / 255 for c in colour))
        their_hue, their_lightness, _ = colorsys.rgb_to_hls(*spread)
        assert their_lightness == pytest.approx(1 - lightness, abs=0.01)
        assert their_hue == pytest.approx(hue, abs=0.02)


def test_page_shows_either() -> None:
    assert 'srcset="../results/a-dark.png"' in pictures.picture("../results/a.png", "what it shows")
