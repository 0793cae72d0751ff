"""A model made ready for repeated inference: constant factors folded into the weights, then either of two backends.

On a CPU the blocks' weights are put into the layout of the library that multiplies by them, oneDNN or MKL, both of
which PyTorch brings along: no matrix product packs them anew, and nothing is compiled. Elsewhere inductor compiles the
model.

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
import torch.nn.functional as F
from torch import Tensor, nn

from .image import ImageProcessor
from .layers import Block, Mlp, PatchEmbed, QKVProjection
from .model import DINOv3ViT

BACKENDS = ("auto", "packed", "inductor")
EXAMPLE = (14, 16)  # grid that graphs for all sizes are compiled with: unequal sides, near the usual 224 pixels
MANY_ROWS = 300  # of a float32 product: beside more, packing a weight costs nothing to speak of


def compile(
    model: nn.Module, processor: ImageProcessor | None = None, *, backend: str = "auto", dynamic: bool = True
) -> CompiledModel:
    """`model` for inference: the same call and the same outputs, from folded weights.

    model: a DINOv3ViT, or a module around one (a backbone, a head on top) that takes images, in evaluation mode. It
        stays as it is and shares its other weights with the result: compile again once they have changed, or the
        model has moved.
    processor: the images are then uint8 pixels (B, 3, H, W) of any size that the model takes, and the processor's
        rescaling and normalisation are part of the patch embedding, in float32 whatever the model's dtype. Its
        resizing is not done.
    backend: "packed" holds the blocks' weights once more, in a library's own layout, and compiles nothing. "inductor"
        is torch.compile, at the first call or in `warm_up`; torch keeps what it compiled on disk for later processes.
        "auto" is packed for a model on a CPU where oneDNN takes its dtype, else inductor.
    dynamic: True prepares for all sizes and batches at once: one packing, oneDNN's; or one graph of inductor's and
        another for single images (a grid of one row or column of patches has its own). False is faster where shapes
        seldom change: float32 weights are packed by MKL, anew whenever the number of tokens in a batch changes (0.1 s
        for a ViT-B; half precision stays oneDNN's); or a graph is compiled for each new shape.

    Raises ValueError for a model in training mode, for one without a DINOv3ViT, for an unknown backend, and for
    "packed" where oneDNN does not take the model.
    """
    weight = vit_inside(model).norm.weight
    if model.training:
        raise ValueError("the model is in training mode, where RoPE coordinates are random: call model.eval() first")
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}: expected one of {', '.join(BACKENDS)}")
    suits = suits_onednn(weight)
    if backend == "packed" and not suits:
        raise ValueError(
            f"backend is 'packed' and the model is {weight.dtype} on {weight.device}, which oneDNN does not take on "
            "this machine: expected float32, bfloat16 or float16 on a CPU that it supports; use 'inductor'"
        )
    folded = fold(model, processor)
    compiled = backend == "inductor" or not suits
    if compiled:
        folded.compile(fullgraph=True, dynamic=dynamic)
    else:
        pack(folded, dynamic)
    return CompiledModel(folded, torch.uint8 if processor else None, compiled and dynamic)


def vit_inside(model: nn.Module) -> DINOv3ViT:
    """The first DINOv3ViT of a module, which may be it. ValueError where there is none."""
    for module in model.modules():
        if isinstance(module, DINOv3ViT):
            return module
    raise ValueError(f"model is a {type(model).__name__} without a DINOv3ViT inside: there is nothing to fold")


class CompiledModel(nn.Module):
    """What `compile` returns. Runs without gradients; its outputs may be trained on."""

    def __init__(self, folded: nn.Module, pixel_dtype: torch.dtype | None, dynamic: bool) -> None:
        super().__init__()
        self.folded = folded
        self.pixel_dtype = pixel_dtype
        self.dynamic = dynamic
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
        self._vit._check_images(images)  # inside a graph, the error would be the compiler's
        if self.dynamic:
            self._generalise(images)
        return self.folded(images)

    def _generalise(self, images: Tensor) -> None:
        """Let the graph be made from images of unequal sides: from square ones it would hold for squares alone."""
        single = len(images) == 1
        if single not in self._general:
            h, w = (n * self._vit.patch_size for n in EXAMPLE)
            self.folded(images.new_zeros(1 if single else 2, images.shape[1], h, w))
            self._general.add(single)

    def warm_up(self, batch: int, height: int, width: int) -> float:
        """Run once on images of this shape, compiling what that takes: the seconds of it."""
        shape = (batch, self._vit.config.num_channels, height, width)
        images = torch.zeros(shape, dtype=self.pixel_dtype, device=self._vit.norm.weight.device)
        start = time.perf_counter()
        self(images)
        return time.perf_counter() - start

    @property
    def _vit(self) -> DINOv3ViT:
        return vit_inside(self.folded)


def suits_onednn(weight: Tensor) -> bool:
    """Whether oneDNN has matrix products of this tensor's dtype on this machine, and the tensor is on the CPU."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    has_half = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
    if weight.dtype in has_half:
        return getattr(torch.ops.mkldnn, has_half[weight.dtype])()
    return weight.dtype == torch.float32


class PackedLinear(nn.Module):
    """W x + b, (.., in) -> (.., out), with W in a library's own layout: opaque, neither to be moved nor saved."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = linear.fused_bias() if isinstance(linear, QKVProjection) else linear.bias

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


class PackedByOneDNN(PackedLinear):
    """In oneDNN's layout, which holds for any number of rows; float32 products of many rows take W as it is."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear)
        weight = linear.weight.detach()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight)
        self.weight = weight if weight.dtype == torch.float32 else None

    def forward(self, x: Tensor) -> Tensor:
        if self.weight is not None and x.shape[:-1].numel() > MANY_ROWS:
            return F.linear(x, self.weight, self.bias)
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")


class PackedByMKL(PackedLinear):
    """In MKL's layout, float32 alone, which holds for the number of rows of the last call."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear)
        self.weight = linear.weight.detach()
        self.packed = (0, self.weight)  # number of rows, layout: replaced as one, since threads may share the model

    def forward(self, x: Tensor) -> Tensor:
        rows = x.shape[:-1].numel()
        packed_for, packed = self.packed
        if rows and packed_for != rows:  # MKL divides by zero where there is no row
            packed = torch.ops.mkl._mkl_reorder_linear_weight(self.weight, rows)
            self.packed = (rows, packed)
        return torch.ops.mkl._mkl_linear(x, packed, self.weight, self.bias, rows)


@torch.no_grad()
def pack(folded: nn.Module, dynamic: bool) -> None:
    """Put a PackedLinear in place of every projection of the blocks, but for those that somebody replaced."""
    for block in [module for module in folded.modules() if isinstance(module, Block)]:
        for part in (block.attn, block.mlp):
            for name, linear in part.named_children():
                if isinstance(linear, nn.Linear) and type(linear) in (nn.Linear, QKVProjection):
                    by_mkl = not dynamic and linear.weight.dtype == torch.float32 and torch.backends.mkl.is_available()
                    part.add_module(name, (PackedByMKL if by_mkl else PackedByOneDNN)(linear))


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
