"""Made pictures on disk, for tests that read them."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
from helpers import PREPROCESSING

SIZE = 48
PREPROCESSING_48 = {**PREPROCESSING, "size": {"height": SIZE, "width": SIZE}}


def picture(seed: int, suffix: str = ".jpg", size: tuple[int, int] | None = None, **options: object) -> bytes:
    """A smooth random picture of (width, height), as a file's bytes."""
    from PIL import Image

    rng = np.random.default_rng(seed)
    width, height = size or rng.integers(30, 110, 2).tolist()
    small = Image.fromarray(rng.integers(0, 256, (7, 5, 3), np.uint8))
    file = io.BytesIO()
    formats = {".jpg": "JPEG", ".png": "PNG", ".webp": "WEBP", ".tif": "TIFF"}
    small.resize((width, height), Image.Resampling.BICUBIC).save(file, formats[suffix], **options)
    return file.getvalue()


def write_pictures(folder: Path, count: int, first: int = 0) -> list[str]:
    """Pictures of several formats and sizes, some in a folder within; their names in the order of the plan."""
    names = []
    for i in range(first, first + count):
        suffix = (".jpg", ".jpg", ".png", ".webp")[i % 4]
        name = f"{'inner/' if i % 3 == 0 else ''}p{i:03d}{suffix}"
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(picture(i, suffix))
        names.append(name)
    return sorted(names)


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> None:
    """A tar of files (name, content), compressed if it is a .tgz."""
    with tarfile.open(path, "w:gz" if path.suffix == ".tgz" else "w") as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
