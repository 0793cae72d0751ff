"""A feature pyramid for segmentation decoders: four maps of a ViT's quarters, or of a ConvNeXt's stages."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .loading import Backbone, load


class PyramidEncoder(nn.Module):
    """(B, 3, H, W) -> [F1, F2, F3, F4]: feature maps of a ViT's blocks at 1/4, 2/4, 3/4 and 4/4 of its depth.

    Each map is (B, C, H/s, W/s) for its s in `strides` (a side shorter than s gives 1): the patch tokens before the
    final LayerNorm, resized. A ConvNeXt's maps are its four stages as they are: (B, c, H/s, W/s), c in `channels`.
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
    """Load a pretrained encoder with four maps, at strides 4, 8, 16 and 32 or, with `simple`, all at the patch size.

    model_name: a hub id, used if there is no pretrained_path.
    pretrained_path: a file or folder that `dinov3_lite.load` reads, of a ViT or a ConvNeXt.
    freeze: True computes no gradients and stays in evaluation mode; False is for fine-tuning.
    simple: leave a ViT's maps on the patch grid. Otherwise they are resized bilinearly, with align_corners=False; a
        ConvNeXt's are its four stages as they are, with unequal `channels`.
    loading: further arguments of `dinov3_lite.load`: dtype, device, attention, prefix, num_channels, channel_rule,
        subfolder, mesh, revision, cache_dir, local_files_only.

    Raises what `dinov3_lite.load` does, and ValueError for a model of fewer than four blocks and for a ConvNeXt with
    `simple`: its stages have strides of their own.
    """
    backbone = load(model_name if pretrained_path is None else pretrained_path, **loading)
    if backbone.depth < 4:
        raise ValueError(f"the model has {backbone.depth} blocks: four maps need at least 4")
    return PyramidEncoder(backbone, freeze, simple)
