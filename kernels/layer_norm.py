"""Residual + LayerScale + LayerNorm in one pass, as PyTorch ops. Letters: T rows, C channels.

Autograd, torch.compile and torch.export see them as they see PyTorch's own. Autocast changes nothing: arithmetic is
float32 in any case, and results have the dtypes that the docstring says.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import plain, tuning
from .availability import require
from .first_use import Checked, sample
from .operators import check_rows, define
from .reference import add_layer_norm_reference

MAX_CHANNELS = 4096


def add_layer_norm(
    x: Tensor, branch: Tensor, gamma: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """x_new = x + gamma * branch and normed = LayerNorm(x_new) * weight + bias, in one pass.

    x: (..., C), the residual stream, contiguous, C at most 4096. branch: (..., C), contiguous; its dtype may be half
        precision where x is float32.
    gamma (LayerScale), weight, bias: (C,), float32, float16 or bfloat16 like x and branch; bias has weight's dtype.

    Returns x_new (..., C) in x's dtype and normed (..., C) in weight's. Statistics are float32, of x_new as it is
    returned. Differentiable in all five, once; equal inputs give equal gradients, bit for bit.

    Raises ValueError for shapes, dtypes, devices or strides that contradict this, RuntimeError where the kernels can't
    run (see `unavailable_reason`).
    """
    check_rows("x", x)
    check_rows("branch", branch)
    if branch.shape != x.shape:
        raise ValueError(f"branch has shape {tuple(branch.shape)}: expected {tuple(x.shape)}, the shape of x")
    if x.shape[-1] > MAX_CHANNELS:
        raise ValueError(f"x has {x.shape[-1]} channels: expected at most {MAX_CHANNELS}")
    for name, vector in (("gamma", gamma), ("weight", weight), ("bias", bias)):
        check_rows(name, vector)
        if vector.shape != x.shape[-1:]:
            raise ValueError(f"{name} has shape {tuple(vector.shape)}: expected {tuple(x.shape[-1:])}, x's channels")
    if bias.dtype != weight.dtype:
        raise ValueError(f"bias is {bias.dtype}: expected {weight.dtype}, the dtype of weight")
    for name, tensor in (("branch", branch), ("gamma", gamma), ("weight", weight), ("bias", bias)):
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}: expected {x.device}, the device of x")
    x_new, normed = torch.ops.dinov3_lite.add_layer_norm.default(x, branch, gamma, weight, bias, eps)
    return x_new, normed


def _add_layer_norm(
    x: Tensor, branch: Tensor, gamma: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    require("add_layer_norm", "x", x)
    return _forward(_kind(x, branch, gamma, weight), x, branch, gamma, weight, bias, eps)


def _add_layer_norm_backward(
    x_new: Tensor, branch: Tensor, gamma: Tensor, weight: Tensor, grad_x_new: Tensor, grad_normed: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x and branch, and those of gamma, weight and bias as one (3, C) float32 tensor."""
    grads = (grad_x_new.contiguous(), grad_normed.contiguous())
    return _backward(_kind(x_new, branch, gamma, weight), x_new, branch, gamma, weight, *grads, eps)


def _kind(x: Tensor, branch: Tensor, gamma: Tensor, weight: Tensor) -> tuple[Any, ...]:
    """What a kernel is compiled for, and so checked for."""
    return (x.device, weight.dtype, x.shape[-1], x.dtype, branch.dtype, gamma.dtype)


def _launch_forward(
    x: Tensor, branch: Tensor, gamma: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    from .layer_norm_triton import add_layer_norm_forward_kernel

    C = x.shape[-1]
    x_new, normed = torch.empty_like(x), torch.empty_like(x, dtype=weight.dtype)
    with torch.cuda.device_of(x):
        add_layer_norm_forward_kernel[(x.numel() // C,)](
            x_ptr=x,
            branch_ptr=branch,
            gamma_ptr=gamma,
            weight_ptr=weight,
            bias_ptr=bias,
            x_new_ptr=x_new,
            normed_ptr=normed,
            eps=eps,
            **tuning.layer_norm_launch(tuning.architecture(x.device), C),
        )
    return x_new, normed


def _launch_backward(
    x_new: Tensor, branch: Tensor, gamma: Tensor, weight: Tensor, grad_x_new: Tensor, grad_normed: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    from .layer_norm_triton import add_layer_norm_backward_kernel

    C = x_new.shape[-1]
    T = x_new.numel() // C
    launch = tuning.layer_norm_launch(tuning.architecture(x_new.device), C)
    grad_x, grad_branch = torch.empty_like(x_new), torch.empty_like(branch)
    partials = x_new.new_empty((_num_programs(T, launch["num_warps"], x_new.device), 3, C), dtype=torch.float32)
    with torch.cuda.device_of(x_new):
        add_layer_norm_backward_kernel[(partials.shape[0],)](
            x_new_ptr=x_new,
            branch_ptr=branch,
            gamma_ptr=gamma,
            weight_ptr=weight,
            grad_x_new_ptr=grad_x_new,
            grad_normed_ptr=grad_normed,
            grad_x_ptr=grad_x,
            grad_branch_ptr=grad_branch,
            partials_ptr=partials,
            T=T,
            eps=eps,
            **launch,
        )
    return grad_x, grad_branch, partials.sum(dim=0)


def _num_programs(T: int, num_warps: int, device: torch.device) -> int:
    """Programs of the backward: those that are resident at a time, 16 warps of its 100 registers a thread.

    It depends on shapes and device alone, so sums over rows are always taken in the same order.
    """
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    return min(T, processors * 16 // num_warps)


def _forward_sample(
    device: torch.device,
    dtype: torch.dtype,
    C: int,
    stream: torch.dtype,
    branch_dtype: torch.dtype,
    gamma_dtype: torch.dtype,
) -> tuple[Any, ...]:
    """Seven rows with a mean of their own."""
    x = 3 * sample(device, stream, 7, C) + 1
    gamma, weight, bias = sample(device, torch.float32, 3, C, seed=1)
    return x, sample(device, branch_dtype, 7, C, seed=2), gamma.to(gamma_dtype), weight.to(dtype), bias.to(dtype), 1e-5


def _backward_sample(device: torch.device, dtype: torch.dtype, C: int, *dtypes: torch.dtype) -> tuple[Any, ...]:
    x, branch, gamma, weight, _, eps = _forward_sample(device, dtype, C, *dtypes)
    grads = (sample(device, x.dtype, 7, C, seed=3), sample(device, dtype, 7, C, seed=4))
    return x, branch, gamma, weight, *grads, eps


_forward = Checked("add_layer_norm", _launch_forward, add_layer_norm_reference, _forward_sample)
_backward = Checked("add_layer_norm_backward", _launch_backward, plain.add_layer_norm_gradients, _backward_sample)


def _save_add_layer_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, branch, gamma, weight, _, ctx.eps = inputs
    ctx.save_for_backward(output[0], branch, gamma, weight)


def _add_layer_norm_gradients(ctx: Any, grad_x_new: Tensor, grad_normed: Tensor) -> tuple[Tensor | None, ...]:
    x_new, branch, gamma, weight = ctx.saved_tensors
    grad_x, grad_branch, vectors = torch.ops.dinov3_lite.add_layer_norm_backward.default(
        x_new, branch, gamma, weight, grad_x_new, grad_normed, ctx.eps
    )
    grad_gamma, (grad_weight, grad_bias) = vectors[0].to(gamma.dtype), vectors[1:].to(weight.dtype)
    return grad_x, grad_branch, grad_gamma, grad_weight, grad_bias, None


define(
    "add_layer_norm",
    "(Tensor x, Tensor branch, Tensor gamma, Tensor weight, Tensor bias, float eps) -> (Tensor, Tensor)",
    _add_layer_norm,
    fake=lambda x, branch, gamma, weight, bias, eps: (torch.empty_like(x), torch.empty_like(x, dtype=weight.dtype)),
    gradients=_add_layer_norm_gradients,
    save=_save_add_layer_norm,
)
define(
    "add_layer_norm_backward",
    "(Tensor x_new, Tensor branch, Tensor gamma, Tensor weight, Tensor grad_x_new, Tensor grad_normed, float eps) "
    "-> (Tensor, Tensor, Tensor)",
    _add_layer_norm_backward,
    fake=lambda x_new, branch, gamma, *others: (
        torch.empty_like(x_new),
        torch.empty_like(branch),
        gamma.new_empty((3, *gamma.shape), dtype=torch.float32),
    ),
)
