from __future__ import annotations

import pytest
import torch
from dinov3_lite.kernels import rope_attention_reference
from helpers import TINY, relative_error, write_checkpoint

from dinov3_lite import DINOv3ViT
from dinov3_lite.attention import ATTENTION, eager_attention, resolve_attention, sdpa_attention


def inputs(N: int, D: int, dtype: torch.dtype, heads: int = 3):
    """q, k, v as views of one fused projection, and tables whose first rows are the identity."""
    qkv = torch.randn(2, N, 3 * heads * D).to(dtype)
    angles = torch.rand(N, D // 2) * 6
    angles[:5] = 0
    return *qkv.unflatten(-1, (3, heads, D)).unbind(-3), angles.cos(), angles.sin()


@pytest.mark.parametrize("D", [16, 64, 128])
@pytest.mark.parametrize("N", [1, 6, 41])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_all_functions_agree_with_the_definition(N, D, scale):
    q, k, v, cos, sin = inputs(N, D, torch.float32)
    prefix = min(5, N - 1)
    truth = rope_attention_reference(q.double(), k.double(), v.double(), cos[prefix:], sin[prefix:], scale)
    for attention in (eager_attention, sdpa_attention):
        assert relative_error(attention(q, k, v, cos, sin, scale), truth) < 2e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_half_precision(dtype):
    q, k, v, cos, sin = inputs(41, 64, dtype)
    truth = rope_attention_reference(q.double(), k.double(), v.double(), cos, sin)
    for attention in (eager_attention, sdpa_attention):
        out = attention(q, k, v, cos, sin)
        assert out.dtype == dtype
        assert relative_error(out, truth) < 2 * torch.finfo(dtype).eps


def test_an_explicit_choice_is_taken_at_its_word():
    assert resolve_attention("auto") is sdpa_attention
    for name, function in ATTENTION.items():
        assert resolve_attention(name) is function


def test_unknown_name_at_any_door(tmp_path):
    message = "attention is 'flash': expected one of auto, sdpa, eager"
    with pytest.raises(ValueError, match=message):
        DINOv3ViT(TINY, attention="flash")
    with pytest.raises(ValueError, match=message):
        DINOv3ViT.from_pretrained(write_checkpoint(tmp_path, TINY), attention="flash")
    model = DINOv3ViT(TINY)
    model.attention = "flash"
    with pytest.raises(ValueError, match=message):
        model(torch.zeros(1, 3, 16, 16))
