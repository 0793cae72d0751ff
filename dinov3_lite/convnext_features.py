"""What Meta's and timm's classes have, by their names and with their meaning: a ConvNeXt's part of `features`.

The methods are functions over `DINOv3ConvNeXt.run_stages`, which the class binds.

Letters in the shape comments: B batch, h w a stage's grid, C its channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .checks import check_count
from .config import DINOv3ConvNeXtConfig
from .features import as_output, block_indices, dtype_of


class Sizes(nn.Module):
    """A model's sizes as attributes. They are read off its modules, and so stay right when those are changed."""

    stem: nn.Module
    stages: nn.ModuleList
    norm: nn.Module
    config: DINOv3ConvNeXtConfig

    @property
    def depth(self) -> int:
        """How many stages there are."""
        return len(self.stages)

    @property
    def embed_dims(self) -> tuple[int, ...]:
        """The channels of each stage's map."""
        return tuple(stage.channels for stage in self.stages)  # type: ignore[misc]

    @property
    def strides(self) -> tuple[int, ...]:
        """How many pixels of the image a pixel of each stage's map stands for, along one side."""
        return tuple(4 * 2**i for i in range(self.depth))

    @property
    def stride(self) -> int:
        """How many pixels a patch token stands for, along one side: the last of `strides`."""
        return self.strides[-1]

    def grid_of(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns (h, w) of the last stage's map for an image of this size. Raises ValueError if too small."""
        least = self.stride
        if least > height or least > width:
            raise ValueError(
                f"image height {height} and width {width} must be at least {least}, the stride of the last stage"
            )
        return height // least, width // least

    @property
    def layers(self) -> list[tuple[nn.Module, ...]]:
        """The groups of modules that `finetune` counts as layers, first to last: one block each, of all stages; the
        first block of a stage goes with the step down before it.
        """
        stages: Any = self.stages
        return [
            (stage.downsample, block) if i == 0 else (block,)
            for stage in stages
            for i, block in enumerate(stage.blocks)
        ]

    @property
    def embed_dim(self) -> int:
        """C, the channels of the last stage's map and the width of a token."""
        return self.embed_dims[-1]

    @property
    def num_channels(self) -> int:
        """The channels of an image."""
        return getattr(self.stem, "num_channels", self.config.num_channels)

    n_blocks = depth
    num_features = embed_dim
    n_storage_tokens = 0
    num_prefix_tokens = 1
    num_heads = 0
    packs = False
    """Whether images of different sizes can run as one sequence."""

    @property
    def dtype(self) -> torch.dtype:
        """The weights' dtype, that of the final LayerNorm: what `forward` returns."""
        return dtype_of(self.norm, self.stages, self.stem)

    @property
    def device(self) -> torch.device:
        """The device that the model lies on."""
        return next(self.parameters()).device


def get_intermediate_layers(
    model: Any,
    x: Tensor,
    n: int | str | Sequence[int] = 1,
    reshape: bool = False,
    return_class_token: bool = False,
    return_extra_tokens: bool = False,
    norm: bool = True,
    patch_size: int | None = None,
) -> tuple[Any, ...]:
    """Return the outputs of the last n stages, or of the stages that n lists, in ascending order: Meta's method.

    n: a count; a list of indices from 0 to 3, counted from the end if negative; "quarters" or "dpt", all four.
    norm: applies the final LayerNorm to the last stage; the others have none and stay as they are.
    patch_size: resizes each map to (H // patch_size, W // patch_size), a ViT's grid, by bilinear interpolation with
        antialiasing; None is the model's own `patch_size`.

    Each output is the stage's map as tokens (B, h*w, C), or (B, C, h, w) with `reshape`. With `return_class_token` or
    `return_extra_tokens` it is a tuple that continues with the map's mean (B, C) and with a ConvNeXt's register
    tokens, of which there are none: (B, 0, C).

    Raises ValueError for a count or an index that the model does not have, and for a patch size that is no whole
    number from 1 to the image's shorter side.
    """
    taps = block_indices(model, n)
    patch_size = model.patch_size if patch_size is None else patch_size
    outputs: list[tuple[Tensor, ...]] = []
    for i, state in zip(taps, model.run_stages(model.embed(x), taps), strict=True):
        parts = mean_token(state), on_grid(state, x, patch_size)  # (B, 1, C), (B, h, w, C)
        pooled, patches = (model.norm(t) if norm and i == model.depth - 1 else as_output(model, t) for t in parts)
        output = [patches.permute(0, 3, 1, 2) if reshape else patches.flatten(1, 2)]
        if return_class_token:
            output.append(pooled[:, 0])
        if return_extra_tokens:
            output.append(pooled[:, 1:])
        outputs.append(tuple(output))
    return tuple(o if return_class_token or return_extra_tokens else o[0] for o in outputs)


def forward_features(model: Any, x: Tensor | list[Tensor], masks: Any = None) -> Any:
    """Return Meta's dictionary: x_norm_clstoken (B, C), x_storage_tokens (B, 0, C), x_norm_patchtokens (B, h*w, C),
    x_prenorm, masks.

    All are after the final LayerNorm but x_prenorm, the last stage's map as tokens (B, h*w, C). With a list of
    batches (crops of different sizes), a list of dictionaries.

    Raises ValueError as `forward` does, for an empty list, and for masks.
    """
    if not isinstance(x, Tensor):
        x = list(x)
        if not x or (masks is not None and len(masks) != len(x)):
            raise ValueError(f"x is a list of {len(x)} batches: expected at least one, and as many masks")
        return [forward_features(model, *pair) for pair in zip(x, masks or [None] * len(x), strict=True)]
    refuse(masks=masks)
    (state,) = model.run_stages(model.embed(x), (model.depth - 1,))
    normed = model.norm(to_tokens(state))
    return {
        "x_norm_clstoken": normed[:, 0],
        "x_storage_tokens": normed[:, 1:1],
        "x_norm_patchtokens": normed[:, 1:],
        "x_prenorm": as_output(model, state.flatten(1, 2)),
        "masks": masks,
    }


def forward_intermediates(
    model: Any,
    x: Tensor,
    indices: int | str | Sequence[int] | None = None,
    norm: bool = False,
    stop_early: bool = False,
    output_fmt: str = "NCHW",
    intermediates_only: bool = False,
) -> Any:
    """Return the last map and a list of stages' maps (B, C, h, w), or the list alone: timm's method.

    indices: as n of `get_intermediate_layers`; None is every stage.
    norm: without effect, as in timm: the final LayerNorm comes after pooling, and all maps are before it.
    stop_early: run no stage after the last one asked for; the first result is then that stage's map.
    intermediates_only: return the list alone, and run no stage after the last one asked for.

    Raises ValueError for an index that the model does not have and for another output_fmt.
    """
    if output_fmt != "NCHW":
        raise ValueError(f"output_fmt is {output_fmt!r}: expected 'NCHW', all that timm's ConvNeXt has")
    taps = block_indices(model, model.depth if indices is None else indices, "indices")
    last = taps[-1] if intermediates_only or stop_early else model.depth - 1
    maps = [to_map(model, state) for state in model.run_stages(model.embed(x), sorted({*taps, last}))]
    return maps[: len(taps)] if intermediates_only else (maps[-1], maps[: len(taps)])


def feature_info(model: Any) -> list[dict[str, Any]]:
    """Module, num_chs (channels) and reduction (stride) of each stage's map, as timm describes them."""
    return [
        {"num_chs": channels, "reduction": stride, "module": f"stages.{i}"}
        for i, (channels, stride) in enumerate(zip(model.embed_dims, model.strides, strict=True))
    ]


def mean_token(state: Tensor) -> Tensor:
    """The mean over a map's pixels, which a ConvNeXt has for a CLS token: (B, h, w, C) -> (B, 1, C)."""
    return state.mean(dim=(1, 2)).unsqueeze(1)


def to_tokens(state: Tensor) -> Tensor:
    """The mean, then the map's pixels row by row: (B, h, w, C) -> (B, 1 + h*w, C)."""
    return torch.cat((mean_token(state), state.flatten(1, 2)), dim=1)


def to_map(model: Any, state: Tensor) -> Tensor:
    """Give a stage's output channels first and cast it as `as_output` does: (B, h, w, C) -> (B, C, h, w)."""
    return as_output(model, state).permute(0, 3, 1, 2)


def on_grid(state: Tensor, images: Tensor, patch_size: int | None) -> Tensor:
    """Resize a map (B, h, w, C) to the grid that a ViT with this patch size has; None returns it as it is.

    PyTorch resizes so in float32 and float64 alone: a narrower map is resized in float32.
    """
    if patch_size is None:
        return state
    side, (H, W) = check_count("patch_size", patch_size), images.shape[-2:]
    if side > min(H, W):
        raise ValueError(f"patch_size is {side}: expected 1 to {min(H, W)} for images of {H} x {W} pixels")
    wide = state.to(torch.promote_types(state.dtype, torch.float32)).permute(0, 3, 1, 2)
    resized = F.interpolate(wide, (H // side, W // side), mode="bilinear", antialias=True)
    return resized.permute(0, 2, 3, 1).to(state.dtype)


def refuse(**tensors: Tensor | None) -> None:
    """Raise ValueError if one of these arguments is given, which only a ViT, which is made of tokens, takes."""
    for name, tensor in tensors.items():
        if tensor is not None:
            raise ValueError(f"{name} is given: a ConvNeXt has no tokens to mask or leave out, only a DINOv3ViT has")
