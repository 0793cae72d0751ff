"""torch.compile and torch.export of the model, and what is computed in place."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec as importable

import pytest
import torch
from helpers import TINY, TINY_GATED, relative_error, trained_like, write_checkpoint

from dinov3_lite import DINOv3ViT


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


@pytest.mark.skipif(not importable("triton"), reason="needs triton")
@torch.no_grad()
def test_a_gate_of_another_activation_is_not_fused(tmp_path, images):
    config = replace(TINY_GATED, hidden_act="gelu", num_hidden_layers=1)
    model = DINOv3ViT.from_pretrained(write_checkpoint(tmp_path, config))
    expected = model(images).last_hidden_state
    model.attention = "triton"
    assert relative_error(model(images).last_hidden_state, expected) < 2e-6
