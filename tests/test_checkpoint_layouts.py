"""The tables against the models' own state dicts, for every variant, without memory."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from helpers import TINY, TINY_GATED

from dinov3_lite import DINOv3Config, DINOv3ViT
from dinov3_lite.checkpoint.layouts import (
    LAYOUTS,
    LITE,
    META,
    STATE_DICT,
    TIMM,
    TRANSFORMERS,
    detect,
    model_tensors,
    rename,
)
from dinov3_lite.checkpoint.layouts.table import Layout, numel
from dinov3_lite.checkpoint.layouts.vit import SWITCHES, VIT, infer_config
from dinov3_lite.config import VARIANTS
from dinov3_lite.rope import rope_periods

ODD = {
    "every bias": replace(TINY, key_bias=True),
    "no bias": replace(TINY, query_bias=False, value_bias=False, proj_bias=False, mlp_bias=False),
    "gated without bias": replace(TINY_GATED, mlp_bias=False, key_bias=False),
    "no registers": replace(TINY, num_register_tokens=0),
}
CONFIGS = {**VARIANTS, **ODD}


@pytest.mark.parametrize("name", CONFIGS)
def test_our_tables_are_the_state_dict(name):
    """Of which our file has the fused bias in the thirds that there are."""
    config = CONFIGS[name]
    with torch.device("meta"):
        shapes = {name: tuple(tensor.shape) for name, tensor in DINOv3ViT(config).state_dict().items()}
    assert their_shapes(STATE_DICT, config) == shapes
    for i in range(config.num_hidden_layers if config.query_bias or config.key_bias or config.value_bias else 0):
        assert shapes.pop(f"blocks.{i}.attn.qkv.bias") == (3 * config.hidden_size,)
        parts = {"q": config.query_bias, "k": config.key_bias, "v": config.value_bias}
        shapes |= {f"blocks.{i}.attn.qkv.{x}_bias": (config.hidden_size,) for x, there in parts.items() if there}
    assert {name: shape for name, (shape, _) in model_tensors(config).items()} == shapes


@pytest.mark.parametrize("name", CONFIGS)
def test_transformers_table_is_its_state_dict(name):
    transformers = pytest.importorskip("transformers")
    content = {k: v for k, v in CONFIGS[name].to_dict().items() if k not in ("model_type", "architectures")}
    with torch.device("meta"):
        model = transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig(**content))
    theirs = {key.replace("model.layer.", "layer."): tuple(t.shape) for key, t in model.state_dict().items()}
    assert their_shapes(TRANSFORMERS, CONFIGS[name]) == theirs


# Tensors and elements of Meta's released files, counted on its own models.
META_COUNTS = {
    "vits16": (188, 21_601_152),
    "vits16plus": (212, 28_697_472),
    "vitb16": (188, 85_669_632),
    "vitl16": (368, 303_154_176),
    "vitl16plus": (416, 403_915_776),
    "vith16plus": (552, 840_633_600),
    "vit7b16": (608, 6_716_035_072),  # and two of local_cls_norm, which the model does not use
}


@pytest.mark.parametrize("name", META_COUNTS)
def test_meta_table_has_the_released_counts(name):
    shapes = their_shapes(META, VARIANTS[name])
    parameters = {k: s for k, s in shapes.items() if not k.endswith(("bias_mask", "periods"))}
    assert (len(shapes), sum(map(numel, parameters.values()))) == META_COUNTS[name]


def test_meta_names_and_shapes_of_a_released_file():
    shapes = their_shapes(META, VARIANTS["vits16plus"])
    assert shapes["storage_tokens"] == (1, 4, 384) and shapes["mask_token"] == (1, 384)
    assert shapes["rope_embed.periods"] == (16,)
    assert shapes["blocks.11.attn.qkv.bias"] == shapes["blocks.11.attn.qkv.bias_mask"] == (1152,)
    assert shapes["blocks.0.mlp.w1.weight"] == shapes["blocks.0.mlp.w2.weight"] == (1536, 384)
    assert shapes["blocks.0.mlp.w3.weight"] == (384, 1536) and shapes["blocks.3.ls1.gamma"] == (384,)
    assert not any("attn.qkv.bias" in key for key in their_shapes(META, VARIANTS["vit7b16"]))


def their_shapes(layout: Layout, config: DINOv3Config) -> dict[str, tuple[int, ...]]:
    shapes = {name: shape for equation in layout.table(config).equations(config) for name, shape in equation.theirs}
    return shapes | {name: tuple(t.shape) for name, t in layout.table(config).masks(config).items()}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=lambda layout: layout.name)
@pytest.mark.parametrize("name", CONFIGS)
def test_both_sides_of_each_row_add_up(layout, name):
    config = CONFIGS[name]
    shapes = model_tensors(config)
    covered = set()
    for equation in layout.table(config).equations(config):
        assert sum(numel(shape) for _, shape in equation.theirs) == sum(numel(shape) for _, shape in equation.ours)
        for ours, shape in equation.ours:
            if ours in shapes:
                assert shapes[ours][0] == shape and ours not in covered
                covered.add(ours)
    left = {
        kind
        for kind in layout.table(config).assumed
        if any(kind.format(i=i) in shapes for i in range(config.num_hidden_layers))
    }
    assert covered | {kind.format(i=i) for kind in left for i in range(config.num_hidden_layers)} == {
        name for name, (shape, _) in shapes.items() if numel(shape) or layout.table(config).stores_empty
    }
    names = [name for equation in layout.table(config).equations(config) for name, _ in equation.theirs]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    ("layout", "name"),
    # timm stores no periods, off which a foreign head dim could be read
    [(META, name) for name in (*VARIANTS, "no registers", "gated without bias")] + [(TIMM, name) for name in VARIANTS],
    ids=lambda value: getattr(value, "name", value),
)
def test_the_config_is_read_off_the_tensors(layout, name):
    config = CONFIGS[name]
    shapes = their_shapes(layout, config)

    def read(name: str) -> torch.Tensor:
        if name == "rope_embed.periods":
            return rope_periods(config).bfloat16()
        return layout.table(config).masks(config)[name] if name.endswith("mask") else torch.ones(shapes[name])

    inferred = infer_config(layout.table(config), shapes, read)
    biases = {"query_bias": True, "value_bias": True} if name == "gated without bias" else {}
    expected = replace(config, **biases)
    assert {k: v for k, v in inferred.to_dict().items() if k != "image_size"} == {
        k: v for k, v in expected.to_dict().items() if k != "image_size"
    }


def test_renaming_shares_what_it_does_not_join():
    state = DINOv3ViT(TINY).state_dict()
    theirs = rename(state, META, TINY)
    assert theirs["blocks.0.attn.qkv.weight"].data_ptr() == state["blocks.0.attn.qkv.weight"].data_ptr()
    bias = theirs["blocks.1.attn.qkv.bias"].view(3, 32)
    assert torch.equal(bias[0], state["blocks.1.attn.qkv.bias"][:32]) and (bias[1] == 0).all()
    assert torch.equal(theirs["blocks.2.attn.qkv.bias_mask"].view(3, 32)[:, 0], torch.tensor([1.0, 0.0, 1.0]))


def test_shape_letters():
    config = DINOv3Config.from_name("vith16plus")
    assert VIT.shape(("C", "I", "p", "p"), config) == (1280, 3, 16, 16)
    assert VIT.shape(("1", "R", "C"), config) == (1, 4, 1280)
    assert VIT.shape(("F", "C"), config) == (5120, 1280)
    assert VIT.shape(("E",), config) == (16,)
    assert model_tensors(config)["blocks.3.attn.qkv.weight"] == ((3840, 1280), 3)
    assert model_tensors(config)["blocks.0.mlp.w12.bias"] == ((10240,), 2)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=lambda layout: layout.name)
@pytest.mark.parametrize("name", CONFIGS)
def test_detection_by_names(layout, name):
    names = list(their_shapes(layout, CONFIGS[name]))
    assert detect(names) == (layout, DINOv3Config)
    assert detect([*names[: len(names) // 2], "something.else"]) == (layout, DINOv3Config)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_state_dict_is_known_by_its_names(name):
    config = CONFIGS[name]
    found, config_class = detect(list(their_shapes(STATE_DICT, config)))
    has_biases = config.query_bias or config.key_bias or config.value_bias
    assert found is (STATE_DICT if has_biases else LITE) and config_class is DINOv3Config and found.name == "lite"


BIASES = [dict(zip(SWITCHES, present, strict=True)) for present in itertools.product([False, True], repeat=3)]


@pytest.mark.parametrize("present", BIASES, ids=lambda present: "".join(s[0] for s, there in present.items() if there))
def test_which_biases_a_state_dict_has_is_told_by_their_numbers(present):
    """In the last block here. Where all are zero it is a new model of the released kind, if it has any."""
    config, last = replace(TINY, **present), "blocks.2.attn.qkv.bias"
    shapes = their_shapes(STATE_DICT, config)

    def inferred(bias: torch.Tensor) -> dict[str, bool]:
        tensors = {"rope_embed.periods": rope_periods(config), last: bias}
        read = {name: torch.zeros(shape) for name, shape in shapes.items()} | tensors
        found = infer_config(STATE_DICT.table(config), shapes, read.__getitem__)
        return {switch: getattr(found, switch) for switch in SWITCHES}

    one_number = torch.zeros(3, 32)
    one_number[list(present.values()), 7] = 1e-30
    assert inferred(one_number.flatten()) == present
    as_released = {"query_bias": True, "key_bias": False, "value_bias": True}
    assert inferred(torch.zeros(96)) == (as_released if any(present.values()) else present)


@pytest.mark.parametrize("names", [[], ["encoder.layer.0.attention.query.weight", "fc.bias"]])
def test_foreign_names(names):
    with pytest.raises(ValueError, match="this is not a DINOv3 vision transformer"):
        detect(names)
