"""ConvNeXts for the tests: small configs, trained-like weights, and every layout's names by substitution."""

from __future__ import annotations

import math
import re

import torch
from torch import Tensor

from dinov3_lite import DINOv3ConvNeXt, DINOv3ConvNeXtConfig

TINY_CONVNEXT = DINOv3ConvNeXtConfig(hidden_sizes=(8, 16, 24, 32), depths=(1, 2, 3, 1))

# Names by substitution, apart from the library's tables: what a user would write who renames by hand.
TRANSFORMERS = [
    (r"^stem\.conv", "stages.0.downsample_layers.0"),
    (r"^stem\.norm", "stages.0.downsample_layers.1"),
    (r"^norm\.", "layer_norm."),
    (r"downsample\.norm", "downsample_layers.0"),
    (r"downsample\.conv", "downsample_layers.1"),
    (r"\.blocks\.(\d+)\.norm", r".layers.\1.layer_norm"),
    (r"\.blocks\.", ".layers."),
    (r"dwconv", "depthwise_conv"),
    (r"mlp\.fc", "pointwise_conv"),
    (r"ls\.gamma", "gamma"),
]
META = [
    (r"^stem\.conv", "downsample_layers.0.0"),
    (r"^stem\.norm", "downsample_layers.0.1"),
    (r"stages\.(\d)\.downsample\.norm", r"downsample_layers.\1.0"),
    (r"stages\.(\d)\.downsample\.conv", r"downsample_layers.\1.1"),
    (r"\.blocks\.", "."),
    (r"mlp\.fc", "pwconv"),
    (r"ls\.gamma", "gamma"),
]
TIMM = [
    (r"^stem\.conv", "stem.0"),
    (r"^stem\.norm", "stem.1"),
    (r"^norm\.", "head.norm."),
    (r"downsample\.norm", "downsample.0"),
    (r"downsample\.conv", "downsample.1"),
    (r"dwconv", "conv_dw"),
    (r"ls\.gamma", "gamma"),
]


def renamed(weights: dict[str, Tensor], substitutions: list[tuple[str, str]]) -> dict[str, Tensor]:
    """Our tensors under the names of another layout."""
    result = {}
    for name, tensor in weights.items():
        for pattern, replacement in substitutions:
            name = re.sub(pattern, replacement, name)
        result[name] = tensor
    return result


def trained_like(config: DINOv3ConvNeXtConfig, seed: int = 0) -> dict[str, Tensor]:
    """A state dict of ours with the statistics of trained weights, which plain initial ones hide.

    LayerNorm gains spread over a decade and more, LayerScale over two and both signs, every bias is non-zero.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(shape: torch.Size, std: float) -> Tensor:
        return torch.randn(shape, generator=generator) * std

    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in DINOv3ConvNeXt(config).state_dict().items()}
    weights = {}
    for name, shape in shapes.items():
        if "norm" in name and name.endswith("weight"):
            weights[name] = torch.exp(normal(shape, 0.7))
        elif name.endswith("gamma"):
            weights[name] = 10 ** (2 * torch.rand(shape, generator=generator) - 2) * torch.sign(normal(shape, 1.0))
        elif name.endswith("bias"):
            weights[name] = normal(shape, 0.2)
        else:
            weights[name] = normal(shape, math.prod(shape[1:]) ** -0.5)
    return weights


def made(config: DINOv3ConvNeXtConfig = TINY_CONVNEXT, dtype: torch.dtype = torch.float32) -> DINOv3ConvNeXt:
    """The model with trained-like weights, in evaluation mode."""
    model = DINOv3ConvNeXt(config)
    model.load_state_dict(trained_like(config))
    return model.eval().to(dtype)
