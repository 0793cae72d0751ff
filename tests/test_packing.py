from __future__ import annotations

import importlib.util
from dataclasses import replace

import pytest
import torch
from helpers import TINY, TINY_GATED, relative_error, write_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st

from dinov3_lite import DINOv3ViT
from dinov3_lite.attention import ATTENTION
from dinov3_lite.packing import pack, unpack


@pytest.fixture(scope="module", params=[TINY, TINY_GATED], ids=["plain", "gated"])
def model(request, tmp_path_factory) -> DINOv3ViT:
    return DINOv3ViT.from_pretrained(write_checkpoint(tmp_path_factory.mktemp("model"), request.param))


SIZES = [(40, 24), (8, 8), (16, 64), (40, 24), (24, 40)]


@pytest.mark.parametrize("attention", ["eager", "sdpa", "triton"])
def test_each_image_gets_what_it_gets_alone(model, attention, monkeypatch):
    """Triton packs all images into one launch, in its interpreter here."""
    if attention == "triton":
        pytest.importorskip("triton")
    monkeypatch.setattr(model, "attention", attention)
    images = [torch.randn(3, *size) for size in SIZES]
    together = model.forward_packed(images)
    for image, out in zip(images, together, strict=True):
        alone = model(image.unsqueeze(0))
        assert out.grid == alone.grid and out.feature_map.shape == alone.feature_map.shape
        for name in (
            "last_hidden_state",
            "pooler_output",
            "cls_token",
            "register_tokens",
            "patch_tokens",
            "feature_map",
        ):
            assert relative_error(getattr(out, name), getattr(alone, name)) < 1e-6


@settings(max_examples=25, deadline=None)
@given(sizes=st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=6), seed=st.integers(0, 99))
def test_any_mix_of_sizes(model, sizes, seed):
    torch.manual_seed(seed)
    images = [torch.randn(3, 8 * h, 8 * w) for h, w in sizes]
    for image, out, grid in zip(images, model.forward_packed(images), sizes, strict=True):
        assert out.grid == grid
        assert relative_error(out.last_hidden_state, model(image.unsqueeze(0)).last_hidden_state) < 1e-6


def test_in_half_precision_and_with_gradients(tmp_path):
    folder = write_checkpoint(tmp_path, TINY)
    images = [torch.randn(3, *size) for size in SIZES]
    half = DINOv3ViT.from_pretrained(folder, dtype=torch.bfloat16)
    for image, out in zip(images, half.forward_packed(images), strict=True):
        assert out.last_hidden_state.dtype == torch.bfloat16
        assert relative_error(out.last_hidden_state, half(image.unsqueeze(0)).last_hidden_state) < 1e-2

    model = DINOv3ViT.from_pretrained(folder, dtype=torch.float64)
    gradients = []
    for run in (model.forward_packed, lambda images: [model(image.unsqueeze(0)) for image in images]):
        model.zero_grad()
        sum(out.last_hidden_state.square().sum() for out in run(images)).backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for packed, alone in zip(*gradients, strict=True):
        assert relative_error(packed, alone) < 1e-12


def test_with_activation_checkpointing(tmp_path):
    model = DINOv3ViT.from_pretrained(write_checkpoint(tmp_path, TINY))
    images = [torch.randn(3, *size) for size in SIZES]
    plain = model.forward_packed(images)
    model.gradient_checkpointing = True
    recomputed = model.forward_packed(images)
    sum(out.cls_token.sum() for out in recomputed).backward()
    assert all(torch.equal(a.last_hidden_state, b.last_hidden_state) for a, b in zip(plain, recomputed, strict=True))
    assert model.blocks[0].attn.qkv.weight.grad.abs().sum() > 0


def test_no_token_of_padding_is_computed(model):
    images = [torch.randn(3, *size) for size in SIZES]
    seen = []
    hook = model.blocks[0].mlp.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape))
    model.forward_packed(images)
    hook.remove()
    prefix = model.num_prefix_tokens
    assert seen == [(1, sum(prefix + h * w // 64 for h, w in SIZES), 32)]


def test_a_pack_is_attended_by_the_function_that_was_chosen(model, monkeypatch):
    calls: dict[str, int] = dict.fromkeys(("eager", "sdpa"), 0)
    for name in calls:

        def counted(*args, name=name, function=ATTENTION[name]):
            calls[name] += 1
            return function(*args)

        monkeypatch.setitem(ATTENTION, name, counted)
    for name in calls:
        monkeypatch.setattr(model, "attention", name)
        before = dict(calls)
        model.forward_packed([torch.randn(3, 8, 8), torch.randn(3, 8, 16)])
        assert calls == {**before, name: before[name] + 2 * model.depth}


def test_tables_of_each_sequence_are_packed_one_by_one(model):
    """Of a batch of which each image keeps patches of its own, beside one with a table for all."""
    kept = torch.tensor([[0, 5], [3, 1], [4, 2]])
    batches = [model.embed(torch.randn(3, 3, 16, 24), keep_indices=kept)[0], model.embed(torch.randn(2, 3, 8, 8))[0]]
    packed = pack(batches)
    for table in ("cos", "sin"):
        own, shared = unpack(getattr(packed, table), packed.shapes)
        assert torch.equal(own, getattr(batches[0], table)) and not torch.equal(own[0], own[1])
        assert all(torch.equal(row, getattr(batches[1], table)) for row in shared)


def test_pack_and_unpack_are_inverse(model):
    batches = [model.embed(torch.randn(b, 3, 8 * h, 16))[0] for b, h in ((2, 3), (1, 1), (3, 2))]
    packed = pack(batches)
    assert packed.x.shape[1] == len(packed.cos) == len(packed.sin)
    for x, tokens in zip(unpack(packed.x.squeeze(0), packed.shapes), batches, strict=True):
        assert torch.equal(x, tokens.x)
    for table in ("cos", "sin"):
        rows = unpack(getattr(packed, table), packed.shapes)
        for row, tokens in zip(rows, batches, strict=True):
            assert all(torch.equal(one, getattr(tokens, table)) for one in row)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([], r"images is an empty list: expected at least one image of shape \(channels, height, width\)"),
        ([(3, 8, 8), (4, 8, 8)], r"images\[1\] has shape \(4, 8, 8\): expected \(3, height, width\)"),
        ([(1, 3, 8, 8)], r"images\[0\] has shape \(1, 3, 8, 8\): expected \(3, height, width\)"),
        ([(3, 8, 8), (3, 8, 12)], "height 8 and width 12 must be multiples of the patch size 8"),
    ],
)
def test_images_that_do_not_fit(model, images, message):
    with pytest.raises(ValueError, match=message):
        model.forward_packed([torch.zeros(shape) for shape in images])


def test_images_may_come_one_by_one(model):
    images = torch.randn(2, 3, 8, 8)
    first, second = model.forward_packed(image for image in images)
    assert torch.equal(first.cls_token, model.forward_packed(images)[0].cls_token) and second.grid == (1, 1)


def test_integer_images(model):
    with pytest.raises(ValueError, match=r"images\[1\] is torch.uint8: expected normalised floating-point images"):
        model.forward_packed([torch.zeros(3, 8, 8), torch.zeros(3, 8, 8, dtype=torch.uint8)])


def test_stochastic_depth_has_no_samples_to_drop():
    model = DINOv3ViT(replace(TINY, drop_path_rate=0.1)).train()
    with pytest.raises(ValueError, match=r"drop_path_rate is 0.1: stochastic depth drops whole samples"):
        model.forward_packed([torch.zeros(3, 8, 8), torch.zeros(3, 8, 16)])
    model.eval().forward_packed([torch.zeros(3, 8, 8), torch.zeros(3, 8, 16)])


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
@torch.no_grad()
def test_the_longest_sequence_may_be_anywhere(tmp_path):
    """Between two short ones, one of more tokens than a kernel's tile has rows."""
    model = DINOv3ViT.from_pretrained(write_checkpoint(tmp_path, replace(TINY, num_hidden_layers=1)))
    images = [torch.randn(3, 8, 8), torch.randn(3, 80, 88), torch.randn(3, 8, 16)]
    expected = [model(image.unsqueeze(0)).last_hidden_state for image in images]
    model.attention = "triton"
    for out, truth in zip(model.forward_packed(images), expected, strict=True):
        assert relative_error(out.last_hidden_state, truth) < 2e-6
