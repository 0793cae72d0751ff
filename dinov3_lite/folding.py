"""Constant factors folded into the weights beside them, and the blocks' weights prepacked.

Folding is exact in real arithmetic. With LayerScale's gamma, the branch's last projection W h + b, and a processor that
maps pixels p to (r p - mean) / std:

    x + gamma * (W h + b)         =  x + (gamma W) h + gamma b
    W ((r p - mean) / std) + b    =  (W r / std) (p - c) + b + sum W (r c - mean) / std

Patches don't overlap and nothing is padded, so the second line holds for every patch. c is the whole number nearest
mean / r: p - c loses no digit, and its sums are as small as those of normalised images.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .image import ImageProcessor
from .layers import Block, GatedMlp, Mlp, PatchEmbed
from .prepacked import prepack


@torch.no_grad()
def fold(block: Block) -> Block:
    """Return a block that computes the same, with LayerScale in its projections; it shares the other weights."""
    folded = copy.deepcopy(block, {id(tensor): tensor for tensor in (*block.parameters(), *block.buffers())})
    last = {Mlp: "fc2", GatedMlp: "w3"}[type(folded.mlp)]
    for projection, scale in ((folded.attn.proj, folded.ls1), (getattr(folded.mlp, last), folded.ls2)):
        projection.weight = _constant(scale.gamma.unsqueeze(1) * projection.weight)
        if projection.bias is not None:
            projection.bias = _constant(scale.gamma * projection.bias)
    folded.add_module("ls1", Residual())
    folded.add_module("ls2", Residual())
    return folded


class Residual(nn.Module):
    """x + branch, where LayerScale is part of the branch already."""

    def forward(self, x: Tensor, branch: Tensor) -> Tensor:
        return x + branch


@torch.no_grad()
def prepack_projections(block: Block, dynamic: bool) -> None:
    """Replace every projection of a block by a prepacked one."""
    for part in (block.attn, block.mlp):
        for name, child in part.named_children():
            if isinstance(child, nn.Linear):
                part.add_module(name, prepack(child, dynamic))


class PixelPatchEmbed(nn.Module):
    """`embed` made over for pixels that are not normalised, in float32 or wider: (B, 3, H, W) -> (B, P, C)."""

    centre: Tensor

    @torch.no_grad()
    def __init__(self, embed: PatchEmbed, processor: ImageProcessor) -> None:
        super().__init__()
        weight = embed.proj.weight.double()
        mean, std = (weight.new_tensor(values).view(-1, 1, 1) for values in (processor.mean, processor.std))
        centre = (mean / processor.rescale_factor).round()
        offset = (weight * ((processor.rescale_factor * centre - mean) / std)).sum(dim=(1, 2, 3))
        bias = offset if embed.proj.bias is None else offset + embed.proj.bias.double()
        dtype = torch.promote_types(embed.proj.weight.dtype, torch.float32)
        self.stride = embed.proj.stride
        self.weight = _constant((weight * (processor.rescale_factor / std)).to(dtype))
        self.bias = _constant(bias.to(dtype))
        self.register_buffer("centre", centre.to(dtype))

    @staticmethod
    def fits(embed: PatchEmbed) -> bool:
        """Whether every patch is of pixels alone, without padding, and of all channels."""
        return embed.proj.padding == (0, 0) and embed.proj.groups == 1

    def forward(self, pixels: Tensor) -> Tensor:
        return F.conv2d(pixels - self.centre, self.weight, self.bias, self.stride).flatten(2).transpose(1, 2)


def _constant(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)
