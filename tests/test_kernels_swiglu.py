"""SwiGLU's kernels against float64, in triton's interpreter where there is no GPU."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from dinov3_lite.kernels import availability, swiglu, swiglu_reference
from helpers import relative_error
from kernel_inputs import DEVICE, DTYPES, assert_no_worse_than, float64, rows_with_gradients

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("poisoned_memory")


def eager_swiglu(gate_value):
    gate, value = gate_value.chunk(2, dim=-1)
    return F.silu(gate) * value


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("F", [8, 100, 1024, 1536])
@pytest.mark.parametrize("shape", [(1,), (3, 5)], ids=str)
def test_swiglu_and_its_gradient(shape, F, dtype):
    gate_value = (4 * torch.randn(*shape, 2 * F, device=DEVICE)).to(dtype).requires_grad_()
    grads = [torch.randn(*shape, F, device=DEVICE).to(dtype)]
    ours = rows_with_gradients(swiglu, [gate_value], grads=grads)
    eager = rows_with_gradients(eager_swiglu, [gate_value], grads=grads)
    truth = rows_with_gradients(swiglu_reference, float64([gate_value]), grads=grads)
    assert_no_worse_than(eager, ours, truth, "out grad_gate_value")


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
def test_swiglu_saturates_without_overflow():
    gate_value = torch.tensor([[-200.0, -90.0, 0.0, 200.0, 3.0, 3.0, 3.0, 3.0]], device=DEVICE, requires_grad=True)
    out = swiglu(gate_value)
    (grad,) = torch.autograd.grad(out.sum(), gate_value)
    assert torch.equal(out, torch.tensor([[0.0, 0.0, 0.0, 600.0]], device=DEVICE))
    assert torch.equal(grad, torch.tensor([[0.0, 0.0, 1.5, 3.0, 0.0, 0.0, 0.0, 200.0]], device=DEVICE))


def test_the_reference_is_right():
    """It is the truth above, so it is compared with PyTorch's own functions in float64."""
    gate_value = torch.randn(7, 20).double()
    assert relative_error(swiglu_reference(gate_value), eager_swiglu(gate_value)) < 1e-15


def test_no_rows():
    assert swiglu(torch.empty(0, 6, device=DEVICE)).shape == (0, 3)


def test_gradient_of_a_strided_gradient():
    """A sum's gradient is expanded from one number: it has no rows in memory."""
    gate_value = torch.randn(7, 12, device=DEVICE, requires_grad=True)
    (ours,) = torch.autograd.grad(swiglu(gate_value).sum(), gate_value)
    (truth,) = torch.autograd.grad(swiglu_reference(gate_value.double()).sum(), gate_value)
    assert relative_error(ours, truth) < 1e-6


def test_a_second_derivative_is_refused():
    gate_value = torch.randn(2, 8, device=DEVICE, requires_grad=True)
    (grad,) = torch.autograd.grad(swiglu(gate_value).sum(), gate_value, create_graph=True)
    with pytest.raises(RuntimeError, match="swiglu_backward has no gradient: the kernels are differentiable once"):
        grad.sum().backward()


def test_opcheck():
    gate_value = torch.randn(2, 3, 136, device=DEVICE, requires_grad=True)
    torch.library.opcheck(torch.ops.dinov3_lite.swiglu.default, (gate_value,))
    grad_out = torch.randn(2, 3, 68, device=DEVICE)
    torch.library.opcheck(torch.ops.dinov3_lite.swiglu_backward.default, (gate_value.detach(), grad_out))


@pytest.mark.parametrize(
    "gate_value, message",
    [
        (torch.zeros(2, 7), "gate_value has 7 channels: expected an even number, gates and values"),
        (torch.zeros(2, 0), "gate_value has shape (2, 0): expected at least one channel"),
        (torch.zeros(2, 8).double(), "gate_value is torch.float64: expected torch.float32, float16 or bfloat16"),
        (torch.zeros(8, 2).t(), "gate_value has strides (1, 2) for shape (2, 8): expected it contiguous"),
    ],
)
def test_bad_input_of_swiglu(gate_value, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        swiglu(gate_value)


def test_where_no_kernel_can_run(monkeypatch):
    assert availability.is_available()
    monkeypatch.setattr(availability, "interpreted", lambda: False)
    message = "gate_value is on cpu: expected a CUDA device, or the CPU under TRITON_INTERPRET=1"
    with pytest.raises(RuntimeError, match=f"^{message}$"):
        swiglu(torch.zeros(2, 8))
    monkeypatch.setattr(availability, "unavailable_reason", lambda: "triton is not installed")
    with pytest.raises(RuntimeError, match="^swiglu can't run: triton is not installed$"):
        swiglu(torch.zeros(2, 8))
