"""Dense features of pictures that are too large for one forward: windows, blended where they overlap."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .checks import check_count
from .model import DINOv3ViT


@torch.no_grad()
def sliding_window_features(
    model: DINOv3ViT,
    pixel_values: Tensor,
    window: int | tuple[int, int] = 512,
    stride: int | tuple[int, int] | None = None,
    *,
    block: int = -1,
    norm: bool = True,
    batch_size: int = 1,
    progress: bool = False,
) -> Tensor:
    """Dense features of large pictures: the model runs on overlapping windows, whose maps are blended into one.

    pixel_values: (B, 3, H, W) normalised images, on any device, which need not be the model's: windows are moved to the
        model one by one. The result lies where pixel_values do, in float32 or wider.
    window, stride: in pixels, an int or (height, width), multiples of the patch size; the stride is half the window
        unless given. The last window of a row or column is moved inwards to end at the border; a window larger
        than the picture is the picture.
    block, norm: which block's output, and whether the final LayerNorm is applied.
    batch_size: windows in one forward. progress: show a bar.

    Returns (B, C, H / p, W / p), p the patch size. Where windows overlap, their features are averaged, each weighted by
    the distance to its window's border (a tent over rows times a tent over columns).
    Memory is that of the result and of one batch of windows. A patch sees no further than its windows do, and RoPE
    coordinates span each window.

    Raises ValueError for sizes that are no multiples of the patch size, for a stride beyond the window, and for a
    batch_size below 1.
    """
    check_count("batch_size", batch_size)
    if not isinstance(model, DINOv3ViT):
        raise ValueError(
            f"model is a {type(model).__name__}: windows are for a DINOv3ViT; a ConvNeXt sees the same at any size, so "
            "run it on the whole picture, or on strips of it"
        )
    p = model.patch_size
    sides = [_side("height", 0, pixel_values, window, stride, p), _side("width", 1, pixel_values, window, stride, p)]
    (y_starts, y_blends), (x_starts, x_blends) = (blend(*side) for side in sides)
    h, w = (size for size, _, _ in sides)
    wh, ww = (length for _, length, _ in sides)

    device = next(model.parameters()).device
    dtype = torch.promote_types(model.dtype, torch.float32)
    out = torch.zeros(pixel_values.shape[0], model.embed_dim, h, w, dtype=dtype, device=pixel_values.device)
    places = [(b, i, j) for b in range(len(out)) for i in range(len(y_starts)) for j in range(len(x_starts))]
    for batch in _batches(places, batch_size, progress):
        crops = [
            pixel_values[b, :, p * y_starts[i] : p * (y_starts[i] + wh), p * x_starts[j] : p * (x_starts[j] + ww)]
            for b, i, j in batch
        ]
        (maps,) = model.get_intermediate_layers(torch.stack(crops).to(device), n=[block], reshape=True, norm=norm)
        for (b, i, j), feature_map in zip(batch, maps.to(out), strict=True):
            weight = torch.outer(y_blends[i], x_blends[j]).to(out)  # (wh, ww)
            out[b, :, y_starts[i] : y_starts[i] + wh, x_starts[j] : x_starts[j] + ww] += weight * feature_map
    return out


def _side(
    name: str, axis: int, images: Tensor, window: int | tuple[int, int], stride: int | tuple[int, int] | None, p: int
) -> tuple[int, int, int]:
    """Picture, window and stride along one axis, in patches."""
    size = images.shape[2 + axis]
    length = window if isinstance(window, int) else window[axis]
    step = max(p, length // 2 // p * p) if stride is None else stride if isinstance(stride, int) else stride[axis]
    for what, pixels in (("image", size), ("window", length), ("stride", step)):
        if not isinstance(pixels, int) or pixels < p or pixels % p:
            raise ValueError(f"{what} {name} is {pixels}: expected a multiple of the patch size {p}")
    if step > length:
        raise ValueError(
            f"stride {name} is {step} and the window's {length}: patches between windows would be left out"
        )
    return size // p, min(length, size) // p, step // p


def blend(size: int, length: int, step: int) -> tuple[list[int], list[Tensor]]:
    """Where windows start along an axis of `size` patches, and each one's weights, which add up to 1 at every patch."""
    starts = [*range(0, size - length, step), size - length]
    ramp = torch.arange(1, length + 1, dtype=torch.float64)
    tent = torch.minimum(ramp, ramp.flip(0))
    total = torch.zeros(size, dtype=torch.float64)
    for start in starts:
        total[start : start + length] += tent
    return starts, [tent / total[start : start + length] for start in starts]


def _batches(places: list[tuple[int, int, int]], size: int, progress: bool) -> Iterator[list[tuple[int, int, int]]]:
    from tqdm import tqdm

    with tqdm(total=len(places), unit="window", disable=not progress) as bar:
        for start in range(0, len(places), size):
            yield places[start : start + size]
            bar.update(len(places[start : start + size]))
