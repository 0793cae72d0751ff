"""The libraries that people use instead, on the same weights. Import this before anything of theirs."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from environment import version
from safetensors.torch import load_file, save_file

from convert import convert
from dinov3_lite import DINOv3Config, DINOv3ViT
from dinov3_lite.layouts import TRANSFORMERS, rename
from dinov3_lite.sample import made_weights

REFERENCES = Path(sys.prefix) / "references" / "torchvision"


def write_checkpoint(folder: Path, variant: str) -> Path:
    """Made weights of a released variant, as from the hub."""
    config = DINOv3Config.from_name(variant)
    theirs = {name: t.contiguous() for name, t in rename(made_weights(config), TRANSFORMERS, config).items()}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(theirs, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    return folder


def ours(folder: Path, **options: Any) -> DINOv3ViT:
    return DINOv3ViT.from_pretrained(folder, **options)


def transformers_model(folder: Path, name: str = "DINOv3ViTModel", **options: Any) -> Any:
    """One of transformers' classes, in evaluation mode."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    options.setdefault("dtype", torch.float32)
    return getattr(transformers, name).from_pretrained(folder, **options).eval()


def timm_model(folder: Path, **options: Any) -> Any | None:
    """A timm model with these weights, or None where there is no timm."""
    timm = _timm()
    if timm is None:
        return None
    written = convert(folder, folder / "timm", to="timm", allow_loss=True, force=True)
    architecture = json.loads((written / "config.json").read_text())["architecture"]
    model = timm.create_model(architecture, pretrained=False, num_classes=0, dynamic_img_size=True, **options)
    model.load_state_dict(load_file(written / "model.safetensors"))
    return model.eval()


def _timm() -> ModuleType | None:
    """An installed timm, or the one that `make` puts beside the environment."""
    if version("timm") == "-" and REFERENCES.exists():
        import transformers.models.dinov3_vit.modeling_dinov3_vit  # noqa: F401  before it can see that torchvision

        sys.path += [str(REFERENCES), str(Path(__file__).parent.parent / "tests")]
        import torchvision_shim  # noqa: F401
    try:
        import timm
    except ImportError:
        return None
    return timm
