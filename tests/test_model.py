"""What the model gives: outputs, intermediate layers, kept patches, attention maps, and sentences for bad input."""

from __future__ import annotations

import re
from dataclasses import replace
from importlib.util import find_spec as importable

import numpy as np
import pytest
import torch
from helpers import TINY, TINY_GATED, relative_error, write_checkpoint

from dinov3_lite import DINOv3ViT, FeaturesOnly
from dinov3_lite.features import dtype_of
from dinov3_lite.layers import Block

# ---- what comes out


def test_output_views_and_shapes(model, images):
    out = model(images, output_hidden_states=True)
    assert out.grid == (5, 3)
    assert out.last_hidden_state.shape == (2, 1 + 4 + 15, 32)
    assert torch.equal(out.pooler_output, out.last_hidden_state[:, 0])
    assert torch.equal(out.cls_token, out.last_hidden_state[:, 0])
    assert torch.equal(out.register_tokens, out.last_hidden_state[:, 1:5])
    assert torch.equal(out.patch_tokens, out.last_hidden_state[:, 5:])
    assert out.feature_map.shape == (2, 32, 5, 3)
    assert torch.equal(out.feature_map[1, :, 4, 2], out.last_hidden_state[1, -1])
    assert out.feature_map.data_ptr() == out.patch_tokens.data_ptr()
    assert len(out.hidden_states) == 4
    assert torch.equal(model.norm(out.hidden_states[-1]), out.last_hidden_state)


def test_plain_tuple(model, images):
    out = model(images, output_hidden_states=True)
    last, pooled, hidden_states = model(images, output_hidden_states=True, return_dict=False)
    assert torch.equal(last, out.last_hidden_state) and torch.equal(pooled, out.pooler_output)
    assert len(hidden_states) == 4
    assert len(model(images, return_dict=False)) == 2
    assert out.num_prefix_tokens == 5
    assert model(images).hidden_states is None


def test_the_patches_keep_their_places(model):
    """Row by row: changing pixels of one patch changes the embedding of that token alone."""
    images = torch.zeros(1, 3, 40, 24)
    before = model(images, output_hidden_states=True).hidden_states[0]
    images[0, :, 8:16, 16:24] = 1
    after = model(images, output_hidden_states=True).hidden_states[0]
    changed = (before != after).any(dim=-1)[0].nonzero().flatten().tolist()
    assert changed == [5 + 1 * 3 + 2]


def test_attributes(model):
    assert (model.embed_dim, model.num_features, model.patch_size) == (32, 32, 8)
    assert (model.depth, model.n_blocks, len(model.blocks), model.num_heads) == (3, 3, 3, 2)
    assert (model.n_storage_tokens, model.num_prefix_tokens) == (4, 5)
    assert model.config == TINY
    assert not model.training


def test_get_intermediate_layers(model, images):
    hidden = model(images, output_hidden_states=True).hidden_states
    (last,) = model.get_intermediate_layers(images)
    assert torch.equal(last, model.norm(hidden[3])[:, 5:])
    first, third = model.get_intermediate_layers(images, n=[-1, 0], norm=False)
    assert torch.equal(first, hidden[1][:, 5:]) and torch.equal(third, hidden[3][:, 5:])
    for (patches, cls, registers), state in zip(
        model.get_intermediate_layers(images, n=2, reshape=True, return_class_token=True, return_extra_tokens=True),
        hidden[2:],
        strict=True,
    ):
        normed = model.norm(state)
        assert torch.equal(patches, normed[:, 5:].transpose(1, 2).reshape(2, 32, 5, 3))
        assert torch.equal(cls, normed[:, 0]) and torch.equal(registers, normed[:, 1:5])
    ((_, cls),) = model.get_intermediate_layers(images, return_class_token=True)
    ((_, registers),) = model.get_intermediate_layers(images, return_extra_tokens=True)
    assert cls.shape == (2, 32) and registers.shape == (2, 4, 32)


def test_intermediate_layers_stop_at_the_last_block_asked_for(model, images):
    ran = []
    for i, block in enumerate(model.blocks):
        block.register_forward_hook(lambda *_, i=i: ran.append(i))
    model.get_intermediate_layers(images, n=[0, 1])
    assert ran == [0, 1]


def test_block_indices_may_be_numpys(model, images):
    assert len(model.get_intermediate_layers(images, n=np.array([0, -1]))) == 2
    assert model.block_indices(np.int64(2)) == model.block_indices(torch.tensor(2)) == [1, 2]
    assert model.block_indices(torch.tensor([1])) == model.block_indices([np.int64(1)]) == [1]


@pytest.mark.parametrize("n", [0, 4, -1, [3], [-4], []])
def test_blocks_that_there_are_not(model, images, n):
    with pytest.raises(
        ValueError, match=r"n is .*: expected (a count of blocks from 1 to 3|block indices from -3 to 2)"
    ):
        model.get_intermediate_layers(images, n=n)


@pytest.mark.parametrize("n", [None, 1.5, [1.5]])
def test_what_counts_no_blocks(model, n):
    with pytest.raises(ValueError, match=rf"n is {re.escape(str(n))}: expected a count of blocks, a list of their ind"):
        model.block_indices(n)


def test_what_counts_no_blocks_is_called_as_the_argument_is(model, images):
    with pytest.raises(ValueError, match=r"^indices is \[3\]: expected"):
        model.forward_intermediates(images, indices=[3])
    with pytest.raises(ValueError, match=r"^out_indices is \[3\]: expected"):
        FeaturesOnly(model, [3])


def test_forward_features(model, images):
    mask = torch.rand(2, 15) < 0.5
    out = model(images, bool_masked_pos=mask, output_hidden_states=True)
    features = model.forward_features(images, masks=mask)
    assert torch.equal(features["x_norm_clstoken"], out.cls_token)
    assert torch.equal(features["x_storage_tokens"], out.register_tokens)
    assert torch.equal(features["x_norm_patchtokens"], out.patch_tokens)
    assert torch.equal(features["x_prenorm"], out.hidden_states[-1])
    assert features["masks"] is mask


def test_a_masked_patch_is_the_mask_token(model, images):
    mask = torch.zeros(2, 15, dtype=torch.bool)
    mask[1, 7] = True
    state = model(images, bool_masked_pos=mask, output_hidden_states=True).hidden_states[0]
    unmasked = model(images, output_hidden_states=True).hidden_states[0]
    assert torch.equal(state[1, 5 + 7], model.mask_token[0, 0])
    state[1, 5 + 7] = unmasked[1, 5 + 7]
    assert torch.equal(state, unmasked)


# ---- a subset of the patches, one query's attention


@pytest.mark.parametrize("config", [TINY, TINY_GATED], ids=["plain", "gated"])
@pytest.mark.parametrize("kept", [1, 6, 15])
def test_kept_patches_are_those_of_a_model_without_the_others(config, kept, tmp_path, images):
    pytest.importorskip("transformers")
    import reference

    folder = write_checkpoint(tmp_path, config)
    keep_indices = torch.stack([torch.randperm(15)[:kept] for _ in images])
    theirs = reference.truth_model(folder)
    with torch.no_grad():
        pairs = zip(images.double().split(1), keep_indices, strict=True)
        truth = torch.cat([reference.kept_patches(theirs, image, indices) for image, indices in pairs])
    for dtype, bound in ((torch.float64, 3e-7), (torch.float32, 2e-6)):
        model = DINOv3ViT.from_pretrained(folder, dtype=dtype)
        for attention in ("sdpa", "eager", "triton")[: 3 if dtype == torch.float32 and importable("triton") else 2]:
            model.attention = attention
            out = model(images, keep_indices=keep_indices)
            assert relative_error(out.last_hidden_state, truth) < bound
    assert out.patch_tokens.shape == (2, kept, 32) and out.grid == (5, 3)


def test_all_patches_kept_is_the_plain_forward(model, images):
    everything = torch.arange(15).expand(2, -1)
    assert torch.equal(model(images, keep_indices=everything).last_hidden_state, model(images).last_hidden_state)
    backwards = model(images, keep_indices=everything.flip(1))
    torch.testing.assert_close(backwards.patch_tokens.flip(1), model(images).patch_tokens)


def test_kept_patches_train_with_masks_and_checkpointing(model, images):
    keep_indices, mask = torch.tensor([[0, 7, 3], [14, 2, 9]]), torch.zeros(2, 15, dtype=torch.bool)
    mask[:, 7] = True
    model.gradient_checkpointing = True
    out = model(images, mask, keep_indices=keep_indices, output_hidden_states=True)
    assert torch.equal(out.hidden_states[0][0, 5 + 1], model.mask_token[0, 0])
    out.last_hidden_state.square().sum().backward()
    assert model.mask_token.grad.abs().sum() > 0


def test_some_patches_make_no_map(model, images):
    out = model(images, keep_indices=torch.zeros(2, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match="a feature map needs all 5 x 3 patches, and 4 were kept"):
        _ = out.feature_map


@pytest.mark.parametrize(
    ("keep_indices", "message"),
    [
        (torch.zeros(2, 4), r"torch.float32 of shape \(2, 4\): expected torch.int64 of shape \(2, number of patches"),
        (torch.zeros(1, 4, dtype=torch.int64), r"of shape \(1, 4\): expected torch.int64 of shape \(2, "),
        (torch.zeros(4, dtype=torch.int64), r"of shape \(4,\): expected torch.int64 of shape \(2, "),
        (torch.tensor([[0], [15]]), "keep_indices goes from 0 to 15: expected 0 to 14, the patches of the image"),
        (torch.tensor([[-1], [3]]), "keep_indices goes from -1 to 3: expected 0 to 14"),
    ],
)
def test_kept_patches_that_do_not_fit(model, images, keep_indices, message):
    with pytest.raises(ValueError, match=message):
        model(images, keep_indices=keep_indices)


@pytest.mark.parametrize("config", [TINY, TINY_GATED], ids=["plain", "gated"])
def test_attention_maps_are_transformers_weights(config, tmp_path, images):
    pytest.importorskip("transformers")
    import reference

    folder, prefix = write_checkpoint(tmp_path, config), config.num_prefix_tokens
    theirs = reference.truth_model(folder)
    with torch.no_grad():
        weights = theirs(images.double(), output_attentions=True).attentions
        for dtype, bound in ((torch.float64, 1e-6), (torch.float32, 1e-5)):
            model = DINOv3ViT.from_pretrained(folder, dtype=dtype)
            for block in (0, 1, 2, -1):
                maps = model.attention_maps(images, block)
                assert maps.shape == (2, 2, 5, 3) and maps.dtype == dtype
                assert relative_error(maps, weights[block][:, :, 0, prefix:].unflatten(-1, (5, 3))) < bound


def test_attention_maps_compute_one_query_of_one_block(model, images, monkeypatch):
    ran = []
    for i, block in enumerate(model.blocks):
        block.register_forward_hook(lambda *_, i=i: ran.append(i))
    model.attention_maps(images, 1)
    assert ran == [0]
    assert model.half().attention_maps(images).dtype == torch.float32
    with pytest.raises(ValueError, match="block is 3: expected the index of a block, from -3 to 2"):
        model.attention_maps(images, 3)


@torch.no_grad()
def test_sizes_are_read_off_the_modules_and_else_the_configs():
    """Of a projection that tells neither its patches nor its channels, and blocks of other heads than the config's."""

    class Patches(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pieces = torch.nn.Conv2d(4, 32, 8, 8)

        def forward(self, pixel_values):
            return self.pieces(pixel_values).flatten(2).mT

    model = DINOv3ViT(replace(TINY, num_channels=4)).eval()
    model.patch_embed = Patches()
    model.blocks = torch.nn.ModuleList(Block(replace(TINY, num_attention_heads=4)) for _ in range(2))
    assert (model.num_channels, model.patch_size, model.stride, model.num_heads, model.depth) == (4, 8, 8, 4, 2)
    with pytest.raises(ValueError, match=r"expected \(batch, 4, height, width\)"):
        model(torch.randn(1, 3, 16, 24))


def test_a_dtype_is_that_of_what_computes():
    """Of quantised weights the scales', not the whole numbers'."""
    layer = torch.nn.Linear(2, 2).bfloat16()
    layer.weight = torch.nn.Parameter(torch.ones(2, 2, dtype=torch.int8), requires_grad=False)
    assert dtype_of(layer) == dtype_of(torch.nn.Identity(), layer) == torch.bfloat16


@torch.no_grad()
def test_a_model_that_was_made_in_inference_mode_runs_outside_of_it(images):
    """Its parameters have no version to look at, and nobody may write to them."""
    with torch.inference_mode():
        model = DINOv3ViT(TINY).eval()
        expected = model(images).last_hidden_state
    assert relative_error(model(images).last_hidden_state, expected) < 2e-6
    assert not model.blocks[0].attn.qkv.bias.any() and "blocks.0.attn.qkv.bias" in model.state_dict()


# ---- bad input


@pytest.mark.parametrize(
    ("pixel_values", "message"),
    [
        (torch.zeros(3, 40, 24), r"shape \(3, 40, 24\): expected \(batch, 3, height, width\)"),
        (torch.zeros(1, 4, 40, 24), r"shape \(1, 4, 40, 24\): expected \(batch, 3, height, width\)"),
        (torch.zeros(1, 3, 40, 24, dtype=torch.uint8), "torch.uint8: expected normalised floating-point images"),
        (
            torch.zeros(1, 3, 43, 24),
            "height 43 and width 24 must be multiples of the patch size 8.* height 40 or 48 and width 24",
        ),
        (torch.zeros(1, 3, 5, 30), "height 5 and width 30 .* height 8 and width 24 or 32"),
        (torch.zeros(1, 3, 0, 24), "height 0 and width 24 .* height 8 and width 24"),
        (torch.zeros(1, 3, 24, 0), "height 24 and width 0 .* height 24 and width 8"),
    ],
)
def test_images_that_do_not_fit(model, pixel_values, message):
    with pytest.raises(ValueError, match=message):
        model(pixel_values)


@pytest.mark.parametrize(
    "mask",
    [
        torch.zeros(2, 14, dtype=torch.bool),
        torch.zeros(1, 15, dtype=torch.bool),
        torch.zeros(2, 15),
        [[True] * 15] * 2,
    ],
)
def test_masks_that_do_not_fit(model, images, mask):
    with pytest.raises(ValueError, match=r"bool_masked_pos is .*: expected torch.bool of shape \(2, 15\)"):
        model(images, bool_masked_pos=mask)


def test_an_unknown_config_field():
    with pytest.raises(TypeError, match="hidden_sizes"):
        DINOv3ViT.from_name("vits16", hidden_sizes=5)


# ---- values that tests usually leave at their defaults


@pytest.mark.parametrize("eps", [1e-5, 1e-2])
@torch.no_grad()
def test_every_norm_has_the_configs_epsilon(eps, tmp_path, images):
    pytest.importorskip("transformers")
    import reference

    folder = write_checkpoint(tmp_path, replace(TINY, layer_norm_eps=eps))
    truth = reference.states(reference.truth_model(folder), images.double())
    model = DINOv3ViT.from_pretrained(folder, dtype=torch.float64)
    for state, expected in zip(reference.states(model, images), truth, strict=True):
        assert relative_error(state, expected) < 1e-6
    assert {m.eps for m in model.modules() if isinstance(m, torch.nn.LayerNorm)} == {eps}
