"""From layout to layout: bit for bit back again, and what a layout can't hold."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import PREPROCESSING, TINY, TINY_GATED, trained_like, write_checkpoint
from safetensors.torch import load_file

from convert import convert
from dinov3_lite import DINOv3Config, DINOv3ViT, ImageProcessor
from dinov3_lite.checkpoint import open_checkpoint
from dinov3_lite.checkpoint.layouts import LAYOUTS, META, rename

# A width of which timm's layout can tell the head dim (64).
WIDE = replace(TINY, hidden_size=128, num_attention_heads=2, intermediate_size=96)

CONFIGS = {
    "plain": WIDE,
    "gated": replace(WIDE, use_gated_mlp=True, hidden_act="silu"),
    "no query and value bias": replace(WIDE, query_bias=False, value_bias=False),
    "no registers": replace(WIDE, num_register_tokens=0),
}


def holdable(config: DINOv3Config) -> dict[str, torch.Tensor]:
    """Weights that every layout can hold: without a mask token, which timm has not."""
    weights = trained_like(config)
    weights["embeddings.mask_token"].zero_()
    return weights


def state(source: Path) -> dict[str, torch.Tensor]:
    opened = open_checkpoint(source)
    return {name: opened.tensor(name).clone() for name in opened.names()}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("chain", list(itertools.permutations(LAYOUTS, 3)), ids="-".join)
def test_chains_come_back_bit_for_bit(chain, name, tmp_path):
    source = write_checkpoint(tmp_path / "source", CONFIGS[name], holdable(CONFIGS[name]))
    expected, path = state(source), source
    for i, layout in enumerate((*chain, "transformers")):
        path = convert(path, tmp_path / str(i), to=layout)
        result = state(path)
        assert result.keys() == expected.keys()
        for key, tensor in expected.items():
            assert torch.equal(result[key], tensor), (layout, key)
    written = load_file(path / "model.safetensors")
    original = load_file(source / "model.safetensors")
    assert written.keys() == original.keys()
    assert all(torch.equal(written[key], original[key]) for key in original)


@pytest.mark.parametrize("config", [TINY, TINY_GATED], ids=["plain", "gated"])
def test_config_and_preprocessing_survive_our_file(config, tmp_path):
    preprocessing = {**PREPROCESSING, "size": {"height": 96, "width": 160}, "a_key_of_theirs": [1, 2]}
    source = write_checkpoint(tmp_path / "source", config, preprocessing=preprocessing)
    back = convert(convert(source), tmp_path / "back", to="transformers")
    assert DINOv3Config.from_dict(json.loads((back / "config.json").read_text())) == config
    assert json.loads((back / "preprocessor_config.json").read_text()) == preprocessing
    assert ImageProcessor.from_pretrained(back).size == (96, 160)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("to", LAYOUTS)
def test_cast_while_converting(to, dtype, tmp_path):
    source = write_checkpoint(tmp_path / "source", WIDE, holdable(WIDE))
    expected = DINOv3ViT.from_pretrained(source, dtype=dtype).state_dict()
    result = DINOv3ViT.from_pretrained(convert(source, tmp_path / "out", to=to, dtype=dtype)).state_dict()
    for key, tensor in expected.items():
        # tokens go through float16 in layouts of one dtype
        tensor = tensor.to(dtype) if "token" in key else tensor
        assert torch.equal(result[key].to(tensor.dtype), tensor), key


def test_shards_in_and_out(tmp_path):
    source = write_checkpoint(tmp_path / "source", WIDE)
    sharded = convert(source, tmp_path / "shards", to="transformers", max_shard_size=200_000)
    shards = sorted(sharded.glob("model-*.safetensors"))
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    assert len(shards) > 3 and not (sharded / "model.safetensors").exists()
    assert shards[0].name == f"model-00001-of-{len(shards):05}.safetensors"
    assert set(index["weight_map"].values()) == {shard.name for shard in shards}
    assert index["metadata"]["total_size"] == sum(t.nbytes for s in shards for t in load_file(s).values())
    assert all(sum(t.nbytes for t in load_file(s).values()) <= 200_000 or len(load_file(s)) == 1 for s in shards)
    expected, result = state(source), state(convert(sharded))
    assert all(torch.equal(result[key], expected[key]) for key in expected)


# ---- what a file can't say


@pytest.mark.parametrize(
    ("to", "changes", "message"),
    [
        (
            "meta",
            {"layer_norm_eps": 1e-3},
            r"'layer_norm_eps' 0.001: its files don't say it, and its readers take 1e-05",
        ),
        ("timm", {"layer_norm_eps": 1e-3}, "'layer_norm_eps' 0.001"),
        ("meta", {"use_gated_mlp": True}, "'hidden_act' 'gelu': its files don't say it, and its readers take 'silu'"),
        # timm has no model without a projection's bias, and nowhere to say what the tensors don't show
        ("timm", {"proj_bias": False, "num_attention_heads": 4}, "'num_attention_heads' 4: .* its readers take 2"),
        ("timm", {"proj_bias": False, "rope_theta": 50.0}, "'rope_embed.periods': it computes RoPE periods from the"),
        (
            "timm",
            {"proj_bias": False, "hidden_size": 48, "num_attention_heads": 1},
            r"the config: its files don't say it, .* \(its width 48 is no multiple of 64, the head dim of released models",
        ),
    ],
)
def test_what_readers_would_take_for_something_else_is_a_loss(to, changes, message, tmp_path):
    config = replace(WIDE, **changes)
    source = write_checkpoint(tmp_path / "source", config, holdable(config))
    with pytest.raises(ValueError, match=f"the {to} layout can't hold .*{message}"):
        convert(source, tmp_path / "out", to=to)
    assert not (tmp_path / "out").exists()
    assert open_checkpoint(convert(source, tmp_path / "lite")).config == config


# ---- checkpoints of training


WRAPPINGS = {
    "model": lambda t: {"model": t, "epoch": 3},
    "state_dict with module.": lambda t: {"state_dict": {f"module.{k}": v for k, v in t.items()}},
    "teacher beside student": lambda t: {
        "student": {f"backbone.{k}": v + 1 for k, v in t.items()},
        "teacher": {f"backbone.{k}": v for k, v in t.items()} | {"dino_head.mlp.0.weight": torch.ones(3)},
    },
    "flat teacher and student": lambda t: (
        {f"student.backbone.{k}": v + 1 for k, v in t.items()} | {f"teacher.backbone.{k}": v for k, v in t.items()}
    ),
    "a segmenter around it": lambda t: (
        {f"encoder.{k}": v for k, v in t.items()}
        | {"decoder.cls_token": torch.ones(1, 1, 7), "decoder.conv.weight": torch.ones(3)}
    ),
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
@pytest.mark.parametrize("layout", ["meta", "timm", "transformers"])
def test_training_checkpoints(wrapping, layout, tmp_path):
    source = write_checkpoint(tmp_path / "source", WIDE, holdable(WIDE))
    plain = convert(source, tmp_path / layout, to=layout)
    tensors = torch.load(plain, weights_only=True) if plain.is_file() else load_file(plain / "model.safetensors")
    wrapped = tmp_path / layout / "wrapped.pth"
    torch.save(WRAPPINGS[wrapping](tensors), wrapped)
    if layout == "timm":
        (tmp_path / layout / "config.json").unlink()
    expected, result = state(source), state(wrapped)
    assert all(torch.equal(result[key], expected[key]) for key in expected)
    outside = {
        "teacher beside student": 1 + len(tensors),
        "flat teacher and student": len(tensors),
        "a segmenter around it": 2,
    }
    assert len(open_checkpoint(wrapped).left_out) == outside.get(wrapping, 0)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_any_pth_that_torch_writes(legacy, tmp_path):
    """Also the format before the archive, shared storages, and tensors that are no contiguous whole."""
    source = write_checkpoint(tmp_path / "source", TINY)
    tensors = rename(DINOv3ViT.from_pretrained(source).state_dict(), META, TINY)
    tensors["blocks.0.mlp.fc1.weight"] = tensors["blocks.0.mlp.fc1.weight"].T.contiguous().T
    both = torch.cat([tensors["norm.weight"], tensors["norm.bias"]])
    tensors["norm.weight"], tensors["norm.bias"] = both[:32], both[32:]
    torch.save(tensors, tmp_path / "x.pth", _use_new_zipfile_serialization=not legacy)
    expected = state(source)
    for result in (state(tmp_path / "x.pth"), state(convert(tmp_path / "x.pth", tmp_path / "y.safetensors"))):
        assert all(torch.equal(result[key], expected[key]) for key in expected)
