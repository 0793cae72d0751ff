"""The kernels of residual + LayerScale + LayerNorm against float64, in triton's interpreter where there is no GPU."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from dinov3_lite.kernels import add_layer_norm, add_layer_norm_reference, availability
from helpers import relative_error
from kernel_inputs import DEVICE, EPS, assert_no_worse_than, float64, row_inputs, rows_with_gradients

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("poisoned_memory")

# residual stream, everything else
DTYPES = [(torch.float32, torch.float32), (torch.float16, torch.float16), (torch.float32, torch.float16)]
DTYPES += [(torch.bfloat16, torch.bfloat16), (torch.float32, torch.bfloat16)]

ADD_LAYER_NORM = "x_new normed grad_x grad_branch grad_gamma grad_weight grad_bias"


def eager_add_layer_norm(x, branch, gamma, weight, bias, eps):
    """What the model does without the kernel, in the same dtypes."""
    x_new = torch.addcmul(x, branch, gamma).to(x.dtype)
    normed = F.layer_norm(x_new, gamma.shape, weight.to(x.dtype), bias.to(x.dtype), eps)
    return x_new, normed.to(weight.dtype)


@pytest.mark.parametrize("stream, half", DTYPES, ids=str)
@pytest.mark.parametrize("C", [128, 136, 384, 768, 1024, 1280, 4096])
@pytest.mark.parametrize("shape", [(1,), (3, 5)], ids=str)
def test_add_layer_norm_and_its_gradients(shape, C, stream, half):
    inputs = row_inputs((*shape, C), stream, half)
    grads = [torch.randn(*shape, C, device=DEVICE).to(dtype) for dtype in (stream, half)]
    ours = rows_with_gradients(add_layer_norm, inputs, EPS, grads=grads)
    eager = rows_with_gradients(eager_add_layer_norm, inputs, EPS, grads=grads)
    truth = rows_with_gradients(add_layer_norm_reference, float64(inputs), EPS, grads=grads)
    assert_no_worse_than(eager, ours, truth, ADD_LAYER_NORM)


def test_eps_counts_where_rows_are_small():
    x, branch, *vectors = row_inputs((3, 136), torch.float32, torch.float32)
    inputs = [(1e-4 * x).detach(), (1e-4 * branch).detach(), *vectors]
    grads = [torch.randn(3, 136, device=DEVICE) for _ in range(2)]
    inputs[:2] = (t.requires_grad_() for t in inputs[:2])
    ours = rows_with_gradients(add_layer_norm, inputs, EPS, grads=grads)
    truth = rows_with_gradients(add_layer_norm_reference, float64(inputs), EPS, grads=grads)
    for a, t in zip(ours, truth, strict=True):
        assert relative_error(a, t) < 1e-6


def test_the_reference_is_right():
    """It is the truth above, so it is compared with PyTorch's own functions in float64."""
    inputs = float64(row_inputs((7, 136), torch.float32, torch.float32))
    for ours, eager in zip(add_layer_norm_reference(*inputs, EPS), eager_add_layer_norm(*inputs, EPS), strict=True):
        assert relative_error(ours, eager) < 1e-14
    assert torch.autograd.gradcheck(add_layer_norm_reference, (*float64(row_inputs((2, 6), *DTYPES[0])), EPS))


def test_no_rows():
    inputs = row_inputs((0, 4, 136), torch.float32, torch.float16)
    x_new, normed = add_layer_norm(*inputs, EPS)
    grads = torch.autograd.grad(x_new.sum() + normed.sum(), inputs)
    assert x_new.shape == normed.shape == grads[0].shape == grads[1].shape == (0, 4, 136)
    assert all(torch.equal(g, torch.zeros_like(g)) for g in grads[2:])


def test_twice_the_same_bits():
    inputs = row_inputs((37, 136), torch.float32, torch.float16)
    grads = [torch.randn(37, 136, device=DEVICE), torch.randn(37, 136, device=DEVICE)]
    first = rows_with_gradients(add_layer_norm, inputs, EPS, grads=grads)
    again = rows_with_gradients(add_layer_norm, inputs, EPS, grads=grads)
    assert all(map(torch.equal, first, again))


def test_gradients_of_one_output_and_of_strided_ones():
    """An unused output has no gradient, and a sum's is expanded from one number: neither has rows in memory."""
    inputs = row_inputs((7, 136), torch.float32, torch.float32)
    for i in range(2):
        ours = torch.autograd.grad(add_layer_norm(*inputs, EPS)[i].sum(), inputs[:3])
        truth_inputs = float64(inputs)
        truth = torch.autograd.grad(add_layer_norm_reference(*truth_inputs, EPS)[i].sum(), truth_inputs[:3])
        for a, t in zip(ours, truth, strict=True):
            assert (a - t).abs().max() < 1e-5


def test_layer_scale_may_have_a_dtype_of_its_own():
    """Half precision beside it rounds neither what it does nor its gradient."""
    x, branch, gamma, *others = row_inputs((7, 136), torch.float32, torch.float16)
    inputs = [x, branch, gamma.detach().float().requires_grad_(), *others]
    grads = [torch.randn(7, 136, device=DEVICE), torch.randn(7, 136, device=DEVICE)]
    ours = rows_with_gradients(add_layer_norm, inputs, EPS, grads=grads)
    truth = rows_with_gradients(add_layer_norm_reference, float64(inputs), EPS, grads=[grads[0], grads[1].half()])
    for name, a, t in zip(ADD_LAYER_NORM.split(), ours, truth, strict=True):
        assert relative_error(a, t) < (2e-6 if a.dtype == torch.float32 else 1e-3), name
    assert ours[4].dtype == torch.float32


def test_only_what_needs_a_gradient_gets_one():
    x, branch, gamma, weight, bias = (t.detach() for t in row_inputs((3, 136), torch.float32, torch.float32))
    branch.requires_grad_()
    x_new, normed = add_layer_norm(x, branch, gamma, weight, bias, EPS)
    (x_new.sum() + normed.sum()).backward()
    assert torch.isfinite(branch.grad).all() and gamma.grad is None
    with torch.no_grad():
        assert not add_layer_norm(x, branch, gamma, weight, bias, EPS)[0].requires_grad


def test_opcheck():
    inputs = row_inputs((2, 3, 136), torch.float32, torch.float16)
    x, branch, gamma, weight, _ = (t.detach() for t in inputs)
    torch.library.opcheck(torch.ops.dinov3_lite.add_layer_norm.default, (*inputs, EPS))
    backward = torch.ops.dinov3_lite.add_layer_norm_backward.default
    torch.library.opcheck(backward, (x, branch, gamma, weight, x, branch, EPS))


def changed(**changes):
    """Arguments of add_layer_norm, all right but for the changes."""
    good = {"x": torch.zeros(2, 3, 16), "branch": torch.zeros(2, 3, 16), "eps": EPS}
    return good | {name: torch.zeros(16) for name in ("gamma", "weight", "bias")} | changes


@pytest.mark.parametrize(
    "arguments, message",
    [
        (changed(branch=torch.zeros(2, 4, 16)), "branch has shape (2, 4, 16): expected (2, 3, 16), the shape of x"),
        (changed(branch=torch.zeros(16)), "branch has shape (16,): expected (2, 3, 16), the shape of x"),
        (changed(gamma=torch.zeros(1)), "gamma has shape (1,): expected (16,), x's channels"),
        (changed(weight=torch.zeros(1, 16)), "weight has shape (1, 16): expected (16,), x's channels"),
        (changed(bias=torch.zeros(8)), "bias has shape (8,): expected (16,), x's channels"),
        (changed(bias=torch.zeros(16).half()), "bias is torch.float16: expected torch.float32, the dtype of weight"),
        (changed(x=torch.zeros(2, 3, 16).double()), "x is torch.float64: expected torch.float32, float16 or bfloat16"),
        (changed(gamma=torch.zeros(16).int()), "gamma is torch.int32: expected torch.float32, float16 or bfloat16"),
        (
            changed(x=torch.zeros(3, 2, 16).transpose(0, 1)),
            "x has strides (16, 32, 1) for shape (2, 3, 16): expected it contiguous",
        ),
        (
            changed(branch=torch.zeros(2, 3, 32)[..., ::2]),
            "branch has strides (96, 32, 2) for shape (2, 3, 16): expected it contiguous",
        ),
        (changed(branch=torch.zeros(2, 3, 16, device="meta")), "branch is on meta: expected cpu, the device of x"),
        (changed(gamma=torch.zeros(16, device="meta")), "gamma is on meta: expected cpu, the device of x"),
        (changed(weight=torch.zeros(16, device="meta")), "weight is on meta: expected cpu, the device of x"),
        (changed(bias=torch.zeros(16, device="meta")), "bias is on meta: expected cpu, the device of x"),
        (changed(x=torch.tensor(1.0)), "x has shape (): expected at least one channel"),
        (changed(x=torch.zeros(1, 4104), branch=torch.zeros(1, 4104)), "x has 4104 channels: expected at most 4096"),
    ],
)
def test_bad_input_of_add_layer_norm(arguments, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        add_layer_norm(**arguments)


def test_where_no_kernel_can_run(monkeypatch):
    assert availability.is_available()
    monkeypatch.setattr(availability, "interpreted", lambda: False)
    message = "x is on cpu: expected a CUDA device, or the CPU under TRITON_INTERPRET=1"
    with pytest.raises(RuntimeError, match=f"^{message}$"):
        add_layer_norm(**changed())
    monkeypatch.setattr(availability, "unavailable_reason", lambda: "triton is not installed")
    with pytest.raises(RuntimeError, match="^add_layer_norm can't run: triton is not installed$"):
        add_layer_norm(**changed())
