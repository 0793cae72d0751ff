from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from helpers import TINY, write_checkpoint
from torch import nn

from dinov3_lite import DINOv3ViT, build_dinov3_encoder
from dinov3_lite.encoder import PyramidEncoder

CONFIG = replace(TINY, patch_size=16, num_hidden_layers=8)


@pytest.fixture
def folder(tmp_path):
    return write_checkpoint(tmp_path, CONFIG)


@pytest.mark.parametrize(("height", "width"), [(64, 64), (96, 160), (48, 80), (16, 16)])
def test_the_pyramid_is_that_of_transformers_hidden_states(folder, height, width):
    """Blocks 2, 4, 6 and 8 of 8, patch tokens only, not normed, resized."""
    pytest.importorskip("transformers")
    import reference

    images = torch.randn(2, 3, height, width)
    with torch.no_grad():
        hidden = reference.states(reference.load(folder), images)
    encoder = build_dinov3_encoder(pretrained_path=folder)
    maps = encoder(images)
    assert encoder.channels == (32,) * 4 and encoder.strides == (4, 8, 16, 32)
    for feature_map, block, stride in zip(maps, (2, 4, 6, 8), encoder.strides, strict=True):
        grid = hidden[block][:, 5:].transpose(1, 2).reshape(2, 32, height // 16, width // 16)
        size = (max(1, height // stride), max(1, width // stride))
        expected = F.interpolate(grid, size, mode="bilinear", align_corners=False)
        torch.testing.assert_close(feature_map, expected, rtol=1e-4, atol=1e-5)


def test_simple_keeps_the_patch_grid(folder):
    encoder = build_dinov3_encoder(pretrained_path=folder, simple=True)
    images = torch.randn(1, 3, 64, 96)
    expected = encoder.backbone.get_intermediate_layers(images, n=[1, 3, 5, 7], reshape=True, norm=False)
    assert encoder.strides == (16,) * 4
    for feature_map, e in zip(encoder(images), expected, strict=True):
        assert feature_map.shape == (1, 32, 4, 6) and torch.equal(feature_map, e)


def test_frozen_means_frozen_whatever_the_parent_does(folder):
    parent = nn.Sequential(build_dinov3_encoder(pretrained_path=folder), nn.Identity()).train()
    encoder = parent[0]
    assert not any(module.training for module in encoder.modules())
    assert not any(p.requires_grad for p in encoder.parameters())
    images = torch.randn(1, 3, 32, 32, requires_grad=True)
    maps = encoder(images)
    assert not any(m.requires_grad for m in maps)
    assert all(torch.equal(a, b) for a, b in zip(maps, encoder(images), strict=True))


def test_fine_tuning_reaches_every_block(folder):
    encoder = build_dinov3_encoder(pretrained_path=folder, freeze=False).train()
    assert encoder.backbone.training
    sum(m.square().mean() for m in encoder(torch.randn(1, 3, 32, 64))).backward()
    assert all(block.attn.qkv.weight.grad.abs().sum() > 0 for block in encoder.backbone.blocks)


def test_the_blocks_of_every_variant():
    for depth, blocks in ((12, [2, 5, 8, 11]), (24, [5, 11, 17, 23]), (32, [7, 15, 23, 31]), (40, [9, 19, 29, 39])):
        with torch.device("meta"):
            assert PyramidEncoder(DINOv3ViT(replace(CONFIG, num_hidden_layers=depth))).blocks == blocks


def test_too_few_blocks(tmp_path):
    with pytest.raises(ValueError, match="the model has 3 blocks: four maps need at least 4"):
        build_dinov3_encoder(pretrained_path=write_checkpoint(tmp_path, TINY))


def test_freezing_sets_the_mode_of_a_model_in_training(folder):
    model = DINOv3ViT.from_pretrained(folder).train()
    assert not PyramidEncoder(model).backbone.training
    assert PyramidEncoder(model, freeze=False).backbone.training and all(p.requires_grad for p in model.parameters())


def test_a_fine_tuned_encoder_keeps_nothing_under_no_grad(folder):
    encoder = build_dinov3_encoder(pretrained_path=folder, freeze=False)
    with torch.no_grad():
        assert not any(m.requires_grad for m in encoder(torch.randn(1, 3, 32, 32)))


def test_strides_are_of_the_patch_size(tmp_path):
    """A patch of 8 pixels: a quarter and half of it, itself and twice; no released model has another than 16."""
    encoder = build_dinov3_encoder(pretrained_path=write_checkpoint(tmp_path, replace(CONFIG, patch_size=8)))
    maps = encoder(torch.randn(1, 3, 32, 48))
    assert encoder.strides == (2, 4, 8, 16)
    assert [tuple(m.shape[2:]) for m in maps] == [(16, 24), (8, 12), (4, 6), (2, 3)]


def test_how_it_is_loaded_is_passed_on(folder):
    backbone = build_dinov3_encoder(pretrained_path=folder, dtype=torch.bfloat16, attention="eager").backbone
    assert (backbone.dtype, backbone.attention) == (torch.bfloat16, "eager")
