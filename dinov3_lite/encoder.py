"""A feature pyramid for segmentation decoders: four maps of a ViT's quarters, or of a ConvNeXt's stages."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .loading import Backbone, load


class PyramidEncoder(nn.Module):
    """(B, 3, H, W) -> [F1, F2, F3, F4], patch tokens of the blocks at 1/4, 2/4, 3/4 and 4/4 of a ViT's depth as maps.

    The maps are (B, C, H/s, W/s) for s in `strides`, before the final LayerNorm; a side shorter than s gives 1. Of a
    ConvNeXt they are its four stages as they are, (B, c, H/s, W/s) for c in `channels`.
    A frozen encoder computes no gradients, keeps no activations, and stays in evaluation mode whatever its parent does.
    """

    def __init__(self, backbone: Backbone, freeze: bool = True, simple: bool = False) -> None:
        super().__init__()
        self.backbone = backbone
        self.freeze = freeze
        self.blocks = backbone.block_indices("quarters")
        self.native = tuple(backbone.strides[i] for i in self.blocks)
        self.channels = tuple(backbone.embed_dims[i] for i in self.blocks)
        p, one_grid = self.native[0], len(set(self.native)) == 1
        if simple and not one_grid:
            raise ValueError("simple keeps a vision transformer's one grid: a ConvNeXt has four, leave simple out")
        self.strides = (p // 4, p // 2, p, 2 * p) if one_grid and not simple else self.native
        backbone.requires_grad_(not freeze)
        self.train(not freeze)

    def forward(self, x: Tensor) -> list[Tensor]:
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.freeze):
            maps = self.backbone.get_intermediate_layers(x, n=self.blocks, reshape=True, norm=False)
            strides = zip(self.native, self.strides, strict=True)
            return [m if old == new else _resize(m, x, new) for m, (old, new) in zip(maps, strides, strict=True)]

    def train(self, mode: bool = True) -> PyramidEncoder:
        return super().train(mode and not self.freeze)


def _resize(feature_map: Tensor, x: Tensor, stride: int) -> Tensor:
    """The map on the grid that the images `x` have at this stride."""
    size = (max(1, x.shape[-2] // stride), max(1, x.shape[-1] // stride))
    return F.interpolate(feature_map, size, mode="bilinear", align_corners=False)


def build_dinov3_encoder(
    model_name: str = "facebook/dinov3-vitb16-pretrain-lvd1689m",
    pretrained_path: str | os.PathLike[str] | None = None,
    freeze: bool = True,
    simple: bool = False,
    **loading: Any,
) -> PyramidEncoder:
    """A pretrained encoder whose four maps have strides 4, 8, 16 and 32 or, with `simple`, all 16 (at patch size 16).

    model_name: a hub id, used if there is no pretrained_path.
    pretrained_path: whatever `dinov3_lite.load` reads: a ViT, or a ConvNeXt, of which nothing is resized and whose maps
        have unequal `channels`.
    freeze: no gradients, always in evaluation mode; False fine-tunes. Resizing is bilinear with align_corners=False.
    loading: further arguments of `dinov3_lite.load`: dtype, device, attention, prefix, num_channels, channel_rule,
        subfolder, revision, cache_dir, local_files_only.

    Raises what `dinov3_lite.load` does, and ValueError if the model has fewer than four blocks, and for `simple` of a
    ConvNeXt.
    """
    backbone = load(model_name if pretrained_path is None else pretrained_path, **loading)
    if backbone.depth < 4:
        raise ValueError(f"the model has {backbone.depth} blocks: four maps need at least 4")
    return PyramidEncoder(backbone, freeze, simple)
