"""timm's vit_*_patch16_dinov3 models, of which those called *_qkvb have query and value biases; and its convnext_*."""

from __future__ import annotations

import math
import re
from collections.abc import Collection
from typing import Any

from ...config import CONVNEXTS, DINOv3Config, DINOv3ConvNeXtConfig
from .cards import CONFIG, read_foreign_card, readme
from .convnext import CONVNEXT, rows
from .meta import variant_ignoring_biases
from .table import Beside, Card, Layout, Row, Table
from .vit import COMPUTED_PERIODS, NO_KEY_BIAS, NO_MASK_TOKEN, VIT

FILE = "model.safetensors"
MLP = "blocks.{i}.mlp"
ROWS = (
    Row(("register_tokens",), ("reg_token",)),
    Row(("blocks.{i}.attn.qkv.q_bias",), ("blocks.{i}.attn.q_bias",)),
    Row(("blocks.{i}.attn.qkv.v_bias",), ("blocks.{i}.attn.v_bias",)),
    Row(("blocks.{i}.ls1.gamma",), ("blocks.{i}.gamma_1",)),
    Row((f"{MLP}.w12.weight",), (f"{MLP}.fc1_g.weight", f"{MLP}.fc1_x.weight")),
    Row((f"{MLP}.w12.bias",), (f"{MLP}.fc1_g.bias", f"{MLP}.fc1_x.bias")),
    Row((f"{MLP}.w3.weight",), (f"{MLP}.fc2.weight",)),
    Row((f"{MLP}.w3.bias",), (f"{MLP}.fc2.bias",)),
    Row(("blocks.{i}.ls2.gamma",), ("blocks.{i}.gamma_2",)),
)
CONVNEXT_NAMES = {
    "stem.conv": "stem.0",
    "stem.norm": "stem.1",
    "stages.{s}.downsample.norm": "stages.{s}.downsample.0",
    "stages.{s}.downsample.conv": "stages.{s}.downsample.1",
    "stages.{s}.blocks.{i}.dwconv": "stages.{s}.blocks.{i}.conv_dw",
    "stages.{s}.blocks.{i}.ls.gamma": "stages.{s}.blocks.{i}.gamma",
    "norm": "head.norm",
}
ASSUMED = {
    "rope_embed.periods": COMPUTED_PERIODS,
    "mask_token": NO_MASK_TOKEN,
    "blocks.{i}.attn.qkv.k_bias": NO_KEY_BIAS,
}

# How timm calls the variants.
SIZES = {
    "vits16": "small", "vits16plus": "small_plus", "vitb16": "base", "vitl16": "large", "vith16plus": "huge_plus",
    "vit7b16": "7b",
}  # fmt: skip
BILINEAR = 2  # PIL's number for it
IMAGENET_MEAN, IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def read_card(beside: Beside) -> Card:
    """What its config.json says of images; transformers' files go before it where they lie beside it too."""
    card = read_foreign_card(beside)
    if card.preprocessing is None:
        card = card._replace(preprocessing=_read_images(beside.files.get(CONFIG, {}).get("pretrained_cfg")))
    return card


def _read_images(cfg: Any) -> dict[str, Any] | None:
    """As a preprocessor_config.json would say it.

    timm resizes bicubically; the released models were trained and are evaluated by Meta with bilinear resizing.
    """
    if not isinstance(cfg, dict) or not {"mean", "std"} <= cfg.keys() or not _is_triple(cfg.get("input_size")):
        return None
    size = {"height": cfg["input_size"][1], "width": cfg["input_size"][2]}
    return {"do_resize": True, "size": size, "resample": BILINEAR, "image_mean": cfg["mean"], "image_std": cfg["std"]}


def write_card(card: Card) -> Beside:
    """Its config.json: the name of its model where one has these tensors, and image statistics. A model card too."""
    config = card.config
    if config is None:
        return Beside(metadata={"format": "pt"}, license=card.license)
    architecture, width = _architecture(config)
    content: dict[str, Any] = {"num_classes": 0, "num_features": width}
    if architecture:
        content["architecture"] = architecture
    if images := _write_images(card.preprocessing):
        height, width, mean, std = images
        content["pretrained_cfg"] = {
            "input_size": [config.num_channels, height, width],
            "mean": mean,
            "std": std,
            "interpolation": "bilinear",
        }
    use = 'import timm\n\nmodel = timm.create_model("local-dir:.", pretrained=True)'
    if not architecture:  # none of timm's models has these tensors: its readers are ours
        loader = TIMM.table(config).family.loader
        use = f'from dinov3_lite import {loader}\n\nmodel = {loader}.from_pretrained(".")'
    card_text = readme(card, "timm", use)
    return Beside(metadata={"format": "pt"}, files={CONFIG: content}, readme=card_text, license=card.license)


def _architecture(config: DINOv3Config | DINOv3ConvNeXtConfig) -> tuple[str, int]:
    """The name of its model with these tensors, empty where it has none; the width of that model's features."""
    if isinstance(config, DINOv3ConvNeXtConfig):
        return config.name.replace("-", "_") if config.name in CONVNEXTS else "", config.hidden_sizes[-1]
    size = SIZES.get(variant_ignoring_biases(config))
    has_biases = config.query_bias and size != "7b"
    return f"vit_{size}_patch16_dinov3" + ("_qkvb" if has_biases else "") if size else "", config.hidden_size


def _write_images(d: dict[str, Any] | None) -> tuple[int, int, list[float], list[float]] | None:
    """Height, width, mean and std, or None where timm can't say what a preprocessor_config.json asks for."""
    if d is None or not d.get("do_resize", True) or d.get("resample", BILINEAR) != BILINEAR:
        return None
    if d.get("do_center_crop") or d.get("do_pad"):
        return None
    size = d.get("size", {"height": 224, "width": 224})
    size = size if isinstance(size, dict) else {"height": size, "width": size}
    height, width = size.get("height"), size.get("width")
    mean, std = [0.0] * 3, [1.0] * 3
    if d.get("do_normalize", True):
        mean, std = d.get("image_mean", IMAGENET_MEAN), d.get("image_std", IMAGENET_STD)
    sides = all(isinstance(side, int) and not isinstance(side, bool) and side > 0 for side in (height, width))
    if not sides or not _is_triple(mean) or not _is_triple(std) or not all(map(_is_number, (*mean, *std))):
        return None
    return (height, width, list(mean), list(std)) if all(std) else None  # type: ignore[return-value]


def _is_triple(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == 3


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def file_name(card: Card, carried: Collection[str]) -> str:
    """One name for all."""
    return FILE


def ungated_copy(repo_id: str) -> str:
    """The hub id of timm's copy of one of Meta's repositories, which needs no request; empty where it has none."""
    match = re.search(r"dinov3-([\w-]+)-pretrain-(\w+)$", repo_id)
    if match and match[1] in CONVNEXTS:
        return f"timm/{match[1].replace('-', '_')}.dinov3_{match[2]}"
    return f"timm/vit_{SIZES[match[1]]}_patch16_dinov3.{match[2]}" if match and match[1] in SIZES else ""


TIMM = Layout(
    name="timm",
    tables={
        DINOv3Config: Table(VIT, ROWS, assumed=ASSUMED, stores_empty=False),
        DINOv3ConvNeXtConfig: Table(CONVNEXT, rows(CONVNEXT_NAMES)),
    },
    container=".safetensors",
    files=(FILE,),
    read_card=read_card,
    write_card=write_card,
    file_name=file_name,
    is_folder=True,
)
