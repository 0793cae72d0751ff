"""From pictures to model input, on torch alone and in the order of transformers' DINOv3ViTImageProcessor."""

from __future__ import annotations

import math
import os
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .checkpoint import read_preprocessing
from .checkpoint.hub import locate

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SATELLITE_MEAN, SATELLITE_STD = (0.430, 0.411, 0.296), (0.213, 0.156, 0.143)
BILINEAR = 2  # PIL's number for it, as preprocessor_config.json writes it


@dataclass(frozen=True)
class ImageProcessor:
    """Rescale to [0, 1], resize (bilinear, antialiased), normalise per channel.

    size: (height, width) in pixels, each a multiple of the model's patch size, whatever the picture's aspect; None
        keeps the picture's own size. mean, std: per channel, of values in [0, 1]. rescale_factor: what pixel values
        are multiplied by.
    """

    size: tuple[int, int] | None = (224, 224)
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    rescale_factor: float = 1 / 255

    def __post_init__(self) -> None:
        size = self.size
        if size is not None and not (len(size) == 2 and all(isinstance(n, int) and n > 0 for n in size)):
            raise ValueError(f"size is {size}: expected (height, width), two whole numbers of pixels")
        for name in ("mean", "std"):
            value = getattr(self, name)
            if not isinstance(value, tuple) or len(value) != 3 or not all(map(_is_number, value)):
                raise ValueError(f"{name} is {value}: expected three numbers, one a channel")
        if not all(self.std):
            raise ValueError(f"std is {self.std}: expected three numbers, none of them zero")
        if not _is_number(self.rescale_factor):
            raise ValueError(f"rescale_factor is {self.rescale_factor}: expected a number")

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike[str],
        *,
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
    ) -> ImageProcessor:
        """The processor of a checkpoint: from its preprocessor_config.json, or from what a converted file keeps of it.

        Warns if a satellite model (sat493m) comes with ImageNet's statistics. Raises FileNotFoundError if the
        checkpoint has no such file, ValueError if it asks for something else than rescale, bilinear resize and
        normalise.
        """
        path = locate(source, revision=revision, cache_dir=cache_dir, local_files_only=local_files_only)
        content = read_preprocessing(path)
        if content is None:
            raise FileNotFoundError(
                f"{path}: no preprocessor_config.json with it: make an ImageProcessor(size=, mean=, std=) of your own"
            )
        try:
            processor = cls.from_dict(content)
        except ValueError as error:
            raise ValueError(f"{path}: preprocessor_config.json: {error}") from error
        if "sat493m" in str(path.resolve()) and processor.mean == IMAGENET_MEAN:
            warnings.warn(
                f"{path}: a satellite model (sat493m) with ImageNet's image statistics: it was trained with "
                f"mean={SATELLITE_MEAN}, std={SATELLITE_STD}",
                stacklevel=2,
            )
        return processor

    @classmethod
    def from_dict(cls, d: dict[str, Any]) -> ImageProcessor:
        """The processor that a parsed preprocessor_config.json describes."""
        for switch in ("do_center_crop", "do_pad"):
            if d.get(switch):
                raise ValueError(f"{switch} is true: only rescale, resize and normalise are supported")
        if d.get("resample", BILINEAR) != BILINEAR:
            raise ValueError(f"resample is {d['resample']}: only bilinear ({BILINEAR}) is supported")
        size = d.get("size", {"height": 224, "width": 224})
        if isinstance(size, int) and not isinstance(size, bool):
            size = {"height": size, "width": size}
        if not isinstance(size, dict) or not {"height", "width"} <= size.keys():
            raise ValueError(f"size is {size}: expected a height and a width")
        normalise = d.get("do_normalize", True)
        return cls(
            size=(size["height"], size["width"]) if d.get("do_resize", True) else None,
            mean=_as_tuple(d.get("image_mean", IMAGENET_MEAN)) if normalise else (0.0,) * 3,
            std=_as_tuple(d.get("image_std", IMAGENET_STD)) if normalise else (1.0,) * 3,
            rescale_factor=d.get("rescale_factor", 1 / 255) if d.get("do_rescale", True) else 1.0,
        )

    def __call__(self, images: Any) -> dict[str, Tensor]:
        """{"pixel_values": (B, 3, h, w) float32} of a PIL image, an (H, W, 3) uint8 array, a (3, H, W) uint8 tensor,
        or a list.

        A PIL image of any mode is converted to RGB. Tensors stay on their device.
        Raises ValueError for an empty list, for other shapes and dtypes, and for pictures of several sizes if `size`
        is None.
        """
        images = list(images) if isinstance(images, (list, tuple)) else [images]
        if not images:
            raise ValueError("images is an empty list: expected at least one picture")
        pixels = [self._prepare(to_tensor(image)) for image in images]
        if len({p.shape for p in pixels}) > 1:
            sizes = ", ".join(sorted({f"{p.shape[1]} x {p.shape[2]}" for p in pixels}))
            raise ValueError(f"the pictures have several sizes ({sizes}): give a size to resize to, or one at a time")
        return {"pixel_values": torch.stack(pixels)}

    def _prepare(self, image: Tensor) -> Tensor:
        """(3, H, W) uint8 -> (3, h, w) float32, normalised."""
        x = image.to(torch.float32) * self.rescale_factor
        if self.size is not None and x.shape[1:] != self.size:
            x = F.interpolate(x[None], self.size, mode="bilinear", antialias=True, align_corners=False)[0]
        mean, std = (torch.tensor(v, dtype=x.dtype, device=x.device).view(-1, 1, 1) for v in (self.mean, self.std))
        return (x - mean) / std


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def to_tensor(image: Any) -> Tensor:
    """One picture as a (3, H, W) uint8 tensor."""
    if isinstance(image, Tensor):
        tensor = image
    elif isinstance(image, np.ndarray) and image.dtype == np.uint8:
        tensor = torch.from_numpy(image.copy())
        tensor = tensor.permute(2, 0, 1) if tensor.ndim == 3 else tensor
    elif isinstance(image, np.ndarray):
        tensor = torch.empty(0)
    elif hasattr(image, "convert"):  # a PIL image, without importing PIL
        tensor = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    else:
        raise ValueError(f"image is a {type(image).__name__}: expected a PIL image, a uint8 array or a uint8 tensor")
    if tensor.dtype != torch.uint8 or tensor.ndim != 3 or tensor.shape[0] != 3 or 0 in tensor.shape:
        order = "(height, width, 3)" if isinstance(image, np.ndarray) else "(3, height, width)"
        raise ValueError(f"image is {image.dtype} of shape {tuple(image.shape)}: expected uint8 of shape {order}")
    return tensor
