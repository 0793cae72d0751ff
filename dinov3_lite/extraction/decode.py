"""From a picture's bytes to the model's input, or to the reason why there is none. Runs in threads."""

from __future__ import annotations

import io
import re
from functools import cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..image import ImageProcessor, to_tensor
from .reading import Rejected

MOST_PIXELS = 178_956_970  # what Pillow refuses as a decompression bomb
LARGE = 1 << 20  # pixels from which a picture is resized in strips
STRIP = 32  # rows
ORIENTATION = 0x0112  # the EXIF tag; 5 to 8 exchange height and width


def decoders() -> dict[str, str]:
    """What decides the pixels: Pillow's release and that of its JPEG library."""
    import PIL
    from PIL import features

    return {"pillow": PIL.__version__, "libjpeg_turbo": features.version("libjpeg_turbo") or "none"}


def decode(data: bytes, wanted: tuple[int, int] | None = None) -> Tensor:
    """The picture, (3, H, W) uint8, in RGB and turned as its EXIF says; of an animation, the first frame.

    wanted: (height, width) that it will be resized to: a JPEG may then be decoded at 1/2, 1/4 or 1/8 of its size, as
        long as that is at least twice what is wanted.

    Raises Rejected for anything but a whole picture of bearable size.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    if not data:
        raise Rejected("an empty file")
    try:
        with Image.open(io.BytesIO(data)) as image:
            width, height = image.size
            if width * height > MOST_PIXELS:
                raise Rejected(f"{width} x {height} pixels: more than {MOST_PIXELS}")
            turned = image.getexif().get(ORIENTATION, 1)
            if wanted is not None:
                h, w = wanted if turned < 5 else wanted[::-1]
                image.draft("RGB", (2 * w, 2 * h))
            elif turned == 1 and (pixels := _decode_fast(image, data)) is not None:
                return pixels
            return to_tensor(ImageOps.exif_transpose(image))
    except Rejected:
        raise
    except UnidentifiedImageError as error:
        raise Rejected("not an image") from error
    except Image.DecompressionBombError as error:
        raise Rejected(f"a decompression bomb: more than {MOST_PIXELS} pixels") from error
    except MemoryError:
        raise
    except Exception as error:  # Pillow's many readers raise what they like
        reason = re.sub(r" at 0x[0-9a-f]+", "", " ".join(str(error).split()))  # the same words in every run
        raise Rejected(f"damaged ({reason or type(error).__name__})") from error


def _decode_fast(image: Any, data: bytes) -> Tensor | None:
    """By simplejpeg, whose pixels are Pillow's; None where it can't, or refuses: Pillow then has the last word."""
    plain = image.format == "JPEG" and image.mode == "RGB" and image.info.get("adobe_transform", 1) == 1
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


def native_size(pixels: Tensor, patch_size: int) -> tuple[int, int]:
    """The picture's own (height, width), each to the nearest multiple of the patch size."""
    height, width = (max(patch_size, round(n / patch_size) * patch_size) for n in pixels.shape[1:])
    return height, width


def to_input(pixels: Tensor, size: tuple[int, int], processor: ImageProcessor, rounded: bool) -> Tensor:
    """What the model is given: (3, h, w) float32 as `processor` makes it or, rounded, uint8 pixels of that size."""
    if rounded:
        return _resize(pixels, size)
    values = resize(pixels, size, processor.rescale_factor)
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (processor.mean, processor.std))
    return values.sub_(mean).div_(std)


def resize(pixels: Tensor, size: tuple[int, int], factor: float) -> Tensor:
    """(3, H, W) uint8 -> (3, h, w) float32: times `factor`, then resized (bilinear, antialiased).

    Both passes of a resize are independent in rows or columns: a large picture is first narrowed strip by strip, with
    the same result bit for bit in a third of the time, since its float32 copy never leaves the processor's cache.
    """
    _, H, W = pixels.shape
    if H * W < LARGE:
        return _resize(pixels.to(torch.float32) * factor, size)
    narrow = torch.empty(3, H, size[1])
    for top in range(0, H, STRIP):
        strip = pixels[:, top : top + STRIP].to(torch.float32, memory_format=torch.contiguous_format) * factor
        narrow[:, top : top + STRIP] = _resize(strip, (strip.shape[1], size[1]))
    return _resize(narrow, size)


def _resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    if x.shape[1:] == size:
        return x
    return F.interpolate(x[None], size, mode="bilinear", antialias=True, align_corners=False)[0]
