"""A model made ready for repeated inference: constant factors folded into the weights, then compiled by inductor.

Folding is exact in real arithmetic. With LayerScale's gamma, the branch's last projection W h + b, and a processor that
maps pixels p to (r p - mean) / std:

    x + gamma * (W h + b)         =  x + (gamma W) h + gamma b
    W ((r p - mean) / std) + b    =  (W r / std) (p - c) + b + sum W (r c - mean) / std

Patches don't overlap and nothing is padded, so the second line holds for every patch. c is the whole number nearest
mean / r: p - c loses no digit, and its sums are as small as those of normalised images.
"""

from __future__ import annotations

import copy
import time
from typing import Any

import torch
from torch import Tensor, nn

from .image import ImageProcessor
from .layers import Block, Mlp, PatchEmbed
from .model import DINOv3ViT

EXAMPLE = (14, 16)  # grid that graphs for all sizes are compiled with: unequal sides, near the usual 224 pixels


def compile(model: nn.Module, processor: ImageProcessor | None = None, *, dynamic: bool = True) -> CompiledModel:
    """`model` for inference: the same call and the same outputs, from folded weights through torch.compile.

    model: a DINOv3ViT, or a module around one (a backbone, a head on top) that takes images, in evaluation mode. It
        stays as it is and shares its other weights with the result: compile again once they have changed.
    processor: the images are then uint8 pixels (B, 3, H, W) of any size that the model takes, and the processor's
        rescaling and normalisation are part of the patch embedding, in float32 whatever the model's dtype. Its
        resizing is not done.
    dynamic: one graph for all sizes and batches, and one for single images (a grid of one row or column of patches
        has its own). False compiles a graph for each new shape, where those are few.

    Compiling takes place at the first call, or in `warm_up`; torch keeps the result on disk for later processes.

    Raises ValueError for a model in training mode and for one without a DINOv3ViT.
    """
    if not any(isinstance(module, DINOv3ViT) for module in model.modules()):
        raise ValueError(f"model is a {type(model).__name__} without a DINOv3ViT inside: there is nothing to fold")
    if model.training:
        raise ValueError("the model is in training mode, where RoPE coordinates are random: call model.eval() first")
    return CompiledModel(fold(model, processor), torch.uint8 if processor else None, dynamic)


class CompiledModel(nn.Module):
    """What `compile` returns. Runs without gradients; its outputs may be trained on."""

    def __init__(self, folded: nn.Module, pixel_dtype: torch.dtype | None, dynamic: bool) -> None:
        super().__init__()
        self.folded = folded
        self.pixel_dtype = pixel_dtype
        self.dynamic = dynamic
        self._run = torch.compile(folded, fullgraph=True, dynamic=dynamic)
        self._general: set[bool] = set()  # whether the graphs for one image and for more are there
        self.eval()

    @torch.no_grad()
    def forward(self, images: Tensor) -> Any:
        """The model's own call.

        Raises ValueError for images that the model does not take, or not uint8 where a processor was folded in.
        """
        if self.pixel_dtype is not None:
            if images.dtype != self.pixel_dtype:
                raise ValueError(
                    f"images are {images.dtype}: expected {self.pixel_dtype} pixels, which the processor given to "
                    "compile() normalises"
                )
            images = images.float()
        self._vit._check_images(images)  # inside the graph, the error would be the compiler's
        if self.dynamic:
            self._generalise(images)
        return self._run(images)

    def _generalise(self, images: Tensor) -> None:
        """Let the graph be made from images of unequal sides: from square ones it would hold for squares alone."""
        single = len(images) == 1
        if single not in self._general:
            h, w = (n * self._vit.patch_size for n in EXAMPLE)
            self._run(images.new_zeros(1 if single else 2, images.shape[1], h, w))
            self._general.add(single)

    def warm_up(self, batch: int, height: int, width: int) -> float:
        """Compile for images of this shape, and run once: the seconds that it took."""
        shape = (batch, self._vit.config.num_channels, height, width)
        images = torch.zeros(shape, dtype=self.pixel_dtype, device=self._vit.norm.weight.device)
        start = time.perf_counter()
        self(images)
        return time.perf_counter() - start

    @property
    def _vit(self) -> DINOv3ViT:
        return next(module for module in self.folded.modules() if isinstance(module, DINOv3ViT))


class Residual(nn.Module):
    """x + branch, where LayerScale is part of the branch already."""

    def forward(self, x: Tensor, branch: Tensor) -> Tensor:
        return x + branch


class PixelPatchEmbed(nn.Module):
    """`embed` made over for pixels that are not normalised, in float32 or wider: (B, 3, H, W) -> (B, P, C)."""

    centre: Tensor

    def __init__(self, embed: PatchEmbed, processor: ImageProcessor) -> None:
        super().__init__()
        conv = embed.proj
        assert conv.bias is not None
        weight, bias = conv.weight.double(), conv.bias.double()
        mean, std = (weight.new_tensor(values).view(-1, 1, 1) for values in (processor.mean, processor.std))
        centre = (mean / processor.rescale_factor).round()
        offset = (weight * ((processor.rescale_factor * centre - mean) / std)).sum(dim=(1, 2, 3))
        dtype = torch.promote_types(conv.weight.dtype, torch.float32)
        self.proj = conv
        self.proj.weight = _constant((weight * (processor.rescale_factor / std)).to(dtype))
        self.proj.bias = _constant((bias + offset).to(dtype))
        self.register_buffer("centre", centre.to(dtype))

    def forward(self, pixels: Tensor) -> Tensor:
        return self.proj(pixels - self.centre).flatten(2).transpose(1, 2)


@torch.no_grad()
def fold(model: nn.Module, processor: ImageProcessor | None = None) -> nn.Module:
    """A copy of `model` that shares its weights, but for those that LayerScale and the normalisation went into."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    folded = copy.deepcopy(model, shared)
    for module in list(folded.modules()):
        if isinstance(module, Block):
            last = module.mlp.fc2 if isinstance(module.mlp, Mlp) else module.mlp.w3
            fold_layer_scale(module.attn.proj, module.ls1.gamma)
            fold_layer_scale(last, module.ls2.gamma)
            module.add_module("ls1", Residual())
            module.add_module("ls2", Residual())
        elif isinstance(module, DINOv3ViT) and processor is not None:
            module.add_module("patch_embed", PixelPatchEmbed(module.patch_embed, processor))
    return folded


def fold_layer_scale(projection: nn.Linear, gamma: Tensor) -> None:
    """Fold gamma * (W h + b) into one affine map."""
    projection.weight = _constant(gamma.unsqueeze(1) * projection.weight)
    if projection.bias is not None:
        projection.bias = _constant(gamma * projection.bias)


def _constant(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)
