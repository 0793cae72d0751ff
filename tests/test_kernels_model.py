"""The model on its kernels, in triton's interpreter where there is no GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers import TINY, TINY_GATED, relative_error, write_checkpoint
from kernel_inputs import DEVICE
from torch import Tensor

from dinov3_lite import DINOv3ViT, kernels
from dinov3_lite.attention import sdpa_attention, triton_attention

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("poisoned_memory")

SWIGLU = replace(TINY, use_gated_mlp=True, hidden_act="silu")


@pytest.fixture
def images() -> Tensor:
    return torch.randn(2, 3, 24, 16, device=DEVICE)


def weighted_sum(out: Tensor) -> Tensor:
    """A loss of well-conditioned gradients. That of out ** 2 is not: the final LayerNorm keeps it nearly constant."""
    return (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)).sum()


def model_with_gradients(model: DINOv3ViT, attention: str, images: Tensor) -> list[Tensor]:
    model.attention = attention
    model.zero_grad()
    out = model(images).last_hidden_state
    weighted_sum(out).backward()
    return [out.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("config", [TINY, TINY_GATED], ids=["plain", "gated"])
def test_model_is_as_exact_as_eager(config, tmp_path):
    """Outputs and gradients with all kernels, those of rows too, beside PyTorch's float32: mean error against float64."""
    folder = write_checkpoint(tmp_path, config)
    model = DINOv3ViT.from_pretrained(folder, device=DEVICE)
    exact = DINOv3ViT.from_pretrained(folder, dtype=torch.float64, device=DEVICE)
    errors = {"eager": 0.0, "triton": 0.0}
    for _ in range(4):
        images = torch.randn(2, 3, 24, 16, device=DEVICE)
        truth = model_with_gradients(exact, "eager", images)
        for name in errors:
            actual = model_with_gradients(model, name, images)
            assert len(actual) == len(truth) > 10
            errors[name] += sum(relative_error(a, t) for a, t in zip(actual, truth, strict=True)) / len(truth) / 4
    assert errors["triton"] < 1.5 * errors["eager"] < 1e-5

    plain = model_with_gradients(model, "triton", images)
    model.gradient_checkpointing = True
    for recomputed, p in zip(model_with_gradients(model, "triton", images), plain, strict=True):
        assert torch.equal(recomputed, p)


@pytest.mark.parametrize(
    ("config", "row_kernels"), [(TINY, {"add_layer_norm"}), (SWIGLU, {"add_layer_norm", "swiglu"})]
)
def test_model_runs_the_row_kernels_beside_attention(config, row_kernels, images, monkeypatch):
    called = set()
    for name in ("rope_attention", "add_layer_norm", "swiglu"):
        function = getattr(kernels, name)
        monkeypatch.setattr(kernels, name, lambda *args, name=name, f=function: (called.add(name), f(*args))[1])
    model = DINOv3ViT(config, attention="triton").to(DEVICE).eval()
    for name, expected in (("triton", {"rope_attention"} | row_kernels), ("sdpa", set())):
        model.attention = name
        called.clear()
        with torch.no_grad():
            model(images)
        assert called == expected


@pytest.mark.parametrize("config", [TINY, SWIGLU], ids=["mlp", "swiglu"])
def test_stochastic_depth_may_drop_both_branches_of_a_fused_block(config):
    block = DINOv3ViT(replace(config, drop_path_rate=1 - 1e-7)).to(DEVICE).train().blocks[0]
    x, ones = torch.randn(2, 3, config.hidden_size, device=DEVICE), torch.ones(3, config.head_dim // 2, device=DEVICE)
    for training in (True, False):
        out = block.train(training)(x, ones, torch.zeros_like(ones), triton_attention)
        assert torch.equal(out, x) == training


@torch.no_grad()
def test_the_norm_of_a_fused_block_has_the_configs_epsilon():
    block = DINOv3ViT(replace(TINY, layer_norm_eps=0.5)).to(DEVICE).blocks[0]
    x, ones = torch.randn(2, 3, 32, device=DEVICE), torch.ones(3, 8, device=DEVICE)
    block.ls2.gamma.fill_(1.0)
    plain, fused = (block(x.clone(), ones, torch.zeros_like(ones), a) for a in (sdpa_attention, triton_attention))
    assert relative_error(fused - x, plain - x) < 2e-6


@pytest.mark.parametrize("act", ["gelu", "silu"])
def test_a_gated_model_of_another_activation_is_not_swiglu(act, images):
    model = DINOv3ViT(replace(SWIGLU, hidden_act=act), attention="triton").to(DEVICE).eval()
    model.load_state_dict({k: 4 * v for k, v in model.state_dict().items()})  # GELU and SiLU are one near zero
    with torch.no_grad():
        ours = model(images).last_hidden_state
        model.attention = "eager"
        assert relative_error(ours, model(images).last_hidden_state) < 1e-5
        for block in model.blocks:
            block.mlp.act = {"gelu": "silu", "silu": "gelu"}[act]
        assert relative_error(ours, model(images).last_hidden_state) > 1e-2


@pytest.mark.parametrize(
    "shapes", [[(8, 8), (72, 80)], [(72, 80), (8, 8), (80, 72)]], ids=["short first", "long first"]
)
def test_a_pack_whose_sequences_take_several_tiles(shapes):
    """95 tokens beside 6: programs are launched for the longest sequence, wherever it lies."""
    model = DINOv3ViT(TINY, attention="triton").to(DEVICE).eval()
    pictures = [torch.randn(3, *shape, device=DEVICE) for shape in shapes]
    with torch.no_grad():
        packed = model.forward_packed(pictures)
        model.attention = "eager"
        for picture, out in zip(pictures, packed, strict=True):
            assert relative_error(out.last_hidden_state, model(picture[None]).last_hidden_state) < 2e-6


def test_model_under_autocast(images):
    model = DINOv3ViT(TINY).to(DEVICE).eval()
    with torch.autocast(DEVICE, torch.float16):
        eager, ours = (model_with_gradients(model, name, images) for name in ("eager", "triton"))
    for a, e in zip(ours, eager, strict=True):
        assert relative_error(a, e) < 5e-3


def test_training_step_of_the_model_compiles_whole(images, tmp_path):
    model = DINOv3ViT.from_pretrained(write_checkpoint(tmp_path, TINY), attention="triton", device=DEVICE)
    expected = model_with_gradients(model, "triton", images)
    model.zero_grad()
    out = torch.compile(model, fullgraph=True, backend="aot_eager")(images).last_hidden_state
    weighted_sum(out).backward()
    for a, e in zip([out, *(p.grad for p in model.parameters() if p.grad is not None)], expected, strict=True):
        assert relative_error(a, e) < 1e-5  # the rows of a compiled model are PyTorch's


def test_export_with_dynamic_resolution(images):
    from torch.export import Dim, export

    model = DINOv3ViT(replace(TINY, num_hidden_layers=1), attention="triton").to(DEVICE).eval()
    shapes = ({0: Dim("batch", max=64), 2: 8 * Dim("h", max=64), 3: 8 * Dim("w", max=64)},)
    with torch.no_grad():
        program = export(model, (images,), dynamic_shapes=shapes, strict=False)
        other = torch.randn(3, 3, 16, 40, device=DEVICE)
        torch.testing.assert_close(program.module()(other).last_hidden_state, model(other).last_hidden_state)
