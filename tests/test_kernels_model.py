"""The model on its kernels, in triton's interpreter where there is no GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers import TINY, TINY_GATED, relative_error, write_checkpoint
from kernel_inputs import DEVICE
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dinov3_lite import DINOv3ViT

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
def test_model_runs_the_row_kernels_beside_attention(config, row_kernels, images):
    model = DINOv3ViT(config, attention="triton").to(DEVICE).eval()
    for name, expected in (("triton", {"rope_attention"} | row_kernels), ("sdpa", set())):
        model.attention = name
        with Launches() as launches, torch.no_grad():
            model(images)
        assert launches.ops == expected


class Launches(TorchDispatchMode):
    """Which of our ops run."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "dinov3_lite":
            self.ops.add(func.__name__.split(".")[0])
        return func(*args, **(kwargs or {}))


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
