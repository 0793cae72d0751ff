"""Half precision, autocast, and the residual stream's dtype."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from helpers import TINY, relative_error, write_checkpoint

from dinov3_lite import DINOv3ViT
from dinov3_lite.attention import eager_attention


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_outputs(tmp_path, dtype):
    model = DINOv3ViT.from_pretrained(write_checkpoint(tmp_path, TINY), dtype=dtype)
    out = model(torch.randn(1, 3, 16, 16), output_hidden_states=True)
    assert out.last_hidden_state.dtype == out.pooler_output.dtype == dtype
    assert all(s.dtype == (torch.float32 if dtype == torch.float16 else dtype) for s in out.hidden_states)


def test_the_residual_stream_of_half_precision_weights_is_float32_unless_told_otherwise(tmp_path):
    folder = write_checkpoint(tmp_path, TINY)
    model = DINOv3ViT.from_pretrained(folder, dtype=torch.bfloat16)
    images = torch.randn(4, 3, 40, 24)
    seen = []
    model.blocks[1].register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
    truth = DINOv3ViT.from_pretrained(folder, dtype=torch.float64)(images).last_hidden_state
    wide = relative_error(model(images).last_hidden_state, truth)
    model.residual_dtype = torch.bfloat16
    narrow = relative_error(model(images).last_hidden_state, truth)
    assert seen == [torch.float32, torch.bfloat16]
    assert wide < narrow


def test_tokens_stay_float32_under_float16_only():
    model = DINOv3ViT(TINY)
    with torch.no_grad():
        model.register_tokens[0, 0, 0] = 1e5
    model.half()
    assert model.register_tokens.dtype == torch.float32 and model.register_tokens[0, 0, 0] == 1e5
    assert model.blocks[0].ls1.gamma.dtype == torch.float16
    assert DINOv3ViT(TINY).bfloat16().register_tokens.dtype == torch.bfloat16


def test_tokens_that_were_half_precision_on_the_meta_device_get_storage():
    """Where there is nothing to keep of them."""
    torch.set_default_dtype(torch.float16)
    try:
        with torch.device("meta"):
            model = DINOv3ViT(TINY)
    finally:
        torch.set_default_dtype(torch.float32)
    assert model.cls_token.dtype == torch.float16
    model.to_empty(device="cpu").init_weights()
    assert model.cls_token.dtype == model.mask_token.dtype == model.register_tokens.dtype == torch.float32
    assert 0 < model.register_tokens.std() < 0.1 and model.norm.weight.dtype == torch.float16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_keeps_the_stream_in_float32(model, images, dtype):
    exact = model(images).last_hidden_state
    with torch.autocast("cpu", dtype):
        out = model(images, output_hidden_states=True)
    assert all(s.dtype == torch.float32 for s in out.hidden_states)
    assert 0 < relative_error(out.last_hidden_state, exact) < 10 * torch.finfo(dtype).eps


def test_a_gradient_survives_half():
    model = DINOv3ViT(TINY)
    model(torch.randn(1, 3, 16, 16)).last_hidden_state.sum().backward()
    model.half()
    assert model.register_tokens.grad.dtype == torch.float32
    torch.optim.AdamW(model.parameters()).step()


def test_the_residual_stream_keeps_the_dtype_it_was_told(images):
    model = DINOv3ViT(TINY)
    model.residual_dtype = torch.bfloat16
    seen = []
    model.norm.register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
    assert model(images).last_hidden_state.dtype == torch.float32 and seen == [torch.bfloat16]


def test_eager_attention_is_exact_under_autocast(model, images):
    model.attention = "eager"
    qkv = [torch.randn(1, 20, 2, 16) for _ in range(3)]
    tables = model.rope_embed(5, 3, 5, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        inside = eager_attention(*qkv, *tables)
    assert torch.equal(inside, eager_attention(*qkv, *tables))


def test_attention_maps_keep_their_dtype_under_autocast(model, images):
    exact = model.attention_maps(images)
    with torch.autocast("cpu", torch.bfloat16):
        maps = model.attention_maps(images)
    assert maps.dtype == torch.float32 and 0 < relative_error(maps, exact) < 0.05
    assert (maps.sum(dim=(-2, -1)) < 1).all()


@pytest.mark.parametrize("autocast", [False, True], ids=["bfloat16 weights", "autocast"])
@pytest.mark.parametrize(("height", "width"), [(320, 16), (80, 16), (80, 32), (16, 80)])
def test_images_one_patch_wide_are_as_exact_as_others(height, width, autocast):
    """In bfloat16 with AMX PyTorch's convolution gives noise or NaN for one column of five patches or more."""
    model = DINOv3ViT(replace(TINY, hidden_size=384, num_attention_heads=6, patch_size=16)).eval()
    images = torch.randn(2, 3, height, width)
    truth = copy.deepcopy(model).double()(images.double()).last_hidden_state
    for _ in range(3):  # what it gives depends on what lay there before
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            actual = (model if autocast else copy.deepcopy(model).bfloat16())(images).last_hidden_state
        assert relative_error(actual, truth) < 2e-2
