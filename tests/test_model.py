from __future__ import annotations

import copy
from dataclasses import replace
from importlib.util import find_spec as importable

import pytest
import torch
from helpers import TINY, TINY_GATED, relative_error, trained_like, write_checkpoint

from dinov3_lite import DINOv3ViT
from dinov3_lite.attention import eager_attention


@pytest.fixture
def model(tmp_path) -> DINOv3ViT:
    return DINOv3ViT.from_pretrained(write_checkpoint(tmp_path, TINY))


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(2, 3, 40, 24)


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
    np = pytest.importorskip("numpy")
    assert len(model.get_intermediate_layers(images, n=np.array([0, -1]))) == 2


@pytest.mark.parametrize("n", [0, 4, -1, [3], [-4], []])
def test_blocks_that_there_are_not(model, images, n):
    with pytest.raises(
        ValueError, match=r"n is .*: expected (a count of blocks from 1 to 3|block indices from -3 to 2)"
    ):
        model.get_intermediate_layers(images, n=n)


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
    with pytest.raises(ValueError, match=r"n is \[3\]: expected block indices from -3 to 2"):
        model.attention_maps(images, 3)


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
    ],
)
def test_images_that_do_not_fit(model, pixel_values, message):
    with pytest.raises(ValueError, match=message):
        model(pixel_values)


@pytest.mark.parametrize(
    "mask", [torch.zeros(2, 14, dtype=torch.bool), torch.zeros(1, 15, dtype=torch.bool), torch.zeros(2, 15)]
)
def test_masks_that_do_not_fit(model, images, mask):
    with pytest.raises(ValueError, match=r"bool_masked_pos is .*: expected torch.bool of shape \(2, 15\)"):
        model(images, bool_masked_pos=mask)


def test_an_unknown_config_field():
    with pytest.raises(TypeError, match="hidden_sizes"):
        DINOv3ViT.from_name("vits16", hidden_sizes=5)


# ---- dtypes


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


# ---- training


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


# ---- graphs


def test_compile_has_no_graph_break_and_few_recompilations(model):
    """A few graphs serve every batch size and resolution."""
    torch._dynamo.reset()
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    with torch.no_grad():
        for batch, height, width in [(1, 40, 24), (2, 24, 56), (3, 64, 32), (5, 32, 80), (4, 48, 48), (2, 72, 40)]:
            images = torch.randn(batch, 3, height, width)
            expected = model(images, output_hidden_states=True)
            out = compiled(images, output_hidden_states=True)
            assert out.feature_map.shape == expected.feature_map.shape
            torch.testing.assert_close(out.last_hidden_state, expected.last_hidden_state)
    assert counter.frame_count <= 3


def test_compile_with_inductor_forward_and_backward(images):
    torch._dynamo.reset()
    model = DINOv3ViT(TINY).eval()
    compiled = torch.compile(model, fullgraph=True)
    expected = model(images).last_hidden_state
    torch.testing.assert_close(compiled(images).last_hidden_state, expected, rtol=1e-4, atol=1e-5)
    expected.square().sum().backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    compiled(images).last_hidden_state.square().sum().backward()
    for eager, ours in zip(gradients, (p.grad for p in model.parameters() if p.grad is not None), strict=True):
        torch.testing.assert_close(ours, eager, rtol=1e-3, atol=1e-4)


def test_compile_in_training_mode_has_no_graph_break(images):
    torch._dynamo.reset()
    model = DINOv3ViT(replace(TINY, drop_path_rate=0.2, pos_embed_jitter=1.2)).train()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compiled(images, bool_masked_pos=torch.rand(2, 15) < 0.5).last_hidden_state.sum().backward()
    assert model.mask_token.grad.abs().sum() > 0


@pytest.mark.parametrize("config", [TINY, TINY_GATED], ids=["plain", "gated"])
def test_export_with_dynamic_batch_and_resolution(config, tmp_path):
    from torch.export import Dim, export

    model = DINOv3ViT.from_pretrained(write_checkpoint(tmp_path, config, trained_like(config)))
    h, w = Dim("h", min=2, max=64), Dim("w", min=2, max=64)
    shapes = {"pixel_values": {0: Dim("batch", min=1, max=64), 2: 8 * h, 3: 8 * w}}
    program = export(model, (torch.randn(2, 3, 40, 24),), dynamic_shapes=shapes)
    torch.export.save(program, tmp_path / "program.pt2")
    program = torch.export.load(tmp_path / "program.pt2")
    for batch, height, width in [(1, 16, 64), (3, 72, 24), (2, 40, 24)]:
        images = torch.randn(batch, 3, height, width)
        out = program.module()(images)
        torch.testing.assert_close(out.last_hidden_state, model(images).last_hidden_state, rtol=1e-4, atol=1e-5)
        assert out.feature_map.shape == (batch, 32, height // 8, width // 8)


@pytest.mark.parametrize("config", [TINY, TINY_GATED], ids=["mlp", "gated"])
def test_activations_overwrite_only_what_nobody_else_reads(config):
    model = DINOv3ViT(config).eval()
    images = torch.randn(1, 3, 2 * config.patch_size, 3 * config.patch_size)
    with_gradients = model(images).last_hidden_state
    first = model.blocks[0].mlp.w12 if config.use_gated_mlp else model.blocks[0].mlp.fc1
    with torch.no_grad():
        assert torch.equal(model(images).last_hidden_state, with_gradients)
        seen = []
        handle = first.register_forward_hook(lambda module, args, output: seen.append((args[0], output)))
        assert torch.equal(model(images).last_hidden_state, with_gradients)
        handle.remove()
        ((x, hidden),) = seen
        assert torch.equal(hidden, first(x))


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


def test_stochastic_depth_may_drop_both_branches():
    block = DINOv3ViT(replace(TINY, drop_path_rate=1 - 1e-7)).train().blocks[0]
    x = torch.randn(4, 5, 32)
    assert torch.equal(block(x, torch.ones(5, 8), torch.zeros(5, 8), eager_attention), x)
    assert not torch.equal(block.eval()(x, torch.ones(5, 8), torch.zeros(5, 8), eager_attention), x)


@pytest.mark.skipif(not importable("triton"), reason="needs triton")
@torch.no_grad()
def test_a_gate_of_another_activation_is_not_fused(tmp_path, images):
    config = replace(TINY_GATED, hidden_act="gelu", num_hidden_layers=1)
    model = DINOv3ViT.from_pretrained(write_checkpoint(tmp_path, config))
    expected = model(images).last_hidden_state
    model.attention = "triton"
    assert relative_error(model(images).last_hidden_state, expected) < 2e-6


def test_attention_maps_keep_their_dtype_under_autocast(model, images):
    exact = model.attention_maps(images)
    with torch.autocast("cpu", torch.bfloat16):
        maps = model.attention_maps(images)
    assert maps.dtype == torch.float32 and 0 < relative_error(maps, exact) < 0.05
    assert (maps.sum(dim=(-2, -1)) < 1).all()
