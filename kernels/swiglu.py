"""SwiGLU in one pass, as PyTorch ops: silu(gate) * value. Letters: T rows, F half the width of a gated projection.

Autograd, torch.compile and torch.export see them as they see PyTorch's own. Autocast changes nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import plain, tuning
from .availability import require
from .first_use import Checked, sample
from .operators import check_rows, define
from .reference import swiglu_reference


def swiglu(gate_value: Tensor) -> Tensor:
    """silu(gate) * value of a fused projection [gate | value], in one pass (arXiv 2002.05202).

    gate_value: (..., 2F), contiguous, float32, float16 or bfloat16. Returns (..., F) in its dtype, computed in float32
    and rounded once. Differentiable, once.

    Raises ValueError for an odd width, another dtype or strides, RuntimeError where the kernels can't run (see
    `unavailable_reason`).
    """
    check_rows("gate_value", gate_value)
    if gate_value.shape[-1] % 2:
        raise ValueError(f"gate_value has {gate_value.shape[-1]} channels: expected an even number, gates and values")
    return torch.ops.dinov3_lite.swiglu.default(gate_value)


def _swiglu(gate_value: Tensor) -> Tensor:
    require("swiglu", "gate_value", gate_value)
    return _forward(_kind(gate_value), gate_value)


def _swiglu_backward(gate_value: Tensor, grad_out: Tensor) -> Tensor:
    return _backward(_kind(gate_value), gate_value, grad_out.contiguous())


def _kind(gate_value: Tensor) -> tuple[Any, ...]:
    """What a kernel is compiled for, and so checked for."""
    return (gate_value.device, gate_value.dtype, gate_value.shape[-1] // 2)


def _launch_forward(gate_value: Tensor) -> Tensor:
    from .swiglu_triton import swiglu_forward_kernel

    out = _half(gate_value)
    launch = tuning.swiglu_launch(tuning.architecture(out.device), out.shape[-1])
    with torch.cuda.device_of(gate_value):
        swiglu_forward_kernel[_grid(out, launch)](gate_value_ptr=gate_value, out_ptr=out, **launch)
    return out


def _launch_backward(gate_value: Tensor, grad_out: Tensor) -> Tensor:
    from .swiglu_triton import swiglu_backward_kernel

    grad_gate_value = torch.empty_like(gate_value)
    launch = tuning.swiglu_launch(tuning.architecture(grad_out.device), grad_out.shape[-1])
    with torch.cuda.device_of(gate_value):
        swiglu_backward_kernel[_grid(grad_out, launch)](
            gate_value_ptr=gate_value,
            grad_out_ptr=grad_out,
            grad_gate_value_ptr=grad_gate_value,
            **launch,
        )
    return grad_gate_value


def _half(gate_value: Tensor) -> Tensor:
    return gate_value.new_empty((*gate_value.shape[:-1], gate_value.shape[-1] // 2))


def _grid(out: Tensor, launch: dict[str, int]) -> tuple[int, int]:
    """A program for each row and block of its channels."""
    F = out.shape[-1]
    return out.numel() // F, -(-F // launch["BLOCK_F"])


def _forward_sample(device: torch.device, dtype: torch.dtype, F: int) -> tuple[Tensor]:
    return (2 * sample(device, dtype, 3, 2 * F),)


def _backward_sample(device: torch.device, dtype: torch.dtype, F: int) -> tuple[Tensor, Tensor]:
    return *_forward_sample(device, dtype, F), sample(device, dtype, 3, F, seed=1)


_forward = Checked("swiglu", _launch_forward, swiglu_reference, _forward_sample)
_backward = Checked("swiglu_backward", _launch_backward, plain.swiglu_gradient, _backward_sample)


def _save_swiglu(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _swiglu_gradient(ctx: Any, grad_out: Tensor) -> Tensor:
    return torch.ops.dinov3_lite.swiglu_backward.default(*ctx.saved_tensors, grad_out)


define(
    "swiglu",
    "(Tensor gate_value) -> Tensor",
    _swiglu,
    fake=_half,
    gradients=_swiglu_gradient,
    save=_save_swiglu,
)
define(
    "swiglu_backward",
    "(Tensor gate_value, Tensor grad_out) -> Tensor",
    _swiglu_backward,
    fake=lambda gate_value, grad_out: torch.empty_like(gate_value),
)
