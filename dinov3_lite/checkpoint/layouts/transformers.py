"""transformers' DINOv3ViTModel and DINOv3ConvNextModel, as all releases write them: folders with config.json."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

from ...config import CONVNEXT_TYPE, MODEL_TYPE, DINOv3Config, DINOv3ConvNeXtConfig
from .cards import CONFIG, NOTE_KEY, PREPROCESSOR, read_config, read_foreign_card, readme
from .convnext import CONVNEXT, rows
from .table import Beside, Card, Layout, Row, Table
from .vit import COMPUTED_PERIODS, VIT

FILE = "model.safetensors"


def _row(ours: str, *theirs: str) -> Row:
    return Row((ours,), theirs)


# fmt: off
ROWS = (
    _row("cls_token",                   "embeddings.cls_token"),
    _row("register_tokens",             "embeddings.register_tokens"),
    _row("mask_token",                  "embeddings.mask_token"),
    _row("patch_embed.proj.weight",     "embeddings.patch_embeddings.weight"),
    _row("patch_embed.proj.bias",       "embeddings.patch_embeddings.bias"),
    _row("blocks.{i}.norm1.weight",     "layer.{i}.norm1.weight"),
    _row("blocks.{i}.norm1.bias",       "layer.{i}.norm1.bias"),
    _row("blocks.{i}.attn.qkv.weight",  *(f"layer.{{i}}.attention.{part}_proj.weight" for part in "qkv")),
    _row("blocks.{i}.attn.qkv.q_bias",  "layer.{i}.attention.q_proj.bias"),
    _row("blocks.{i}.attn.qkv.k_bias",  "layer.{i}.attention.k_proj.bias"),
    _row("blocks.{i}.attn.qkv.v_bias",  "layer.{i}.attention.v_proj.bias"),
    _row("blocks.{i}.attn.proj.weight", "layer.{i}.attention.o_proj.weight"),
    _row("blocks.{i}.attn.proj.bias",   "layer.{i}.attention.o_proj.bias"),
    _row("blocks.{i}.ls1.gamma",        "layer.{i}.layer_scale1.lambda1"),
    _row("blocks.{i}.norm2.weight",     "layer.{i}.norm2.weight"),
    _row("blocks.{i}.norm2.bias",       "layer.{i}.norm2.bias"),
    _row("blocks.{i}.mlp.fc1.weight",   "layer.{i}.mlp.up_proj.weight"),
    _row("blocks.{i}.mlp.fc1.bias",     "layer.{i}.mlp.up_proj.bias"),
    _row("blocks.{i}.mlp.fc2.weight",   "layer.{i}.mlp.down_proj.weight"),
    _row("blocks.{i}.mlp.fc2.bias",     "layer.{i}.mlp.down_proj.bias"),
    _row("blocks.{i}.mlp.w12.weight",   "layer.{i}.mlp.gate_proj.weight", "layer.{i}.mlp.up_proj.weight"),
    _row("blocks.{i}.mlp.w12.bias",     "layer.{i}.mlp.gate_proj.bias",   "layer.{i}.mlp.up_proj.bias"),
    _row("blocks.{i}.mlp.w3.weight",    "layer.{i}.mlp.down_proj.weight"),
    _row("blocks.{i}.mlp.w3.bias",      "layer.{i}.mlp.down_proj.bias"),
    _row("blocks.{i}.ls2.gamma",        "layer.{i}.layer_scale2.lambda1"),
)
CONVNEXT_NAMES = {
    "stem.conv":                       "stages.0.downsample_layers.0",
    "stem.norm":                       "stages.0.downsample_layers.1",
    "stages.{s}.downsample.norm":      "stages.{s}.downsample_layers.0",
    "stages.{s}.downsample.conv":      "stages.{s}.downsample_layers.1",
    "stages.{s}.blocks.{i}.dwconv":    "stages.{s}.layers.{i}.depthwise_conv",
    "stages.{s}.blocks.{i}.norm":      "stages.{s}.layers.{i}.layer_norm",
    "stages.{s}.blocks.{i}.mlp.fc1":   "stages.{s}.layers.{i}.pointwise_conv1",
    "stages.{s}.blocks.{i}.mlp.fc2":   "stages.{s}.layers.{i}.pointwise_conv2",
    "stages.{s}.blocks.{i}.ls.gamma":  "stages.{s}.layers.{i}.gamma",
    "norm":                            "layer_norm",
}
# fmt: on


def read_card(beside: Beside) -> Card:
    """What its two JSON files say. Raises ValueError if the config is not there."""
    if CONFIG not in beside.files:
        raise ValueError(
            f"{beside.path(CONFIG)}: missing: a checkpoint in transformers' layout needs the config it came with"
        )
    if "model_type" not in beside.files[CONFIG]:
        raise ValueError(
            f"{beside.path(CONFIG)}: no model_type in it, expected {MODEL_TYPE!r}, or {CONVNEXT_TYPE!r}: this is no "
            "model's config.json"
        )
    return replace(read_foreign_card(beside), config=read_config(beside))


def write_card(card: Card) -> Beside:
    """Its two JSON files, and a model card."""
    note = {NOTE_KEY: card.note} if card.note else {}
    files = {PREPROCESSOR: card.preprocessing} if card.preprocessing is not None else {}
    if card.config:  # last: what a reader can't do without
        files[CONFIG] = {**card.config.to_dict(), **note}
    use = 'from transformers import AutoModel\n\nmodel = AutoModel.from_pretrained(".")'
    return Beside(
        metadata={"format": "pt"}, files=files, readme=readme(card, "transformers", use), license=card.license
    )


def opens(layout: Layout, path: Path) -> bool:
    """Whether transformers itself opens a checkpoint of that layout at that path."""
    return layout is TRANSFORMERS and path.is_dir()


def file_name(card: Card, carried: Collection[str]) -> str:
    """One name for all."""
    return FILE


TRANSFORMERS = Layout(
    name="transformers",
    tables={
        DINOv3Config: Table(VIT, ROWS, assumed={"rope_embed.periods": COMPUTED_PERIODS}),
        DINOv3ConvNeXtConfig: Table(CONVNEXT, rows(CONVNEXT_NAMES)),
    },
    container=".safetensors",
    files=(FILE, "pytorch_model.bin"),
    read_card=read_card,
    write_card=write_card,
    file_name=file_name,
    is_folder=True,
    is_sharded=True,
    needs_config=True,
    in_memory={"model.layer.": "layer.", "model.stages.": "stages."},
)
