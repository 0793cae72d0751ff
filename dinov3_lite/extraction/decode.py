"""From a picture's bytes to the model's input, or to the reason why there is none. Runs in threads."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..extras import needed
from ..image import ImageProcessor
from ..pixels import ORIENTATION_TAG, opened
from .reading import Rejected

MOST_PIXELS = 178_956_970  # what Pillow refuses as a decompression bomb


def decoders() -> dict[str, str]:
    """What decides the pixels: Pillow's release and that of its JPEG library."""
    with needed("opening pictures", "Pillow", "'dinov3-lite[images]'"):
        import PIL
        from PIL import features

    return {"pillow": PIL.__version__, "libjpeg_turbo": features.version("libjpeg_turbo") or "none"}


def decode(data: bytes, wanted: tuple[int, int] | None = None) -> Any:
    """The decoded picture: a PIL image that is loaded or, where that is faster, its pixels (3, H, W) uint8.

    wanted: (height, width) that it will be resized to: a JPEG may then be decoded at 1/2, 1/4 or 1/8 of its size, as
        long as that is at least twice what is wanted.

    Raises Rejected for anything but a whole picture of bearable size.
    """
    from PIL import Image

    if not data:
        raise Rejected("an empty file")
    with _rejecting():
        image = Image.open(io.BytesIO(data))
        width, height = image.size
        if width * height > MOST_PIXELS:
            raise Rejected(f"{width} x {height} pixels: more than {MOST_PIXELS}")
        if image.format == "JPEG":
            turned = _turned(image)
            if wanted is not None:
                h, w = wanted if turned < 5 else wanted[::-1]
                image.draft("RGB", (2 * w, 2 * h))
            elif turned == 1 and (pixels := _decode_fast(image, data)) is not None:
                return pixels
        image.load()
        return image


@contextmanager
def _rejecting(as_it_is: type[Exception] | tuple[()] = ()) -> Iterator[None]:
    """Whatever Pillow finds wrong is a reason, in the same words in every run; as_it_is: errors that are sentences."""
    from PIL import Image, UnidentifiedImageError

    try:
        yield
    except (Rejected, MemoryError):
        raise
    except UnidentifiedImageError as error:
        raise Rejected("not an image") from error
    except Image.DecompressionBombError as error:
        raise Rejected(f"a decompression bomb: more than {MOST_PIXELS} pixels") from error
    except Exception as error:  # Pillow's many readers raise what they like
        reason = re.sub(r" at 0x[0-9a-f]+", "", " ".join(str(error).split())).removeprefix("image: ")
        if isinstance(error, as_it_is):
            raise Rejected(reason) from error
        raise Rejected(f"damaged ({reason or type(error).__name__})") from error


def _turned(image: Any) -> int:
    """The EXIF orientation of a JPEG: 1 is upright, from 5 on height and width change places."""
    try:
        return int(image.getexif().get(ORIENTATION_TAG, 1))
    except Exception:  # a damaged EXIF block says nothing
        return 1


def _decode_fast(image: Any, data: bytes) -> Tensor | None:
    """By simplejpeg, whose pixels are Pillow's; None where it can't, or refuses: Pillow then has the last word."""
    plain = image.mode == "RGB" and image.info.get("adobe_transform", 1) == 1
    if not plain or (decode_jpeg := _simplejpeg()) is None:
        return None
    try:
        return torch.from_numpy(decode_jpeg(data, "RGB")).permute(2, 0, 1)
    except ValueError:
        return None


@cache
def _simplejpeg() -> Any:
    """The decoder of simplejpeg if it is there and gives Pillow's pixels bit for bit: each brings a JPEG library."""
    try:
        from simplejpeg import decode_jpeg
    except ImportError:
        return None
    from PIL import Image

    noise = np.random.default_rng(0).integers(0, 256, (9, 7, 3), np.uint8)
    picture = Image.fromarray(noise).resize((61, 83), Image.Resampling.BICUBIC)
    for subsampling in (0, 1, 2):
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=85, subsampling=subsampling, progressive=subsampling == 1)
        data = file.getvalue()
        if not np.array_equal(decode_jpeg(data, "RGB"), np.asarray(Image.open(io.BytesIO(data)))):
            return None
    return decode_jpeg


class Preparation:
    """From what `decode` gives to the model's input, by an image processor; `processor.size` None is the native size.

    rounded: resized pixels as uint8, for a model that normalises them itself; otherwise float32, normalised.
    """

    def __init__(self, processor: ImageProcessor, stride: int, rounded: bool) -> None:
        self.processor, self.stride, self.rounded = processor, stride, rounded
        self.dtype = torch.uint8 if rounded else torch.float32

    def __call__(self, picture: Any) -> Tensor:
        """(C, h, w). Raises Rejected for pictures that the processor does not take."""
        with _rejecting(as_it_is=ValueError):
            size = self.processor.size or self._native_size(picture)
            if self.rounded:
                return self._rounded(picture, size)
            return replace(self.processor, size=size)(picture)["pixel_values"][0]

    def _native_size(self, picture: Any) -> tuple[int, int]:
        """The picture's own (height, width), each to the nearest multiple of the model's stride."""
        p = self.stride
        with opened(picture, self.processor.num_channels, self.processor.exif) as rows:
            return max(p, round(rows.height / p) * p), max(p, round(rows.width / p) * p)

    def _rounded(self, picture: Any, size: tuple[int, int]) -> Tensor:
        with opened(picture, self.processor.num_channels, self.processor.exif) as rows:
            pixels = rows.rows(0, rows.height)
        if pixels.dtype != torch.uint8:  # of 16 bits
            pixels = pixels.round().to(torch.uint8)
        if pixels.shape[1:] == size:
            return pixels
        return F.interpolate(pixels[None], size, mode="bilinear", antialias=True, align_corners=False)[0]
