"""Pictures that are shown to people, and masks as files. Needs Pillow."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..checkpoint.files import whole_files

TINTS = np.array(  # of the foreground, or of the classes from 1 in turn
    [(255, 40, 90), (40, 170, 255), (255, 190, 30), (60, 200, 90), (170, 90, 255), (255, 120, 200)], np.float32
)


def save_picture(pixels: np.ndarray, path: Path, palette: Sequence[int] | None = None) -> None:
    """Write (H, W) or (H, W, 3) uint8 as a PNG, whole or not at all; (H, W) with the colours of a palette, if given."""
    from PIL import Image

    image = Image.fromarray(pixels)
    if palette is not None:
        image.putpalette(palette)
    with whole_files() as out, out.create(path) as file:
        image.save(file, "png")


def overlay(pixels: np.ndarray, prediction: np.ndarray, classes: int) -> np.ndarray:
    """The picture (H, W, 3) with its foreground, or each class but 0, tinted."""
    strength = prediction / 255 if classes == 1 else (prediction > 0).astype(np.float64)
    share = 0.6 * strength[..., None]
    tint = TINTS[0] if classes == 1 else TINTS[(prediction.astype(np.int64) - 1) % len(TINTS)]
    return ((1 - share) * pixels + share * tint).round().astype(np.uint8)


def draw_matches(
    first: np.ndarray, second: np.ndarray, points: list[tuple[tuple[float, float], tuple[float, float]]]
) -> np.ndarray:
    """Two pictures (H, W, 3) uint8 side by side, lines between points ((x, y) in pixels of each)."""
    from PIL import Image, ImageDraw

    height = 480
    panels = [
        Image.fromarray(p).resize((max(1, round(height * p.shape[1] / p.shape[0])), height)) for p in (first, second)
    ]
    gap = 12
    sheet = Image.new("RGB", (panels[0].width + gap + panels[1].width, height), "white")
    sheet.paste(panels[0], (0, 0))
    sheet.paste(panels[1], (panels[0].width + gap, 0))
    pen = ImageDraw.Draw(sheet)
    scales = [panel.width / pixels.shape[1] for panel, pixels in zip(panels, (first, second), strict=True)]
    for i, (p, q) in enumerate(points):
        colour = f"hsl({round(360 * i * 0.618) % 360}, 90%, 55%)"
        start = (p[0] * scales[0], p[1] * scales[0])
        end = (q[0] * scales[1] + panels[0].width + gap, q[1] * scales[1])
        pen.line([start, end], fill=colour, width=2)
        for x, y in (start, end):
            pen.ellipse([x - 4, y - 4, x + 4, y + 4], outline=colour, width=2)
    return np.array(sheet)
