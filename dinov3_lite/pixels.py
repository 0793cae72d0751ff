"""Pictures of any kind as values in [0, 255], read a band of rows at a time: files, PIL images, arrays and tensors.

What becomes of a picture, here and in transformers 5's DINOv3ViTImageProcessor, which takes arrays as they are:

| picture | here | transformers |
|---|---|---|
| RGB, L, 1 | RGB; grey and black-and-white repeat in three channels | the same, but 1 as 0 and 1 of 255 |
| P (palette), CMYK, YCbCr, HSV | RGB, by Pillow's conversion | the palette's indices; an error; the raw channels |
| RGBA, LA, PA, a transparent colour | over white, as browsers show it | an error (`do_convert_rgb=True`: over white) |
| I;16, uint16; I of a 16-bit PNG or PGM | divided by 257: 65535 is white | up to 257 times too bright |
| bool | 0 and 255 | 0 and 1 of 255 |
| I, F, other arrays | refused: their values have no range | taken for 0 to 255 |
| EXIF orientation | turned as the camera was held, but for `exif=False` | not turned |
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .extras import needed

if TYPE_CHECKING:
    from PIL import Image

CPU = torch.device("cpu")

# By EXIF orientation: PIL's transposition that undoes it, whether rows of the result are columns of the stored picture,
# and whether they begin at its far end.
ORIENTATION_TAG = 0x0112
TURNS = {
    2: ("FLIP_LEFT_RIGHT", False, False),
    3: ("ROTATE_180", False, True),
    4: ("FLIP_TOP_BOTTOM", False, True),
    5: ("TRANSPOSE", True, False),
    6: ("ROTATE_270", True, False),
    7: ("TRANSVERSE", True, True),
    8: ("ROTATE_90", True, True),
}


class Picture(NamedTuple):
    """`rows(a, b)` gives rows a to b as (C, b - a, width), uint8 or float32 values in [0, 255], on the device."""

    height: int
    width: int
    rows: Callable[[int, int], Tensor]
    device: torch.device = CPU


@contextmanager
def opened(image: Any, channels: int, exif: bool = True, name: str = "image") -> Iterator[Picture]:
    """A picture of so many channels: of a file's path, a PIL image, an (H, W, C) array or a (C, H, W) tensor.

    exif: turn PIL images and files as their EXIF orientation says. name: what errors call an image that is no file.

    Raises ValueError, also while rows are read, for what is no such picture and for a file that Pillow can't read to
    its end; OSError where there is no such file; ImportError for a file where Pillow is missing.
    """
    if isinstance(image, (str, os.PathLike)):
        with open_file(image) as pil_image:
            yield _of_pil(pil_image, channels, exif, "it")
    elif isinstance(image, Tensor):
        yield _of_tensor(image, channels, name)
    elif isinstance(image, np.ndarray):
        yield _of_array(image, channels, name)
    elif hasattr(image, "getbands"):  # a PIL image, without importing PIL
        with _errors_named(getattr(image, "filename", "") or name):
            yield _of_pil(image, channels, exif, "it")
    else:
        raise ValueError(
            f"{name} is a {type(image).__name__}: expected a path, a PIL image, a uint8 array or a uint8 tensor"
        )


@contextmanager
def open_file(path: str | os.PathLike[str]) -> Iterator[Image.Image]:
    """The PIL image of a file. Whatever Pillow raises while it is open becomes a ValueError that names the file."""
    with needed(f"{path}: opening pictures", "Pillow", "'dinov3-lite[images]'"):
        from PIL import Image
    with _errors_named(path), Image.open(path) as image:
        yield image


@contextmanager
def _errors_named(name: str | os.PathLike[str]) -> Iterator[None]:
    """For what Pillow's plugins raise: OSError without a name, SyntaxError, EOFError, struct.error, zlib.error..."""
    from PIL import Image, UnidentifiedImageError

    try:
        yield
    except Exception as error:
        if isinstance(error, OSError) and error.filename is not None:  # named already: not found, not allowed
            raise
        reason = str(error) or type(error).__name__
        if isinstance(error, UnidentifiedImageError):
            reason = "cannot identify image file: it is no picture, or of a kind that Pillow does not read"
        elif isinstance(error, Image.DecompressionBombError):
            reason += " If you trust it, set PIL.Image.MAX_IMAGE_PIXELS."
        raise ValueError(f"{os.fspath(name)}: {reason}") from error


def orientation(image: Image.Image) -> int:
    """How a PIL image is to be turned, as EXIF counts: 1, or a key of TURNS. An EXIF block that is damaged says 1."""
    image.load()  # TIFFs are turned by this, which changes what they say
    try:
        value = image.getexif().get(ORIENTATION_TAG)
    except Exception:  # as many kinds as there are ways to damage one
        return 1
    return value if value in TURNS else 1


def _of_pil(image: Image.Image, channels: int, exif: bool, name: str) -> Picture:
    if not image.width or not image.height:
        raise ValueError(f"{name} is a picture of {image.width} x {image.height} pixels: expected at least one")
    turn = TURNS.get(orientation(image)) if exif else None
    sixteen_bits = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))
    if image.mode in ("I", "F") and not sixteen_bits:
        raise ValueError(
            f"{name} is a picture in mode {image.mode}, whose values have no range: "
            "scale them to 8 or 16 bits, as an array of uint8 or uint16"
        )
    if channels not in (1, 3) and (len(image.getbands()) != channels or image.mode in ("PA", "RGBa", "La")):
        raise ValueError(
            f"{name} is a picture in mode {image.mode}: expected {channels} channels, as an array "
            f"(height, width, {channels})"
        )
    image.load()

    def band(a: int, b: int) -> Image.Image:
        from PIL import Image

        if turn is None:
            return image.crop((0, a, image.width, b))
        method, by_columns, from_the_end = turn
        length = image.width if by_columns else image.height
        a, b = (length - b, length - a) if from_the_end else (a, b)
        box = (a, 0, b, image.height) if by_columns else (0, a, image.width, b)
        return image.crop(box).transpose(Image.Transpose[method])

    def rows(a: int, b: int) -> Tensor:
        if sixteen_bits:
            values = np.asarray(band(a, b)).astype(np.float32)
            values[values == image.info.get("transparency", -1)] = 65535  # which lies on white
            grey = torch.from_numpy(values / 257)
            return grey.expand(channels, *grey.shape)
        return torch.from_numpy(np.array(_in_channels(band(a, b), channels)).reshape(b - a, -1, channels)).permute(
            2, 0, 1
        )

    height, width = (image.width, image.height) if turn and turn[1] else (image.height, image.width)
    return Picture(height, width, rows)


def _in_channels(image: Image.Image, channels: int) -> Image.Image:
    """A PIL image as L for one channel, as RGB for three, or as it is; what is transparent lies on white."""
    if channels not in (1, 3):
        return image
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        from PIL import Image

        image = image.convert({"La": "LA"}.get(image.mode, image.mode)).convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB" if channels == 3 else "L")


def _of_array(image: np.ndarray, channels: int, name: str) -> Picture:
    known = (
        image.dtype == np.uint8 or image.dtype == np.bool_ or (image.dtype.kind == "u" and image.dtype.itemsize == 2)
    )
    if isinstance(image, np.ma.MaskedArray):
        raise ValueError(f"{name} is a masked array: give what its masked values shall be, as in {name}.filled(0)")
    if not known or image.ndim != 3 or image.shape[2] != channels or not image.size:
        raise _unfit(name, image.dtype, image.shape, f"(height, width, {channels})")

    def rows(a: int, b: int) -> Tensor:
        band = np.ascontiguousarray(image[a:b].transpose(2, 0, 1))
        if image.dtype == np.uint8:
            return torch.from_numpy(band.copy() if np.shares_memory(band, image) else band)
        return torch.from_numpy(band.astype(np.float32) * (255 if image.dtype == np.bool_ else 1 / 257))

    return Picture(image.shape[0], image.shape[1], rows)


def _of_tensor(image: Tensor, channels: int, name: str) -> Picture:
    scales = {torch.uint8: 1, torch.bool: 255, torch.uint16: 257}
    if image.dtype not in scales or image.ndim != 3 or image.shape[0] != channels or not image.numel():
        raise _unfit(name, image.dtype, tuple(image.shape), f"({channels}, height, width)")

    def rows(a: int, b: int) -> Tensor:
        band = image[:, a:b]
        if image.dtype == torch.uint8:
            return band
        return band.to(torch.float32) * 255 if image.dtype == torch.bool else band.to(torch.float32) / 257

    return Picture(image.shape[1], image.shape[2], rows, image.device)


def _unfit(name: str, dtype: object, shape: tuple[int, ...], expected: str) -> ValueError:
    return ValueError(
        f"{name} is {dtype} of shape {shape}: expected uint8 of shape {expected}; uint16 and bool are scaled"
    )
