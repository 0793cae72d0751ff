"""Gradients, checkpointing, stochastic depth, initial weights, and biases that are not there."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from helpers import TINY, TINY_GATED

from dinov3_lite import DINOv3ViT
from dinov3_lite.attention import eager_attention


@pytest.mark.parametrize("config", [TINY, TINY_GATED], ids=["plain", "gated"])
def test_activation_checkpointing_changes_nothing_but_memory(config, images):
    model = DINOv3ViT(replace(config, drop_path_rate=0.3)).train()
    gradients = []
    for switch in (False, True):
        model.gradient_checkpointing = switch
        model.zero_grad()
        torch.manual_seed(5)
        model(images).last_hidden_state.square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) > 30
    for plain, recomputed in zip(*gradients, strict=True):
        assert torch.equal(plain, recomputed)


def test_activation_checkpointing_keeps_no_activation_inside_blocks(model, images):
    def kept(switch: bool) -> int:
        model.gradient_checkpointing = switch
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            model(images)
        return sum(sizes)

    assert kept(True) < kept(False) / 4


def test_training_creates_no_key_bias(images):
    model = DINOv3ViT(TINY).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0, weight_decay=0.1)
    for _ in range(3):
        model(images).last_hidden_state.square().sum().backward()
        optimizer.step()
    for block in model.blocks:
        for biases in (dict(block.attn.qkv.named_parameters())["bias"], block.attn.qkv(torch.zeros(1, 1, 32))[0, 0]):
            q, k, v = biases.chunk(3)
            assert (k == 0).all() and (q != 0).any() and (v != 0).any()


def test_the_projection_is_the_linear_layer_that_it_says_it_is(model, images):
    """What replaces it by its weight and bias computes the same, even after somebody wrote to all of its bias."""
    expected = model(images).last_hidden_state
    for fill in (False, True):
        for block in model.blocks:
            qkv = block.attn.qkv
            if fill:
                with torch.no_grad():
                    dict(qkv.named_parameters())["bias"].normal_()
                expected = None
            linear = torch.nn.Linear(qkv.in_features, qkv.out_features)
            linear.weight, linear.bias = qkv.weight, qkv.bias
            x = torch.randn(2, 3, 32)
            assert torch.equal(linear(x), qkv(x)) and (qkv.bias[32:64] == 0).all()
            if not fill:
                block.attn.qkv = linear
        if expected is not None:
            assert torch.equal(model(images).last_hidden_state, expected)
            model = DINOv3ViT(TINY)


def test_a_state_dict_names_the_biases_that_there_are(model):
    state = model.state_dict()
    assert "blocks.0.attn.qkv.q_bias" in state and "blocks.0.attn.qkv.v_bias" in state
    assert not any("k_bias" in name or name.endswith("qkv.bias") for name in state)
    assert [name for name, _ in model.named_parameters() if "bias" in name] == [
        name for name, _ in model.named_parameters() if name.endswith(".bias")
    ]
    for source in (state, dict(model.named_parameters()) | dict(model.named_buffers())):
        other = DINOv3ViT(TINY)
        other.load_state_dict(source)
        for name, parameter in other.named_parameters():
            assert torch.equal(parameter, dict(model.named_parameters())[name]), name
    del state["blocks.0.attn.qkv.q_bias"]
    with pytest.raises(RuntimeError, match="Missing key.*blocks.0.attn.qkv.q_bias"):
        other.load_state_dict(state)
    with pytest.raises(RuntimeError, match="Unexpected key.*blocks.0.attn.qkv.k_bias"):
        other.load_state_dict(model.state_dict() | {"blocks.0.attn.qkv.k_bias": torch.zeros(32)})
    with pytest.raises(RuntimeError, match="qkv.bias is not zero in the third k_bias, which the config does not have"):
        other.load_state_dict(dict(model.named_parameters()) | {"blocks.0.attn.qkv.bias": torch.ones(96)}, strict=False)


def test_a_key_bias_that_the_config_has_is_kept():
    model = DINOv3ViT(TINY_GATED)
    assert "blocks.0.attn.qkv.k_bias" in model.state_dict()
    assert "blocks.0.attn.qkv.v_bias" not in model.state_dict()


def test_stochastic_depth_drops_whole_branches_and_keeps_the_mean():
    model = DINOv3ViT(replace(TINY, drop_path_rate=0.4)).train()
    branch = torch.ones(20000, 2, 3)
    dropped = model.blocks[0].drop_path(branch)
    values = dropped[:, 0, 0]
    assert torch.equal(dropped, values[:, None, None].expand_as(dropped))
    torch.testing.assert_close(values.unique(), torch.tensor([0.0, 1 / 0.6]))
    assert values.mean().item() == pytest.approx(1.0, abs=0.03)
    assert torch.equal(model.eval().blocks[0].drop_path(branch), branch)


def test_a_copy_is_independent(model, images):
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.cls_token.add_(1)
        twin.rope_embed.periods.mul_(2)
    assert not torch.equal(twin.cls_token, model.cls_token)
    assert not torch.equal(twin.rope_embed.periods, model.rope_embed.periods)


def test_initial_weights():
    model = DINOv3ViT(replace(TINY, hidden_size=128, layerscale_value=0.5))
    weight = model.blocks[1].attn.qkv.weight
    assert weight.std().item() == pytest.approx(0.02, rel=0.05) and weight.abs().max() > 0.05
    assert (model.blocks[0].attn.proj.bias == 0).all() and (model.mask_token == 0).all()
    assert (model.blocks[2].ls2.gamma == 0.5).all()
    with torch.device("meta"):
        empty = DINOv3ViT(replace(TINY, layerscale_value=0.5))
    empty = empty.to_empty(device="cpu")
    for tensor in empty.state_dict().values():
        tensor.fill_(float("nan"))
    empty.init_weights()
    assert all(t.isfinite().all() for t in empty.state_dict().values())
    assert (empty.blocks[0].norm1.weight == 1).all() and (empty.blocks[0].attn.qkv.bias == 0).all()


def test_stochastic_depth_may_drop_both_branches():
    block = DINOv3ViT(replace(TINY, drop_path_rate=1 - 1e-7)).train().blocks[0]
    x = torch.randn(4, 5, 32)
    assert torch.equal(block(x, torch.ones(5, 8), torch.zeros(5, 8), eager_attention), x)
    assert not torch.equal(block.eval()(x, torch.ones(5, 8), torch.zeros(5, 8), eager_attention), x)
