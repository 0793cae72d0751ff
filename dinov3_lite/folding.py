"""Constant factors folded into the weights beside them.

Folding is exact in real arithmetic. With LayerScale's gamma, the branch's last projection W h + b, and a processor that
maps pixels p to (r p - mean) / std:

    x + gamma * (W h + b)         =  x + (gamma W) h + gamma b
    W ((r p - mean) / std) + b    =  (W r / std) (p - c) + b + sum W (r c - mean) / std

Patches don't overlap and nothing is padded, so the second line holds for every patch. c is the whole number nearest
mean / r: p - c loses no digit, and its sums are as small as those of normalised images.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .convnext import ConvNeXtBlock, Stem
from .features import dtype_of
from .image import ImageProcessor
from .layers import Block, GatedMlp, LayerScale, Mlp, PatchEmbed


@torch.no_grad()
def fold(block: Block | ConvNeXtBlock) -> nn.Module:
    """Return a block that computes the same, with LayerScale in its projections; it shares the other weights.

    In half precision LayerScale stays: gamma W would be rounded once more than W is.
    """
    folded = copy_sharing_weights(block)
    if dtype_of(folded.mlp).itemsize < 4:
        return folded
    last = getattr(folded.mlp, {Mlp: "fc2", GatedMlp: "w3"}[type(folded.mlp)])
    branches = {"ls": last} if isinstance(folded, ConvNeXtBlock) else {"ls1": folded.attn.proj, "ls2": last}
    for name, projection in branches.items():
        scale: LayerScale = getattr(folded, name)
        projection.weight = _constant(scale.gamma.unsqueeze(1) * projection.weight)
        if projection.bias is not None:
            projection.bias = _constant(scale.gamma * projection.bias)
        folded.add_module(name, Residual())
    return folded


def copy_sharing_weights(module: nn.Module) -> Any:
    """A copy of the modules, with the same tensors in them."""
    return copy.deepcopy(module, {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())})


class Residual(nn.Module):
    """x + branch in x's dtype, where LayerScale is part of the branch already."""

    def forward(self, x: Tensor, branch: Tensor) -> Tensor:
        return (x + branch).to(x.dtype)


class PixelConv(nn.Module):
    """A convolution made over for pixels that are not normalised, in float32 or wider: (B, 3, H, W) -> (B, C, h, w)."""

    centre: Tensor

    @torch.no_grad()
    def __init__(self, conv: nn.Conv2d, processor: ImageProcessor) -> None:
        super().__init__()
        weight = conv.weight.double()
        mean, std = (weight.new_tensor(values).view(-1, 1, 1) for values in (processor.mean, processor.std))
        centre = (mean / processor.rescale_factor).round()
        offset = (weight * ((processor.rescale_factor * centre - mean) / std)).sum(dim=(1, 2, 3))
        bias = offset if conv.bias is None else offset + conv.bias.double()
        dtype = torch.promote_types(conv.weight.dtype, torch.float32)
        self.stride = conv.stride
        self.weight = _constant((weight * (processor.rescale_factor / std)).to(dtype))
        self.bias = _constant(bias.to(dtype))
        self.register_buffer("centre", centre.to(dtype))

    @staticmethod
    def fits(conv: nn.Module) -> bool:
        """Whether every patch is of pixels alone, without padding or gaps, and of all channels."""
        if not isinstance(conv, nn.Conv2d):
            return isinstance(conv, PixelConv)
        return conv.padding == (0, 0) and conv.dilation == (1, 1) and conv.groups == 1

    def forward(self, pixels: Tensor) -> Tensor:
        return F.conv2d(pixels - self.centre, self.weight, self.bias, self.stride)


def for_pixels(embed: PatchEmbed | Stem, processor: ImageProcessor) -> nn.Module:
    """`embed` with the processor's normalisation in its convolution, or as it is where that doesn't fit."""
    name = "conv" if isinstance(embed, Stem) else "proj"
    conv = getattr(embed, name)
    if not PixelConv.fits(conv):
        return embed
    made_over = copy_sharing_weights(embed)
    made_over.add_module(name, PixelConv(conv, processor))
    return made_over


def _constant(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)
