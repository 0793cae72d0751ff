"""A made checkpoint for trying things out where the real weights can't be downloaded: made, not trained.

The patch embedding is a bank of colour and frequency filters (a 2D cosine basis of each opponent colour), and each
attention head averages tokens that look alike, so that the features show the picture and not noise. They mean nothing
beyond that.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import save_file
from torch import Tensor

from .checkpoint.layouts import TRANSFORMERS, rename
from .checkpoint.layouts.cards import NOTE_KEY
from .config import DINOv3Config
from .image import BILINEAR, IMAGENET_MEAN, IMAGENET_STD, ImageProcessor
from .model import DINOv3ViT

NOTE = "made, not trained"


def write_sample(folder: Path) -> None:
    """Write config.json, model.safetensors and preprocessor_config.json of a ViT-S as transformers would.

    Raises FileExistsError if the folder holds a checkpoint already; nothing is left of one that can't be written.
    """
    for name in ("config.json", "preprocessor_config.json", "model.safetensors", "model.safetensors.index.json"):
        if (folder / name).exists():
            raise FileExistsError(f"{folder}: holds a {name} already: choose another folder")
    config = DINOv3Config.from_name("vits16")
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
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{folder.name}.", suffix=".tmp", dir=folder.parent) as temporary:
        save_file(theirs, Path(temporary) / "model.safetensors", metadata={"format": "pt"})
        for name, content in {
            "config.json": {**config.to_dict(), NOTE_KEY: NOTE},
            "preprocessor_config.json": preprocessing,
        }.items():
            (Path(temporary) / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        folder.mkdir(exist_ok=True)
        for file in sorted(Path(temporary).iterdir(), reverse=True):  # the config comes last
            file.replace(folder / file.name)


def made_weights(config: DINOv3Config) -> dict[str, Tensor]:
    """A state dict of `DINOv3ViT(config)`, the same at each call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        weights = dict(DINOv3ViT(config).state_dict())
        weights["patch_embed.proj.weight"] = _colour_frequency_filters(config)
        C = config.hidden_size
        for i in range(config.num_hidden_layers):
            mix = torch.linalg.qr(torch.randn(C, C)).Q
            look = 0.8 * torch.linalg.qr(torch.randn(C, C)).Q
            weights[f"blocks.{i}.attn.qkv.weight"] = torch.cat((look, look, mix))
            weights[f"blocks.{i}.attn.proj.weight"] = mix.T  # a head gives back what it averaged
            weights[f"blocks.{i}.ls1.gamma"].uniform_(0.05, 0.15)
            weights[f"blocks.{i}.ls2.gamma"].uniform_(0.02, 0.1)
        return weights


def _colour_frequency_filters(config: DINOv3Config) -> Tensor:
    """(C, 3, p, p): for each opponent colour the lowest-frequency cosines of a patch, high ones amplified."""
    p = config.patch_size
    opponent = torch.tensor([[1.0, 1.0, 1.0], [1.0, -1.0, 0.0], [0.5, 0.5, -1.0]])
    opponent = opponent / opponent.norm(dim=1, keepdim=True)
    k = torch.arange(p)
    cosines = torch.cos(math.pi * k[:, None] * (k + 0.5) / p)  # (frequency, pixel)
    frequency = k[:, None] ** 2 + k**2
    order = frequency.flatten().argsort(stable=True)[: config.hidden_size // len(opponent)]
    basis = torch.einsum("uy,vx->uvyx", cosines, cosines).flatten(0, 1)[order]  # (n, p, p)
    gain = (1 + 0.5 * frequency.flatten()[order].sqrt()) / p**2
    filters = torch.einsum("nyx,n,oc->noyxc", basis, gain, opponent)
    return filters.permute(0, 1, 4, 2, 3).flatten(0, 1)
