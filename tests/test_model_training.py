"""Gradients, checkpointing, stochastic depth, initial weights, and biases that are not there."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from helpers import TINY, TINY_GATED, write_checkpoint

from dinov3_lite import DINOv3ViT
from dinov3_lite.attention import eager_attention
from dinov3_lite.layers import Block


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


def in_thirds(model: DINOv3ViT) -> dict[str, torch.Tensor]:
    """A state dict as older releases wrote it, and as our files hold it."""
    state = dict(model.state_dict())
    for i, block in enumerate(model.blocks):
        thirds = zip(block.attn.qkv.has_bias.items(), state.pop(f"blocks.{i}.attn.qkv.bias").chunk(3), strict=True)
        state |= {f"blocks.{i}.attn.qkv.{name}": third for (name, there), third in thirds if there}
    return state


@pytest.mark.parametrize("config", [TINY, TINY_GATED])
def test_a_state_dict_names_what_the_parameters_are(config, tmp_path):
    model = DINOv3ViT.from_pretrained(write_checkpoint(tmp_path, config))
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    assert model.state_dict().keys() == tensors.keys() and "blocks.0.attn.qkv.bias" in tensors
    for source in (model.state_dict(), tensors, in_thirds(model)):
        for assign in (False, True):
            other = DINOv3ViT(config)
            other.load_state_dict(source, assign=assign)
            assert all(torch.equal(t, tensors[name]) for name, t in other.state_dict().items())
    with torch.device("meta"):
        empty = DINOv3ViT(config)
    for source in (model.state_dict(), in_thirds(model)):
        empty.load_state_dict(source, assign=True)
        assert all(torch.equal(t, tensors[name]) for name, t in empty.state_dict().items())
    taken = empty.load_state_dict(model.state_dict(), assign=True) and empty.blocks[0].attn.qkv.bias
    assert taken.data_ptr() == model.blocks[0].attn.qkv.bias.data_ptr()  # as any parameter's


def test_what_a_state_dict_lacks_or_has_too_much_is_named(model):
    state, name = in_thirds(model), "blocks.0.attn.qkv"
    for given, words in (
        ({k: t for k, t in model.state_dict().items() if k != f"{name}.bias"}, f'Missing key.*: "{name}.bias"'),
        ({k: t for k, t in state.items() if k != f"{name}.q_bias"}, f'Missing key.*: "{name}.q_bias"'),
        (state | {f"{name}.k_bias": torch.zeros(32)}, f'Unexpected key.*: "{name}.k_bias"'),
        (model.state_dict() | {f"{name}.v_bias": torch.zeros(32)}, f'Unexpected key.*: "{name}.v_bias"'),
        (model.state_dict() | {f"{name}.bias": torch.zeros(1)}, rf"size mismatch for {name}.bias: .*\[1\]"),
    ):
        other = DINOv3ViT(TINY)
        before = other.blocks[0].attn.qkv.bias.clone()
        with pytest.raises(RuntimeError, match=words):
            other.load_state_dict(given)
        if "mismatch" not in words:
            taken = model.blocks[0].attn.qkv.bias if "Unexpected" in words else before
            assert torch.equal(other.blocks[0].attn.qkv.bias, taken)


@pytest.mark.parametrize("assign", [False, True])
def test_a_key_bias_is_not_born_of_a_state_dict(model, assign):
    noisy = {name: t + 0.1 * torch.rand_like(t) for name, t in model.state_dict().items()}
    given, other = noisy["blocks.0.attn.qkv.bias"].clone(), DINOv3ViT(TINY)
    with pytest.warns(UserWarning, match="blocks.0.attn.qkv.bias is not zero where the config has no bias"):
        other.load_state_dict(noisy, assign=assign)
    for name, parameter in other.named_parameters():
        if "qkv.bias" in name:
            q, k, v = parameter.chunk(3)
            assert not k.any() and torch.equal(torch.cat((q, v)), noisy[name].view(3, -1)[[0, 2]].flatten())
        else:
            assert torch.equal(parameter, noisy[name])
    assert torch.equal(noisy["blocks.0.attn.qkv.bias"], given)  # the caller's own


def test_what_was_written_to_a_bias_that_is_not_there_is_not_saved(model):
    before = model.blocks[1].attn.qkv.bias.view(3, 32).clone()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    for i in range(3):
        assert [bool(t.any()) for t in model.state_dict()[f"blocks.{i}.attn.qkv.bias"].chunk(3)] == [True, False, True]
    with torch.no_grad():
        for tensor in model.state_dict().values():  # they are the parameters
            tensor.add_(1.0)
    q, k, v = model.blocks[1].attn.qkv.bias.chunk(3)
    assert torch.equal(q, before[0] + 1.0 + 1.0) and not k.any() and torch.equal(v, before[2] + 1.0 + 1.0)


def test_a_key_bias_that_the_config_has_is_kept():
    model = DINOv3ViT(TINY_GATED)
    with torch.no_grad():
        model.blocks[0].attn.qkv.bias.fill_(1.0)
    q, k, v = model.state_dict()["blocks.0.attn.qkv.bias"].chunk(3)
    assert q.all() and k.all() and not v.any()


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
    wider = DINOv3ViT(replace(TINY, hidden_size=128, initializer_range=0.3)).blocks[1].attn.qkv.weight
    assert wider.std().item() == pytest.approx(0.3, rel=0.05)
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


@pytest.mark.parametrize("config", [TINY, TINY_GATED], ids=["mlp", "gated"])
def test_a_block_by_itself_is_as_its_config_says(config):
    """As somebody appends one to a model, whose `init_weights` has run."""
    block = Block(replace(config, layerscale_value=0.25))
    assert (block.ls1.gamma == 0.25).all() and (block.ls2.gamma == 0.25).all() and not block.attn.qkv.bias.any()
    within = {"mlp.fc1.bias", "mlp.fc2.bias"} if config is TINY else {"mlp.w12.bias", "mlp.w3.bias"}
    always = {"norm1.bias", "norm2.bias", "attn.qkv.bias"}
    for changes, more in (
        ({}, {"attn.proj.bias", *within}),
        ({"proj_bias": False}, within),
        ({"mlp_bias": False}, {"attn.proj.bias"}),
    ):
        names = {name for name, _ in Block(replace(config, **changes)).named_parameters() if name.endswith("bias")}
        assert names == always | more


def test_stochastic_depth_may_drop_both_branches():
    block = DINOv3ViT(replace(TINY, drop_path_rate=1 - 1e-7)).train().blocks[0]
    x = torch.randn(4, 5, 32)
    assert torch.equal(block(x, torch.ones(5, 8), torch.zeros(5, 8), eager_attention), x)
    assert not torch.equal(block.eval()(x, torch.ones(5, 8), torch.zeros(5, 8), eager_attention), x)
