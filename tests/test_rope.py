from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from helpers import TINY

from dinov3_lite import DINOv3Config, DINOv3ViT
from dinov3_lite.rope import RotaryEmbedding2D, apply_rope, patch_center_coords, rope_periods


def test_periods_are_the_published_ones():
    """Of head dim 64 rounded to bfloat16, as Meta's files hold them."""
    published = [
        1,
        1.3359375,
        1.78125,
        2.375,
        3.15625,
        4.21875,
        5.625,
        7.5,
        10,
        13.3125,
        17.75,
        23.75,
        31.625,
        42.25,
        56.25,
        75,
    ]
    assert rope_periods(DINOv3Config.from_name("vitb16")).bfloat16().float().tolist() == published


def test_coordinates_are_patch_centres_row_by_row():
    expected = [[-0.5, -2 / 3], [-0.5, 0], [-0.5, 2 / 3], [0.5, -2 / 3], [0.5, 0], [0.5, 2 / 3]]
    torch.testing.assert_close(patch_center_coords(2, 3), torch.tensor(expected))
    tall = [[-2 / 3, -0.5], [-2 / 3, 0.5], [0, -0.5], [0, 0.5], [2 / 3, -0.5], [2 / 3, 0.5]]
    torch.testing.assert_close(patch_center_coords(3, 2), torch.tensor(tall))


@pytest.mark.parametrize("grid", [(1, 1), (3, 5), (5, 3), (14, 14), (1, 7), (7, 1)])
def test_tables_from_the_formula(grid):
    """Angle = 2 pi coordinate / period, frequencies of y first; the identity for prefix tokens."""
    rope = RotaryEmbedding2D(TINY).eval()
    cos, sin = rope(*grid, 5, torch.float64)
    assert cos.shape == sin.shape == (5 + grid[0] * grid[1], 8)
    assert (cos[:5] == 1).all() and (sin[:5] == 0).all()
    h, w = grid
    for row in range(h):
        for column in range(w):
            centre = (2 * (row + 0.5) / h - 1, 2 * (column + 0.5) / w - 1)
            for axis in range(2):
                for i in range(4):
                    angle = 2 * math.pi * centre[axis] / 100 ** (i / 4)
                    entry = (5 + row * w + column, axis * 4 + i)
                    assert cos[entry].item() == pytest.approx(math.cos(angle), abs=1e-6)
                    assert sin[entry].item() == pytest.approx(math.sin(angle), abs=1e-6)


def test_tables_in_float64_round_nothing_but_coordinates_and_periods():
    """Which are float32; these coordinates are eighths."""
    rope = RotaryEmbedding2D(TINY).eval()
    cos, sin = rope(4, 8, 0, torch.float64)
    angles = (2 * math.pi * patch_center_coords(4, 8).double().unsqueeze(-1) / rope.periods.double()).flatten(1)
    assert (cos - angles.cos()).abs().max() < 1e-14 and (sin - angles.sin()).abs().max() < 1e-14


def test_rotation_is_that_of_complex_numbers():
    x = torch.randn(2, 7, 3, 16, dtype=torch.float64)
    angles = torch.rand(7, 8, dtype=torch.float64) * 6
    rotated = torch.complex(x[..., :8], x[..., 8:]) * torch.polar(torch.ones_like(angles), angles)[:, None]
    torch.testing.assert_close(
        apply_rope(x, angles.cos(), angles.sin()), torch.cat((rotated.real, rotated.imag), dim=-1)
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_without_a_gradient_it_is_the_same_rotation_bit_for_bit_with_heads_apart(dtype):
    q = torch.randn(2, 21, 3 * 4 * 32).to(dtype).unflatten(-1, (3, 4, 32))[:, :, 1]  # a view, as in the model
    angles = torch.rand(21, 16, dtype=torch.promote_types(dtype, torch.float32)) * 6
    recorded = apply_rope(q, angles.cos(), angles.sin())
    with torch.no_grad():
        written = apply_rope(q, angles.cos(), angles.sin())
        mapped = torch.func.vmap(apply_rope, in_dims=(0, None, None))(q, angles.cos(), angles.sin())
    assert torch.equal(written, recorded) and torch.equal(mapped, recorded)
    assert written.transpose(1, 2).is_contiguous()


def test_the_identity_rotation_changes_no_bit():
    x = torch.randn(1, 5, 2, 16).to(torch.bfloat16)
    assert torch.equal(apply_rope(x, torch.ones(5, 8), torch.zeros(5, 8)), x)


def test_half_precision_is_rotated_in_float32_and_rounded_once():
    x = torch.randn(1, 9, 2, 16).to(torch.bfloat16)
    angles = torch.rand(9, 8) * 6
    exact = apply_rope(x.double(), angles.cos().double(), angles.sin().double())
    ours = apply_rope(x, angles.cos(), angles.sin())
    assert ours.dtype == torch.bfloat16
    # one rounding to 8 bits, and nothing else of that size
    assert ((ours.double() - exact).abs() <= exact.abs() * 2**-8 + 1e-6).all()


@pytest.mark.parametrize(
    "cast", [lambda m: m.half(), lambda m: m.bfloat16(), lambda m: m.to(torch.bfloat16), lambda m: m.double()]
)
def test_periods_stay_float32_to_the_bit(cast):
    model = DINOv3ViT(TINY)
    model.rope_embed.periods.copy_(torch.tensor([1.0, 3.15625, 10.1, 31.7]))
    before = model.rope_embed.periods.clone()
    cast(model)
    assert model.rope_embed.periods.dtype == torch.float32
    assert torch.equal(model.rope_embed.periods, before)
    assert model.norm.weight.dtype != torch.float32


def test_tables_follow_the_periods():
    """However they change: nothing of an earlier call is kept."""
    rope = RotaryEmbedding2D(TINY).eval()
    first = rope(3, 4, 5, torch.float32)[0]
    rope.periods.mul_(2)
    second = rope(3, 4, 5, torch.float32)[0]
    rope.load_state_dict({"periods": rope.periods * 2})
    third = rope(3, 4, 5, torch.float32)[0]
    assert not torch.equal(first, second) and not torch.equal(second, third)


@pytest.mark.parametrize(
    "cast", [lambda m: m, lambda m: m.bfloat16(), lambda m: m.half()], ids=["as is", "bf16", "half"]
)
def test_periods_stay_float32_on_the_way_from_the_meta_device(cast):
    with torch.device("meta"):
        model = DINOv3ViT(TINY)
    model = cast(model).to_empty(device="cpu")
    assert model.rope_embed.periods.dtype == torch.float32
    model.init_weights()
    assert torch.equal(model.rope_embed.periods, rope_periods(TINY))


def test_inference_mode_leaves_nothing_behind_that_training_trips_over():
    model = DINOv3ViT(TINY).eval()
    images = torch.randn(1, 3, 24, 24)
    with torch.inference_mode():
        model(images)
    model(images).last_hidden_state.sum().backward()
    assert model.blocks[0].attn.qkv.weight.grad.abs().sum() > 0


def test_training_draws_new_coordinates_each_call_and_evaluation_never():
    rope = RotaryEmbedding2D(replace(TINY, pos_embed_rescale=2.0))
    a, b = rope.train()(3, 3, 5, torch.float32)[0], rope(3, 3, 5, torch.float32)[0]
    assert not torch.equal(a, b)
    off = RotaryEmbedding2D(replace(TINY, pos_embed_rescale=None))
    torch.testing.assert_close(off.train()(3, 3, 5, torch.float32), off.eval()(3, 3, 5, torch.float32), rtol=0, atol=0)
