"""From pictures to model input, on torch alone and in the order of transformers' DINOv3ViTImageProcessor."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .checkpoint.channels import check_rule, statistics
from .checkpoint.hub import locate
from .checkpoint.preprocessing import read_preprocessing
from .checks import check_size
from .pixels import Picture, opened

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SATELLITE_MEAN, SATELLITE_STD = (0.430, 0.411, 0.296), (0.213, 0.156, 0.143)
BILINEAR = 2  # PIL's number for it, as preprocessor_config.json writes it
BAND = 2**20  # pixels that are float32 at a time: a picture of 36 megapixels is 430 MB in float32


@dataclass(frozen=True)
class ImageProcessor:
    """Rescale to [0, 1], resize (bilinear, antialiased), normalise per channel.

    size: (height, width) in pixels, each a multiple of the model's patch size, whatever the picture's aspect; one
        number for a square; None keeps the picture's own size.
    mean, std: of values in [0, 1], one number a channel, as a tuple, list, array or tensor. Images must have that many
        channels. A single number serves every channel (three of them, if both are single).
    rescale_factor: what pixel values of 0 to 255 are multiplied by.
    exif: turn photographs as their EXIF orientation says. transformers does not: give False for its pixels.

    Two processors of the same values are equal and hash alike, whether given as tuples, lists, arrays or tensors.
    Raises ValueError for any other value.
    """

    size: tuple[int, int] | None = (224, 224)
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    rescale_factor: float = 1 / 255
    exif: bool = True

    def __post_init__(self) -> None:
        size = None if self.size is None else check_size("size", self.size)
        mean, std = _as_statistics("mean", self.mean), _as_statistics("std", self.std)
        counts = [len(values) for values in (mean, std) if isinstance(values, tuple)] or [3]
        mean, std = (values if isinstance(values, tuple) else (values,) * counts[0] for values in (mean, std))
        if len(mean) != len(std):
            name, values, count = ("std", std, len(mean)) if len(mean) == 3 else ("mean", mean, len(std))
            raise ValueError(f"{name} is {values}: expected {_numbers(count)}, one a channel as in the other")
        if min(std) <= 0:
            raise ValueError(f"std is {std}: expected {_numbers(len(std))}, none of them zero or less")
        factor = _as_number(self.rescale_factor)
        if factor is None:
            raise ValueError(f"rescale_factor is {self.rescale_factor!s:.100}: expected a number")
        for name, value in {"size": size, "mean": mean, "std": std, "rescale_factor": factor}.items():
            object.__setattr__(self, name, value)

    @property
    def num_channels(self) -> int:
        return len(self.mean)

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike[str],
        *,
        subfolder: str | None = None,
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        num_channels: int | None = None,
        channel_rule: str = "repeat",
    ) -> ImageProcessor:
        """The processor of a checkpoint: from its preprocessor_config.json, or from what a converted file keeps of it.

        num_channels, channel_rule: those given to `DINOv3ViT.from_pretrained`. "repeat" repeats the means and stds of
            the checkpoint's channels in turn; "mean" keeps them and gives each further channel their average.

        Warns if a satellite model (sat493m) comes with ImageNet's statistics. Raises FileNotFoundError if the
        checkpoint has no such file, ValueError if it asks for something else than rescale, bilinear resize and
        normalise.
        """
        path = locate(
            source, subfolder=subfolder, revision=revision, cache_dir=cache_dir, local_files_only=local_files_only
        )
        content = read_preprocessing(path)
        if content is None:
            raise FileNotFoundError(
                f"{path}: no preprocessor_config.json with it: make an ImageProcessor(size=, mean=, std=) of your own"
            )
        try:
            processor = cls.from_dict(content)
        except ValueError as error:
            raise ValueError(f"{path}: preprocessor_config.json: {error}") from error
        if warning := satellite_warning(path, processor.mean):
            warnings.warn(f"{path}: {warning}", stacklevel=2)
        if num_channels is None:
            return processor
        check_rule(num_channels, channel_rule)
        mean, std = (statistics(values, num_channels, channel_rule) for values in (processor.mean, processor.std))
        return replace(processor, mean=mean, std=std)

    @classmethod
    def of_release(cls, path: Path) -> ImageProcessor:
        """The processor of weights that come without one, as Meta's .pth files do: ImageNet's statistics, or the
        satellite pictures' if the name says sat493m.
        """
        return cls(mean=SATELLITE_MEAN, std=SATELLITE_STD) if is_satellite(path) else cls()

    @classmethod
    def from_dict(cls, d: dict[str, Any]) -> ImageProcessor:
        """The processor that a parsed preprocessor_config.json describes."""
        for switch in ("do_center_crop", "do_pad"):
            if d.get(switch):
                raise ValueError(f"{switch} is true: only rescale, resize and normalise are supported")
        if d.get("resample", BILINEAR) != BILINEAR:
            raise ValueError(f"resample is {d['resample']!s:.100}: only bilinear ({BILINEAR}) is supported")
        size = d.get("size", {"height": 224, "width": 224})
        if isinstance(size, int) and not isinstance(size, bool):
            size = {"height": size, "width": size}
        if not isinstance(size, dict) or not {"height", "width"} <= size.keys():
            raise ValueError(f"size is {size!s:.100}: expected a height and a width")
        processor = cls(
            size=(size["height"], size["width"]) if d.get("do_resize", True) else None,
            mean=d.get("image_mean", IMAGENET_MEAN),
            std=d.get("image_std", IMAGENET_STD),
            rescale_factor=d.get("rescale_factor", 1 / 255) if d.get("do_rescale", True) else 1.0,
        )
        if d.get("do_normalize", True):
            return processor
        return replace(processor, mean=(0.0,) * processor.num_channels, std=(1.0,) * processor.num_channels)

    def __call__(self, images: Any, return_tensors: str | None = "pt") -> dict[str, Tensor]:
        """{"pixel_values": (B, C, h, w) float32} of one picture, or of each in a list or tuple.

        A picture is a file's path, a PIL image, an (H, W, C) array or a (C, H, W) tensor of uint8, uint16 or bool,
        where C is `num_channels`; the table in pixels.py says what becomes of Pillow's modes. Tensors stay on their
        device. return_tensors: "pt", as transformers is told; there are no others.

        Raises ValueError for an empty list, for other kinds, shapes and dtypes, for modes without a range, for a file
        that is damaged (and names it), and for pictures of several sizes if `size` is None; OSError for a file that
        can't be read.
        """
        if return_tensors not in ("pt", None):
            raise ValueError(f"return_tensors is {return_tensors!r}: only 'pt', torch's tensors, is supported")
        several = isinstance(images, (list, tuple))
        if several and not images:
            raise ValueError("images is an empty list: expected at least one picture")
        pixels = []
        for i, image in enumerate(images if several else [images]):
            name = f"images[{i}]" if several and len(images) > 1 else "image"
            with opened(image, self.num_channels, self.exif, name) as picture:
                pixels.append(self.prepare(picture))
        if len({p.shape for p in pixels}) > 1:
            sizes = ", ".join(sorted({f"{p.shape[1]} x {p.shape[2]}" for p in pixels}))
            raise ValueError(f"the pictures have several sizes ({sizes}): give a size to resize to, or one at a time")
        return {"pixel_values": torch.stack(pixels) if len(pixels) > 1 else pixels[0][None]}

    def prepare(self, picture: Picture) -> Tensor:
        """(C, h, w) float32 of a picture that `pixels.opened` gives, rescaled, resized and normalised.

        Resizing is separable, rows first, and each row by itself: done on bands of rows it gives the same bits, and
        the picture is never float32 as a whole.
        """
        H, W = picture.height, picture.width
        h, w = self.size or (H, W)
        x = torch.empty(self.num_channels, H, w, dtype=torch.float32, device=picture.device)
        step = max(1, BAND // W) if picture.device.type == "cpu" else H  # elsewhere resizing is no two steps
        for a in range(0, H, step):
            b = min(a + step, H)
            x[:, a:b] = _resize(self._rescaled(picture, a, b), b - a, w)
        x = _resize(x, h, w)
        mean, std = (x.new_tensor(v).view(-1, 1, 1) for v in (self.mean, self.std))
        return x.sub_(mean).div_(std)

    def _rescaled(self, picture: Picture, a: int, b: int) -> Tensor:
        """Rows a to b as (C, b - a, W) float32."""
        band = torch.empty(self.num_channels, b - a, picture.width, dtype=torch.float32, device=picture.device)
        return band.copy_(picture.rows(a, b)).mul_(self.rescale_factor)


def is_satellite(path: Path) -> bool:
    """Do a checkpoint's name, its folder's or its hub repository's say that it was trained on satellite pictures?"""
    places = (path, path.resolve())
    names = [place.name for place in places] + [place.parent.name for place in places if place.is_file()]
    return any("sat493m" in name for name in names + [p for p in places[1].parts if p.startswith("models--")])


def satellite_warning(path: Path, mean: Sequence[float]) -> str:
    """What is to be said of a checkpoint with that mean of pixel values, if anything."""
    if not is_satellite(path) or tuple(mean) != IMAGENET_MEAN:
        return ""
    return (
        f"a satellite model (sat493m) with ImageNet's image statistics: it was trained with "
        f"mean={SATELLITE_MEAN}, std={SATELLITE_STD}"
    )


def _resize(x: Tensor, height: int, width: int) -> Tensor:
    if x.shape[1:] == (height, width):
        return x
    return F.interpolate(x[None], (height, width), mode="bilinear", antialias=True, align_corners=False)[0]


def _as_statistics(name: str, value: Any) -> float | tuple[float, ...]:
    """One number, or several in a tuple."""
    number = _as_number(value)
    if number is not None:
        return number
    found = [_as_number(item) for item in value] if isinstance(value, (list, tuple, np.ndarray, Tensor)) else []
    numbers = tuple(item for item in found if item is not None)
    if not numbers or len(numbers) < len(found):
        raise ValueError(f"{name} is {value!s:.100}: expected three numbers, or as many as there are channels")
    return numbers


def _as_number(value: Any) -> float | None:
    """A finite number as a float, or None. The float32 or float16 nearest to 0.485 becomes 0.485 itself."""
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        value = (value.float() if value.dtype == torch.bfloat16 else value).numpy()
    if isinstance(value, (np.ndarray, np.generic)):
        if value.ndim:
            return None
        value = float(str(value)) if value.dtype in (np.float32, np.float16) else value.item()
    known = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if known else None


def _numbers(count: int) -> str:
    return {1: "one number", 3: "three numbers"}.get(count, f"{count} numbers")
