"""A made checkpoint for trying things out where the real weights can't be downloaded: made, not trained.

The patch embedding is a bank of colour and frequency filters (a 2D cosine basis of each opponent colour), and each
attention head averages tokens that look alike (a ConvNeXt averages neighbours), so that the features show the picture
and not noise. They mean nothing beyond that.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from torch import Tensor

from .checkpoint import CONVERTED
from .checkpoint.containers import CONTAINERS, OutputTensor
from .checkpoint.files import whole_files
from .checkpoint.layouts import TRANSFORMERS, rename
from .checkpoint.layouts.cards import NOTE_KEY
from .config import DINOv3Config, DINOv3ConvNeXtConfig, config_from_name
from .convnext import DINOv3ConvNeXt
from .image import BILINEAR, IMAGENET_MEAN, IMAGENET_STD, ImageProcessor
from .model import DINOv3ViT

NOTE = "made, not trained"


def write_sample(folder: Path, variant: str = "vits16") -> None:
    """Write config.json, model.safetensors and preprocessor_config.json of a variant as transformers would.

    Raises FileExistsError if the folder holds a checkpoint already, ValueError for an unknown variant; nothing is left
    of one that can't be written.
    """
    config = config_from_name(variant)
    for name in (*TRANSFORMERS.side_files, "model.safetensors", "model.safetensors.index.json", CONVERTED):
        if (folder / name).exists():
            raise FileExistsError(f"{folder}: holds a {name} already: choose another folder")
    theirs = {name: t.contiguous() for name, t in rename(made_weights(config), TRANSFORMERS, config).items()}
    height, width = ImageProcessor().size or (0, 0)
    preprocessing = {
        "image_processor_type": "DINOv3ViTImageProcessor",
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_resize": True,
        "size": {"height": height, "width": width},
        "resample": BILINEAR,
        "do_normalize": True,
        "image_mean": IMAGENET_MEAN,
        "image_std": IMAGENET_STD,
    }
    files = {"preprocessor_config.json": preprocessing, "config.json": {**config.to_dict(), NOTE_KEY: NOTE}}
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with whole_files() as out:
            with out.create(folder / "model.safetensors") as file:
                tensors = [OutputTensor.of(name, tensor) for name, tensor in theirs.items()]
                CONTAINERS[".safetensors"].write(file, tensors, {"format": "pt"}, lambda count: None)
            for name, content in files.items():
                with out.create(folder / name) as file:
                    file.write(f"{json.dumps(content, indent=2)}\n".encode())
    except BaseException:
        if is_new:
            folder.rmdir()
        raise


def made_weights(config: DINOv3Config | DINOv3ConvNeXtConfig) -> dict[str, Tensor]:
    """A state dict for a model of that config: made weights, the same at each call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if isinstance(config, DINOv3ConvNeXtConfig):
            return _made_convnext(config)
        weights = dict(DINOv3ViT(config).state_dict())
        C = config.hidden_size
        weights["patch_embed.proj.weight"] = _colour_frequency_filters(C, config.patch_size)
        for i in range(config.num_hidden_layers):
            mix = torch.linalg.qr(torch.randn(C, C)).Q
            look = 0.8 * torch.linalg.qr(torch.randn(C, C)).Q
            weights[f"blocks.{i}.attn.qkv.weight"] = torch.cat((look, look, mix))
            weights[f"blocks.{i}.attn.proj.weight"] = mix.T  # a head gives back what it averaged
            weights[f"blocks.{i}.ls1.gamma"].uniform_(0.05, 0.15)
            weights[f"blocks.{i}.ls2.gamma"].uniform_(0.02, 0.1)
        return weights


def _made_convnext(config: DINOv3ConvNeXtConfig) -> dict[str, Tensor]:
    """The stem is filters; each step down averages 2 x 2 pixels and mixes their channels; blocks change little."""
    weights = dict(DINOv3ConvNeXt(config).state_dict())
    weights["stem.conv.weight"] = _colour_frequency_filters(config.hidden_sizes[0], 4)
    for name, weight in weights.items():
        if name.endswith("downsample.conv.weight"):
            mix = torch.linalg.qr(torch.randn(weight.shape[:2])).Q / 4
            weights[name] = mix[..., None, None].expand_as(weight).contiguous()
        elif name.endswith("gamma"):
            weight.uniform_(0.02, 0.1)
    return weights


def _colour_frequency_filters(channels: int, p: int) -> Tensor:
    """(C, 3, p, p): for each opponent colour the lowest-frequency cosines of a patch, high ones amplified.

    Channels beyond three times the cosines that there are, p ** 2, are zero.
    """
    opponent = torch.tensor([[1.0, 1.0, 1.0], [1.0, -1.0, 0.0], [0.5, 0.5, -1.0]])
    opponent = opponent / opponent.norm(dim=1, keepdim=True)
    k = torch.arange(p)
    cosines = torch.cos(math.pi * k[:, None] * (k + 0.5) / p)  # (frequency, pixel)
    frequency = k[:, None] ** 2 + k**2
    order = frequency.flatten().argsort(stable=True)[: channels // len(opponent)]
    basis = torch.einsum("uy,vx->uvyx", cosines, cosines).flatten(0, 1)[order]  # (n, p, p)
    gain = (1 + 0.5 * frequency.flatten()[order].sqrt()) / p**2
    filters = torch.zeros(channels, len(opponent), p, p)
    filters[: len(opponent) * len(order)] = torch.einsum("nyx,n,oc->nocyx", basis, gain, opponent).flatten(0, 1)
    return filters
