"""Meta's files: names, masked biases, stored RoPE periods, and what the model does not use."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import TINY, write_checkpoint
from safetensors.torch import load_file

from convert import convert
from dinov3_lite import DINOv3Config, DINOv3ViT
from dinov3_lite.checkpoint import open_checkpoint
from dinov3_lite.checkpoint.layouts import META, rename
from dinov3_lite.checkpoint.layouts.table import Card
from dinov3_lite.rope import rope_periods


def state(source: Path) -> dict[str, torch.Tensor]:
    opened = open_checkpoint(source)
    return {name: opened.tensor(name).clone() for name in opened.names()}


def test_a_meta_file_is_what_metas_strict_loader_expects(tmp_path):
    """Names, shapes and values of every tensor, and the end of the file name that its hub code insists on."""
    config = replace(DINOv3Config.from_name("vitl16"), num_hidden_layers=24, hidden_size=64, intermediate_size=96)
    config = replace(config, num_attention_heads=1, num_hidden_layers=2)
    path = convert(write_checkpoint(tmp_path, config), to="meta")
    tensors = torch.load(path, weights_only=True)
    ours = DINOv3ViT.from_pretrained(tmp_path / "model.safetensors").state_dict()
    for key, tensor in rename(ours, META, config).items():
        assert torch.equal(tensors.pop(key), tensor), key
    assert not tensors


@pytest.mark.parametrize(("name", "ending"), [("vitl16", "-8aa4cbdd.pth"), ("vits16", "-08c60483.pth")])
def test_meta_file_names(name, ending):
    assert META.file_name(Card(DINOv3Config.from_name(name)), []).endswith(ending)


def test_the_satellite_vit_l_gets_the_name_that_metas_hub_code_gives_its_norm():
    card = Card(DINOv3Config.from_name("vitl16"))
    assert META.file_name(card, ["local_cls_norm.weight"]) == "dinov3_vitl16_pretrain_sat493m-eadcf0ff.pth"


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
    assert list(opened.left_out) == ["local_cls_norm.bias", "local_cls_norm.weight"]
    assert not opened.config.key_bias
    expected = state(tmp_path / "source")
    assert all(torch.equal(tensor, expected[key]) for key, tensor in state(meta).items())


def test_what_the_model_does_not_use_goes_through_our_file_bit_for_bit(tmp_path):
    """The norm of local crops' CLS tokens, in Meta's 7B and satellite ViT-L, has weights of its own."""
    config = replace(TINY, hidden_size=4096, num_attention_heads=32, intermediate_size=8, num_hidden_layers=1)
    config = replace(config, patch_size=2, query_bias=False, value_bias=False)
    meta = convert(write_checkpoint(tmp_path / "source", config), tmp_path / "meta", to="meta")
    tensors = torch.load(meta, weights_only=True)
    for part in ("weight", "bias"):  # for strict loaders, where the source has none
        assert torch.equal(tensors[f"local_cls_norm.{part}"], tensors[f"norm.{part}"])
        tensors[f"local_cls_norm.{part}"] = torch.randn(4096)
    torch.save(tensors, meta)
    lite = convert(meta, tmp_path / "lite")
    again = convert(lite, tmp_path / "again", dtype=torch.bfloat16)
    for source, dtype in ((meta, torch.float32), (lite, torch.float32), (again, torch.bfloat16)):
        opened = open_checkpoint(source)
        assert len(opened.left_out) == 2 and opened.names() == open_checkpoint(tmp_path / "source").names()
        back = torch.load(convert(source, tmp_path / "back", to="meta", force=True), weights_only=True)
        assert back.keys() == tensors.keys()
        for key in tensors if dtype == torch.float32 else ("local_cls_norm.weight", "local_cls_norm.bias"):
            assert back[key].dtype == dtype and torch.equal(back[key], tensors[key].to(dtype)), key
    hf = load_file(convert(lite, tmp_path / "hf", to="transformers") / "model.safetensors")
    assert not any("local" in key for key in hf)


def with_masks(folder: Path, mask: torch.Tensor, config=TINY, seed: int = 0) -> tuple[Path, dict[str, torch.Tensor]]:
    """A file of Meta's with that bias_mask in every block, and its tensors; every third of its biases is non-zero."""
    meta = convert(write_checkpoint(folder / "source", config), folder / "meta", to="meta")
    tensors = torch.load(meta, weights_only=True)
    for i in range(config.num_hidden_layers):
        tensors[f"blocks.{i}.attn.qkv.bias"] = torch.randn(96)
        tensors[f"blocks.{i}.attn.qkv.bias_mask"] = mask.clone()
    torch.save(tensors, meta)
    return meta, tensors


MASKS = {
    "zeros, as released": torch.zeros(96),
    "one, zero, one": torch.tensor([1.0, 0.0, 1.0]).repeat_interleave(32),
    "query only": torch.tensor([1.0, 0.0, 0.0]).repeat_interleave(32),
    "ones": torch.ones(96),
    "key only": torch.tensor([0.0, 1.0, 0.0]).repeat_interleave(32),
    "one channel of the key": torch.eye(96)[40],
    "other values": torch.linspace(-2, 2, 96),
}


@pytest.mark.parametrize("name", MASKS)
def test_metas_layer_adds_the_bias_times_its_mask(name, tmp_path):
    meta, tensors = with_masks(tmp_path, MASKS[name])
    model = DINOv3ViT.from_pretrained(meta)
    assert model.config.key_bias == bool(MASKS[name][32:64].any())
    assert model.config.query_bias and model.config.value_bias
    for i, block in enumerate(model.blocks):
        assert torch.equal(block.attn.qkv.bias, tensors[f"blocks.{i}.attn.qkv.bias"] * MASKS[name])
    lite = DINOv3ViT.from_pretrained(convert(meta, tmp_path / "lite"))
    back = DINOv3ViT.from_pretrained(convert(convert(meta, tmp_path / "again", to="meta"), tmp_path / "x.safetensors"))
    for result in (lite, back):
        assert result.config == model.config
        assert all(torch.equal(t, model.state_dict()[key]) for key, t in result.state_dict().items())
    written = torch.load(next((tmp_path / "again").glob("*.pth")), weights_only=True)
    if model.config.key_bias:  # it acts, so nothing masks it
        assert not any("bias_mask" in key for key in written)
    else:
        assert torch.equal(written["blocks.1.attn.qkv.bias_mask"].view(3, 32)[:, 0], torch.tensor([1.0, 0.0, 1.0]))


def test_a_mask_in_one_block_only_and_in_another_dtype(tmp_path):
    meta, tensors = with_masks(tmp_path, torch.ones(96))
    del tensors["blocks.0.attn.qkv.bias_mask"]
    tensors["blocks.1.attn.qkv.bias_mask"] = torch.full((96,), 0.3)
    tensors = {key: t if key.endswith(("mask", "periods")) else t.bfloat16() for key, t in tensors.items()}
    torch.save(tensors, meta)
    model = DINOv3ViT.from_pretrained(meta)
    for i, factor in enumerate((1.0, torch.tensor(0.3).bfloat16(), 1.0)):
        bias = model.blocks[i].attn.qkv.bias
        assert bias.dtype == torch.bfloat16 and torch.equal(bias, tensors[f"blocks.{i}.attn.qkv.bias"] * factor)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_mask_of_a_model_that_was_never_initialised(value, tmp_path):
    meta, _ = with_masks(tmp_path, torch.full((96,), value))
    with pytest.raises(ValueError, match=r"'blocks.0.attn.qkv.bias_mask' holds NaN or infinity.*: save it once they"):
        DINOv3ViT.from_pretrained(meta)


@pytest.mark.parametrize("name", MASKS)
def test_a_config_beside_a_masked_file_may_not_deny_what_acts(name, tmp_path):
    meta, _ = with_masks(tmp_path, MASKS[name])
    (meta.parent / "config.json").write_text(json.dumps(TINY.to_dict()))
    if MASKS[name][32:64].any():
        with pytest.raises(
            ValueError, match=r"'blocks.0.attn.qkv.bias' holds a k_bias that is not zero, which the config"
        ):
            DINOv3ViT.from_pretrained(meta)
    else:
        assert DINOv3ViT.from_pretrained(meta).config == TINY
    (meta.parent / "config.json").write_text(json.dumps(replace(TINY, key_bias=True).to_dict()))
    bias = DINOv3ViT.from_pretrained(meta).state_dict()["blocks.1.attn.qkv.bias"]
    assert torch.equal(bias, torch.load(meta)["blocks.1.attn.qkv.bias"] * MASKS[name])


@pytest.mark.parametrize("part", ["q", "v"])
def test_a_bias_that_the_config_denies_is_zero_or_refused(part, tmp_path):
    meta = convert(write_checkpoint(tmp_path / "source", TINY), tmp_path / "meta", to="meta")
    switch = {"q": "query_bias", "v": "value_bias"}[part]
    (meta.parent / "config.json").write_text(json.dumps(replace(TINY, **{switch: False}).to_dict()))
    with pytest.raises(ValueError, match=f"holds a {part}_bias that is not zero, which the config"):
        open_checkpoint(meta)
    tensors = torch.load(meta, weights_only=True)
    for i in range(3):
        tensors[f"blocks.{i}.attn.qkv.bias"].view(3, 32)[["q", "v"].index(part) * 2] = 0
    torch.save(tensors, meta)
    assert f"blocks.0.attn.qkv.{part}_bias" not in open_checkpoint(meta).names()


PERIODS = {
    "another theta": (50.0, lambda p: p),
    "another theta, rounded": (1000.0, lambda p: p.bfloat16()),
    "theta 100 through half": (100.0, lambda p: p.half()),
    "in float64": (100.0, lambda p: p.double()),
}


@pytest.mark.parametrize("name", PERIODS)
def test_periods_are_read_whatever_they_are(name, tmp_path):
    theta, change = PERIODS[name]
    config = replace(TINY, rope_theta=theta)
    meta = convert(write_checkpoint(tmp_path / "source", config), tmp_path / "meta", to="meta")
    tensors = torch.load(meta, weights_only=True)
    tensors["rope_embed.periods"] = change(rope_periods(config))
    torch.save(tensors, meta)
    model = DINOv3ViT.from_pretrained(meta)
    assert model.config.rope_theta == theta
    assert torch.equal(model.rope_embed.periods, change(rope_periods(config)).float())


def test_periods_between_two_bounds_are_kept_and_their_loss_is_told(tmp_path):
    """Meta's code can also space them from a smallest to a largest: no theta gives those."""
    meta = convert(write_checkpoint(tmp_path / "source", TINY), tmp_path / "meta", to="meta")
    tensors = torch.load(meta, weights_only=True)
    tensors["rope_embed.periods"] = 0.5 * 60.0 ** torch.linspace(0, 1, 4)
    torch.save(tensors, meta)
    assert torch.equal(DINOv3ViT.from_pretrained(meta).rope_embed.periods, tensors["rope_embed.periods"])
    with pytest.raises(ValueError, match="the transformers layout can't hold 'rope_embed.periods'"):
        convert(meta, tmp_path / "hf", to="transformers")


@pytest.mark.parametrize(
    ("periods", "message"),
    [
        (torch.zeros(4), r"holds \[0.0, 0.0, 0.0, 0.0\]: expected RoPE periods, finite and above zero"),
        (torch.tensor([1.0, -3.0, 10.0, 31.0]), "expected RoPE periods, finite and above zero"),
        (torch.full((4,), float("nan")), "expected RoPE periods, finite and above zero"),
        (torch.ones(()), r"has shape \(\): expected the RoPE periods"),
        (torch.ones(0), r"has shape \(0,\): expected the RoPE periods"),
        (torch.ones(1, 4), r"has shape \(1, 4\): expected the RoPE periods"),
        (torch.ones(5), "no multiple of 20"),
    ],
)
def test_periods_that_are_none(periods, message, tmp_path):
    meta = convert(write_checkpoint(tmp_path / "source", TINY), tmp_path / "meta", to="meta")
    tensors = torch.load(meta, weights_only=True)
    torch.save(tensors | {"rope_embed.periods": periods}, meta)
    with pytest.raises(ValueError, match=message) as caught:
        open_checkpoint(meta)
    assert str(meta) in str(caught.value)
