"""From layout to layout: bit for bit back again, and what the other side's own code makes of it."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import PREPROCESSING, TINY, TINY_GATED, relative_error, run_reference, trained_like, write_checkpoint
from safetensors.torch import load_file, save_file

from convert import convert
from dinov3_lite import DINOv3Config, DINOv3ViT, ImageProcessor
from dinov3_lite.layouts import LAYOUTS, META, rename
from dinov3_lite.rope import rope_periods
from dinov3_lite.weights import open_checkpoint

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


# ---- Meta


def test_a_meta_file_is_what_metas_strict_loader_expects(tmp_path):
    """Names, shapes and values of every tensor, and the end of the file name that its hub code insists on."""
    config = replace(DINOv3Config.from_name("vitl16"), num_hidden_layers=24, hidden_size=64, intermediate_size=96)
    config = replace(config, num_attention_heads=1, num_hidden_layers=2)
    path = convert(write_checkpoint(tmp_path, config), to="meta")
    tensors = torch.load(path, weights_only=True)
    ours = state(tmp_path / "model.safetensors")
    for key, tensor in rename(ours, META, config).items():
        assert torch.equal(tensors.pop(key), tensor), key
    assert not tensors


@pytest.mark.parametrize(("name", "ending"), [("vitl16", "-8aa4cbdd.pth"), ("vits16", "-08c60483.pth")])
def test_meta_file_names(name, ending, tmp_path):
    from convert.plan import output_name

    class Opened:
        config = DINOv3Config.from_name(name)

    assert output_name(Opened(), META).endswith(ending)


def test_metas_rounded_periods_are_kept_to_the_bit_and_transformers_refuses_them(tmp_path):
    meta = convert(write_checkpoint(tmp_path / "source", TINY), tmp_path / "meta", to="meta")
    tensors = torch.load(meta, weights_only=True)
    tensors["rope_embed.periods"] = rope_periods(TINY).bfloat16()
    torch.save(tensors, meta)
    model = DINOv3ViT.from_pretrained(meta)
    assert model.config.rope_theta == 100
    assert torch.equal(model.rope_embed.periods, rope_periods(TINY).bfloat16().float())
    lite = convert(meta, tmp_path)
    assert torch.equal(DINOv3ViT.from_pretrained(lite).rope_embed.periods, model.rope_embed.periods)
    with pytest.raises(
        ValueError, match=r"the transformers layout can't hold 'rope_embed.periods': it computes .* --allow-loss"
    ):
        convert(lite, tmp_path / "hf", to="transformers")
    convert(lite, tmp_path / "hf", to="transformers", allow_loss=True)
    back = torch.load(convert(lite, tmp_path / "back", to="meta"), weights_only=True)
    assert torch.equal(back["rope_embed.periods"], model.rope_embed.periods)


def test_a_key_bias_goes_through_meta_without_a_mask(tmp_path):
    """The mask of an absent key bias would switch a present one off."""
    config = replace(TINY, key_bias=True)
    source = write_checkpoint(tmp_path / "source", config)
    meta = convert(source, tmp_path / "meta", to="meta")
    assert not any("bias_mask" in key for key in torch.load(meta, weights_only=True))
    expected = state(source)
    assert "blocks.0.attn.qkv.k_bias" in expected
    for path in (meta, convert(meta, tmp_path / "back", to="transformers")):
        result = state(path)
        assert result.keys() == expected.keys()
        assert all(torch.equal(result[key], expected[key]) for key in expected)


def test_metas_tensors_that_the_model_does_not_use(tmp_path):
    meta = convert(write_checkpoint(tmp_path / "source", TINY), tmp_path / "meta", to="meta")
    tensors = torch.load(meta, weights_only=True)
    tensors |= {"local_cls_norm.weight": torch.ones(32), "local_cls_norm.bias": torch.zeros(32)}
    tensors["blocks.0.attn.qkv.bias"].view(3, 32)[1] = 7.0  # masked, so without effect
    torch.save(tensors, meta)
    opened = open_checkpoint(meta)
    assert [item.split()[0] for item in opened.left_out] == ["'local_cls_norm.bias'", "'local_cls_norm.weight'"]
    assert not opened.config.key_bias
    expected = state(tmp_path / "source")
    assert all(torch.equal(tensor, expected[key]) for key, tensor in state(meta).items())


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
    outside = {"teacher beside student": 1, "flat teacher and student": len(tensors), "a segmenter around it": 2}
    assert len(open_checkpoint(wrapped).left_out) == outside.get(wrapping, 0)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_any_pth_that_torch_writes(legacy, tmp_path):
    """Also the format before the archive, shared storages, and tensors that are no contiguous whole."""
    source = write_checkpoint(tmp_path / "source", TINY)
    tensors = rename(state(source), META, TINY)
    tensors["blocks.0.mlp.fc1.weight"] = tensors["blocks.0.mlp.fc1.weight"].T.contiguous().T
    both = torch.cat([tensors["norm.weight"], tensors["norm.bias"]])
    tensors["norm.weight"], tensors["norm.bias"] = both[:32], both[32:]
    torch.save(tensors, tmp_path / "x.pth", _use_new_zipfile_serialization=not legacy)
    expected = state(source)
    for result in (state(tmp_path / "x.pth"), state(convert(tmp_path / "x.pth", tmp_path / "y.safetensors"))):
        assert all(torch.equal(result[key], expected[key]) for key in expected)


# ---- timm


def test_timm_has_no_mask_token(tmp_path):
    source = write_checkpoint(tmp_path / "source", WIDE)
    with pytest.raises(
        ValueError, match="the timm layout can't hold 'mask_token': it has no mask token: use --allow-loss"
    ):
        convert(source, tmp_path / "timm", to="timm")
    back = convert(convert(source, tmp_path / "timm", to="timm", allow_loss=True))
    assert (DINOv3ViT.from_pretrained(back).mask_token == 0).all()


@pytest.mark.parametrize("preprocessing", [None, {"size": {"shortest_edge": 7}}, {"size": 5, "image_mean": 0.5}])
def test_preprocessing_that_timm_is_not_told(preprocessing, tmp_path):
    source = write_checkpoint(tmp_path / "source", WIDE, holdable(WIDE), preprocessing)
    folder = convert(source, tmp_path / "timm", to="timm")
    assert "pretrained_cfg" not in json.loads((folder / "config.json").read_text())


def test_timm_has_no_key_bias(tmp_path):
    config = replace(WIDE, key_bias=True)
    source = write_checkpoint(tmp_path / "source", config, holdable(config))
    with pytest.raises(ValueError, match=r"'blocks.0.attn.qkv.k_bias' \(and 2 more\): it has no key bias"):
        convert(source, tmp_path / "timm", to="timm")


@pytest.mark.parametrize(
    ("name", "changes", "architecture"),
    [
        ("vits16", {}, "vit_small_patch16_dinov3_qkvb"),
        ("vits16", {"query_bias": False, "value_bias": False}, "vit_small_patch16_dinov3"),
        ("vits16plus", {}, "vit_small_plus_patch16_dinov3_qkvb"),
    ],
)
def test_timm_itself_loads_what_we_write_and_agrees(name, changes, architecture, tmp_path):
    config = replace(DINOv3Config.from_name(name), **changes)
    source = write_checkpoint(tmp_path / "source", config, holdable(config))
    folder = convert(source, tmp_path / "timm", to="timm")
    images = torch.randn(2, 3, 64, 96)
    save_file({"images": images}, tmp_path / "images.safetensors")
    files = tmp_path / "images.safetensors", tmp_path / "out.safetensors"
    printed = run_reference("reference_timm.py", folder, *files, cwd=tmp_path)
    assert printed.strip() == architecture
    theirs = load_file(tmp_path / "out.safetensors")
    with torch.no_grad():
        ours = DINOv3ViT.from_pretrained(folder)(images).last_hidden_state
    assert relative_error(theirs["features"], ours) < 5e-6
    assert ImageProcessor.from_pretrained(folder).size == (224, 224)
