"""What a forward accepts. Everything else is a ValueError of one sentence: what was found, what was expected."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor

from .tracing import traced

BATCH = ("batch", "channels", "height", "width")
SINGLE = BATCH[1:]


def check_images(
    images: Tensor,
    channels: int,
    patch_size: int,
    name: str = "pixel_values",
    dims: tuple[str, ...] = BATCH,
    pixels: bool = False,
) -> tuple[int, int]:
    """Return the patch grid (h, w) of images (batch, channels, height, width), or of one image without the batch.

    name: what errors call them. dims: the names of the axes, `BATCH` or `SINGLE`. pixels: allow integer dtypes too.
    Raises ValueError for another rank, number of channels, dtype or size.
    """
    check_kind(images, channels, name, dims, pixels)
    height, width = images.shape[-2:]
    return patch_grid(height, width, patch_size)


def patch_grid(H: int, W: int, p: int) -> tuple[int, int]:
    """Return the grid (h, w) of patches of p pixels a side in an image of H x W pixels. Raises ValueError unless both
    are multiples of p.
    """
    if p > H or p > W or H % p or W % p:
        raise ValueError(
            f"image height {H} and width {W} must be multiples of the patch size {p}: "
            f"the nearest that work are height {_nearest_multiples(H, p)} and width {_nearest_multiples(W, p)}"
        )
    return H // p, W // p


def check_kind(
    images: Tensor, channels: int, name: str = "pixel_values", dims: tuple[str, ...] = BATCH, pixels: bool = False
) -> None:
    """Raise ValueError for images of another rank, number of channels or dtype, whatever their size. Arguments: see
    `check_images`.
    """
    expected = ", ".join(dims).replace("channels", str(channels))
    if isinstance(images, torch.fx.Proxy):
        raise ValueError(
            f"{name} is a Proxy of torch.fx, which can't follow a model whose steps depend on the size of the image: "
            "trace around the model, with its class among the tracer's leaf modules, or use torch.export"
        )
    if not isinstance(images, Tensor):
        raise ValueError(
            f"{name} is a {type(images).__name__}: expected a tensor ({expected}), which dinov3_lite.ImageProcessor "
            "makes of pictures and of arrays"
        )
    if images.ndim != len(dims) or images.shape[-3] != channels:
        raise ValueError(f"{name} has shape {tuple(images.shape)}: expected ({expected})")
    if not (pixels or images.is_floating_point()):
        raise ValueError(
            f"{name} is {images.dtype}: expected normalised floating-point images, "
            "which dinov3_lite.ImageProcessor makes of pictures"
        )


def _nearest_multiples(size: int, p: int) -> str:
    below = size // p * p
    if below == size and size:
        return f"{size}"
    return f"{below} or {below + p}" if below else f"{p}"


def check_mask(bool_masked_pos: Tensor, patches: Tensor) -> None:
    """Raise ValueError unless a mask is bool of shape (B, P), for patches (B, P, C)."""
    known = isinstance(bool_masked_pos, Tensor) and bool_masked_pos.dtype == torch.bool
    if not known or bool_masked_pos.shape != patches.shape[:2]:
        raise ValueError(
            f"bool_masked_pos is {_kind(bool_masked_pos)}: "
            f"expected torch.bool of shape {tuple(patches.shape[:2])}, one value a patch"
        )


def _kind(found: Any) -> str:
    return f"{found.dtype} of shape {tuple(found.shape)}" if isinstance(found, Tensor) else f"a {type(found).__name__}"


def check_patches(patches: Tensor, grid: tuple[int, int]) -> None:
    """Raise ValueError unless patches (B, P, C) are as many as the grid has: a projection that somebody put in may
    give more or fewer.
    """
    h, w = grid
    if patches.ndim != 3 or patches.shape[1] != h * w:
        raise ValueError(
            f"patch_embed gives patches of shape {tuple(patches.shape)}: expected (batch, {h * w}, C), one for each of "
            f"{h} x {w} places of the image; its patches must touch, and neither overlap nor be padded"
        )


def check_keep_indices(keep_indices: Tensor, patches: Tensor) -> None:
    """Raise ValueError unless these are int64 indices (B, K) of patches (B, P, C).

    On a GPU values out of range are not looked for, which would wait for it: the gather reports them.
    """
    B, P = patches.shape[:2]
    known = isinstance(keep_indices, Tensor) and keep_indices.dtype == torch.int64
    if not known or keep_indices.ndim != 2 or keep_indices.shape[0] != B:
        raise ValueError(
            f"keep_indices is {_kind(keep_indices)}: expected torch.int64 of shape ({B}, number of patches to keep)"
        )
    if traced() or keep_indices.device.type != "cpu" or not keep_indices.numel():
        return
    if keep_indices.min() < 0 or keep_indices.max() >= P:
        raise ValueError(
            f"keep_indices goes from {keep_indices.min()} to {keep_indices.max()}: expected 0 to {P - 1}, "
            "the patches of the image row by row"
        )


def check_dtype(dtype: torch.dtype | None) -> None:
    """Raise ValueError unless this is a dtype that weights may have, or None, the checkpoint's own."""
    if dtype not in (None, torch.float64, torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"dtype is {dtype!r}: expected torch.float32, float16, bfloat16, float64 or None")


def check_size(name: str, value: Any) -> tuple[int, int]:
    """Return `value` as (height, width); one number is a square. Raises ValueError that calls it `name` for another."""
    found = value.tolist() if hasattr(value, "tolist") else value  # an array, a tensor, or a number out of one
    found = [found, found] if isinstance(found, int) else found
    pair = [n.item() if hasattr(n, "item") else n for n in found] if isinstance(found, (list, tuple)) else []
    if len(pair) != 2 or not all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in pair):
        raise ValueError(f"{name} is {value!s:.100}: expected (height, width), two whole numbers of pixels")
    return pair[0], pair[1]


def check_count(name: str, value: Any) -> int:
    """Return `value` as an int. Raises ValueError that calls it `name` unless it is a whole number from 1 on."""
    try:
        count = operator.index(value)
    except TypeError:
        count = 0
    if count < 1 or isinstance(value, bool):
        raise ValueError(f"{name} is {value!r}: expected a whole number from 1 up")
    return count
