"""Stand-in until the project's one writer has landed."""

from __future__ import annotations

import os
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import numpy as np


def write_whole(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    temporary = path.with_name(f".{path.name}.part")
    temporary.write_bytes(content)
    os.replace(temporary, path)


def save_picture(pixels: np.ndarray, path: Path, palette: Sequence[int] | None = None) -> None:
    """Write (H, W) or (H, W, 3) uint8 as a PNG, whole or not at all; (H, W) with the colours of a palette, if given."""
    from PIL import Image

    image = Image.fromarray(pixels)
    if palette is not None:
        image.putpalette(palette)
    buffer = BytesIO()
    image.save(buffer, "png")
    write_whole(path, buffer.getvalue())
