"""timm's vit_*_patch16_dinov3 models, of which those called *_qkvb have query and value biases; and its convnext_*."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Collection
from dataclasses import replace
from typing import Any

from ...config import CONVNEXTS, VARIANTS, DINOv3Config, DINOv3ConvNeXtConfig
from ..words import short
from .cards import CONFIG, read_foreign_card, readme
from .convnext import CONVNEXT, rows
from .table import Beside, Card, Config, Layout, Row, Table
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

# How timm calls the variants; the tiny one is EUPE's.
SIZES = {
    "vits16": "small", "vits16plus": "small_plus", "vitb16": "base", "vitl16": "large", "vith16plus": "huge_plus",
    "vit7b16": "7b", "vitt16": "tiny",
}  # fmt: skip
# The arguments of its models and our fields that mean the same; a feed-forward's width is said as a multiple of C.
VIT_ARGUMENTS = {
    "patch_size": "patch_size", "in_chans": "num_channels", "embed_dim": "hidden_size", "depth": "num_hidden_layers",
    "num_heads": "num_attention_heads", "qkv_bias": "query_bias", "num_reg_tokens": "num_register_tokens",
    "rope_temperature": "rope_theta",
}  # fmt: skip
CONVNEXT_ARGUMENTS = {
    "in_chans": "num_channels", "depths": "depths", "dims": "hidden_sizes", "act_layer": "hidden_act",
    "norm_eps": "layer_norm_eps",
}  # fmt: skip
# Arguments that don't change what a backbone computes: those of heads, of new weights, and of training.
WITHOUT_EFFECT = {
    *("num_classes", "global_pool", "img_size", "dynamic_img_size", "dynamic_img_pad", "init_values", "ls_init_value"),
    *("head_init_scale", "drop_rate", "pos_drop_rate", "patch_drop_rate", "proj_drop_rate", "attn_drop_rate"),
    *("drop_path_rate", "rope_shift_coords", "rope_jitter_coords", "rope_rescale_coords"),
}
BILINEAR = 2  # PIL's number for it
IMAGENET_MEAN, IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def read_card(beside: Beside) -> Card:
    """What its config.json says of the model and of images; transformers' files go before it where they lie beside too.

    Raises ValueError that names the file if its arguments are not of a model that we know.
    """
    card, content = read_foreign_card(beside), beside.files.get(CONFIG, {})
    if card.config is None:
        try:
            card = card._replace(config=_read_model(content.get("architecture"), content.get("model_args")))
        except ValueError as error:
            raise ValueError(f"{beside.path(CONFIG)}: {error}") from error
    if card.preprocessing is None:
        card = card._replace(preprocessing=_read_images(content.get("pretrained_cfg")))
    return card


@functools.cache
def _models() -> dict[str, Config]:
    """What timm's models are by their names: the 7B is only without query and value biases, the tiny one only with."""
    result: dict[str, Config] = {}
    for variant, size in SIZES.items():
        for ending, has_biases, lacking in ("", False, "vitt16"), ("_qkvb", True, "vit7b16"):
            if variant != lacking:
                config = replace(VARIANTS[variant], query_bias=has_biases, value_bias=has_biases)
                result[f"vit_{size}_patch16_dinov3{ending}"] = config
    return result | {name.replace("-", "_"): config for name, config in CONVNEXTS.items()}


def _read_model(name: Any, arguments: Any) -> Config | None:
    """The config of a model by its name and arguments. None where those are not said: then the tensors show it.

    Raises ValueError if an argument is none that we know, or its value is out of range.
    """
    base = _models().get(name) if isinstance(name, str) and isinstance(arguments, dict) else None
    if base is None:
        return None
    said = {key: value for key, value in arguments.items() if value is not None and key not in WITHOUT_EFFECT}
    is_vit = isinstance(base, DINOv3Config)
    fields = VIT_ARGUMENTS if is_vit else CONVNEXT_ARGUMENTS
    if unknown := said.keys() - fields.keys() - ({"mlp_ratio", "swiglu_align_to"} if is_vit else set()):
        key = min(unknown)
        raise ValueError(
            f"model_args says {short(key)}: {short(said[key])}, and whether that is a DINOv3 model is not known here: "
            "expected " + ", ".join(fields)
        )
    config = replace(base, **{fields[key]: value for key, value in said.items() if key in fields})
    if not is_vit:
        return config
    ratio = said.get("mlp_ratio", base.intermediate_size / base.hidden_size)
    multiple = said.get("swiglu_align_to", 64 if name == "vit_7b_patch16_dinov3" else 8) if base.use_gated_mlp else 1
    if not (_is_number(ratio) and _is_number(multiple) and multiple >= 1):
        raise ValueError(
            f"model_args says mlp_ratio: {short(ratio)}, swiglu_align_to: {short(multiple)}: expected numbers"
        )
    width = int(config.hidden_size * ratio)
    return replace(config, value_bias=config.query_bias, intermediate_size=width + -width % int(multiple))


def _write_model(config: Config) -> tuple[str, dict[str, Any]]:
    """The name of its model that differs least from the config, and the arguments that make it the same.

    An empty name if none can be: timm has one switch for query and value biases, and none for the others.
    """
    is_vit = isinstance(config, DINOv3Config)
    if is_vit and not (
        config.query_bias == config.value_bias
        and config.proj_bias
        and config.mlp_bias
        and config.hidden_act == ("silu" if config.use_gated_mlp else "gelu")
    ):
        return "", {}

    wanted = _arguments(config)
    differing = {
        name: {key: wanted[key] for key, value in _arguments(base).items() if value != wanted[key]}
        for name, base in _models().items()
        if type(base) is type(config) and (not is_vit or base.use_gated_mlp == config.use_gated_mlp)
    }
    name = min(differing, key=lambda name: len(differing[name]))
    arguments = differing[name]
    if is_vit and config.use_gated_mlp and arguments.keys() & {"embed_dim", "mlp_ratio"}:
        arguments["swiglu_align_to"] = 1  # else it rounds the width up
    return name, arguments


def _arguments(config: Config) -> dict[str, Any]:
    """What a config says, as arguments of timm's models."""
    if isinstance(config, DINOv3ConvNeXtConfig):
        return {key: getattr(config, field) for key, field in CONVNEXT_ARGUMENTS.items()}
    ratio = config.intermediate_size / config.hidden_size
    if int(config.hidden_size * ratio) < config.intermediate_size:  # as timm multiplies it out
        ratio = math.nextafter(ratio, math.inf)
    return {**{key: getattr(config, field) for key, field in VIT_ARGUMENTS.items()}, "mlp_ratio": ratio}


def _read_images(cfg: Any) -> dict[str, Any] | None:
    """As a preprocessor_config.json would say it.

    timm resizes bicubically; the released models were trained and are evaluated by Meta with bilinear resizing.
    """
    if not isinstance(cfg, dict) or not {"mean", "std"} <= cfg.keys() or not _is_triple(cfg.get("input_size")):
        return None
    size = {"height": cfg["input_size"][1], "width": cfg["input_size"][2]}
    return {"do_resize": True, "size": size, "resample": BILINEAR, "image_mean": cfg["mean"], "image_std": cfg["std"]}


def write_card(card: Card) -> Beside:
    """Its config.json: the name and arguments of its model that has these tensors, and image statistics. A model card
    too.
    """
    config = card.config
    if config is None:
        return Beside(metadata={"format": "pt"}, license=card.license)
    architecture, arguments = _write_model(config)
    width = config.hidden_size if isinstance(config, DINOv3Config) else config.hidden_sizes[-1]
    content: dict[str, Any] = {"num_classes": 0, "num_features": width}
    if architecture:
        content["architecture"] = architecture
    if arguments:
        content["model_args"] = arguments
    content["pretrained_cfg"] = {}  # without one, timm takes the whole file for it
    if images := _write_images(card.preprocessing):
        height, width, mean, std = images
        content["pretrained_cfg"] = {
            "input_size": [config.num_channels, height, width],
            "mean": mean,
            "std": std,
            "interpolation": "bilinear",
        }
    use = 'import timm\n\nmodel = timm.create_model("local-dir:.", pretrained=True)'
    if not architecture:  # none of timm's models can have these tensors: its readers are ours
        loader = TIMM.table(config).family.loader
        use = f'from dinov3_lite import {loader}\n\nmodel = {loader}.from_pretrained(".")'
    card_text = readme(card, "timm", use)
    return Beside(metadata={"format": "pt"}, files={CONFIG: content}, readme=card_text, license=card.license)


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
    name = f"vit_{SIZES.get(match[1])}_patch16_dinov3" if match else ""
    return f"timm/{name}.{match[2]}" if match and name in _models() else ""


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
