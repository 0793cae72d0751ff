"""Dense features of pictures that are too large for one forward: windows, blended where they overlap."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .checks import check_count, check_kind, check_size
from .features import block_index
from .loading import Backbone


@torch.no_grad()
def sliding_window_features(
    model: Backbone,
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
    model: a DINOv3ViT, whose stride is the patch size, or a DINOv3ConvNeXt, which needs windows where a picture's
        activations don't fit into memory: s is that of the stage asked for, from 4 to 32.
    window, stride: in pixels, an int or (height, width), multiples of the model's stride, 32 of a ConvNeXt, as the
        images' sides are; the stride is half the window unless given. The last window of a row or column is moved
        inwards to end at the border; a window larger than the picture is the picture.
    block, norm: which block's output, or stage's, and whether the final LayerNorm is applied (to a ConvNeXt's last
        stage only, as the others have none).
    batch_size: windows in one forward. progress: show a bar.

    Returns (B, C, H / s, W / s), s the model's stride. Where windows overlap, their features are averaged, each
    weighted by the distance to its window's border (a tent over rows times a tent over columns).
    Memory is that of the result and of one batch of windows. A patch sees no further than its windows do, and RoPE
    coordinates span each window.

    Raises ValueError for images of another rank or number of channels, for sizes that are no multiples of the model's
    stride, for a stride beyond the window, for a block that the model does not have, and for a batch_size below 1.
    """
    check_count("batch_size", batch_size)
    check_kind(pixel_values, model.num_channels, pixels=True)
    index = block_index(model, block)
    s, C = model.strides[index], model.embed_dims[index]
    lengths = check_size("window", window)
    steps = (None, None) if stride is None else check_size("stride", stride)
    sizes = pixel_values.shape[2:]
    sides = [_side(axis, sizes[axis], lengths[axis], steps[axis], model.stride) for axis in (0, 1)]
    (h, wh, y_step), (w, ww, x_step) = ([pixels // s for pixels in side] for side in sides)
    (y_starts, y_blends), (x_starts, x_blends) = blend(h, wh, y_step), blend(w, ww, x_step)

    dtype = torch.promote_types(model.dtype, torch.float32)
    out = torch.zeros(pixel_values.shape[0], C, h, w, dtype=dtype, device=pixel_values.device)
    places = [(b, i, j) for b in range(len(out)) for i in range(len(y_starts)) for j in range(len(x_starts))]
    for batch in _batches(places, batch_size, progress):
        crops = [
            pixel_values[b, :, s * y_starts[i] : s * (y_starts[i] + wh), s * x_starts[j] : s * (x_starts[j] + ww)]
            for b, i, j in batch
        ]
        (maps,) = model.get_intermediate_layers(torch.stack(crops).to(model.device), n=[index], reshape=True, norm=norm)
        for (b, i, j), feature_map in zip(batch, maps.to(out), strict=True):
            weight = torch.outer(y_blends[i], x_blends[j]).to(out)  # (wh, ww)
            out[b, :, y_starts[i] : y_starts[i] + wh, x_starts[j] : x_starts[j] + ww] += weight * feature_map
    return out


def _side(axis: int, size: int, length: int, step: int | None, p: int) -> tuple[int, int, int]:
    """Picture, window and stride along one axis, in pixels: multiples of the model's stride p."""
    name = ("height", "width")[axis]
    step = max(p, length // 2 // p * p) if step is None else step
    for what, pixels in (("image", size), ("window", length), ("stride", step)):
        if pixels < p or pixels % p:
            raise ValueError(f"{what} {name} is {pixels}: expected a multiple of {p}, the pixels of a patch")
    if step > length:
        raise ValueError(
            f"stride {name} is {step} and the window's {length}: patches between windows would be left out"
        )
    return size, min(length, size), step


def blend(size: int, length: int, step: int) -> tuple[list[int], list[Tensor]]:
    """Where windows start along an axis of `size` places, and each one's weights, which add up to 1 at every place."""
    starts = [*range(0, size - length, step), size - length]
    ramp = torch.arange(1, length + 1, dtype=torch.float64, device="cpu")
    tent = torch.minimum(ramp, ramp.flip(0))
    total = torch.zeros(size, dtype=torch.float64, device="cpu")
    for start in starts:
        total[start : start + length] += tent
    return starts, [tent / total[start : start + length] for start in starts]


def _batches(places: list[tuple[int, int, int]], size: int, progress: bool) -> Iterator[list[tuple[int, int, int]]]:
    from tqdm import tqdm

    with tqdm(total=len(places), unit=" windows", disable=not progress) as bar:
        for start in range(0, len(places), size):
            yield places[start : start + size]
            bar.update(len(places[start : start + size]))
