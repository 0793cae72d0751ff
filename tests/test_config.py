from __future__ import annotations

import dataclasses
import math

import pytest

from dinov3_lite import DINOv3Config
from dinov3_lite.config import VARIANTS, DINOv3ConvNeXtConfig

# Parameters in transformers' layout: of Meta's seven counted on transformers' own models, of the others given by their
# publishers (the giant) or by arithmetic (12 blocks of 12 C^2 + 14 C, and 151 thousand outside of them).
PARAMETERS = {
    "vitt16": 5_489_856,
    "vits16": 21_596_544,
    "vits16plus": 28_692_864,
    "vitb16": 85_660_416,
    "vitl16": 303_129_600,
    "vitl16plus": 403_891_200,
    "vith16plus": 840_592_640,
    "vit7b16": 6_716_035_072,
    "vitg16": 1_134_474_752,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_variants_have_the_released_number_of_parameters(name):
    import torch

    from dinov3_lite import DINOv3ViT
    from dinov3_lite.checkpoint.layouts import model_tensors

    with torch.device("meta"):
        model = DINOv3ViT.from_name(name)
    stored = {key: math.prod(shape) for key, (shape, _) in model_tensors(model.config).items()}
    assert sum(stored.values()) - stored["rope_embed.periods"] == PARAMETERS[name]
    # the keys' third of the fused biases is a parameter that stays zero, as in Meta's own model
    keys = model.depth * model.embed_dim if model.config.query_bias else 0
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name] + keys
    assert model.config.name == name


def test_the_variants_are_all_there():
    assert VARIANTS.keys() == PARAMETERS.keys()


@pytest.mark.parametrize("name", VARIANTS)
def test_dict_round_trip(name):
    config = DINOv3Config.from_name(name)
    assert DINOv3Config.from_dict(config.to_dict()) == config
    assert config.to_dict()["model_type"] == "dinov3_vit"


@pytest.mark.parametrize(
    "hub_id", ["facebook/dinov3-vitl16-pretrain-lvd1689m", "facebook/dinov3-vitl16-pretrain-sat493m", "dinov3-vitl16"]
)
def test_from_hub_id(hub_id):
    assert DINOv3Config.from_name(hub_id) == VARIANTS["vitl16"]


@pytest.mark.parametrize(
    ("hub_id", "name"),
    [
        ("robbyant/lingbot-vision-vit-small", "vits16"),
        ("robbyant/lingbot-vision-vit-giant", "vitg16"),
        ("facebook/EUPE-ViT-T", "vitt16"),
        ("facebook/EUPE-ViT-B", "vitb16"),
    ],
)
def test_from_the_hub_id_of_another_source(hub_id, name):
    assert DINOv3Config.from_name(hub_id) == VARIANTS[name]


def test_missing_keys_take_transformers_defaults_and_foreign_keys_are_ignored():
    config = DINOv3Config.from_dict(
        {"model_type": "dinov3_vit", "transformers_version": "5.0.0", "out_features": ["stage12"]}
    )
    assert config == DINOv3Config()
    assert config.num_register_tokens == 0


def test_square_pairs_are_one_size():
    assert DINOv3Config.from_dict({"patch_size": [14, 14], "image_size": [518, 518]}).patch_size == 14


def test_it_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        DINOv3Config().hidden_size = 5  # type: ignore[misc]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 385}, "hidden_size 385 does not divide into num_attention_heads 6"),
        ({"hidden_size": 36, "num_attention_heads": 6}, "head dim 6: 2D RoPE needs a multiple of 4"),
        ({"hidden_size": -384}, "hidden_size is -384: expected more than zero"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0: expected more than zero"),
        ({"num_hidden_layers": 12.5}, "num_hidden_layers is 12.5: expected int"),
        ({"num_hidden_layers": "12"}, "num_hidden_layers is '12': expected int"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True: expected int"),
        ({"num_register_tokens": -1}, "num_register_tokens is -1: expected zero or more"),
        ({"layer_norm_eps": float("nan")}, "layer_norm_eps is nan: expected float"),
        ({"patch_size": [16, 14]}, r"patch_size is \[16, 14\]: expected int"),
        ({"key_bias": 1}, "key_bias is 1: expected bool"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu': expected one of gelu, silu"),
        ({"attention_dropout": 0.1}, "attention_dropout is 0.1: DINOv3 has none"),
        ({"drop_path_rate": 1.0}, "drop_path_rate is 1.0: expected a probability below 1"),
        ({"rope_theta": None}, "rope_theta is None: expected float"),
        ({"model_type": "dinov2"}, "model_type is 'dinov2': expected 'dinov3_vit'"),
        ({"model_type": "dinov3_convnext"}, "model_type is 'dinov3_convnext': expected 'dinov3_vit'"),
    ],
)
def test_contradictions_are_one_sentence(change, message):
    with pytest.raises(ValueError, match=message):
        DINOv3Config.from_dict({"model_type": "dinov3_vit", **change})


def test_unknown_name_lists_the_known():
    with pytest.raises(ValueError, match="unknown DINOv3 variant 'vitg14': expected one of vitt16, vits16, .*vit7b16"):
        DINOv3Config.from_name("vitg14")


def test_defaults_are_transformers_defaults():
    expected = {
        "patch_size": 16, "hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 12, "num_attention_heads": 6,
        "hidden_act": "gelu", "attention_dropout": 0.0, "initializer_range": 0.02, "layer_norm_eps": 1e-5, "rope_theta": 100.0,
        "image_size": 224, "num_channels": 3, "query_bias": True, "key_bias": False, "value_bias": True, "proj_bias": True,
        "mlp_bias": True, "layerscale_value": 1.0, "drop_path_rate": 0.0, "use_gated_mlp": False, "num_register_tokens": 0,
        "pos_embed_shift": None, "pos_embed_jitter": None, "pos_embed_rescale": 2.0,
    }  # fmt: skip
    assert DINOv3Config() == DINOv3Config(**expected)
    assert {v.layer_norm_eps for v in VARIANTS.values()} == {1e-5} and {v.rope_theta for v in VARIANTS.values()} == {
        100.0
    }


# ---- each field by itself

POSITIVE = [
    "patch_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "layer_norm_eps", "rope_theta",
    "image_size", "num_channels", "pos_embed_jitter", "pos_embed_rescale",
]  # fmt: skip


@pytest.mark.parametrize("field", POSITIVE)
def test_what_zero_means_nothing_for(field):
    """The logarithm of a jitter, a division by a theta: not in some later call."""
    for zero in (0, 0.0) if field.startswith(("pos_", "rope_", "layer_norm")) else (0,):
        with pytest.raises(ValueError, match=f"{field} is {zero}: expected more than zero"):
            DINOv3Config(**{field: zero})


def test_what_may_be_zero():
    zeros = {"num_register_tokens": 0, "drop_path_rate": 0, "initializer_range": 0, "layerscale_value": 0}
    config = DINOv3Config(**zeros, attention_dropout=0, pos_embed_shift=0)
    assert config.pos_embed_shift == 0.0 and config.layerscale_value == 0.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope_theta": float("inf")}, "rope_theta is inf: expected float"),
        ({"layerscale_value": 1e31}, "layerscale_value is 1e.31: expected float"),
        ({"num_hidden_layers": 1001}, "num_hidden_layers is 1001: expected at most 1000"),
        ({"intermediate_size": 2**20 + 1}, "intermediate_size is 1048577: expected at most 1048576"),
        ({"num_register_tokens": 2**40}, "num_register_tokens is 1099511627776: expected at most 1048576"),
    ],
)
def test_sizes_that_no_memory_holds(change, message):
    """A damaged config.json must not ask for a thousand gigabytes."""
    with pytest.raises(ValueError, match=message):
        DINOv3Config(**change)
    assert DINOv3Config(num_hidden_layers=1000, intermediate_size=2**20).num_hidden_layers == 1000


@pytest.mark.parametrize("field", ["hidden_sizes", "depths"])
def test_each_stage_of_a_convnext_has_its_limits(field):
    for value, message in ((0, "is 0: expected more than zero"), (2**20 + 1, "is 1048577: expected at most ")):
        with pytest.raises(ValueError, match=f"{field} {message}"):
            DINOv3ConvNeXtConfig(**{field: (8, 8, value, 8)})
    with pytest.raises(ValueError, match="depths is 1001: expected at most 1000"):
        DINOv3ConvNeXtConfig(depths=(1, 1, 1001, 1))


@pytest.mark.parametrize("change", [
    {"patch_size": 14}, {"hidden_size": 768}, {"intermediate_size": 1024}, {"num_hidden_layers": 11}, {"num_attention_heads": 3},
    {"num_channels": 4}, {"use_gated_mlp": True}, {"hidden_act": "silu"}, {"num_register_tokens": 0}, {"query_bias": False},
    {"key_bias": True}, {"value_bias": False}, {"proj_bias": False}, {"mlp_bias": False},
], ids=str)  # fmt: skip
def test_other_tensors_are_no_released_variant(change):
    """Its name stands on model cards and in file names: what has other tensors or computes otherwise must not bear it."""
    config = dataclasses.replace(VARIANTS["vits16"], **change)
    sizes = f"vit-c{config.hidden_size}-d{config.num_hidden_layers}-h{config.num_attention_heads}"
    assert VARIANTS["vits16"].name == "vits16" and config.name == sizes


def test_other_settings_keep_the_name_of_a_released_variant():
    config = dataclasses.replace(VARIANTS["vitb16"], image_size=512, drop_path_rate=0.1, pos_embed_rescale=None)
    assert config.name == "vitb16"
