"""The tables against the models' own state dicts, for every variant, without memory."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from helpers import TINY, TINY_GATED

from dinov3_lite import DINOv3Config, DINOv3ViT
from dinov3_lite.config import VARIANTS
from dinov3_lite.layouts import LAYOUTS, LITE, TRANSFORMERS, detect, lite_shapes, shape_of

ODD = {
    "every bias": replace(TINY, key_bias=True),
    "no bias": replace(TINY, query_bias=False, value_bias=False, proj_bias=False, mlp_bias=False),
    "gated without bias": replace(TINY_GATED, mlp_bias=False, key_bias=False),
    "no registers": replace(TINY, num_register_tokens=0),
}
CONFIGS = {**VARIANTS, **ODD}


@pytest.mark.parametrize("name", CONFIGS)
def test_our_table_is_the_state_dict(name):
    with torch.device("meta"):
        state = DINOv3ViT(CONFIGS[name]).state_dict()
    assert {name: shape for name, (shape, _) in lite_shapes(CONFIGS[name]).items()} == {
        name: tuple(tensor.shape) for name, tensor in state.items()
    }


@pytest.mark.parametrize("name", CONFIGS)
def test_transformers_table_is_its_state_dict(name):
    transformers = pytest.importorskip("transformers")
    content = {k: v for k, v in CONFIGS[name].to_dict().items() if k not in ("model_type", "architectures")}
    with torch.device("meta"):
        model = transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig(**content))
    theirs = {key.replace("model.layer.", "layer."): tuple(t.shape) for key, t in model.state_dict().items()}
    ours = dict(source for sources in TRANSFORMERS.sources(CONFIGS[name]).values() for source in sources)
    assert ours == theirs


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
@pytest.mark.parametrize("name", CONFIGS)
def test_parts_add_up_to_ours(layout, name):
    config = CONFIGS[name]
    shapes = lite_shapes(config)
    sources = layout.sources(config)
    assert sources.keys() | layout.computed.keys() == shapes.keys()
    for ours, parts in sources.items():
        shape, chunks = shapes[ours]
        assert sum(math.prod(part) for _, part in parts) == math.prod(shape)
        assert chunks % len(parts) == 0 and shape[0] % chunks == 0
    names = [name for parts in sources.values() for name, _ in parts]
    assert len(names) == len(set(names))


def test_shape_letters():
    config = DINOv3Config.from_name("vith16plus")
    assert shape_of("3C,C", config) == (3840, 1280)
    assert shape_of("C,I,p,p", config) == (1280, 3, 16, 16)
    assert shape_of("1,R,C", config) == (1, 4, 1280)
    assert shape_of("2F", config) == (10240,)
    assert shape_of("E", config) == (16,)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
@pytest.mark.parametrize("name", CONFIGS)
def test_detection_by_names(layout, name):
    names = [name for parts in layout.sources(CONFIGS[name]).values() for name, _ in parts]
    assert detect(names) is layout
    assert detect([*names[: len(names) // 2], "something.else"]) is layout


@pytest.mark.parametrize("names", [[], ["encoder.layer.0.attention.query.weight", "fc.bias"]])
def test_foreign_names(names):
    with pytest.raises(ValueError, match="this is not a DINOv3 vision transformer"):
        detect(names)
    assert detect(["cls_token"]) is LITE
