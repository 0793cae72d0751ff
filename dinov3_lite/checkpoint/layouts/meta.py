"""Meta's .pth files, and those of all code that descends from Meta's repository (facebookresearch/dinov3)."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from ...config import VARIANTS, DINOv3Config, DINOv3ConvNeXtConfig
from .cards import read_foreign_card
from .convnext import CONVNEXT, rows
from .table import Beside, Card, Layout, Row, Table
from .vit import BIASES, QKV, VIT

ROWS = (
    Row(("register_tokens",), ("storage_tokens",)),
    Row(("mask_token",), ("mask_token",), shape=("1", "C")),
    Row(BIASES, (f"{QKV}.bias",), mask=f"{QKV}.bias_mask"),
    Row(("blocks.{i}.mlp.w12.weight",), ("blocks.{i}.mlp.w1.weight", "blocks.{i}.mlp.w2.weight")),
    Row(("blocks.{i}.mlp.w12.bias",), ("blocks.{i}.mlp.w1.bias", "blocks.{i}.mlp.w2.bias")),
)
CONVNEXT_NAMES = {
    "stem.conv": "downsample_layers.0.0",
    "stem.norm": "downsample_layers.0.1",
    "stages.{s}.downsample.norm": "downsample_layers.{s}.0",
    "stages.{s}.downsample.conv": "downsample_layers.{s}.1",
    "stages.{s}.blocks.{i}.dwconv": "stages.{s}.{i}.dwconv",
    "stages.{s}.blocks.{i}.norm": "stages.{s}.{i}.norm",
    "stages.{s}.blocks.{i}.mlp.fc1": "stages.{s}.{i}.pwconv1",
    "stages.{s}.blocks.{i}.mlp.fc2": "stages.{s}.{i}.pwconv2",
    "stages.{s}.blocks.{i}.ls.gamma": "stages.{s}.{i}.gamma",
}
# The last of its list of norms for all stages is the final one, which its strict loader wants by both names.
LAST_NORM = {"norms.3.weight": "norm.weight", "norms.3.bias": "norm.bias"}
LOCAL_NORM = ("local_cls_norm.weight", "local_cls_norm.bias")

# The end of the file name that Meta's hub code knows a variant by: a ViT-L without one is refused.
HASHES = {
    "vits16": "08c60483", "vits16plus": "4057cbaa", "vitb16": "73cec8be", "vitl16": "8aa4cbdd",
    "vitl16plus": "46503df0", "vith16plus": "7c1da9a5", "vit7b16": "a955f4ea",
    "convnext-tiny": "21b726bb", "convnext-small": "296db49d",
    "convnext-base": "801f2ba9", "convnext-large": "61fa432d",
}  # fmt: skip
SATELLITE_VITL = "dinov3_vitl16_pretrain_sat493m-eadcf0ff.pth"


def copies(config: DINOv3Config) -> dict[str, str]:
    """The strict loader of the 7B wants the norm of local crops' CLS tokens, which only pretraining uses."""
    is_7b = config.hidden_size == VARIANTS["vit7b16"].hidden_size
    return {name: name.removeprefix("local_cls_") for name in LOCAL_NORM} if is_7b else {}


def write_card(card: Card) -> Beside:
    """Nothing but a licence: its readers know the model by its name."""
    return Beside(license=card.license)


def file_name(card: Card, carried: Collection[str]) -> str:
    """The name by which Meta's hub code knows the variant."""
    if isinstance(card.config, DINOv3ConvNeXtConfig):
        name = card.config.name.replace("-", "_")
        ending = f"_pretrain_lvd1689m-{HASHES[card.config.name]}" if card.config.name in HASHES else ""
        return f"dinov3_{name}{ending}.pth"
    name = variant_ignoring_biases(card.config) if card.config else ""
    if name == "vitl16" and LOCAL_NORM[0] in carried:
        return SATELLITE_VITL  # the only ViT-L whose strict loader wants that norm
    return f"dinov3_{name}_pretrain-{HASHES[name]}.pth" if name in HASHES else f"dinov3_{name}.pth"


def variant_ignoring_biases(config: DINOv3Config) -> str:
    """The released variant of these sizes, with or without query and value biases."""
    bias = config.hidden_size != VARIANTS["vit7b16"].hidden_size
    return replace(config, query_bias=bias, value_bias=bias, key_bias=False).name


META = Layout(
    name="meta",
    tables={
        DINOv3Config: Table(
            VIT,
            ROWS,
            carried=dict.fromkeys(LOCAL_NORM, "normalises the CLS token of local crops in pretraining"),
            copies=copies,
            stores_empty=False,
        ),
        DINOv3ConvNeXtConfig: Table(
            CONVNEXT,
            rows(CONVNEXT_NAMES),
            copies=lambda config: LAST_NORM,
            left_out={"norms.": "the final LayerNorm once more, or one that only training uses"},
        ),
    },
    container=".pth",
    files=("*.pth", "*.pt", "*.ckpt", "*.bin"),
    read_card=read_foreign_card,
    write_card=write_card,
    file_name=file_name,
)
