"""Pictures that are shown to people, and masks as files. Needs Pillow."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..checkpoint.files import whole_files
from ..extras import needed
from ..visualize import panel_size

if TYPE_CHECKING:
    from PIL import Image

TINTS = np.array(  # of the foreground, or of the classes from 1 in turn
    [(255, 40, 90), (40, 170, 255), (255, 190, 30), (60, 200, 90), (170, 90, 255), (255, 120, 200)], np.float32
)


def picture_format(path: Path) -> str:
    """What a picture of this name is written as. Raises ValueError for an ending that Pillow knows no picture by."""
    with needed("drawing pictures", "Pillow", "'dinov3-lite[images]'"):
        from PIL import Image
    kind = Image.registered_extensions().get(path.suffix.lower())
    if kind not in Image.SAVE:
        raise ValueError(f"{path}: unknown type of picture: name it .png or .jpg")
    return kind


def save_picture(picture: np.ndarray | Image.Image, path: Path, palette: Sequence[int] | None = None) -> None:
    """Write (H, W) or (H, W, 3) uint8 whole or not at all, as the kind of picture that the name's ending says.

    palette: the colours of (H, W).

    Raises ValueError for a picture that this kind can't hold.
    """
    kind = picture_format(path)
    from PIL import Image

    image = Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture
    if palette is not None:
        image.putpalette(palette)
    encoded = (
        BytesIO()
    )  # as some of Pillow's encoders write to a file by themselves, and don't look whether all of it went
    try:
        image.save(encoded, kind)
    except (OSError, ValueError) as error:
        size = f"{image.width} x {image.height} pixels"
        raise ValueError(f"{path}: {size} can't be written as {kind} ({error}): name it .png") from error
    with whole_files() as out, out.create(path) as file:
        file.write(encoded.getbuffer())


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
    with needed("drawing pictures", "Pillow", "'dinov3-lite[images]'"):
        from PIL import Image, ImageDraw
    sizes = [panel_size(*pixels.shape[:2]) for pixels in (first, second)]
    panels = [Image.fromarray(p).resize((w, h)) for p, (h, w) in zip((first, second), sizes, strict=True)]
    gap = 12
    sheet = Image.new("RGB", (panels[0].width + gap + panels[1].width, max(h for h, _ in sizes)), "white")
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
